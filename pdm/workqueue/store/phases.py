"""What becomes of the later phases of a REMOVE whose listing has ended without success."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.store.locks import LockedJob
from pdm.workqueue.store.tables import elements
from pdm.workqueue.WorkqueueDB import IS_WAITING_WORK

#: Elements that one transaction closes: others who write get their turn.
CLOSED_AT_ONCE = 2000

_LATER = (
    sa.select(elements.c.id)
    .where(elements.c.job_id == bindparam("of_job"), sa.text(IS_WAITING_WORK), elements.c.phase > 0)
    .limit(bindparam("most"))
)
_CLOSE = (
    sa.update(elements)
    .where(elements.c.job_id == bindparam("of_job"), elements.c.id == bindparam("number"))
    .values(status=JobStatus.CANCELLED)
)


def close_phases(session: Session, job: LockedJob) -> bool:
    """Later phases wait for the whole listing; where that has ended without success they will never be due.

    Returns:
        Whether there are more; a claim that finds nothing else to do goes on with them.
    """
    numbers = session.scalars(_LATER, {"of_job": job.id, "most": CLOSED_AT_ONCE}).all()
    if numbers:
        session.execute(_CLOSE, [{"of_job": job.id, "number": number} for number in numbers])
    job.move(JobStatus.SUBMITTED, JobStatus.CANCELLED, len(numbers))
    return len(numbers) == CLOSED_AT_ONCE

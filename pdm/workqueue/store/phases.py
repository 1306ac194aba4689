"""What becomes of the later phases of a REMOVE whose listing has ended without success."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.store.locks import LockedJob
from pdm.workqueue.store.tables import elements, matched
from pdm.workqueue.WorkqueueDB import IS_WAITING_WORK


def close_phases(session: Session, job: LockedJob) -> None:
    """Later phases wait for the whole listing; where that has ended without success they will never be due."""
    count = matched(
        session,
        sa.update(elements)
        .where(elements.c.job_id == job.id, sa.text(IS_WAITING_WORK), elements.c.phase > 0)
        .values(status=JobStatus.CANCELLED),
    )
    job.move(JobStatus.SUBMITTED, JobStatus.CANCELLED, count)

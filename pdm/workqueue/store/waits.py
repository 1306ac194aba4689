"""Set elements aside that are HELD while a site is polled (`pdm.workqueue.domain.holds`).

That happens in the transaction that adds, retries or settles them. For the elements of other jobs nothing is read or
written.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.holds import HOLDS, WaitKind, WaitPhase
from pdm.workqueue.domain.jobs import JobRecord, NewElement, NewJob
from pdm.workqueue.store.locks import LockedJob, save_jobs
from pdm.workqueue.store.records import columns_of, elements, wait_elements, waits
from pdm.workqueue.store.row_statements import RowStatement

#: Time in which further elements of a job arrive, which are then asked about together.
_GATHERING = timedelta(seconds=1)

_GATHERER = sa.select(waits.c.id, waits.c.due_at).where(
    waits.c.job_id == bindparam("of_job"),
    waits.c.kind == bindparam("of_kind"),
    waits.c.phase == WaitPhase.GATHER.value,
)
#: Adds elements to a wait.
JOIN = RowStatement(
    """
    WITH those (number) AS (VALUES {rows})
    INSERT INTO wait_elements (wait_id, element_id) SELECT ?, number FROM those
    """,
    columns_of(wait_elements, "element_id"),
    columns_of(wait_elements, "wait_id"),
)
_HOLD = RowStatement(
    """
    WITH those (number) AS (VALUES {rows})
    UPDATE job_elements SET status = 'HELD', failure_scope = ?, failure_code = ?, failure_message = ?
    FROM those WHERE job_elements.job_id = ? AND job_elements.id = those.number
    """,
    columns_of(elements, "id"),
    columns_of(elements, "failure_scope", "failure_code", "failure_message", "job_id"),
)
_LEAVE_ALL = RowStatement(
    """
    WITH those (number) AS (VALUES {rows})
    DELETE FROM wait_elements WHERE element_id IN (SELECT number FROM those)
        AND wait_id IN (SELECT id FROM waits WHERE job_id = ? AND kind = ?)
    """,
    columns_of(wait_elements, "element_id"),
    columns_of(waits, "job_id", "kind"),
)


def hold_new(session: Session, job: LockedJob, first: int, new: Sequence[NewElement], now: datetime) -> None:
    """Set new elements of a job aside until their sources are on disk, if it asks for that; the caller saves the job.

    ``first``: number of the first of them.
    """
    if job.record.stages:
        numbers = [first + at for at, one in enumerate(new) if one.type is JobType.COPY and not one.done]
        _hold(session, job, numbers, now)


def hold_items(session: Session, record: JobRecord, new: NewJob, now: datetime) -> JobRecord:
    """Set the items of a job aside that this transaction has registered, if it asks for that; returns the job."""
    if not (record.stages and record.has_items) or record.counters.held:
        return record
    job = LockedJob(record, None, None)
    hold_new(session, job, 0, [new.first, *new.more], now)
    job.roll_up(now)
    save_jobs(session, [job])
    return job.record


def hold_again(session: Session, job: LockedJob, numbers: Sequence[int], now: datetime) -> None:
    """Set elements aside that are put back into the queue; their sources may have left the disk since."""
    if job.record.stages and numbers:
        copies = session.scalars(_COPIES, {"of_job": job.id, "numbers": list(numbers)}).all()
        # An earlier request keeps their files on disk no longer than it was to last.
        _LEAVE_ALL.execute(session, [(number,) for number in copies], job.id, WaitKind.STAGE.value)
        _hold(session, job, copies, now)


_COPIES = (
    sa.select(elements.c.id)
    .where(
        elements.c.job_id == bindparam("of_job"),
        elements.c.id.in_(bindparam("numbers", expanding=True)),
        elements.c.type == JobType.COPY,
    )
    .order_by(elements.c.id)
)


def _hold(session: Session, job: LockedJob, numbers: Sequence[int], now: datetime) -> None:
    if not numbers:
        return
    hold = HOLDS[WaitKind.STAGE]
    _HOLD.execute(session, [(number,) for number in numbers], hold.scope.value, hold.code.value, hold.message, job.id)
    job.move(JobStatus.SUBMITTED, JobStatus.HELD, len(numbers))
    job.hold = job.hold or hold
    join(session, job.record, WaitKind.STAGE, numbers, now)


def join(session: Session, job: JobRecord, kind: WaitKind, numbers: Collection[int], now: datetime) -> None:
    """Add elements that are HELD to the waits of their job, which is locked."""
    gatherer = session.execute(_GATHERER, {"of_job": job.id, "of_kind": kind.value}).first()
    due_at = now + _GATHERING
    if gatherer is None:
        site_id = job.src_siteid if kind is WaitKind.STAGE else job.dst_siteid
        values = {
            "job_id": job.id,
            "kind": kind.value,
            "phase": WaitPhase.GATHER.value,
            "site_id": site_id,
            "began_at": now,
            "deadline": now,
            "due_at": due_at,
        }
        wait_id = session.execute(sa.insert(waits).returning(waits.c.id), values).scalar_one()
    else:
        wait_id = gatherer.id
    JOIN.execute(session, [(number,) for number in numbers], wait_id)


_OF_JOB = sa.update(waits).where(waits.c.job_id == bindparam("of_job"))


def visit_soon(session: Session, job: JobRecord, now: datetime) -> None:
    """Have the waits of a job visited that is cancelled: its requests are withdrawn."""
    if job.stages or job.archives:
        session.execute(_OF_JOB.values(due_at=now), {"of_job": job.id})

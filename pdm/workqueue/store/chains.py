"""Chains: jobs that wait for the end of others.

A job that waits has neither ``list_due_at`` nor ``work_due_at``, so that no claim reads it. Its rows in the table
``predecessors`` name the jobs that it still waits for. The transaction that registers it sets ``is_awaited`` in the
rows of those: the daemon that makes one of them final reads it there, and calls `release`. If that daemon is killed
before, `ended_predecessors` finds the job.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import CancelCode, CancelReason, JobRecord
from pdm.workqueue.store.job_changes import cancel_locked, waiting_listings
from pdm.workqueue.store.locks import LockedJob, lock_jobs, save_jobs
from pdm.workqueue.store.purged_jobs import purged_statuses
from pdm.workqueue.store.records import FINAL, IS_THERE, jobs, predecessors
from pdm.workqueue.WorkqueueDB import NEVER

#: Waiting jobs that one transaction releases or cancels.
RELEASED_AT_ONCE = 500
#: Ended jobs that one sweep finds.
_FOUND_AT_ONCE = 500


class NoPredecessorError(Exception):
    """A job cannot wait for another one, which does not exist or is another user's.

    Attributes:
        job_id: of the other one.
    """

    def __init__(self, job_id: int) -> None:
        super().__init__(f"there is no job {job_id}")
        self.job_id = job_id


class AwaitedJob(NamedTuple):
    """A job that another one waits for."""

    id: int
    status: JobStatus


@frozen
class Released:
    """Result of `release`.

    Attributes:
        has_work: whether a job may be claimed now.
        ended: jobs that were cancelled.
        more: whether further jobs wait for the same one.
    """

    has_work: bool
    ended: Sequence[JobRecord]
    more: bool


# The row locks that this takes let a transaction that makes one of them final commit first, or see that it is awaited.
_MARK_AWAITED = (
    sa.update(jobs)
    .where(
        jobs.c.id.in_(bindparam("numbers", expanding=True)),
        jobs.c.id < bindparam("before"),
        jobs.c.user_id == bindparam("of_user"),
        IS_THERE,
    )
    .values(is_awaited=True)
    .returning(jobs.c.id, jobs.c.status)
)
_WORK_DUE_AT = sa.select(jobs.c.work_due_at).where(jobs.c.id == bindparam("number"))
_FORGET = sa.delete(predecessors).where(predecessors.c.job_id == bindparam("waiting"))


def begin_waiting(session: Session, job: JobRecord, now: datetime) -> JobRecord:
    """Let a job wait for its predecessors, of which nothing was claimed yet and which this transaction has locked.

    If all have ended as it wants, it does not wait; if one has not, it is cancelled. A large job that is being retried
    waits once all of it is put back.

    Raises:
        NoPredecessorError: one of them does not exist, or is another user's.
    """
    if job.after is None or job.started_at is not None:
        return job
    marked = session.execute(
        _MARK_AWAITED, {"numbers": list(job.after.jobs), "before": job.id, "of_user": job.user_id}
    ).all()
    known = {row.id: row.status for row in marked}
    if len(known) < len(set(job.after.jobs)):
        known |= purged_statuses(session, set(job.after.jobs) - known.keys(), job.user_id)
    for number in job.after.jobs:
        if number not in known:
            raise NoPredecessorError(number)
    is_being_retried = session.scalar(_WORK_DUE_AT, {"number": job.id}) == NEVER
    locked = LockedJob(job, None, NEVER if is_being_retried else None)
    for number in job.after.jobs:
        if not _is_satisfied(job, known[number]) and known[number].is_final:
            cancel_locked(session, locked, _reason(number, known[number]), now)
            return locked.record
    open_ = [number for number in job.after.jobs if not known[number].is_final]
    if not open_:
        return job
    session.execute(
        sa.insert(predecessors), [{"job_id": job.id, "predecessor_id": number} for number in dict.fromkeys(open_)]
    )
    save_jobs(session, [locked])
    return locked.record


def _is_satisfied(job: JobRecord, status: JobStatus) -> bool:
    """Whether a job begins after another one that has this status."""
    if job.after is not None and job.after.on_failure:
        return status is JobStatus.FAILED
    any_end = job.after is not None and job.after.any_end
    return status is JobStatus.DONE or (any_end and status.is_final)


def _reason(number: int, status: JobStatus) -> CancelReason:
    return CancelReason(
        CancelCode.PREDECESSOR,
        f"job {number}, after which it was to begin, ended {status.name}: retry that job, then this one",
    )


_STATUS = sa.select(jobs.c.status).where(jobs.c.id == bindparam("number"))
_WAITING_FOR = (
    sa.select(predecessors.c.job_id)
    .where(predecessors.c.predecessor_id == bindparam("number"))
    .order_by(predecessors.c.job_id)
    .limit(RELEASED_AT_ONCE)
)
_TOLD = sa.delete(predecessors).where(
    predecessors.c.predecessor_id == bindparam("number"),
    predecessors.c.job_id.in_(bindparam("told", expanding=True)),
)
_STILL_WAITING = (
    sa.select(predecessors.c.job_id).where(predecessors.c.job_id.in_(bindparam("numbers", expanding=True))).distinct()
)


def release(session: Session, job_id: int, now: datetime) -> Released:
    """Let jobs begin that wait for a job that has ended, or cancel them if it has not ended as they want.

    Does nothing while the job is not final: it may have been retried.
    """
    status: JobStatus | None = session.scalar(_STATUS, {"number": job_id})
    numbers = session.scalars(_WAITING_FOR, {"number": job_id}).all()
    if status is None or not status.is_final or not numbers:
        return Released(has_work=False, ended=(), more=False)
    # Locked first: of two predecessors that end at the same time, the second one sees that the first has.
    locked = lock_jobs(session, numbers)
    session.execute(_TOLD, {"number": job_id, "told": list(numbers)})
    waiting = set(session.scalars(_STILL_WAITING, {"numbers": list(numbers)}))
    ready, ended = [], []
    for job in locked:
        if job.record.status.is_final or job.record.cancel_requested:
            continue
        if not _is_satisfied(job.record, status):
            cancel_locked(session, job, _reason(job_id, status), now)
            ended.append(job.record)
        elif job.id not in waiting:
            ready.append(job)
    if ended:
        session.execute(_FORGET, [{"waiting": record.id} for record in ended])
    _schedule(session, ready)
    return Released(bool(ready), ended, len(numbers) == RELEASED_AT_ONCE)


def _schedule(session: Session, ready: Collection[LockedJob]) -> None:
    listings = waiting_listings(session, [job.id for job in ready]) if ready else set()
    for job in ready:
        # The end of a large retry schedules the listing too.
        if job.id in listings and job.work_due_at != NEVER:
            job.schedule_listing()
        if job.counters.submitted > (job.id in listings):
            job.schedule_work()
    save_jobs(session, ready)


_ENDED = (
    sa.select(predecessors.c.predecessor_id)
    .join(jobs, jobs.c.id == predecessors.c.predecessor_id)
    .where(jobs.c.status.in_(FINAL))
    .distinct()
    .order_by(predecessors.c.predecessor_id)
    .limit(_FOUND_AT_ONCE)
)


def ended_predecessors(session: Session) -> list[int]:
    """Jobs that have ended, and for which others still wait: a daemon was killed before it told them."""
    return list(session.scalars(_ENDED))


_AWAITED = (
    sa.select(jobs.c.id, jobs.c.status)
    .join(predecessors, predecessors.c.predecessor_id == jobs.c.id)
    .where(predecessors.c.job_id == bindparam("number"))
    .order_by(jobs.c.id)
)


def awaited_jobs(session: Session, job_id: int) -> list[AwaitedJob]:
    """The jobs that a job still waits for, with their status, by id."""
    return [AwaitedJob(row.id, row.status) for row in session.execute(_AWAITED, {"number": job_id})]

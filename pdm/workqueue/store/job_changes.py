"""Change the elements of existing jobs: cancel, retry, cancel removals that wait for others.

One transaction changes a bounded number of elements, so that other writers can interleave; `continue_change` does the
rest of a large job.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from attrs import evolve
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import CancelCode, CancelReason, JobRecord
from pdm.workqueue.domain.node_reports import SignalKind
from pdm.workqueue.store import signals, waits
from pdm.workqueue.store.locks import LockedJob, lock_job, lock_jobs, save_jobs
from pdm.workqueue.store.records import UPDATE_ELEMENT, elements, jobs, matched, predecessors
from pdm.workqueue.WorkqueueDB import (
    AT_ONCE,
    HAS_OPEN_DEADLINE,
    HAS_WORK,
    IS_HELD,
    IS_SET_ASIDE,
    IS_WAITING_WORK,
    NEVER,
)

#: Elements of later phases that one transaction cancels.
CLOSED_AT_ONCE = 2000

_LATER = (
    sa.select(elements.c.id)
    .where(elements.c.job_id == bindparam("of_job"), sa.text(IS_WAITING_WORK), elements.c.phase > 0)
    .limit(bindparam("most"))
)
CANCEL_ELEMENT = UPDATE_ELEMENT.values(status=JobStatus.CANCELLED)


def cancel_later_phases(session: Session, job: LockedJob) -> bool:
    """Cancel the later phases of a job: what they wait for has ended without success.

    Returns:
        Whether there are more; the next claim that finds nothing else in the job cancels them.
    """
    numbers = session.scalars(_LATER, {"of_job": job.id, "most": CLOSED_AT_ONCE}).all()
    move_elements(session, CANCEL_ELEMENT, job, numbers, JobStatus.SUBMITTED, JobStatus.CANCELLED)
    return len(numbers) == CLOSED_AT_ONCE


#: Elements that one transaction cancels or puts back.
CHANGED_AT_ONCE = 2000
#: Jobs that one transaction cancels because their deadline is over.
_EXPIRED_AT_ONCE = 100


def cancel(session: Session, job_id: int, now: datetime) -> JobRecord:
    """Cancel a job: SUBMITTED and HELD elements become CANCELLED, RUNNING ones are ended by their daemon.

    No element of it is claimed from now on. `continue_change` cancels the remaining elements of a large job. A final
    job is not changed.

    Raises:
        LookupError: there is no such job.
    """
    job = locked(session, job_id)
    if not job.record.status.is_final:
        job.record = evolve(job.record, cancel_requested=True)
        _cancel_part(session, job, now)
    return job.record


_SET_TERMS = sa.update(jobs).where(jobs.c.id == bindparam("number"))


def cancel_locked(session: Session, job: LockedJob, reason: CancelReason, now: datetime) -> None:
    """Cancel a locked job that is not final, as `cancel` does, and record why."""
    job.record = evolve(job.record, cancel_requested=True, cancel_reason=reason)
    values = {"code": reason.code.value, "message": reason.message}
    session.execute(_SET_TERMS.values(cancel_reason=values), {"number": job.id})
    _cancel_part(session, job, now)


_DUE_DEADLINES = (
    sa.select(jobs.c.id)
    .where(sa.text(HAS_OPEN_DEADLINE), jobs.c.deadline <= bindparam("now"), sa.not_(jobs.c.cancel_requested))
    .order_by(jobs.c.deadline)
    .limit(_EXPIRED_AT_ONCE)
)
_NEXT_DEADLINE = (
    sa.select(jobs.c.deadline)
    .where(sa.text(HAS_OPEN_DEADLINE), sa.not_(jobs.c.cancel_requested))
    .order_by(jobs.c.deadline)
    .limit(1)
)


def cancel_overdue(session: Session, now: datetime) -> list[JobRecord]:
    """Cancel jobs whose deadline is over, a part at a time; the result is empty when there are no more."""
    cancelled = []
    for job in lock_jobs(session, session.scalars(_DUE_DEADLINES, {"now": now}).all()):
        deadline = job.record.deadline
        if job.record.status.is_final or job.record.cancel_requested or deadline is None or deadline > now:
            continue
        words = f"its deadline, {deadline:%Y-%m-%dT%H:%M:%SZ}, is over"
        cancel_locked(session, job, CancelReason(CancelCode.DEADLINE, words), now)
        cancelled.append(job.record)
    return cancelled


def next_deadline(session: Session) -> datetime | None:
    """The first deadline of the jobs that have not ended."""
    return session.scalar(_NEXT_DEADLINE)


def continue_change(session: Session, job_id: int, now: datetime) -> bool:
    """Continue the cancellation or retry of a large job; returns whether there is more to do."""
    job = lock_job(session, job_id)
    if job is None:
        return False
    if job.record.cancel_requested:
        _cancel_part(session, job, now)
        return job.work_due_at is not None
    if job.work_due_at != NEVER:
        return False
    return _retry_part(session, job, now)


_UNFINISHED_CHANGES = sa.select(jobs.c.id).where(sa.text(HAS_WORK), jobs.c.work_due_at >= NEVER)


def unfinished_changes(session: Session) -> list[int]:
    """Jobs whose cancellation or retry is not complete."""
    # Sorted here: for ORDER BY, SQLite would read all jobs in the order of their numbers.
    return sorted(session.scalars(_UNFINISHED_CHANGES))


_CANCEL_LISTING = (
    sa.update(elements)
    .where(
        elements.c.job_id == bindparam("of_job"),
        elements.c.id == 0,
        elements.c.type == JobType.LIST,
        elements.c.status == JobStatus.SUBMITTED,
    )
    .values(status=JobStatus.CANCELLED)
)
_WAITING, _HELD = (
    sa.select(elements.c.id)
    .where(elements.c.job_id == bindparam("of_job"), sa.text(condition))
    .limit(bindparam("most"))
    for condition in (IS_WAITING_WORK, IS_HELD)
)


def _cancel_part(session: Session, job: LockedJob, now: datetime) -> None:
    signals.note(session, SignalKind.CANCEL, job.id)
    waits.visit_soon(session, job.record, now)
    left = CHANGED_AT_ONCE
    if job.counters.submitted:
        listings = matched(session, _CANCEL_LISTING, {"of_job": job.id})
        job.move(JobStatus.SUBMITTED, JobStatus.CANCELLED, listings)
    for status, those in ((JobStatus.SUBMITTED, _WAITING), (JobStatus.HELD, _HELD)):
        if left and (job.counters.submitted if status is JobStatus.SUBMITTED else job.counters.held):
            numbers = session.scalars(those, {"of_job": job.id, "most": left}).all()
            move_elements(session, CANCEL_ELEMENT, job, numbers, status, JobStatus.CANCELLED)
            left -= len(numbers)
    job.roll_up(now)
    save_jobs(session, [job])


def retry(session: Session, job_id: int, now: datetime) -> tuple[JobRecord, int]:
    """Put FAILED and CANCELLED elements back into the queue, with all their tries again; attempt numbers continue.

    Of a large job, `continue_change` puts back the rest; until then nothing of it is claimed, so that it does not end
    in between. While a cancellation is not complete, nothing is changed. A deadline that is over is forgotten.

    Returns:
        The job, and the number of elements.

    Raises:
        LookupError: there is no such job.
    """
    job = locked(session, job_id)
    total = job.counters.failed + job.counters.cancelled
    if not total or is_being_cancelled(job):
        return job.record, 0
    begin_retry(session, job, now)
    _retry_part(session, job, now)
    return job.record, total


def is_being_cancelled(job: LockedJob) -> bool:
    """Whether a cancellation is not complete: meanwhile nothing is retried."""
    return job.record.cancel_requested and not job.record.status.is_final


_FORGET_PREDECESSORS = sa.delete(predecessors).where(predecessors.c.job_id == bindparam("waiting"))


def begin_retry(session: Session, job: LockedJob, now: datetime) -> None:
    """Forget that a job was cancelled, a deadline that is over, and predecessors: `begin_waiting` adds them again."""
    deadline = job.record.deadline
    if deadline is not None and deadline <= now:
        # It was asked for after the deadline, which would end it at once.
        deadline = None
    if job.record.cancel_reason is not None or deadline is not job.record.deadline:
        session.execute(_SET_TERMS.values(cancel_reason=None, deadline=deadline), {"number": job.id})
    job.record = evolve(job.record, cancel_requested=False, cancel_reason=None, deadline=deadline)
    if job.record.after is not None:
        session.execute(_FORGET_PREDECESSORS, {"waiting": job.id})


_RETRY = UPDATE_ELEMENT.values(status=JobStatus.SUBMITTED, lost=elements.c.attempts, due_at=AT_ONCE)
#: Elements of a job with one of these statuses, the first of them.
ELEMENTS_SET_ASIDE = (
    sa.select(elements.c.id)
    .where(elements.c.job_id == bindparam("of_job"), sa.text(IS_SET_ASIDE), elements.c.status == bindparam("in_status"))
    .order_by(elements.c.id)
    .limit(bindparam("most"))
)


def _retry_part(session: Session, job: LockedJob, now: datetime) -> bool:
    left = CHANGED_AT_ONCE
    for status in (JobStatus.FAILED, JobStatus.CANCELLED):
        if left and (job.counters.failed if status is JobStatus.FAILED else job.counters.cancelled):
            numbers = session.scalars(ELEMENTS_SET_ASIDE, {"of_job": job.id, "in_status": status, "most": left}).all()
            requeue(session, job, numbers, status, now)
            left -= len(numbers)
    more = not left and job.counters.failed + job.counters.cancelled > 0
    end_retry_part(session, job, now, more=more)
    return more


def requeue(session: Session, job: LockedJob, numbers: Sequence[int], status: JobStatus, now: datetime) -> None:
    """Put elements that are FAILED or CANCELLED back into the queue, with all their tries again."""
    move_elements(session, _RETRY, job, numbers, status, JobStatus.SUBMITTED)
    waits.hold_again(session, job, numbers, now)


_IS_WAITING = sa.select(sa.exists().where(predecessors.c.job_id == bindparam("waiting")))


def end_retry_part(session: Session, job: LockedJob, now: datetime, *, more: bool) -> None:
    """Save a job of which a part was put back into the queue; while there is more to put back, nothing is claimed."""
    if more:
        job.work_due_at = NEVER
    elif job.record.after is not None and session.scalar(_IS_WAITING, {"waiting": job.id}):
        # The end of its last predecessor schedules it.
        job.work_due_at = None
    else:
        if waiting_listings(session, [job.id]):
            job.schedule_listing()
        job.work_due_at = AT_ONCE
    job.roll_up(now)
    save_jobs(session, [job])


def move_elements(
    session: Session, change: sa.Update, job: LockedJob, numbers: Sequence[int], before: JobStatus, after: JobStatus
) -> None:
    """Change the status of some elements, in their rows and in the counters of the job."""
    if numbers:
        session.execute(change, [{"of_job": job.id, "number": number} for number in numbers])
    job.move(before, after, len(numbers))


def locked(session: Session, job_id: int) -> LockedJob:
    """Lock a job; raises `LookupError` if there is none."""
    job = lock_job(session, job_id)
    if job is None:
        raise LookupError(f"there is no job {job_id}")
    return job


def waiting_listings(session: Session, numbers: list[int]) -> set[int]:
    """The jobs whose LIST element is SUBMITTED and was never postponed."""
    return set(
        session.scalars(
            sa.select(elements.c.job_id).where(
                elements.c.job_id.in_(numbers),
                elements.c.id == 0,
                elements.c.type == JobType.LIST,
                elements.c.status == JobStatus.SUBMITTED,
                elements.c.due_at == AT_ONCE,
            )
        )
    )

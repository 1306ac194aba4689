"""Change the elements of existing jobs: cancel, retry, resume HELD ones, cancel removals that wait for others.

One transaction changes a bounded number of elements, so that other writers can interleave; `continue_change` does the
rest of a large job.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa
from attrs import evolve, frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.credentials import ALL_SITES, CredentialKind
from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.jobs import CancelCode, CancelReason, JobRecord
from pdm.workqueue.domain.signals import SignalKind
from pdm.workqueue.domain.waits import POLLED_CODES
from pdm.workqueue.store import signals, waits
from pdm.workqueue.store.locks import LockedJob, lock_job, lock_jobs, save_jobs
from pdm.workqueue.store.records import UPDATE_ELEMENT, credentials, elements, jobs, matched, predecessors
from pdm.workqueue.WorkqueueDB import (
    AT_ONCE,
    CLOCK_SKEW,
    HAS_HELD,
    HAS_OPEN_DEADLINE,
    HAS_WORK,
    IS_HELD,
    IS_SET_ASIDE,
    IS_WAITING_WORK,
    MAX_BYTES,
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
#: Jobs that one transaction scans for HELD elements.
_HELD_JOBS_AT_ONCE = 500
#: Jobs with HELD elements that are scanned for a credential stored since.
_MOST_HELD_JOBS = 5000


@frozen
class Resumed:
    """Result of `resume_held`.

    Attributes:
        count: elements that went back to the queue.
        after: job and element of the last one, to continue from; None if there are no more.
    """

    count: int
    after: tuple[int, int] | None


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


_HELD_JOBS = (
    sa.select(jobs.c.id, jobs.c.num_held, jobs.c.src_siteid, jobs.c.dst_siteid, jobs.c.protocol)
    .where(sa.text(HAS_HELD), jobs.c.user_id == bindparam("user"), jobs.c.id >= bindparam("first"))
    .order_by(jobs.c.id)
    .limit(_HELD_JOBS_AT_ONCE)
)
_RESUME = UPDATE_ELEMENT.values(status=JobStatus.SUBMITTED, due_at=AT_ONCE)
#: Not by a wait, which puts them back by itself.
_IS_FOR_CREDENTIAL = sa.func.coalesce(elements.c.failure_code, "").not_in([code.value for code in POLLED_CODES])
_HELD_AFTER = (
    sa.select(elements.c.id)
    .where(
        elements.c.job_id == bindparam("of_job"),
        sa.text(IS_HELD),
        _IS_FOR_CREDENTIAL,
        elements.c.id > bindparam("after"),
    )
    .order_by(elements.c.id)
    .limit(bindparam("most"))
)


class HeldRoute(NamedTuple):
    """A user and a route with HELD elements."""

    user_id: int
    protocol: JobProtocol
    source: int
    destination: int | None


def resume_held(
    session: Session,
    user_id: int,
    now: datetime,
    site_id: int = ALL_SITES,
    protocols: Collection[JobProtocol] | None = None,
    after: tuple[int, int] = (0, -1),
) -> Resumed:
    """Put HELD elements of a user back into the queue, a part at a time.

    ``site_id``: only jobs that read from or write to this site. ``protocols``: only jobs with one of these protocols.
    ``after``: where the last call ended: each element is resumed once, even if it is HELD again at once.
    """
    first = after[0] + (after[1] == MAX_BYTES)
    rows = session.execute(_HELD_JOBS, {"user": user_id, "first": first}).all()
    more, seen = len(rows) == _HELD_JOBS_AT_ONCE, first
    chosen, expected = [], 0
    for row in rows:
        if expected >= CHANGED_AT_ONCE:
            more = True
            break
        seen = row.id
        if site_id in (ALL_SITES, row.src_siteid, row.dst_siteid) and (protocols is None or row.protocol in protocols):
            chosen.append(row.id)
            expected += row.num_held
    last: tuple[int, int] | None = (seen, MAX_BYTES) if more else None
    left, count = CHANGED_AT_ONCE, 0
    resumed = []
    for job in lock_jobs(session, chosen):
        if not left or job.record.cancel_requested or not job.counters.held:
            continue
        parameters = {"of_job": job.id, "after": after[1] if job.id == after[0] else -1, "most": left}
        numbers = session.scalars(_HELD_AFTER, parameters).all()
        if not numbers:
            continue
        move_elements(session, _RESUME, job, numbers, JobStatus.HELD, JobStatus.SUBMITTED)
        job.schedule_work()
        resumed.append(job)
        left, count = left - len(numbers), count + len(numbers)
        if not left:
            last = (job.id, numbers[-1])
    if resumed:
        listings = waiting_listings(session, [job.id for job in resumed])
        for job in resumed:
            if job.id in listings:
                job.schedule_listing()
            job.roll_up(now)
        save_jobs(session, resumed)
    return Resumed(count, last)


_FIRST_HELD = (
    sa.select(elements.c.claimed_at)
    .where(elements.c.job_id == jobs.c.id, sa.text(IS_HELD), _IS_FOR_CREDENTIAL)
    .order_by(elements.c.id)
    .limit(1)
    .correlate(jobs)
    .scalar_subquery()
)
_NEWEST_CREDENTIAL = (
    sa.select(sa.func.max(credentials.c.stored_at))
    .where(
        credentials.c.user_id == jobs.c.user_id,
        credentials.c.kind == bindparam("of_kind"),
        sa.or_(credentials.c.site_id == ALL_SITES, credentials.c.site_id.in_([jobs.c.src_siteid, jobs.c.dst_siteid])),
    )
    .correlate(jobs)
    .scalar_subquery()
)
_HELD_DESPITE_CREDENTIAL = (
    sa.select(jobs.c.user_id, _FIRST_HELD.label("claimed_at"), _NEWEST_CREDENTIAL.label("stored_at"))
    .where(
        sa.text(HAS_HELD),
        sa.not_(jobs.c.cancel_requested),
        jobs.c.protocol.in_(bindparam("by_protocols", expanding=True)),
    )
    .limit(_MOST_HELD_JOBS)
)


def held_despite_credential(session: Session, kind: CredentialKind, protocols: Collection[JobProtocol]) -> list[int]:
    """Users with HELD elements who have stored a credential since these were claimed.

    The daemon may have stopped before it had resumed all, or a verdict arrived at the same time as the credential.

    ``protocols``: of jobs that may wait for such a credential.
    """
    rows = session.execute(_HELD_DESPITE_CREDENTIAL, {"of_kind": kind.value, "by_protocols": list(protocols)})
    return sorted(
        {
            row.user_id
            for row in rows
            if row.claimed_at is not None and row.stored_at is not None and row.stored_at >= row.claimed_at - CLOCK_SKEW
        }
    )


def held_routes(session: Session, code: FailureCode) -> list[HeldRoute]:
    """Users and routes with elements HELD for a failure code."""
    rows = session.execute(
        sa.select(jobs.c.user_id, jobs.c.protocol, jobs.c.src_siteid, jobs.c.dst_siteid)
        .where(
            sa.text(HAS_HELD),
            sa.exists().where(
                elements.c.job_id == jobs.c.id,
                elements.c.status == JobStatus.HELD,
                elements.c.failure_code == code.value,
            ),
        )
        .distinct()
    )
    return [HeldRoute(row.user_id, row.protocol, row.src_siteid, row.dst_siteid) for row in rows]


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

"""What users do to jobs that are there: cancel, retry, and what a new credential sets going again."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any, cast

import sqlalchemy as sa
from attrs import evolve
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.credentials import ALL_SITES
from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.store.columns import AT_ONCE, NEVER
from pdm.workqueue.store.locks import LockedJob, lock_held_jobs, lock_job, save_jobs
from pdm.workqueue.store.tables import elements, jobs, matched
from pdm.workqueue.WorkqueueDB import HAS_WORK, IS_HELD, IS_SET_ASIDE, IS_WAITING_WORK

#: Elements that one transaction cancels: others who write get their turn.
CANCELLED_AT_ONCE = 2000


def cancel(session: Session, job_id: int, now: datetime) -> JobRecord:
    """End a job: what waits or is held is CANCELLED, what runs is left to the daemon that runs it.

    From now on nothing of it is claimed. Of a large job, `cancel_more` has to cancel what is left waiting.
    A job that is final stays as it is.

    Raises:
        LookupError: there is no such job.
    """
    job = _locked(session, job_id)
    if not job.record.status.is_final:
        job.record = evolve(job.record, cancel_requested=True)
        _cancel_some(session, job, now)
    return job.record


def cancel_more(session: Session, job_id: int, now: datetime) -> bool:
    """Cancel some more of a job that is being cancelled; says whether there is still more."""
    job = lock_job(session, job_id)
    if job is None or not job.record.cancel_requested:
        return False
    _cancel_some(session, job, now)
    return job.work_due_at is not None


_BEING_CANCELLED = sa.select(jobs.c.id).where(sa.text(HAS_WORK), jobs.c.work_due_at >= NEVER).order_by(jobs.c.id)


def being_cancelled(session: Session) -> list[int]:
    """Jobs of which some elements still wait to be cancelled."""
    return list(session.scalars(_BEING_CANCELLED))


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
_CANCEL = (
    sa.update(elements)
    .where(elements.c.job_id == bindparam("of_job"), elements.c.id == bindparam("number"))
    .values(status=JobStatus.CANCELLED)
)


def _cancel_some(session: Session, job: LockedJob, now: datetime) -> None:
    left = CANCELLED_AT_ONCE
    if job.counters.submitted:
        listings = cast(sa.CursorResult[Any], session.execute(_CANCEL_LISTING, {"of_job": job.id})).rowcount
        job.move(JobStatus.SUBMITTED, JobStatus.CANCELLED, listings)
    for status, those in ((JobStatus.SUBMITTED, _WAITING), (JobStatus.HELD, _HELD)):
        if left and (job.counters.submitted if status is JobStatus.SUBMITTED else job.counters.held):
            numbers = session.scalars(those, {"of_job": job.id, "most": left}).all()
            if numbers:
                session.execute(_CANCEL, [{"of_job": job.id, "number": number} for number in numbers])
            job.move(status, JobStatus.CANCELLED, len(numbers))
            left -= len(numbers)
    job.roll_up(now)
    save_jobs(session, [job])


def retry(session: Session, job_id: int, now: datetime) -> tuple[JobRecord, int]:
    """Put what FAILED or was CANCELLED back into the queue, with as many tries as at first; attempt numbers go on.

    While a cancellation is not through, nothing is changed.

    Returns:
        The job, and how many elements go back.

    Raises:
        LookupError: there is no such job.
    """
    job = _locked(session, job_id)
    if job.record.cancel_requested and not job.record.status.is_final:
        return job.record, 0
    total = 0
    for status in (JobStatus.FAILED, JobStatus.CANCELLED):
        count = matched(
            session,
            sa.update(elements)
            .where(elements.c.job_id == job_id, elements.c.status == status, sa.text(IS_SET_ASIDE))
            .values(status=JobStatus.SUBMITTED, lost=elements.c.attempts, due_at=AT_ONCE),
        )
        job.move(status, JobStatus.SUBMITTED, count)
        total += count
    if total:
        job.record = evolve(job.record, cancel_requested=False)
        if _waiting_listings(session, [job_id]):
            job.list_waits()
        job.work_waits()
        job.roll_up(now)
        save_jobs(session, [job])
    return job.record, total


def resume_held(
    session: Session,
    user_id: int,
    now: datetime,
    site_id: int = ALL_SITES,
    protocols: Collection[JobProtocol] | None = None,
) -> int:
    """Put all that is HELD in a user's jobs back into the queue.

    Args:
        session: of the database.
        user_id: whose jobs.
        now: the present moment, UTC.
        site_id: only jobs that read from or write to this site.
        protocols: only jobs that are moved by one of these.

    Returns:
        How many elements go back.
    """
    locked = [
        job
        for job in lock_held_jobs(session, user_id)
        if site_id in (ALL_SITES, job.record.src_siteid, job.record.dst_siteid)
        and (protocols is None or job.record.protocol in protocols)
    ]
    if not locked:
        return 0
    numbers = [job.id for job in locked]
    count = matched(
        session,
        sa.update(elements)
        .where(elements.c.job_id.in_(numbers), elements.c.status == JobStatus.HELD, sa.text(IS_SET_ASIDE))
        .values(status=JobStatus.SUBMITTED, due_at=AT_ONCE),
    )
    listings = _waiting_listings(session, numbers)
    for job in locked:
        job.move(JobStatus.HELD, JobStatus.SUBMITTED, job.counters.held)
        if job.id in listings:
            job.list_waits()
        job.work_waits()
        job.roll_up(now)
    save_jobs(session, locked)
    return count


def _locked(session: Session, job_id: int) -> LockedJob:
    job = lock_job(session, job_id)
    if job is None:
        raise LookupError(f"there is no job {job_id}")
    return job


def _waiting_listings(session: Session, numbers: list[int]) -> set[int]:
    """Which of these jobs have a LIST element that waits and was never put off."""
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

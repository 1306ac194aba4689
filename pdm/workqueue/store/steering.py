"""What users do to jobs that are there: cancel, retry, and what a new credential sets going again."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from attrs import evolve
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.store.columns import AT_ONCE
from pdm.workqueue.store.locks import LockedJob, lock_held_jobs, lock_job, save_jobs
from pdm.workqueue.store.tables import elements, matched
from pdm.workqueue.WorkqueueDB import IS_SET_ASIDE


def cancel(session: Session, job_id: int, now: datetime) -> JobRecord:
    """End a job: what waits or is held is CANCELLED at once; what runs is left to the daemon that runs it.

    A job that is final stays as it is.

    Raises:
        LookupError: there is no such job.
    """
    job = _locked(session, job_id)
    if not job.record.status.is_final:
        job.record = evolve(job.record, cancel_requested=True)
        for status in (JobStatus.SUBMITTED, JobStatus.HELD):
            count = matched(
                session,
                sa.update(elements)
                .where(elements.c.job_id == job_id, elements.c.status == status)
                .values(status=JobStatus.CANCELLED),
            )
            job.move(status, JobStatus.CANCELLED, count)
        job.roll_up(now)
        save_jobs(session, [job])
    return job.record


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


def resume_held(session: Session, user_id: int, now: datetime) -> int:
    """Put all that is HELD in a user's jobs back into the queue; returns how many elements."""
    locked = lock_held_jobs(session, user_id)
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

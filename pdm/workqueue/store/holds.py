"""Holds: a person keeps a job from starting anything more, and lets it go on.

A job on hold has neither ``list_due_at`` nor ``work_due_at``, as one that waits for others, so that no claim reads it;
`pdm.workqueue.store.locks.LockedJob` keeps it so while its elements change.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

import sqlalchemy as sa
from attrs import evolve
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.holds import HoldBy, JobHold
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.node_reports import SignalKind
from pdm.workqueue.domain.sites import Actor
from pdm.workqueue.store import signals, users
from pdm.workqueue.store.job_changes import locked
from pdm.workqueue.store.locks import LockedJob, lock_jobs, save_jobs
from pdm.workqueue.store.records import elements, jobs, predecessors
from pdm.workqueue.WorkqueueDB import HAS_HOLD, NEVER

#: Jobs that one transaction resumes because their hold is over.
_RESUMED_AT_ONCE = 100


class OperatorHoldError(Exception):
    """Only operators change the hold of an operator; the text says who holds the job, and why."""


def hold(session: Session, job_id: int, new: JobHold, by: Actor) -> JobRecord:
    """Hold a job: nothing more of it is claimed. Replaces an earlier hold, with its message and its end.

    A job that has ended, or is being cancelled, is not changed.

    Raises:
        LookupError: there is no such job.
        OperatorHoldError: an operator holds it, and ``new`` is of its owner.
    """
    job = locked(session, job_id)
    _refuse_change_of_operators_hold(job.record, new.by)
    if job.record.status.is_final or job.record.cancel_requested:
        return job.record
    job.record = evolve(job.record, hold=new)
    job.roll_up(new.since)
    save_jobs(session, [job])
    signals.note(session, SignalKind.HOLD, job_id)
    users.record_action(session, by, "job.hold", f"job {job_id}", new.message, new.since)
    return job.record


def resume(session: Session, job_id: int, as_whom: HoldBy, by: Actor, now: datetime) -> JobRecord:
    """End the hold of a job; a job that no person holds is not changed.

    Raises:
        LookupError: there is no such job.
        OperatorHoldError: an operator holds it, and its owner asks.
    """
    job = locked(session, job_id)
    _refuse_change_of_operators_hold(job.record, as_whom)
    if job.record.hold is None:
        return job.record
    who = "its owner" if as_whom is HoldBy.OWNER else f"an operator ({by.subject})"
    _resume(session, job, as_whom, f"{who} has resumed it", now)
    users.record_action(session, by, "job.resume", f"job {job_id}", "", now)
    return job.record


def _refuse_change_of_operators_hold(job: JobRecord, as_whom: HoldBy) -> None:
    if job.hold is not None and job.hold.by is HoldBy.OPERATOR and as_whom is HoldBy.OWNER:
        raise OperatorHoldError(job.hold.sentence)


_HELD_AMONG = sa.select(jobs.c.id).where(sa.text(HAS_HOLD), jobs.c.id.in_(bindparam("numbers", expanding=True)))


def held_among(session: Session, numbers: Collection[int]) -> Sequence[int]:
    """Those of some jobs that a person holds."""
    return session.scalars(_HELD_AMONG, {"numbers": list(numbers)}).all()


_ENDED = (
    sa.select(jobs.c.id)
    .where(sa.text(HAS_HOLD), jobs.c.held_until <= bindparam("now"))
    .order_by(jobs.c.held_until)
    .limit(_RESUMED_AT_ONCE)
)
_NEXT_END = (
    sa.select(jobs.c.held_until)
    .where(sa.text(HAS_HOLD), jobs.c.held_until < NEVER)
    .order_by(jobs.c.held_until)
    .limit(1)
)


def resume_ended(session: Session, now: datetime) -> int:
    """Resume jobs whose hold is over, a part of them at a time; returns their number."""
    count = 0
    for job in lock_jobs(session, session.scalars(_ENDED, {"now": now}).all()):
        hold = job.record.hold
        if hold is not None and hold.until is not None and hold.until <= now:
            _resume(session, job, HoldBy.SERVICE, f"its hold was until {hold.until:%Y-%m-%dT%H:%M:%SZ}", now)
            count += 1
    return count


def next_end(session: Session) -> datetime | None:
    """When the first hold ends by itself."""
    return session.scalar(_NEXT_END)


_WAITS_FOR_OTHERS = sa.select(sa.exists().where(predecessors.c.job_id == bindparam("waiting")))
_WAITING_LISTINGS = (
    sa.select(sa.func.count())
    .select_from(elements)
    .where(
        elements.c.job_id == bindparam("of_job"),
        elements.c.id == 0,
        elements.c.type == JobType.LIST,
        elements.c.status == JobStatus.SUBMITTED,
    )
)


def _resume(session: Session, job: LockedJob, by: HoldBy, sentence: str, now: datetime) -> None:
    job.record = evolve(job.record, hold=None)
    job.resumed = by, sentence
    # The end of the last predecessor, or of a large retry, schedules it.
    waits = job.record.after is not None and session.scalar(_WAITS_FOR_OTHERS, {"waiting": job.id})
    if not waits and job.work_due_at != NEVER:
        listings = session.scalar(_WAITING_LISTINGS, {"of_job": job.id}) or 0
        # Perhaps earlier than something is due: the first claim corrects that.
        if listings:
            job.schedule_listing()
        if job.counters.submitted > listings:
            job.schedule_work()
    job.roll_up(now)
    save_jobs(session, [job])
    signals.note(session, SignalKind.WORK)

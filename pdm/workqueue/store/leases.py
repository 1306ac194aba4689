"""Who may claim, until when, and what becomes of the elements of a daemon that is gone.

The lease stands on the worker's row: one update renews it for all that the worker runs. An element belongs to its
worker under the number of its attempt; once its lease is taken away the element waits again, the next claim has another
number, and a late result of the old one fits nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from itertools import takewhile

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.domain.jobs import Token
from pdm.workqueue.domain.lifecycle import settled_status
from pdm.workqueue.domain.retry import MOST_CRASHES, GiveUp, RetryPolicy, after_crash
from pdm.workqueue.store.columns import AT_ONCE
from pdm.workqueue.store.locks import lock_jobs, save_jobs
from pdm.workqueue.store.new_rows import INSERT_ATTEMPTS, attempt_row
from pdm.workqueue.store.phases import close_phases
from pdm.workqueue.store.tables import attempts, elements, jobs, matched, workers
from pdm.workqueue.WorkqueueDB import HAS_RUNNING, IS_RUNNING

#: What is said of an attempt whose daemon did not live to tell.
_GONE = AttemptFailure(
    Scope.SERVICE, FailureCode.CRASHED, "the daemon that ran it was gone before it told the result; it runs again"
)
_GONE_TOO_OFTEN = AttemptFailure(
    Scope.SERVICE,
    FailureCode.CRASHED,
    f"{MOST_CRASHES} times in a row what ran it died before it told the result; it is not tried again",
)


@frozen
class Renewal:
    """What a daemon learns when it renews its lease.

    Attributes:
        lost: the lease had been taken away; what the daemon runs may run elsewhere by now.
        cancelled_jobs: jobs to be ended of which it runs elements.
    """

    lost: bool
    cancelled_jobs: frozenset[int]


def register_worker(session: Session, worker: str, now: datetime, lease_s: float) -> int:
    """Begin to claim under a name.

    Whoever registers runs nothing: what an earlier life under the same name has left goes back to the queue.

    Returns:
        How many elements that were.
    """
    lease_until = now + timedelta(seconds=lease_s)
    known = session.scalar(sa.select(workers.c.id).where(workers.c.name == worker).with_for_update())
    if known is None:
        session.execute(sa.insert(workers).values(name=worker, lease_until=lease_until))
        return 0
    session.execute(sa.update(workers).where(workers.c.id == known).values(lease_until=lease_until))
    return _release(session, [known], now)


def renew(session: Session, worker: str, now: datetime, lease_s: float) -> Renewal:
    """Show life."""
    renewed = matched(
        session,
        sa.update(workers)
        .where(workers.c.name == worker, workers.c.lease_until.is_not(None))
        .values(lease_until=now + timedelta(seconds=lease_s)),
    )
    if not renewed:
        return Renewal(lost=True, cancelled_jobs=frozenset())
    cancelled = session.scalars(
        sa.select(jobs.c.id).where(
            sa.text(HAS_RUNNING),
            jobs.c.cancel_requested,
            sa.exists()
            .where(
                elements.c.job_id == jobs.c.id,
                elements.c.status == JobStatus.RUNNING,
                elements.c.worker_id == sa.select(workers.c.id).where(workers.c.name == worker).scalar_subquery(),
            )
            .correlate(jobs),
        )
    )
    return Renewal(lost=False, cancelled_jobs=frozenset(cancelled))


_LIVE_WORKER = (
    sa.select(workers.c.id)
    .where(workers.c.name == sa.bindparam("worker"), workers.c.lease_until > sa.bindparam("now"))
    .with_for_update(read=True)
)


def live_worker(session: Session, worker: str, now: datetime) -> int | None:
    """The number of a worker that holds a lease; until this transaction ends, nobody can take it away."""
    number: int | None = session.scalar(_LIVE_WORKER, {"worker": worker, "now": now})
    return number


def release_expired(session: Session, now: datetime) -> int:
    """Take away the leases that have run out; what those daemons ran goes back to the queue.

    Returns:
        How many elements that were.
    """
    expired = session.scalars(
        sa.select(workers.c.id).where(workers.c.lease_until <= now).order_by(workers.c.id).with_for_update()
    ).all()
    return _take_away(session, expired, now)


def release_worker(session: Session, worker: str, now: datetime) -> int:
    """Take away the lease of one daemon that is known to be gone; returns how many elements go back to the queue."""
    numbers = session.scalars(sa.select(workers.c.id).where(workers.c.name == worker).with_for_update()).all()
    return _take_away(session, numbers, now)


def _take_away(session: Session, worker_ids: Collection[int], now: datetime) -> int:
    if not worker_ids:
        return 0
    session.execute(sa.update(workers).where(workers.c.id.in_(worker_ids)).values(lease_until=None))
    return _release(session, worker_ids, now)


_RELEASE = (
    sa.update(elements)
    .where(elements.c.job_id == sa.bindparam("of_job"), elements.c.id == sa.bindparam("number"))
    .values(
        status=sa.bindparam("new_status"),
        lost=elements.c.lost + 1,
        due_at=sa.bindparam("due_again_at"),
        worker_id=None,
        residue=sa.bindparam("may_leave_residue"),
        failure_scope=sa.bindparam("scope"),
        failure_code=sa.bindparam("code"),
        failure_message=sa.bindparam("message"),
    )
)
_ENDED_CODES = (
    sa.select(attempts.c.failure_code)
    .where(attempts.c.job_id == sa.bindparam("of_job"), attempts.c.element_id == sa.bindparam("number"))
    .order_by(attempts.c.attempt.desc())
    .limit(MOST_CRASHES)
)


def _crashes(session: Session, token: Token) -> int:
    """How many attempts of an element have crashed one after the other, the one that runs now included."""
    if token.attempt == 1:
        return 1
    codes = session.scalars(_ENDED_CODES, {"of_job": token.job_id, "number": token.element_id})
    return 1 + sum(1 for _ in takewhile(lambda code: code == FailureCode.CRASHED.value, codes))


def _release(session: Session, worker_ids: Collection[int], now: datetime) -> int:
    held = sa.and_(sa.text(IS_RUNNING), elements.c.worker_id.in_(worker_ids))
    numbers = session.scalars(sa.select(elements.c.job_id).where(held).distinct()).all()
    if not numbers:
        return 0
    locked = {job.id: job for job in lock_jobs(session, numbers)}
    # Read again: between the first look and the lock some may have been settled.
    rows = session.execute(
        sa.select(
            elements.c.job_id,
            elements.c.id,
            elements.c.attempts,
            elements.c.type,
            elements.c.residue,
            elements.c.claimed_at,
            elements.c.worker_id,
        ).where(held, elements.c.job_id.in_(numbers))
    ).all()
    changes, ended = [], []
    for row in rows:
        job = locked[row.job_id]
        token = Token(row.job_id, row.id, row.attempts)
        decision = after_crash(RetryPolicy(), _crashes(session, token), now)
        failure, due_at, status = _GONE, AT_ONCE, JobStatus.FAILED
        if isinstance(decision, GiveUp):
            failure = _GONE_TOO_OFTEN
        else:
            status = settled_status(JobStatus.SUBMITTED, cancel_requested=job.record.cancel_requested)
            due_at = decision.not_before if decision.not_before > now else AT_ONCE
        job.move(JobStatus.RUNNING, status)
        if status is JobStatus.SUBMITTED and row.type is JobType.LIST:
            job.list_waits(due_at)
        else:
            # Of a REMOVE, the next phase may begin.
            job.work_waits(due_at)
        changes.append(
            {
                "of_job": row.job_id,
                "number": row.id,
                "new_status": status,
                "due_again_at": due_at,
                "scope": failure.scope.value,
                "code": failure.code.value,
                "message": failure.message,
                # A copy that was cut off may have left its temporary file.
                "may_leave_residue": row.residue or row.type is JobType.COPY,
            }
        )
        ended.append(attempt_row(token, JobStatus.FAILED, row.claimed_at, now, row.worker_id, 0, failure))
        if row.type is JobType.LIST and status is JobStatus.FAILED:
            close_phases(session, job)
    if rows:
        session.execute(_RELEASE, changes)
        session.execute(INSERT_ATTEMPTS, ended)
        for job in locked.values():
            job.roll_up(now)
        save_jobs(session, locked.values())
    return len(rows)

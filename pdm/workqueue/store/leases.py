"""Leases of workers, and the release of what dead daemons ran.

The lease is a column of the worker's row: one update renews it for all claims of the worker. The row also has the
*incarnation*, a new name for each start of a daemon, under which it claims: if two daemons use one worker's name (a
copied state directory), the second one finds a live lease and claims nothing.

A claim is valid for its worker and the number of its attempt. After the lease was taken away, the element is SUBMITTED
again, the next claim has another number, and a late result of the old one matches nothing.

On PostgreSQL the database's clock measures leases, so that a daemon whose clock is wrong neither loses its lease nor
takes another's. SQLite has no clock of its own and one daemon at a time, which locks the file: there a lease ends only
when it is taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from itertools import takewhile

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ClaimToken, JobRecord
from pdm.workqueue.domain.lifecycle import MOST_CRASHES, GiveUp, RetryPolicy, after_crash, settled_status
from pdm.workqueue.store.engines import APPLICATION_NAME
from pdm.workqueue.store.events import note_failures
from pdm.workqueue.store.job_changes import cancel_later_phases
from pdm.workqueue.store.jobs import attempts as ended_attempts
from pdm.workqueue.store.locks import is_shared, lock_jobs, save_jobs
from pdm.workqueue.store.records import (
    INSERT_ATTEMPTS,
    IS_INCARNATION,
    UPDATE_ELEMENT,
    WORKER_ID,
    attempt_row,
    elements,
    jobs,
    matched,
    workers,
)
from pdm.workqueue.WorkqueueDB import AT_ONCE, HAS_RUNNING, IS_RUNNING, UtcDateTime

#: Elements that one transaction releases, so that other writers can interleave.
RELEASED_AT_ONCE = 1000

#: Failure of an attempt whose daemon died.
_DAEMON_LOST = AttemptFailure(
    FailureScope.SERVICE,
    FailureCode.CRASHED,
    "the daemon that ran it died before it stored the result; it is tried again",
)
_CRASHED_TOO_OFTEN = AttemptFailure(
    FailureScope.SERVICE,
    FailureCode.CRASHED,
    f"{MOST_CRASHES} times in a row its daemon or helper died before it reported the result; it is not tried again",
)


@frozen
class WorkerIdentity:
    """A daemon that claims.

    Attributes:
        name: of the worker; the same after each start of an instance.
        incarnation: of this start; claims and results are written under it.
        instance: unique to an instance while it locks its state directory: an earlier incarnation with the same one is
            dead. Empty without such a lock.
        host: host and process id, for the operator.
        node: name for people, `[node] name`.
        address: URL under which other nodes reach it; empty for none.
        version: of its program.
    """

    name: str
    incarnation: str
    instance: str = ""
    host: str = ""
    node: str = ""
    address: str = ""
    version: str = ""


@frozen
class Registration:
    """Result of `register_worker`.

    Attributes:
        held_by: host of another incarnation with a live lease; None if this one has the lease now.
        held_for_s: seconds until that lease expires unless it is renewed.
        held_until: the same as a time of the clock that measures leases; a later one next time shows that it is
            renewed.
        back: elements of an earlier incarnation that went back to the queue.
    """

    held_by: str | None = None
    held_for_s: float = 0.0
    held_until: datetime | None = None
    back: int = 0


@frozen
class Renewal:
    """Result of `renew`.

    Attributes:
        lost: the lease had been taken away; the claims may run elsewhere by now.
        cancelled_jobs: cancelled jobs of which this worker runs elements.
    """

    lost: bool
    cancelled_jobs: frozenset[int]


def lease_clock(session: Session, now: datetime) -> datetime:
    """The present time of the clock that measures leases."""
    if not is_shared(session):
        return now
    return session.scalars(sa.select(sa.cast(sa.func.clock_timestamp(), UtcDateTime()))).one()


_LIVE_INCARNATIONS = sa.select(workers.c.incarnation).where(
    workers.c.incarnation.is_not(None), workers.c.lease_until.is_not(None)
)


def is_free(table: sa.Table, timestamp: datetime) -> sa.ColumnElement[bool]:
    """Whether no daemon has a row leased: the lease has ended, or the daemon has none any more, or was replaced.

    ``table``: with ``leased_by``, an incarnation, and ``leased_until``. ``timestamp``: of `lease_clock`.
    """
    leased_by = table.c.leased_by
    return sa.or_(leased_by.is_(None), table.c.leased_until <= timestamp, leased_by.not_in(_LIVE_INCARNATIONS))


#: Those of some attempts at elements of a job whose work had begun, by the logs of the calling daemon.
FindBegun = Callable[[JobRecord, Collection[ClaimToken]], Collection[ClaimToken]]


def register_worker(
    session: Session,
    worker: WorkerIdentity,
    now: datetime,
    lease_s: float,
    *,
    alone: bool = False,
    begun: FindBegun | None = None,
) -> Registration:
    """Take the lease of a name, unless another daemon has it.

    What an earlier incarnation under the name ran goes back to the queue.

    ``lease_s``: seconds for which the lease is valid without a renewal. ``alone``: no other daemon can use the
    database, because this one has locked it. ``begun``: finds attempts of an earlier incarnation whose work had begun;
    None if unknown.
    """
    number = session.scalar(sa.select(workers.c.id).where(workers.c.name == worker.name))
    if number is None:
        number = session.scalar(sa.insert(workers).values(name=worker.name).returning(workers.c.id))
    timestamp = lease_clock(session, now)
    # Do not wait: a hanging session of an earlier incarnation may have locked the row.
    row = session.execute(
        sa.select(workers).where(workers.c.id == number).with_for_update(skip_locked=True)
    ).one_or_none()
    if row is None:
        return Registration("a session that has not ended", lease_s)
    is_ours = row.incarnation in (None, worker.incarnation) or (worker.instance and row.instance == worker.instance)
    if not (alone or is_ours) and row.lease_until is not None and row.lease_until > timestamp:
        return Registration(
            row.host or "an unknown host", (row.lease_until - timestamp).total_seconds(), row.lease_until
        )
    session.execute(
        sa.update(workers)
        .where(workers.c.id == number)
        .values(
            lease_until=timestamp + timedelta(seconds=lease_s),
            incarnation=worker.incarnation,
            instance=worker.instance,
            host=worker.host,
            node=worker.node or worker.name,
            address=worker.address or None,
            version=worker.version or None,
            started_at=timestamp,
            seen_at=timestamp,
            sick=None,
            report=None,
            counts_apart=True,
        )
    )
    left = [number]
    if alone:
        session.execute(sa.update(workers).where(workers.c.id != number).values(lease_until=None))
        left = list(session.scalars(sa.select(workers.c.id)))
    return Registration(back=_release(session, workers.c.id.in_(left), now, begun=begun or _all))


def renew(session: Session, worker: str, now: datetime, lease_s: float) -> Renewal:
    """Renew the lease of an incarnation. Waits for no claim and for no other daemon."""
    lease = timedelta(seconds=lease_s)
    timestamp = sa.func.clock_timestamp() if is_shared(session) else sa.literal(now)
    renewed = matched(
        session,
        sa.update(workers)
        .where(IS_INCARNATION, workers.c.lease_until.is_not(None))
        .values(lease_until=timestamp + lease if is_shared(session) else now + lease, seen_at=timestamp),
        {"of_incarnation": worker},
    )
    if not renewed:
        return Renewal(lost=True, cancelled_jobs=frozenset())
    return Renewal(lost=False, cancelled_jobs=cancelled_jobs(session, worker))


def cancelled_jobs(session: Session, worker: str) -> frozenset[int]:
    """Cancelled jobs of which an incarnation runs elements."""
    cancelled = session.scalars(
        sa.select(jobs.c.id).where(
            sa.text(HAS_RUNNING),
            jobs.c.cancel_requested,
            sa.exists()
            .where(elements.c.job_id == jobs.c.id, elements.c.status == JobStatus.RUNNING, _RUN_BY_WORKER)
            .correlate(jobs),
        ),
        {"of_incarnation": worker},
    )
    return frozenset(cancelled)


def write_probe(session: Session, worker: str) -> None:
    """Write without changing anything: a read-only transaction does not notice a full disk."""
    session.execute(sa.update(workers).where(IS_INCARNATION).values(name=workers.c.name), {"of_incarnation": worker})


def read_probe(session: Session) -> None:
    """Read a row."""
    session.scalar(sa.select(workers.c.id).limit(1))


_RUN_BY_WORKER = elements.c.worker_id == WORKER_ID.scalar_subquery()
# KEY SHARE blocks releasing the lease, not its renewal.
_LOCK_WORKER = WORKER_ID.with_for_update(read=True, key_share=True)
_LIVE_WORKER = {
    True: _LOCK_WORKER.where(workers.c.lease_until > sa.func.clock_timestamp()),
    False: _LOCK_WORKER.where(workers.c.lease_until.is_not(None)),
}


def live_worker(session: Session, worker: str) -> int | None:
    """The id of a worker with a lease, which cannot be taken away before this transaction ends."""
    number: int | None = session.scalar(_LIVE_WORKER[is_shared(session)], {"of_incarnation": worker})
    return number


def release_expired(session: Session, now: datetime) -> int:
    """Take away expired leases; what those daemons ran goes back to the queue.

    Waits for no lock: a worker or a job that a hanging session has locked is left for the next call.

    Returns:
        The number of elements; `RELEASED_AT_ONCE` if there may be more.
    """
    has_ended = workers.c.lease_until <= (sa.func.clock_timestamp() if is_shared(session) else now)
    expired = session.scalars(
        sa.select(workers.c.id).where(has_ended).order_by(workers.c.id).with_for_update(skip_locked=True)
    ).all()
    if expired:
        session.execute(sa.update(workers).where(workers.c.id.in_(expired)).values(lease_until=None))
    return _release(session, workers.c.lease_until.is_(None), now, most=RELEASED_AT_ONCE)


def end_suspended_sessions(session: Session) -> int:
    """End PostgreSQL sessions of daemons that are suspended within a statement, so that their locks are released.

    `idle_in_transaction_session_timeout` does not cover them: a client that stops in the middle of a pipeline (as
    psycopg runs `executemany`), or of reading a result, leaves its session in the state "active", waiting for the
    client.

    Returns:
        The number of sessions.
    """
    if not is_shared(session):
        return 0
    return sum(session.scalars(_END_SUSPENDED, {"application": APPLICATION_NAME}))


_END_SUSPENDED = sa.text("""
    SELECT pg_terminate_backend(pid)::int FROM pg_stat_activity, pg_settings
    WHERE pg_settings.name = 'idle_in_transaction_session_timeout'
      AND datname = current_database() AND usename = current_user AND application_name = :application
      AND pid <> pg_backend_pid() AND state = 'active' AND wait_event IN ('ClientRead', 'ClientWrite')
      AND state_change < clock_timestamp() - setting::int * interval '1 millisecond'
""")


def release_worker(session: Session, name: str, now: datetime) -> int:
    """Take away the lease of a dead daemon; returns how many elements go back to the queue."""
    numbers = session.scalars(sa.select(workers.c.id).where(workers.c.name == name).with_for_update()).all()
    if not numbers:
        return 0
    session.execute(sa.update(workers).where(workers.c.id.in_(numbers)).values(lease_until=None))
    return _release(session, workers.c.id.in_(numbers), now, skip_locked=False)


def give_up_lease(session: Session, worker: str) -> None:
    """Release the lease of an incarnation: unsettled claims may be released at once."""
    session.execute(sa.update(workers).where(IS_INCARNATION).values(lease_until=None), {"of_incarnation": worker})


def running_tokens(session: Session, worker: str) -> list[ClaimToken]:
    """Attempts that run in an incarnation, according to the database."""
    rows = session.execute(
        sa.select(elements.c.job_id, elements.c.id, elements.c.attempts).where(sa.text(IS_RUNNING), _RUN_BY_WORKER),
        {"of_incarnation": worker},
    )
    return [ClaimToken(row.job_id, row.id, row.attempts) for row in rows]


def release_unknown(session: Session, worker: str, tokens: Collection[ClaimToken], now: datetime) -> int:
    """Release claims that their daemon does not know, because the answer to its claim was lost.

    Claims that were settled meanwhile are skipped, and so are jobs that another session has locked.

    Returns:
        The number of elements that go back to the queue.
    """
    number = session.scalar(WORKER_ID, {"of_incarnation": worker})
    if number is None:
        return 0
    return _release(session, workers.c.id == number, now, begun=lambda _job, _tokens: (), only=frozenset(tokens))


_RELEASE = UPDATE_ELEMENT.values(
    status=sa.bindparam("new_status"),
    lost=elements.c.lost + 1,
    due_at=sa.bindparam("due_again_at"),
    worker_id=None,
)
_RELEASE_CRASHED = _RELEASE.values(
    residue=sa.bindparam("may_leave_file"),
    failure_scope=sa.bindparam("scope"),
    failure_code=sa.bindparam("code"),
    failure_message=sa.bindparam("message"),
)


def _crashes(session: Session, token: ClaimToken) -> int:
    """The number of consecutive crashes of an element, including the running attempt.

    Attempts that were claimed and never begun have no row and do not count: they did not cause the crash.
    """
    if token.attempt == 1:
        return 1
    ended = reversed(ended_attempts(session, token.job_id, token.element_id))
    crashed = takewhile(lambda one: one.failure is not None and one.failure.code is FailureCode.CRASHED, ended)
    return 1 + sum(1 for _ in crashed)


def _all(_job: JobRecord, tokens: Collection[ClaimToken]) -> Collection[ClaimToken]:
    return tokens


def _release(
    session: Session,
    of_workers: sa.ColumnElement[bool],
    now: datetime,
    *,
    begun: FindBegun = _all,
    only: Collection[ClaimToken] | None = None,
    most: int | None = None,
    skip_locked: bool = True,
) -> int:
    """Put running elements of some workers back into the queue.

    ``of_workers``: condition on workers. ``begun``: finds those whose work had begun; others have not crashed.
    ``only``: which attempts; None for all. ``skip_locked``: whether to skip jobs that another session has locked.
    """
    held = sa.and_(sa.text(IS_RUNNING), elements.c.worker_id.in_(sa.select(workers.c.id).where(of_workers)))
    if only is not None:
        held = sa.and_(held, elements.c.job_id.in_({token.job_id for token in only}))
    numbers = session.scalars(sa.select(elements.c.job_id).where(held).distinct().limit(most)).all()
    if not numbers:
        return 0
    locked = {job.id: job for job in lock_jobs(session, numbers, skip_locked=skip_locked)}
    # Read again: some may have been settled between the first query and the lock.
    rows = session.execute(
        sa.select(
            elements.c.job_id,
            elements.c.id,
            elements.c.attempts,
            elements.c.type,
            elements.c.residue,
            elements.c.claimed_at,
            elements.c.worker_id,
        )
        .where(held, elements.c.job_id.in_(locked))
        .limit(most)
        # Results may be stored without the lock of their job: those that are being stored now are waited for.
        .with_for_update(key_share=True, of=elements)
    ).all()
    tokens_of: dict[int, set[ClaimToken]] = {}
    for row in rows:
        tokens_of.setdefault(row.job_id, set()).add(ClaimToken(row.job_id, row.id, row.attempts))
    had_begun = {token for job_id, tokens in tokens_of.items() for token in begun(locked[job_id].record, tokens)}
    released, crashed, ended = [], [], []
    failed: dict[tuple[int, FailureCode], list[tuple[int, AttemptFailure]]] = {}
    for row in rows:
        job = locked[row.job_id]
        token = ClaimToken(row.job_id, row.id, row.attempts)
        if only is not None and token not in only:
            continue
        failure, due_at = None, AT_ONCE
        status = settled_status(JobStatus.SUBMITTED, cancel_requested=job.record.cancel_requested)
        if token in had_begun:
            failure = _DAEMON_LOST
            decision = after_crash(RetryPolicy(), _crashes(session, token), now)
            if isinstance(decision, GiveUp):
                failure, status = _CRASHED_TOO_OFTEN, JobStatus.FAILED
            elif decision.not_before > now:
                due_at = decision.not_before
        job.move(JobStatus.RUNNING, status)
        if status is JobStatus.SUBMITTED and row.type is JobType.LIST:
            job.schedule_listing(due_at)
        else:
            # The next phase may begin.
            job.schedule_work(due_at)
        change = {"of_job": row.job_id, "number": row.id, "new_status": status, "due_again_at": due_at}
        if failure is None:
            released.append(change)
        else:
            # An interrupted copy may have left its temporary file.
            leftover = row.residue or row.type is JobType.COPY
            said = {"scope": failure.scope.value, "code": failure.code.value, "message": failure.message}
            crashed.append({**change, **said, "may_leave_file": leftover})
            ended.append(attempt_row(token, JobStatus.FAILED, row.claimed_at, now, row.worker_id, 0, failure))
            failed.setdefault((row.job_id, failure.code), []).append((row.id, failure))
        if row.type is JobType.LIST and status is JobStatus.FAILED:
            cancel_later_phases(session, job)
    for statement, changes in ((_RELEASE, released), (_RELEASE_CRASHED, crashed), (INSERT_ATTEMPTS, ended)):
        if changes:
            session.execute(statement, changes)
    if released or crashed:
        for job in locked.values():
            job.roll_up(now)
        if failed:
            note_failures(session, failed, {job.id: job.record for job in locked.values()}, now)
        save_jobs(session, locked.values())
    return len(released) + len(crashed)

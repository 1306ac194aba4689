"""A session of PostgreSQL that hangs with its locks, or a server that does, blocks no other session."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytest_twisted
import sqlalchemy as sa
from sqlalchemy.orm import Session
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.store import claiming, leases, results
from pdm.workqueue.store.claim_limits import ClaimLimits
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.engines import DatabaseTimeouts, make_engines
from pdm.workqueue.store.errors import DatabaseUnavailableError
from tests.store.stores import LEASE_S, START, Store, done

reactor: Any = _reactor
pytestmark = [
    pytest.mark.postgresql,
    pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True),
]


@pytest.fixture
def hurried(engine: sa.Engine) -> Iterator[Store]:
    """A store whose statements fail rather than wait for a lock."""
    engines = make_engines(engine.url.render_as_string(hide_password=False), 2, DatabaseTimeouts(lock_s=0.5))
    yield Store(engines.writer)
    engines.dispose()


@contextmanager
def hanging(store: Store, function: Any, *args: Any) -> Iterator[Any]:
    """A session that has carried a function out and says nothing more; gives what came of it."""
    with Session(store.engine, autoflush=False) as session:
        yield function(session, *args)
        session.rollback()


_ONE = ClaimLimits(elements=1, batches=1, batch_elements=1, batch_bytes=2**40)


def test_a_claim_that_hangs_holds_up_no_renewal_and_no_release(store: Store, hurried: Store) -> None:
    for name in ("frozen", "gone", "live"):
        store.worker(name)
    user = store.user()
    theirs, other = store.submit(user), store.submit(user)
    store.claim("gone", batches=1, batch_elements=1)
    with hanging(store, claiming.claim, "frozen", _ONE, START) as held:
        assert [batch.job.id for batch in held] == [other.id]
        # Its own daemon renews, for only one session of it hangs.
        assert not hurried.run(leases.renew, "frozen", START, LEASE_S).lost
        hurried.pass_time(LEASE_S + 1)
        hurried.run(leases.renew, "live", START, LEASE_S)
        # Of those whose lease has ended the one that can be had is taken away.
        assert hurried.run(leases.release_expired, START) == 1
        assert store.element(theirs.id, 0).status is JobStatus.SUBMITTED
        # And what waits is claimed by others, but for the job that is held.
        (batch,) = hurried.claim("live")
        assert batch.job.id == theirs.id
        assert hurried.claim("live") == []
    assert hurried.run(leases.renew, "frozen", START, LEASE_S).lost is False


def test_a_job_that_is_held_keeps_no_results_of_others_back(store: Store, hurried: Store) -> None:
    store.worker()
    user = store.user()
    jobs = [store.submit(user) for _ in range(3)]
    verdicts = done(*store.claim())

    def hold(session: Session) -> None:
        session.execute(sa.text(f"SELECT 1 FROM jobs WHERE id = {jobs[1].id} FOR UPDATE"))

    with hanging(store, hold):
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            hurried.settle(verdicts)
        settled = hurried.run(results.settle, "w", verdicts, START, skip_locked=True)
        assert [verdict.token.job_id for verdict in settled.passed_over] == [jobs[1].id]
        assert {job.id for job in settled.finished} == {jobs[0].id, jobs[2].id}
        # What a dead daemon ran of it goes back later.
        store.pass_time(LEASE_S + 1)
        assert hurried.run(leases.release_expired, START) == 0
    assert hurried.run(leases.release_expired, START) == 1


def test_the_server_ends_a_session_that_hangs(url: str, store: Store) -> None:
    store.worker()
    engines = make_engines(url, 1, DatabaseTimeouts(idle_in_transaction_s=0.3, statement_s=0.3))
    with Session(engines.writer) as session:
        session.execute(sa.text("SELECT 1 FROM workers FOR UPDATE"))
        time.sleep(1.0)
        # The lock is free again.
        store.worker()
        with pytest.raises(sa.exc.DBAPIError, match="idle-in-transaction"):
            session.execute(sa.text("SELECT 1"))
    with Session(engines.writer) as session, pytest.raises(sa.exc.OperationalError, match="statement timeout"):
        session.execute(sa.text("SELECT pg_sleep(5)"))
    engines.dispose()


def test_a_session_that_is_suspended_within_a_pipeline_is_ended_by_others(url: str, store: Store) -> None:
    """For the server it is active, so that idle_in_transaction_session_timeout does not see it."""
    store.worker()
    engines = make_engines(url, 1, DatabaseTimeouts(idle_in_transaction_s=0.3))
    with engines.writer.connect() as suspended, engines.lease.connect() as other:
        driver: Any = suspended.connection.driver_connection
        driver.pgconn.enter_pipeline_mode()
        driver.pgconn.send_query_params(b"BEGIN", None)
        driver.pgconn.send_query_params(b"SELECT 1 FROM workers FOR UPDATE", None)
        driver.pgconn.send_flush_request()
        driver.pgconn.flush()
        ended = 0
        give_up_at = time.monotonic() + 30.0
        while not ended:
            assert time.monotonic() < give_up_at
            time.sleep(0.1)
            with Session(other) as session, session.begin():
                ended = leases.end_suspended_sessions(session)
        assert ended == 1
        # The lock is free again.
        store.worker()
        suspended.invalidate()
    engines.dispose()


@pytest.mark.parametrize("by", ["watch", "stop"])
@pytest_twisted.ensureDeferred
async def test_a_server_process_that_is_stopped_is_given_up(url: str, by: str, lost_errors: list[LogEvent]) -> None:
    """No timeout of the server's can help, and its machine still acknowledges what is sent."""
    soon = DatabaseTimeouts(statement_s=0.5, lock_s=0.5) if by == "watch" else DatabaseTimeouts()
    database = Database.open(url, reactor, 2, soon)
    await database.start()
    pids: Deferred[int] = Deferred()

    def hang(session: Session) -> None:
        pid = session.scalar(sa.text("SELECT pg_backend_pid()"))
        if not pids.called:
            os.kill(int(pid or 0), signal.SIGSTOP)
            reactor.callFromThread(pids.callback, pid)
            session.execute(sa.text("SELECT 1"))

    hung = Deferred.fromCoroutine(database.run("hang", hang))
    pid = await pids
    try:
        if by == "stop":
            waiting = Deferred.fromCoroutine(database.run("wait", hang))
            await waiting
            database.give_up()
            with pytest.raises(DatabaseUnavailableError):
                await hung
        else:
            # The second try has another connection.
            await hung
        lost_errors.clear()
        await database.stop()
    finally:
        os.kill(pid, signal.SIGCONT)

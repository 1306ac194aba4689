"""PostgreSQL commits and the connection breaks before the answer: no claim and no verdict is lost or repeated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator
from typing import Any

import pytest
import pytest_twisted
import sqlalchemy as sa
from sqlalchemy.orm import Session
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from zope.interface import provider

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import ClaimToken
from pdm.workqueue.execution.attempts import Settler
from pdm.workqueue.execution.lease import Lease
from pdm.workqueue.logstore.writer import ClosedLog
from pdm.workqueue.store import claiming, users
from pdm.workqueue.store.claim_limits import ClaimLimits
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.telemetry.clocks import utc_now
from tests.store.stores import START, Store, done, identity, token_of
from tests.support.postgresql_proxy import PostgresqlProxy, postgresql_proxy

reactor: Any = _reactor
pytestmark = [
    pytest.mark.postgresql,
    pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True),
]
_LIMITS = ClaimLimits(elements=10, batches=10, batch_elements=1, batch_bytes=2**40)


@pytest.fixture
def proxy(url: str) -> Iterator[PostgresqlProxy]:
    with postgresql_proxy(sa.make_url(url)) as proxy:
        yield proxy


@pytest_twisted.async_yield_fixture
async def database(proxy: PostgresqlProxy) -> AsyncIterator[Database]:
    database = Database.open(proxy.url, reactor, threads=2)
    await database.start()
    yield database
    await database.stop()


@pytest.fixture
def logged() -> Iterator[list[LogEvent]]:
    events: list[LogEvent] = []

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        events.append(event)

    globalLogPublisher.addObserver(observe)
    yield events
    globalLogPublisher.removeObserver(observe)


class Joined:
    """A lease, and what its daemon knows."""

    def __init__(self, database: Database) -> None:
        self.known: Collection[ClaimToken] = ()
        self.claims_over: Deferred[None] = succeed(None)
        self.woken = 0
        self.lease = Lease(reactor=reactor, database=database, worker=identity(), clock=utc_now, lease_s=60.0)

        async def over() -> None:
            await self.claims_over

        async def lost() -> None:
            raise AssertionError("no lease is lost here")

        self.lease.connect(lambda: self.known, over, lost, lambda job: None, self._work)

    def _work(self) -> None:
        self.woken += 1


@pytest_twisted.async_yield_fixture
async def joined(database: Database) -> AsyncIterator[Joined]:
    joined = Joined(database)
    await joined.lease.start()
    # Only the start compares it with that of the database.
    joined.lease.clock = lambda: START
    # Its commits would be cut off in place of those of the tests.
    if joined.lease._takeover is not None:
        await joined.lease._takeover.stop()
    yield joined
    await joined.lease.stop()


@pytest_twisted.ensureDeferred
async def test_a_claim_without_an_answer_goes_back_to_the_queue(
    database: Database, proxy: PostgresqlProxy, joined: Joined, store: Store, lost_errors: list[LogEvent]
) -> None:
    job = store.submit(store.user())
    proxy.cut_commits = 1
    with pytest.raises(DatabaseUnavailableError):
        await database.run("claim", claiming.claim, "w", _LIMITS, START)
    lost_errors.clear()
    assert proxy.lost == 1
    assert store.element(job.id, 0).status is JobStatus.RUNNING
    while database.unavailable is not None:
        # Until a probe has succeeded transactions may be refused.
        await deferLater(reactor, 0.05)
    await joined.lease.reconcile()
    element = store.element(job.id, 0)
    assert (element.status, element.attempts, element.lost) == (JobStatus.SUBMITTED, 1, 1)
    assert store.job(job.id).counters == store.recount(job.id)
    assert joined.woken == 1
    # It was never begun: it crashed nothing, and waits for nothing.
    (again,) = await database.run("claim", claiming.claim, "w", _LIMITS, START)
    assert token_of(again).attempt == 2


@pytest_twisted.ensureDeferred
async def test_what_runs_or_is_being_claimed_stays(database: Database, joined: Joined, store: Store) -> None:
    user = store.user()
    running, claimed = store.submit(user), store.submit(user)
    batches = await database.run("claim", claiming.claim, "w", _LIMITS, START)
    tokens = {batch.job.id: token_of(batch) for batch in batches}
    joined.known = [tokens[running.id]]
    joined.claims_over = Deferred()
    comparing = Deferred.fromCoroutine(joined.lease.reconcile())
    # The answer to the other claim is on its way when the database is read.
    for _ in range(10):
        await database.run("something", lambda session: None)
    assert not comparing.called
    joined.known = list(tokens.values())
    joined.claims_over.callback(None)
    await comparing
    assert {store.element(job.id, 0).status for job in (running, claimed)} == {JobStatus.RUNNING}
    joined.known = [tokens[running.id]]
    await joined.lease.reconcile()
    assert store.element(claimed.id, 0).status is JobStatus.SUBMITTED
    assert store.element(running.id, 0).status is JobStatus.RUNNING


@pytest_twisted.ensureDeferred
async def test_a_verdict_without_an_answer_is_found_written(
    database: Database,
    proxy: PostgresqlProxy,
    joined: Joined,
    store: Store,
    lost_errors: list[LogEvent],
    logged: list[LogEvent],
) -> None:
    job = store.submit(store.user())
    batches = await database.run("claim", claiming.claim, "w", _LIMITS, START)
    settler = Settler(
        reactor=reactor, database=database, worker="w", clock=lambda: START, on_settled=lambda leftover, waiting: None
    )
    proxy.cut_commits = 1
    for verdict in done(*batches):
        settler.submit(verdict)(ClosedLog(True, None))
    assert settler.attempts() == {token_of(batches[0])}
    await settler.drained()
    lost_errors.clear()
    assert proxy.lost == 1
    assert not settler.attempts()
    assert store.job(job.id).status is JobStatus.DONE
    assert not [event for event in logged if "result dropped" in str(event.get("log_format"))]
    settled = store.settle(done(*batches), "w")
    assert set(settled.lost) == settled.repeated == {token_of(batches[0])}


@pytest_twisted.ensureDeferred
async def test_only_what_was_not_committed_is_run_again(
    database: Database, proxy: PostgresqlProxy, lost_errors: list[LogEvent]
) -> None:
    """A commit without an answer may have gone through: to run its function again might do all twice."""
    runs: list[int] = []

    def register(session: Session) -> None:
        runs.append(session.connection().connection.driver_connection.info.backend_pid)  # type: ignore[union-attr]
        if len(runs) == 1:
            # As a server does that is being restarted.
            with pytest.raises(sa.exc.OperationalError) as ended:
                session.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))
            raise ended.value
        users.register(session, f"/CN={len(runs)}", "user", START)

    await database.run("register", register)
    assert len(runs) == 2
    proxy.cut_commits = 1
    with pytest.raises(DatabaseUnavailableError):
        await database.run("register", register)
    lost_errors.clear()
    assert len(runs) == 3

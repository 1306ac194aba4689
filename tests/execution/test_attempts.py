"""Verdicts on their way to the database: none is lost, and they do not pile up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, DeferredQueue
from twisted.internet.task import Clock, deferLater

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.holds import HoldBy, JobHold
from pdm.workqueue.domain.jobs import Batch, LogSpan
from pdm.workqueue.domain.lifecycle import RetryPolicy
from pdm.workqueue.domain.sites import Actor
from pdm.workqueue.execution import executor as executor_module
from pdm.workqueue.execution.attempts import AttemptContext, Settler
from pdm.workqueue.execution.batch import RunningBatch
from pdm.workqueue.execution.batch_verdicts import Ending
from pdm.workqueue.execution.executor import ExecutionLimits, Executor
from pdm.workqueue.execution.progress_board import ProgressBoard
from pdm.workqueue.execution.streams import StreamLimits, Streams
from pdm.workqueue.logstore.writer import ClosedLog
from pdm.workqueue.store import holds, jobs
from pdm.workqueue.store.database import Database
from tests.store.stores import START, Store, done

reactor: Any = _reactor
#: What these tests never come to.
UNUSED: Any = cast(Any, None)


@pytest_twisted.async_yield_fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database.open(url, reactor, threads=2)
    await database.start()
    yield database
    await database.stop()


def executor_of(settler: Settler, database: Database = UNUSED) -> Executor:
    context = AttemptContext(
        reactor=reactor,
        clock=lambda: START,
        host="here",
        policy=RetryPolicy(),
        logs=UNUSED,
        board=ProgressBoard(),
        settler=settler,
        cancel_grace_s=1.0,
        service_health=UNUSED,
    )
    limits = ExecutionLimits(batches=4, listings=1, batch_elements=100)
    streams = Streams(
        limits=StreamLimits(total=4, route=4, route_start=2, window_s=5.0, site_in=4, site_out=4, user=4, job=4),
        sites=UNUSED,
        clock=lambda: START,
    )
    return Executor(
        database=database,
        sites=UNUSED,
        pool=UNUSED,
        credentials=UNUSED,
        worker="w",
        context=context,
        limits=limits,
        streams=streams,
        preparation=UNUSED,
        on_capacity=lambda: None,
        on_work=lambda: None,
        add_element=UNUSED,
        scratch=UNUSED,
    )


async def drained(settler: Settler, clock: Clock) -> None:
    """Drain it while no time passes: what is due at once runs, as the counters that are added up on PostgreSQL."""
    ending = Deferred.fromCoroutine(settler.drained())
    while not ending.called:
        clock.advance(0)
        await deferLater(reactor, 0.005)
    await ending


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("follows", [True, False])
async def test_a_listing_and_its_only_file_share_a_transaction_but_not_for_long(
    database: Database, store: Store, follows: bool
) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1])
    (verdict,) = done(*store.claim())
    settled: list[tuple[bool, bool]] = []
    clock = Clock()
    settler = Settler(
        reactor=clock,
        database=database,
        worker="w",
        clock=lambda: START,
        on_settled=lambda leftover, waiting: settled.append((leftover, waiting)),
    )
    settler.submit(verdict, is_followed=True)(ClosedLog(True, LogSpan(0, 10)))
    await deferLater(reactor, 0.05)
    assert settled == []
    assert settler.attempts() == {verdict.token}
    if follows:
        # A claim that is lost; it is stored, or not, at once.
        settler.submit(verdict._replace(token=verdict.token._replace(attempt=9)))(ClosedLog(True, LogSpan(10, 10)))
    else:
        clock.advance(0.06)
    while settler.backlog:
        await deferLater(reactor, 0.005)
    assert settled == [(False, False)]
    assert store.job(job.id).status is JobStatus.DONE


@pytest_twisted.ensureDeferred
async def test_nothing_new_begins_while_results_wait_for_the_database(
    database: Database, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "_MOST_UNSETTLED", 2)
    store.worker()
    job = store.copy_job(store.user(), [1] * 3)
    verdicts = done(*store.claim())
    settled: list[tuple[bool, bool]] = []
    settler = Settler(
        reactor=reactor,
        database=database,
        worker="w",
        clock=lambda: START,
        on_settled=lambda leftover, waiting: settled.append((leftover, waiting)),
    )
    executor = executor_of(settler)
    assert executor.capacity() == (8, 1)
    # That a log is not on disk yet counts, too.
    on_disk = [settler.submit(verdict) for verdict in verdicts]
    assert settler.backlog == 3
    assert executor.capacity() == (0, 1)
    for log_closed in on_disk:
        log_closed(ClosedLog(True, LogSpan(0, 10)))
    assert settler.backlog == 3
    await settler.drained()
    assert (settler.backlog, executor.capacity()) == (0, (8, 1))
    assert set(settled) == {(False, False)}
    assert store.job(job.id).status is JobStatus.DONE
    (attempt,) = store.run(jobs.attempts, job.id, 1)
    assert attempt.log == LogSpan(0, 10)


@pytest_twisted.ensureDeferred
async def test_many_results_share_transactions_and_few_wait_for_nothing(database: Database, store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1] * 13)
    verdicts = done(*store.claim())
    assert len(verdicts) == 13
    clock = Clock()
    transactions: DeferredQueue[None] = DeferredQueue()
    settler = Settler(
        reactor=clock,
        database=database,
        worker="w",
        clock=lambda: START,
        on_settled=lambda leftover, waiting: transactions.put(None),
    )

    def give(count: int) -> None:
        for _ in range(count):
            settler.submit(verdicts.pop())(ClosedLog(True, LogSpan(0, 10)))

    give(10)
    # One by itself, and what has arrived meanwhile.
    await transactions.get()
    await transactions.get()
    assert settler.backlog == 0
    give(2)
    # A transaction that had begun would be over by now.
    await database.run("nothing", lambda session: None)
    assert (settler.backlog, transactions.pending) == (2, [])
    clock.advance(1)
    await transactions.get()
    assert settler.backlog == 0
    give(1)
    await transactions.get()
    await drained(settler, clock)
    assert store.job(job.id).status is JobStatus.DONE


@pytest_twisted.ensureDeferred
async def test_a_stop_waits_for_no_further_results(database: Database, store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1] * 12)
    clock = Clock()
    settler = Settler(
        reactor=clock, database=database, worker="w", clock=lambda: START, on_settled=lambda leftover, waiting: None
    )
    on_disk = [settler.submit(verdict) for verdict in done(*store.claim())]
    for log_closed in on_disk:
        log_closed(ClosedLog(True, LogSpan(0, 10)))
    await drained(settler, clock)
    assert store.job(job.id).status is JobStatus.DONE


def executor_that_begins(database: Database, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """One whose batches do nothing, and wait for a helper."""
    settler = Settler(
        reactor=reactor, database=database, worker="w", clock=lambda: START, on_settled=lambda leftover, waiting: None
    )
    executor = executor_of(settler, database)
    executor.sites = cast(Any, SimpleNamespace(by_id=lambda number: None))
    executor.pool = cast(Any, SimpleNamespace(wake_waiting=lambda: None))
    services = SimpleNamespace(service_of_batch=lambda batch: None)
    executor.preparation = cast(Any, SimpleNamespace(services=services))
    executor.streams = cast(Any, SimpleNamespace(slot=lambda batch: None))
    monkeypatch.setattr(Executor, "_run", _nothing)
    return executor


@pytest_twisted.ensureDeferred
async def test_a_cancellation_between_a_claim_and_its_answer_is_obeyed(
    database: Database, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim is committed, its result is on its way to the reactor, and the user cancels the job."""
    ended: list[int] = []
    monkeypatch.setattr(RunningBatch, "cancel", lambda batch, job_id: ended.append(job_id))
    executor = executor_that_begins(database, monkeypatch)
    store.worker()
    user = store.user()
    before, during, other = (store.submit(user).id for _ in range(3))
    executor.cancel(before)
    await executor._background.over()
    executor.before_claims()
    batches: list[Batch] = []
    # It looks at the job in a transaction; a claim passes over jobs that others have locked.
    for _ in range(100):
        batches += store.claim(batch_elements=1)
        if len(batches) == 3:
            break
    executor.cancel(during)
    for batch in batches:
        executor.begin(batch)
    assert ended == [during]
    assert {token.job_id for token in executor.attempts()} == {before, during, other}
    await executor._background.over()


@pytest_twisted.ensureDeferred
async def test_a_hold_between_a_claim_and_its_answer_is_obeyed(
    database: Database, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node holds the job; this one does not know yet that it has claimed it."""
    executor = executor_that_begins(database, monkeypatch)
    store.worker()
    user = store.user()
    before, during, resumed, other = (store.submit(user).id for _ in range(4))
    executor.held(before)
    executor.before_claims()
    batches = store.claim(batch_elements=1)
    by = JobHold(by=HoldBy.OWNER, subject="alice", message="", since=START)
    store.run(holds.hold, during, by, Actor(user, "alice"))
    for number in (during, resumed):
        executor.held_elsewhere(number)
    await executor._background.over()
    for batch in batches:
        executor.begin(batch)
    endings = {batch.batch.job.id: batch.ending for batch in executor._running}
    assert endings == {before: None, during: Ending.HELD, resumed: None, other: None}
    # The connection was lost: whatever runs here may have been held meanwhile.
    store.run(holds.hold, other, by, Actor(user, "alice"))
    executor.held_elsewhere(None)
    await executor._background.over()
    endings = {batch.batch.job.id: batch.ending for batch in executor._running}
    assert endings == {before: None, during: Ending.HELD, resumed: None, other: Ending.HELD}


async def _nothing(*_: object) -> None:
    """Stands for the work of a batch."""

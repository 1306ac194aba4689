"""Several daemons on one database at once: every element runs once at a time, and the numbers stay right."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import Batch, ClaimToken
from pdm.workqueue.store import claim_limits, claiming, counted_apart, jobs, leases, results
from pdm.workqueue.store.engines import _sqlite_engine
from pdm.workqueue.store.errors import ChangedMeanwhileError
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.store.jobs import JobFilter
from pdm.workqueue.store.transaction_threads import _max_tries
from tests.store.stores import BROKEN, LEASE_S, Store, done, ended, identity, name_of
from tests.support.records import new_job

_DAEMONS = 4


@pytest.fixture
def store(store: Store) -> Iterator[Store]:
    """With a connection for each thread: on SQLite, too, the database itself must keep them apart."""
    if store.engine.dialect.name != "sqlite":
        yield store
        return
    engine = _sqlite_engine(store.engine.url, 8, "BEGIN IMMEDIATE", read_only=False)
    yield Store(engine)
    engine.dispose()


class Daemon(threading.Thread):
    """Claims and settles until nothing waits; sometimes an attempt fails, sometimes it dies and is declared dead."""

    def __init__(self, store: Store, name: str, board: Board) -> None:
        super().__init__(name=name)
        self._store = store
        self._board = board
        self._chance = random.Random(name)
        self.fault: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.fault = error
            self._board.over.set()

    def _work(self) -> None:
        repeated(self._store, leases.register_worker, identity(self.name), self._store.now, LEASE_S)
        while not self._board.over.is_set():
            batches = repeated(self._store, claiming.claim, self.name, LIMITS, self._store.now)
            if not batches:
                repeated(self._store, counted_apart.add_up, self._store.now)
                if not self._store.run(jobs.page, _UNFINISHED):
                    self._board.over.set()
                self._board.over.wait(0.005)
                continue
            tokens = [batch.token(element) for batch in batches for element in batch.elements]
            self._board.begin(tokens)
            if self._chance.random() < 0.1:
                # It dies: its lease is taken away, and it restarts under a new name.
                self._board.end(tokens)
                repeated(self._store, leases.release_worker, name_of(self.name), self._store.now)
                self.name += "'"
                repeated(self._store, leases.register_worker, identity(self.name), self._store.now, LEASE_S)
                continue
            self._board.end(tokens)
            self._settle(batches)

    def _settle(self, batches: list[Batch]) -> None:
        if self._chance.random() < 0.2:
            verdicts = ended(JobStatus.SUBMITTED, *batches, failure=BROKEN)
        else:
            verdicts = done(*batches)
        settled = repeated(self._store, results.settle, self.name, verdicts, self._store.now, may_count_apart=True)
        assert settled.lost == ()


_UNFINISHED = JobFilter(statuses=[JobStatus.SUBMITTED, JobStatus.RUNNING], limit=1)
LIMITS = claim_limits.ClaimLimits(elements=20, batches=4, batch_elements=5, batch_bytes=2**30)


class Board:
    """What runs, as reported by the daemons."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[tuple[int, int]] = set()
        self.begun: Counter[ClaimToken] = Counter()
        self.over = threading.Event()

    def begin(self, tokens: list[ClaimToken]) -> None:
        with self._lock:
            for token in tokens:
                where = (token.job_id, token.element_id)
                assert where not in self._running, f"{token} runs twice"
                self._running.add(where)
                self.begun[token] += 1

    def end(self, tokens: list[ClaimToken]) -> None:
        with self._lock:
            self._running.difference_update((token.job_id, token.element_id) for token in tokens)


def repeated(store: Store, function: Callable[..., Any], *args: object, **more: object) -> Any:
    """As the daemon does: what may pass is tried again."""
    for _ in range(20):
        try:
            return store.run(function, *args, **more)
        except (sa.exc.DBAPIError, ChangedMeanwhileError) as error:
            if _max_tries(error) == 1:
                raise
    raise AssertionError("it never passed")


def test_daemons_share_the_work(store: Store) -> None:
    users = [store.user(name) for name in ("alice", "bob")]
    store.worker("setup")
    for user in users:
        store.copy_job(user, [1] * 60, worker="setup")
        for _ in range(15):
            store.submit(user)
    board = Board()
    daemons = [Daemon(Store(store.engine), f"daemon {number}", board) for number in range(_DAEMONS)]
    for daemon in daemons:
        daemon.start()
    for daemon in daemons:
        daemon.join(50)
    assert [daemon.fault for daemon in daemons] == [None] * _DAEMONS
    assert set(board.begun.values()) == {1}
    found = store.run(jobs.page, JobFilter())
    assert len(found) == 32
    for job in found:
        assert job.status is JobStatus.DONE
        assert job.counters == store.recount(job.id)
    assert {token.job_id for token in board.begun} == {job.id for job in found}


def test_the_same_request_at_the_same_time_registers_one_job(store: Store) -> None:
    user = store.user()
    key = IdempotencyKey(user, "k", "f")
    barrier = threading.Barrier(4)
    answers: list[int] = []

    def post() -> None:
        barrier.wait(10)
        answers.append(repeated(store, jobs.submit, new_job(user, JobType.LIST), key, store.now).id)

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 4
    assert len(set(answers)) == 1
    assert len(store.run(jobs.page, JobFilter())) == 1

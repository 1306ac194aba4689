"""Database threads: run functions in transactions, one transaction each, or one commit for all queued calls.

A function must be repeatable: after a transient error, or if another function of the same commit fails, its transaction
is rolled back and run again.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from attrs import define, field
from sqlalchemy.orm import Session
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.store.engines import cut_connection
from pdm.workqueue.store.errors import DatabaseClosedError, unavailable_error
from pdm.workqueue.store.events import write_noted
from pdm.workqueue.store.jobs import JobCache, written_jobs
from pdm.workqueue.store.signals import NotedSignal, noted_signals

_MAX_TRIES = 6
#: For a locked SQLite file: each try has waited for the busy timeout.
_MAX_TRIES_LOCKED = 2
_FIRST_PAUSE_S = 0.01
#: Interval of the check for hanging transactions.
_CHECK_EVERY_S = 1.0
#: Slower transactions are logged.
_SLOW_S = 1.0
#: PostgreSQL: serialization failure, deadlock.
_RETRYABLE_STATES = frozenset({"40001", "40P01"})


@define(eq=False)
class QueuedCall:
    """A function that is queued for a transaction."""

    name: str
    function: Callable[[Session], Any]
    result: Deferred[Any] = field(factory=Deferred)
    seconds: float = 0.0
    outcome: Any = None
    #: The commit was sent: if the connection breaks now, the outcome is unknown.
    committing: bool = False

    def run(self, session: Session) -> None:
        began = time.perf_counter()
        try:
            self.outcome = self.function(session)
        finally:
            self.seconds = time.perf_counter() - began


class TransactionThreads:
    """Runs functions in threads, each in a transaction.

    Args:
        together: how many queued functions may share a commit.
        cache: is updated with the jobs that are written.
        on_written: called with these jobs, by id, after their commit, whether it has written events, and the signals
            that it has noted.
        transaction_s: a transaction that takes longer is cut off; None for no limit.
    """

    _log = Logger()

    def __init__(
        self,
        *,
        reactor: IReactorFromThreads,
        engine: sa.Engine,
        threads: int,
        together: int,
        name: str,
        cache: JobCache,
        on_written: Callable[[Mapping[int, JobRecord], bool, Collection[NotedSignal]], None],
        transaction_s: float | None = None,
    ) -> None:
        self._reactor = reactor
        self._engine = engine
        self._threads = threads
        self._together = together
        self._cache = cache
        self._on_written = on_written
        self._pool = ThreadPool(minthreads=0, maxthreads=threads, name=name)
        self._waiting: deque[QueuedCall] = deque()
        self._draining = 0
        self._lock = threading.Lock()
        #: Thread → start (`time.monotonic`) and driver connection of its running transaction.
        self._under_way: dict[int, tuple[float, Any]] = {}
        self._transaction_s = transaction_s
        self._closing = False
        self._watch: threading.Thread | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        self._pool.start()
        if self._transaction_s is not None:
            self._watch = threading.Thread(target=self._cut_hanging, name="database-watch", daemon=True)
            self._watch.start()

    def stop(self) -> None:
        """End the threads; blocks until their transactions have ended."""
        self._ended.set()
        self._pool.stop()

    def give_up(self) -> None:
        """Fail queued calls with `DatabaseClosedError`, and cut off running transactions."""
        with self._lock:
            self._closing = True
            for _, connection in self._under_way.values():
                cut_connection(connection)
        self._fail(self._take_waiting(), DatabaseClosedError("the service is stopping"))

    def submit(self, call: QueuedCall) -> None:
        """Queue a function; its Deferred fires in the reactor thread, after the commit."""
        with self._lock:
            if self._closing:
                raise DatabaseClosedError(f"the service is stopping; {call.name!r} was not carried out")
            self._waiting.append(call)
            if self._draining == self._threads:
                # All threads are busy, and check the queue again before they stop.
                return
            self._draining += 1
        self._pool.callInThread(self._drain)

    # -- in a thread

    def _drain(self) -> None:
        try:
            while calls := self._take_next():
                if len(calls) > 1 and self._run_together(calls):
                    continue
                for call in calls:
                    self._run_alone(call)
        except BaseException:
            with self._lock:
                self._draining -= 1
            raise

    def _take_next(self) -> Sequence[QueuedCall]:
        """The next calls of this thread; empty ends it."""
        with self._lock:
            if not self._waiting:
                self._draining -= 1
            return [self._waiting.popleft() for _ in range(min(self._together, len(self._waiting)))]

    def _run_together(self, calls: Sequence[QueuedCall]) -> bool:
        """Run several functions in one transaction; False if it failed for any reason."""
        try:
            self._run_transaction(calls)
        except Exception:
            # Each function is retried on its own, and gets its own error.
            return False
        return True

    def _run_alone(self, call: QueuedCall) -> None:
        for tries in range(1, _MAX_TRIES + 1):
            try:
                self._run_transaction([call])
            except Exception as error:
                if tries < _max_tries(error, committing=call.committing) and not self._closing:
                    time.sleep(_FIRST_PAUSE_S * 2**tries * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries
                    continue
                outage = unavailable_error(error)
                if outage is None:
                    self._reactor.callFromThread(call.result.errback, Failure())
                else:
                    outage.__cause__ = error
                    self._fail([call] if outage.alone else [call, *self._take_waiting()], outage)
            return

    def _take_waiting(self) -> Sequence[QueuedCall]:
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
            return waiting

    def _fail(self, calls: Sequence[QueuedCall], outage: Exception) -> None:
        """Fail calls at once during an outage: otherwise each would wait for its own timeout."""
        for call in calls:
            self._reactor.callFromThread(call.result.errback, Failure(outage))

    def _run_transaction(self, calls: Sequence[QueuedCall]) -> None:
        """Run functions in one transaction, commit it, and deliver their results."""
        commit = 0
        records: Mapping[int, JobRecord] = {}
        has_events = False
        signals: Collection[NotedSignal] = ()
        for call in calls:
            call.committing = False
        try:
            with (
                self._connected() as connection,
                Session(connection, autoflush=False, expire_on_commit=False) as session,
                session.begin(),
            ):
                for call in calls:
                    call.run(session)
                has_events = write_noted(session)
                signals = noted_signals(session)
                records = written_jobs(session)
                if records:
                    commit = self._cache.begin_write(records)
                for call in calls:
                    call.committing = True
        except BaseException:
            self._cache.end_write(commit, records, committed=False)
            raise
        self._reactor.callFromThread(self._deliver, calls, commit, records, has_events, signals)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        """A connection that is registered while it is used, because it may have to be cut."""
        thread = threading.get_ident()
        try:
            with self._engine.connect() as connection:
                with self._lock:
                    self._under_way[thread] = (time.monotonic(), connection.connection.driver_connection)
                yield connection
        finally:
            with self._lock:
                self._under_way.pop(thread, None)

    def _cut_hanging(self) -> None:
        """Cut hanging transactions: the server's own timeouts do not help if the server or the network hangs."""
        while not self._ended.wait(_CHECK_EVERY_S):
            before = time.monotonic() - (self._transaction_s or 0.0)
            with self._lock:
                # Under the lock: a connection that was returned may belong to another transaction.
                hanging = [connection for since, connection in self._under_way.values() if since < before]
                for connection in hanging:
                    cut_connection(connection)
            if hanging:
                self._log.warn(
                    "{count} transactions that hang are cut off after {seconds:g} s",
                    count=len(hanging),
                    seconds=self._transaction_s,
                )

    # -- in the reactor thread

    def _deliver(
        self,
        calls: Sequence[QueuedCall],
        commit: int,
        records: Mapping[int, JobRecord],
        has_events: bool,
        signals: Collection[NotedSignal],
    ) -> None:
        # First update the cache: a caller whose call is done must read its result.
        self._cache.end_write(commit, records, committed=True)
        for call in calls:
            if call.seconds > _SLOW_S:
                self._log.warn("transaction {name!r} took {seconds:.1f} s", name=call.name, seconds=call.seconds)
            call.result.callback(call.outcome)
        self._on_written(records, has_events, signals)


def _max_tries(error: Exception, *, committing: bool = False) -> int:
    """How often a transaction with this error is run in total."""
    if isinstance(error, sa.exc.IntegrityError):
        # A concurrent transaction inserted the same row: the second run finds it.
        return _MAX_TRIES
    if not isinstance(error, sa.exc.DBAPIError):
        return 1
    if getattr(error.orig, "sqlstate", None) in _RETRYABLE_STATES:
        return _MAX_TRIES
    if error.connection_invalidated:
        # PostgreSQL: a new connection may work; but a commit that was sent may have succeeded.
        return 1 if committing else _MAX_TRIES_LOCKED
    # SQLite: another process (a backup, a shell) has locked the file.
    return _MAX_TRIES_LOCKED if "database is locked" in str(error.orig) else 1

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
from pdm.workqueue.store.engines import cut_connection, is_reachable
from pdm.workqueue.store.errors import (
    ChangedMeanwhileError,
    DatabaseClosedError,
    DatabaseUnavailableError,
    unavailable_error,
)
from pdm.workqueue.store.events import write_noted
from pdm.workqueue.store.jobs import JobCache, written_jobs
from pdm.workqueue.store.signals import NotedSignal, noted_signals

_MAX_TRIES = 6
#: After a lost connection: the second try has a new one.
_MAX_TRIES_LOST = 2
_FIRST_PAUSE_S = 0.01
#: Interval of the check for hanging transactions.
_CHECK_EVERY_S = 1.0
#: A transaction that takes longer may hang: then a new connection shows whether the server answers at all.
_SUSPECT_S = 3.0
_NO_ANSWER = "it does not answer"
#: Slower transactions are logged.
_SLOW_S = 1.0
#: PostgreSQL: serialization failure, deadlock.
_RETRYABLE_STATES = frozenset({"40001", "40P01"})


@define(eq=False)
class QueuedCall:
    """A function that is queued for a transaction.

    Attributes:
        is_probe: it only shows whether the database can be used.
    """

    name: str
    function: Callable[[Session], Any]
    is_probe: bool = False
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
        may_write: whether the functions may write.
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
        may_write: bool = True,
    ) -> None:
        self._reactor = reactor
        self._engine = engine
        self._threads = threads
        self._together = together
        self._cache = cache
        self._on_written = on_written
        # All threads from the start: later there may be no memory for one.
        self._pool = ThreadPool(minthreads=threads, maxthreads=threads, name=name)
        self._waiting: deque[QueuedCall] = deque()
        self._draining = 0
        self._lock = threading.Lock()
        #: Thread → start (`time.monotonic`) and driver connection of its running transaction; None while it connects.
        self._under_way: dict[int, tuple[float, Any]] = {}
        self._transaction_s = transaction_s
        self._may_write = may_write
        #: The server does not answer: transactions are failed at once, not repeated.
        self._unreachable = False
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

    def withdraw(self, call: QueuedCall) -> bool:
        """Take a function out of the queue; False if it runs already, or has ended."""
        with self._lock:
            try:
                self._waiting.remove(call)
            except ValueError:
                return False
        return True

    # -- in a thread

    def _drain(self) -> None:
        try:
            while calls := self._take_next():
                if len(calls) == 1 or not self._run_together(calls):
                    self._run_one_by_one(calls)
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
        except Exception as error:
            outage = unavailable_error(error, may_write=self._may_write)
            if outage is None or outage.alone:
                # Each function is retried on its own, and gets its own error.
                return False
            self._fail([*calls, *self._take_waiting()], outage)
        return True

    def _run_one_by_one(self, calls: Sequence[QueuedCall]) -> None:
        for number, call in enumerate(calls):
            outage = self._run_alone(call)
            if outage is not None:
                # At once: otherwise each would wait for its own timeout.
                self._fail([*calls[number + 1 :], *self._take_waiting()], outage)
                return

    def _run_alone(self, call: QueuedCall) -> DatabaseUnavailableError | None:
        """Run one function; returns the outage that it has met, if others would meet it, too."""
        for tries in range(1, _MAX_TRIES + 1):
            try:
                self._run_transaction([call])
            except Exception as error:
                if tries < self._tries_after(error, call):
                    time.sleep(_FIRST_PAUSE_S * 2**tries * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries
                    continue
                outage = unavailable_error(error, may_write=self._may_write)
                if outage is None:
                    self._reactor.callFromThread(call.result.errback, Failure())
                    return None
                return self._note_outage(call, outage, error)
            return None
        return None

    def _tries_after(self, error: Exception, call: QueuedCall) -> int:
        return 1 if self._closing or self._unreachable else _max_tries(error, committing=call.committing)

    def _note_outage(
        self, call: QueuedCall, outage: DatabaseUnavailableError, error: Exception
    ) -> DatabaseUnavailableError | None:
        """Fail a function; returns the outage for the others."""
        if outage.alone:
            self._fail([call], outage)
            return None
        reason = _NO_ANSWER if self._unreachable else str(outage)
        is_lost = isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
        own = DatabaseUnavailableError(
            reason,
            may_be_done=call.committing and is_lost and self._may_write,
            needs_operator=outage.needs_operator,
        )
        own.__cause__ = error
        self._fail([call], own)
        return DatabaseUnavailableError(reason)

    def _take_waiting(self) -> Sequence[QueuedCall]:
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
            return waiting

    def _fail(self, calls: Sequence[QueuedCall], outage: Exception) -> None:
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
            self._unreachable = False
        except BaseException:
            self._cache.end_write(commit, records, committed=False)
            raise
        self._reactor.callFromThread(self._deliver, calls, commit, records, has_events, signals)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        """A connection that is registered while it is used, because it may have to be cut."""
        thread, began = threading.get_ident(), time.monotonic()
        try:
            with self._lock:
                self._under_way[thread] = (began, None)
            with self._engine.connect() as connection:
                with self._lock:
                    self._under_way[thread] = (began, connection.connection.driver_connection)
                yield connection
        finally:
            with self._lock:
                self._under_way.pop(thread, None)

    def _cut_hanging(self) -> None:
        """Cut hanging transactions: the server's own timeouts do not help if the server or the network hangs."""
        limit_s = self._transaction_s or 0.0
        suspect_s = min(_SUSPECT_S, limit_s)
        while not self._ended.wait(_CHECK_EVERY_S):
            if self._cut_older_than(limit_s):
                self._log.warn("transactions that hang are cut off after {seconds:g} s", seconds=limit_s)
            now = time.monotonic()
            with self._lock:
                is_suspect = any(since < now - suspect_s for since, _ in self._under_way.values())
            if is_suspect and not is_reachable(self._engine):
                self._unreachable = True
                self._cut_older_than(time.monotonic() - now)
                self._fail(self._take_waiting(), DatabaseUnavailableError(_NO_ANSWER))

    def _cut_older_than(self, seconds: float) -> int:
        """Cut off transactions that run for longer; returns how many."""
        before = time.monotonic() - seconds
        with self._lock:
            # Under the lock: a connection that was returned may belong to another transaction.
            hanging = [connection for since, connection in self._under_way.values() if since < before]
            for connection in hanging:
                cut_connection(connection)
        return len(hanging)

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
            if call.seconds > _SLOW_S and not call.is_probe:
                self._log.warn("transaction {name!r} took {seconds:.1f} s", name=call.name, seconds=call.seconds)
            call.result.callback(call.outcome)
        self._on_written(records, has_events, signals)


def _max_tries(error: Exception, *, committing: bool = False) -> int:
    """How often a transaction with this error is run in total."""
    if isinstance(error, sa.exc.IntegrityError | ChangedMeanwhileError):
        # A concurrent transaction has inserted or changed the same row: the second run finds it.
        return _MAX_TRIES
    if not isinstance(error, sa.exc.DBAPIError):
        return 1
    if getattr(error.orig, "sqlstate", None) in _RETRYABLE_STATES:
        return _MAX_TRIES
    # PostgreSQL: a new connection may work; but a commit that was sent may have succeeded.
    return _MAX_TRIES_LOST if error.connection_invalidated and not committing else 1

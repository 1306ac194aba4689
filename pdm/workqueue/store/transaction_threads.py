"""Database threads: run functions in transactions, one transaction each, or one commit for all that are queued.

A function must be repeatable: if its transaction fails for a transient reason, or another function of the same commit
fails, it is rolled back and run again.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from pdm.workqueue.store.job_cache import JobCache, written_jobs

_MAX_TRIES = 6
#: SQLite has waited for its busy timeout by then.
_MAX_TRIES_LOCKED = 2
_FIRST_PAUSE_S = 0.01
#: How often it is looked for transactions that hang.
_CHECK_EVERY_S = 1.0
#: A transaction that takes longer is told of in the log.
_SLOW_S = 1.0
#: PostgreSQL: serialization failure, deadlock.
_RETRYABLE_STATES = frozenset({"40001", "40P01"})


@define(eq=False)
class QueuedCall:
    """A function that waits for its transaction."""

    name: str
    function: Callable[[Session], Any]
    result: Deferred[Any] = field(factory=Deferred)
    seconds: float = 0.0
    outcome: Any = None
    #: Its commit was sent, so that what becomes of a connection that breaks now is not known.
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
        reactor: gets the results.
        engine: of the database.
        threads: how many run at once.
        together: how many functions may share a commit; those that wait do.
        name: of the threads.
        cache: is told of the jobs that are written.
        transaction_s: a transaction that takes longer hangs, and is cut off; None where none can.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IReactorFromThreads,
        engine: sa.Engine,
        threads: int,
        together: int,
        name: str,
        cache: JobCache,
        transaction_s: float | None = None,
    ) -> None:
        self._reactor = reactor
        self._engine = engine
        self._threads = threads
        self._together = together
        self._cache = cache
        self._pool = ThreadPool(minthreads=0, maxthreads=threads, name=name)
        self._waiting: deque[QueuedCall] = deque()
        self._draining = 0
        self._lock = threading.Lock()
        #: What runs: since when (`time.monotonic`), and on which connection of the driver.
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
        """End the threads; blocks until what they run has ended."""
        self._ended.set()
        self._pool.stop()

    def give_up(self) -> None:
        """Carry out no more: what waits fails with `DatabaseClosedError`, what is under way is cut off."""
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
                # All are at work, and look here again before they rest.
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
        """What this thread does next; nothing ends it."""
        with self._lock:
            if not self._waiting:
                self._draining -= 1
            return [self._waiting.popleft() for _ in range(min(self._together, len(self._waiting)))]

    def _run_together(self, calls: Sequence[QueuedCall]) -> bool:
        """Run several functions in one transaction; False if it came to nothing, whatever the reason."""
        try:
            self._run_transaction(calls)
        except Exception:
            # Each of them has its own trial next, and its own error if it is the one to blame.
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
        """Fail all that waited for the database while it could not be used: each would wait as long again."""
        for call in calls:
            self._reactor.callFromThread(call.result.errback, Failure(outage))

    def _run_transaction(self, calls: Sequence[QueuedCall]) -> None:
        """Run functions in one transaction, commit it, and let their results be delivered."""
        commit = 0
        records: Mapping[int, JobRecord] = {}
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
                records = written_jobs(session)
                if records:
                    commit = self._cache.begin_write(records)
                for call in calls:
                    call.committing = True
        except BaseException:
            self._cache.end_write(commit, records, committed=False)
            raise
        self._reactor.callFromThread(self._deliver, calls, commit, records)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        """A connection that is known while it is used: it may have to be cut."""
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
        """The server ends what takes too long, unless it is the server, or the way to it, that hangs."""
        while not self._ended.wait(_CHECK_EVERY_S):
            before = time.monotonic() - (self._transaction_s or 0.0)
            with self._lock:
                # Under the lock: a connection that is free again may be another transaction's.
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

    def _deliver(self, calls: Sequence[QueuedCall], commit: int, records: Mapping[int, JobRecord]) -> None:
        # First: whoever is told below that its work is done must find it done.
        self._cache.end_write(commit, records, committed=True)
        for call in calls:
            if call.seconds > _SLOW_S:
                self._log.warn("transaction {name!r} took {seconds:.1f} s", name=call.name, seconds=call.seconds)
            call.result.callback(call.outcome)


def _max_tries(error: Exception, *, committing: bool = False) -> int:
    """How often a transaction is run that fails so."""
    if isinstance(error, sa.exc.IntegrityError):
        # Another transaction inserted the same at the same moment: the second run finds it there.
        return _MAX_TRIES
    if not isinstance(error, sa.exc.DBAPIError):
        return 1
    if getattr(error.orig, "sqlstate", None) in _RETRYABLE_STATES:
        return _MAX_TRIES
    if error.connection_invalidated:
        # PostgreSQL: the next connection may be good; but a commit that was sent may have gone through unanswered.
        return 1 if committing else _MAX_TRIES_LOCKED
    # SQLite: another process (a backup, somebody's shell) holds the file.
    return _MAX_TRIES_LOCKED if "database is locked" in str(error.orig) else 1

"""A lane of database threads: functions in, one transaction each, or one commit for all that wait.

A function that is given to a lane must be repeatable: where its transaction fails for a reason that passes, or where
another function of the same commit fails, it is rolled back and run again.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
from pdm.workqueue.store.availability import unavailable
from pdm.workqueue.store.job_memory import JobMemory, written

_MOST_TRIES = 6
#: SQLite has waited for its busy timeout by then.
_MOST_TRIES_LOCKED = 2
_FIRST_PAUSE_S = 0.01
#: A transaction that takes longer is told of in the log.
_SLOW_S = 1.0
#: PostgreSQL: serialization failure, deadlock.
_PASSING_STATES = frozenset({"40001", "40P01"})


@define(eq=False)
class Work:
    """A function that waits for its transaction."""

    name: str
    function: Callable[[Session], Any]
    result: Deferred[Any] = field(factory=Deferred)
    seconds: float = 0.0
    outcome: Any = None

    def run(self, session: Session) -> None:
        began = time.perf_counter()
        try:
            self.outcome = self.function(session)
        finally:
            self.seconds = time.perf_counter() - began


class Lane:
    """Runs functions in threads, each in a transaction.

    Args:
        reactor: gets the results.
        engine: of the database.
        threads: how many run at once.
        together: how many functions may share a commit; those that wait do.
        name: of the threads.
        memory: is told of the jobs that are written.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IReactorFromThreads,
        engine: sa.Engine,
        threads: int,
        together: int,
        name: str,
        memory: JobMemory,
    ) -> None:
        self._reactor = reactor
        self._engine = engine
        self._threads = threads
        self._together = together
        self._memory = memory
        self._pool = ThreadPool(minthreads=0, maxthreads=threads, name=name)
        self._waiting: deque[Work] = deque()
        self._draining = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        self._pool.start()

    def stop(self) -> None:
        """End the threads; blocks until what they run has ended."""
        self._pool.stop()

    def submit(self, work: Work) -> None:
        """Queue a function; its Deferred fires in the reactor thread, after the commit."""
        with self._lock:
            self._waiting.append(work)
            if self._draining == self._threads:
                # All are at work, and look here again before they rest.
                return
            self._draining += 1
        self._pool.callInThread(self._drain)

    # -- in a thread

    def _drain(self) -> None:
        try:
            while works := self._next():
                if len(works) > 1 and self._shared(works):
                    continue
                for work in works:
                    self._alone(work)
        except BaseException:
            with self._lock:
                self._draining -= 1
            raise

    def _next(self) -> Sequence[Work]:
        """What this thread does next; nothing ends it."""
        with self._lock:
            if not self._waiting:
                self._draining -= 1
            return [self._waiting.popleft() for _ in range(min(self._together, len(self._waiting)))]

    def _shared(self, works: Sequence[Work]) -> bool:
        """Run several functions in one transaction; False if it came to nothing, whatever the reason."""
        try:
            self._transact(works)
        except Exception:
            # Each of them has its own trial next, and its own error if it is the one to blame.
            return False
        return True

    def _alone(self, work: Work) -> None:
        for tries in range(1, _MOST_TRIES + 1):
            try:
                self._transact([work])
            except Exception as error:
                if tries < _most_tries(error):
                    time.sleep(_FIRST_PAUSE_S * 2**tries * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries
                    continue
                outage = unavailable(error)
                if outage is None:
                    self._reactor.callFromThread(work.result.errback, Failure())
                else:
                    outage.__cause__ = error
                    self._give_up([work] if outage.alone else [work, *self._take_waiting()], outage)
            return

    def _take_waiting(self) -> Sequence[Work]:
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
            return waiting

    def _give_up(self, works: Sequence[Work], outage: Exception) -> None:
        """Fail all that waited for the database while it could not be used: each would wait as long again."""
        for work in works:
            self._reactor.callFromThread(work.result.errback, Failure(outage))

    def _transact(self, works: Sequence[Work]) -> None:
        """Run functions in one transaction, commit it, and let their results be delivered."""
        commit = 0
        records: Mapping[int, JobRecord] = {}
        try:
            with Session(self._engine, autoflush=False, expire_on_commit=False) as session, session.begin():
                for work in works:
                    work.run(session)
                records = written(session)
                if records:
                    commit = self._memory.doubt(records)
        except BaseException:
            self._memory.settle(commit, records, committed=False)
            raise
        self._reactor.callFromThread(self._fire, works, commit, records)

    # -- in the reactor thread

    def _fire(self, works: Sequence[Work], commit: int, records: Mapping[int, JobRecord]) -> None:
        # First: whoever is told below that its work is done must find it done.
        self._memory.settle(commit, records, committed=True)
        for work in works:
            if work.seconds > _SLOW_S:
                self._log.warn("transaction {name!r} took {seconds:.1f} s", name=work.name, seconds=work.seconds)
            work.result.callback(work.outcome)


def _most_tries(error: Exception) -> int:
    """How often a transaction is run that fails so."""
    if isinstance(error, sa.exc.IntegrityError):
        # Another transaction inserted the same at the same moment: the second run finds it there.
        return _MOST_TRIES
    if not isinstance(error, sa.exc.DBAPIError):
        return 1
    if getattr(error.orig, "sqlstate", None) in _PASSING_STATES:
        return _MOST_TRIES
    # SQLite: another process (a backup, somebody's shell) holds the file. PostgreSQL: the connection was cut, and the
    # next one may be good.
    locked = "database is locked" in str(error.orig)
    return _MOST_TRIES_LOCKED if locked or error.connection_invalidated else 1

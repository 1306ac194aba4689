"""The database as the rest of the daemon uses it: functions run in threads, results arrive on the reactor."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger
from twisted.python.failure import Failure

from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.store import engines, events, jobs
from pdm.workqueue.store.engines import DEFAULT_TIMEOUTS, DatabaseTimeouts, Engines, make_engines
from pdm.workqueue.store.errors import (
    Availability,
    DatabaseClosedError,
    DatabaseMissingError,
    DatabaseUnavailableError,
    DatabaseUnusableError,
    SchemaTooNewError,
)
from pdm.workqueue.store.jobs import MOST_JOBS, JobCache
from pdm.workqueue.store.signals import NotedSignal, SignalConnection
from pdm.workqueue.store.transaction_threads import QueuedCall, TransactionThreads
from pdm.workqueue.telemetry.metrics import DB_SECONDS, OTHER, HistogramTally

__all__ = [
    "Database",
    "DatabaseClosedError",
    "DatabaseTimeouts",
    "DatabaseUnavailableError",
    "DatabaseUnusableError",
    "SchemaTooNewError",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Database:
    """Runs functions in transactions, off the reactor.

    Functions take a session first, belong to `pdm.workqueue.store` and must be repeatable. Cancelling the caller does
    not cancel the transaction.
    """

    _log = Logger()

    def __init__(self, reactor: IReactorFromThreads, engines: Engines) -> None:
        self._engines = engines
        # No cache for a shared database: other daemons change it, too.
        self._cache = JobCache(0 if engines.shared else MOST_JOBS)
        # Hanging PostgreSQL transactions are cut off. SQLite waits only for the lock of its file, which has a timeout.
        hangs_s = engines.timeouts.transaction_s if engines.shared else None
        threads = partial(
            TransactionThreads,
            reactor=reactor,
            cache=self._cache,
            on_written=self._tell_waiting,
            transaction_s=hangs_s,
        )
        self._writer = threads(
            engine=engines.writer, threads=engines.writers, together=engines.together, name="database-writer"
        )
        self._reader = threads(engine=engines.reader, threads=engines.readers, together=1, name="database-reader")
        # A thread and a connection of its own, where possible: nothing may delay the renewal of the lease.
        self._lease = threads(engine=engines.lease, threads=1, together=1, name="database-lease")
        #: Durations of transactions, by name.
        self.durations: HistogramTally[str] = HistogramTally(DB_SECONDS, OTHER)
        self._writing = Availability("writing", time.monotonic)
        self._reading = Availability("reading", time.monotonic)
        self._open = False
        self._under_way = 0
        self._idle: Deferred[None] | None = None
        #: Called with each job that has ended and for which others wait.
        self.on_awaited_end: Callable[[int], None] = lambda job_id: None
        #: Called after each commit that has written events.
        self.on_events: Callable[[], None] = lambda: None
        #: Called after each commit with the signals for other daemons that it has noted.
        self.on_signals: Callable[[Collection[NotedSignal]], None] = lambda signals: None
        #: Job → Deferreds that wait for the next commit that writes it.
        self._waiting: dict[int, set[Deferred[None]]] = {}

    @classmethod
    def open(
        cls,
        url: str,
        reactor: IReactorFromThreads,
        threads: int = 4,
        timeouts: DatabaseTimeouts = DEFAULT_TIMEOUTS,
    ) -> Database:
        """The database of an SQLAlchemy URL for SQLite or PostgreSQL; nothing is connected yet.

        Raises:
            DatabaseUrlError: the URL cannot work.
        """
        return cls(reactor, make_engines(url, threads, timeouts))

    @property
    def is_shared(self) -> bool:
        """Whether other daemons may use the database at the same time."""
        return self._engines.shared

    @property
    def file(self) -> Path | None:
        """The file of an SQLite database."""
        return None if self.is_shared else Path(str(self._engines.writer.url.database)).resolve()

    async def start(self) -> None:
        """Start the threads, and create or migrate the tables.

        Raises:
            DatabaseUnusableError: it cannot be opened, or has foreign tables; `SchemaTooNewError` if a newer version of
                the service has used it.
        """
        for pool in self._pools:
            pool.start()
        self._open = True
        try:
            # The exception informs the operator: there is no running service whose outage could be logged.
            await self._submit(self._writer, None, "migrate", _migrate)
        except (DatabaseUnavailableError, sa.exc.DBAPIError, OSError) as error:
            await self.stop()
            reason = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            where = self._engines.writer.url.render_as_string(hide_password=True)
            raise DatabaseMissingError(f"the database {where} cannot be opened: {_line(reason)}") from error
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Accept no more calls, wait for running transactions, close."""
        if not self._open:
            return
        self._open = False
        if self._under_way:
            self._idle = Deferred()
            await self._idle
        # No transaction runs: this joins idle threads.
        for pool in self._pools:
            pool.stop()
        self._engines.dispose()

    def give_up(self) -> None:
        """Fail all running, queued and future transactions, because stopping takes too long."""
        for pool in self._pools:
            pool.give_up()

    @property
    def _pools(self) -> tuple[TransactionThreads, ...]:
        return (self._writer, self._reader, self._lease)

    @property
    def unavailable(self) -> str | None:
        """Why the latest transactions failed; None while the database can be used."""
        return self._writing.reason or self._reading.reason

    async def run(
        self, name: str, function: Callable[Concatenate[Session, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Run a function in one transaction and wait for its commit.

        ``function``: takes the session, then the arguments.

        Raises:
            DatabaseClosedError: the service is stopping.
            DatabaseUnavailableError: the database is away, locked or full; that is logged.
        """
        return cast(_R, await self._submit(self._writer, self._writing, name, partial(_call, function, args, kwargs)))

    async def read(
        self, name: str, function: Callable[Concatenate[Session, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Like `run`, for a function that only reads; runs in parallel to the writers."""
        return cast(_R, await self._submit(self._reader, self._reading, name, partial(_call, function, args, kwargs)))

    async def run_for_lease(
        self, name: str, function: Callable[Concatenate[Session, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Like `run`, without queueing behind other writes; SQLite has one writer for all."""
        pool = self._lease if self.is_shared else self._writer
        return cast(_R, await self._submit(pool, self._writing, name, partial(_call, function, args, kwargs)))

    async def job(self, job_id: int) -> JobRecord | None:
        """A job as committed, None if there is none; reads the database only if the job is not cached.

        Raises:
            DatabaseClosedError: the service is stopping.
        """
        record = self._cache.get(job_id) if self._open else None
        if record is None:
            with self._cache.loading(job_id) as loading:
                record = loading.record = await self.read("fetch a job", jobs.fetch, job_id, None)
        return record

    def written(self, job_id: int) -> Deferred[None]:
        """Fires after the next commit of this daemon that writes a job; may be cancelled."""
        waiting: Deferred[None] = Deferred(partial(self._forget_waiting, job_id))
        self._waiting.setdefault(job_id, set()).add(waiting)
        return waiting

    def _forget_waiting(self, job_id: int, waiting: Deferred[None]) -> None:
        of_job = self._waiting.get(job_id, set())
        of_job.discard(waiting)
        if not of_job:
            self._waiting.pop(job_id, None)

    def signal_connection(self) -> SignalConnection | None:
        """A new connection for signals between daemons, not opened yet; None if the database is not shared."""
        return None if self._engines.signals is None else SignalConnection(self._engines.signals)

    def _tell_waiting(
        self, written: Mapping[int, JobRecord], has_events: bool, signals: Collection[NotedSignal]
    ) -> None:
        if signals:
            self.on_signals(signals)
        if has_events:
            self.on_events()
        for job_id, record in written.items():
            if record.is_awaited and record.status.is_final:
                self.on_awaited_end(job_id)
        if self._waiting:
            for job_id in written:
                for waiting in self._waiting.pop(job_id, ()):
                    if not waiting.called:
                        waiting.callback(None)

    def _submit(
        self, pool: TransactionThreads, availability: Availability | None, name: str, function: Callable[[Session], Any]
    ) -> Deferred[Any]:
        if not self._open:
            raise DatabaseClosedError(f"the database is closed; {name!r} was not carried out")
        call = QueuedCall(name, function)
        pool.submit(call)
        self._under_way += 1
        # The caller may cancel its own Deferred; the count of running transactions must not depend on that.
        watched: Deferred[Any] = Deferred()
        call.result.addBoth(self._ended, availability, name, watched, time.perf_counter())
        return watched

    def _ended(
        self, result: Any, availability: Availability | None, name: str, watched: Deferred[Any], began: float
    ) -> None:
        self._under_way -= 1
        self.durations.observe(name, time.perf_counter() - began)
        outage = result.value if isinstance(result, Failure) else None
        if availability is not None and isinstance(outage, DatabaseUnavailableError):
            availability.failed(outage)
        elif availability is not None and outage is None:
            availability.worked()
        if watched.called and isinstance(result, Failure) and not isinstance(outage, DatabaseUnavailableError):
            self._log.failure("transaction {name!r}, whose caller is gone, failed", failure=result, name=name)
        watched.callback(result)
        if self._idle is not None and not self._under_way:
            idle, self._idle = self._idle, None
            idle.callback(None)


def check_schema(session: Session) -> None:
    """Check that this version can work with the schema.

    Raises:
        DatabaseUnusableError: it is older than this version needs, or there is none.
    """
    outdated = engines.outdated_schema(session.connection())
    if outdated is not None:
        raise DatabaseUnusableError(f"the schema of the database is {outdated}, which is older than this version")


def _call(function: Callable[..., _R], args: tuple[Any, ...], kwargs: dict[str, Any], session: Session) -> _R:
    return function(session, *args, **kwargs)


def _line(reason: object) -> str:
    return " ".join(str(reason).split())


def _migrate(session: Session) -> None:
    engines.migrate(session.connection())
    events.repair_order(session)

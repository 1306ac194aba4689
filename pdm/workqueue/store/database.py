"""The database as the rest of the daemon uses it: functions run in threads, results arrive on the reactor."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import sqlalchemy as sa
from attrs import define
from sqlalchemy.orm import Session
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.store import events, jobs, schema_revisions
from pdm.workqueue.store.engines import DEFAULT_TIMEOUTS, DatabaseTimeouts, Engines, make_engines
from pdm.workqueue.store.errors import (
    DatabaseClosedError,
    DatabaseMissingError,
    DatabaseUnavailableError,
    DatabaseUnusableError,
    SchemaTooNewError,
)
from pdm.workqueue.store.jobs import MOST_JOBS, JobCache
from pdm.workqueue.store.leases import read_probe, write_probe
from pdm.workqueue.store.outages import Availability, DatabaseUse, RequestTransactions, request_transactions
from pdm.workqueue.store.signals import NotedSignal, SignalConnection
from pdm.workqueue.store.transaction_threads import QueuedCall, TransactionThreads
from pdm.workqueue.telemetry.background import Background, Periodic
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

#: Seconds after which an unavailable database is tried again: at the start, and for what must be stored.
_OPEN_AGAIN_AFTER_S = _STORE_AGAIN_AFTER_S = 1.0
#: Interval at which an unavailable database is tried, and waiting requests are looked at.
_WATCH_EVERY_S = 0.5


@define(eq=False)
class _Awaited:
    """A transaction whose caller, a request, does not wait for long.

    Attributes:
        give_up_at: monotonic seconds.
        result: of the caller.
    """

    pool: TransactionThreads
    call: QueuedCall
    give_up_at: float
    result: Deferred[Any]


class Database:
    """Runs functions in transactions, off the reactor.

    Functions take a session first, belong to `pdm.workqueue.store` and must be repeatable. Cancelling the caller does
    not cancel the transaction.

    During an outage, which a failed probe confirms, transactions fail at once, and only the probe is run, every half
    second, until it succeeds. The caller of a transaction that belongs to a request (`outages.begin_request`) gets an
    error after a while; the transaction itself is not cut off.
    """

    _log = Logger()

    def __init__(self, reactor: Any, engines: Engines) -> None:
        self._reactor = reactor
        self._engines = engines
        # No cache for a shared database: other daemons change it, too.
        self._cache = JobCache(0 if engines.shared else MOST_JOBS)
        threads = partial(TransactionThreads, reactor=reactor, cache=self._cache, on_written=self._tell_waiting)
        # Hanging PostgreSQL transactions are cut off. SQLite waits only for the lock of its file, which has a timeout.
        hangs_s = engines.timeouts.transaction_s if engines.shared else None
        renewal_hangs_s = engines.timeouts.of_renewal.transaction_s if engines.shared else None
        self._writer = threads(
            engine=engines.writer,
            threads=engines.writers,
            together=engines.together,
            name="database-writer",
            transaction_s=hangs_s,
        )
        self._reader = threads(
            engine=engines.reader,
            threads=engines.readers,
            together=1,
            name="database-reader",
            transaction_s=hangs_s,
            may_write=False,
        )
        # A thread and a connection of its own, where possible: nothing may delay the renewal of the lease.
        self._lease = threads(
            engine=engines.lease, threads=1, together=1, name="database-lease", transaction_s=renewal_hangs_s
        )
        self.availability = Availability(seconds=time.monotonic)
        #: Name of the worker whose row the probe of an outage writes.
        self.probed_worker = ""
        self._watch = Periodic(reactor, "watch the database", _WATCH_EVERY_S, self._watch_once)
        self._probes = Background()
        self._probing: set[DatabaseUse] = set()
        #: In the order of their begin.
        self._awaited: dict[QueuedCall, _Awaited] = {}
        #: Durations of transactions, by name.
        self.durations: HistogramTally[str] = HistogramTally(DB_SECONDS, OTHER)
        self._open = False
        self._is_given_up = False
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
        reactor: Any,
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

    async def start(self, wait_s: float = 0.0) -> None:
        """Start the threads, and create or migrate the tables.

        ``wait_s``: how long to wait for a database that is away, which is logged; may be cancelled.

        Raises:
            DatabaseUnusableError: it cannot be opened, or has foreign tables; `SchemaTooNewError` if a newer version of
                the service has used it.
        """
        for pool in self._pools:
            pool.start()
        self._open = True
        try:
            # The exception informs the operator: there is no running service whose outage could be logged.
            await self._wait_and_migrate(wait_s)
            self._watch.start()
        except (DatabaseUnavailableError, sa.exc.DBAPIError, OSError) as error:
            await self.stop()
            reason = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            where = self._engines.writer.url.render_as_string(hide_password=True)
            raise DatabaseMissingError(f"the database {where} cannot be opened: {_line(reason)}") from error
        except BaseException:
            await self.stop()
            raise

    async def _wait_and_migrate(self, wait_s: float) -> None:
        give_up_at = time.monotonic() + wait_s
        is_waiting = False
        while True:
            try:
                await self._submit(self._writer, None, "migrate", _migrate)
            except DatabaseUnavailableError as error:
                if error.needs_operator or time.monotonic() >= give_up_at:
                    raise
                if not is_waiting:
                    is_waiting = True
                    self._log.error(
                        "the database {url} cannot be opened: {why}; the start waits for it for up to {seconds:.0f} s",
                        url=self._engines.writer.url.render_as_string(hide_password=True),
                        why=_line(error),
                        seconds=wait_s,
                    )
                await deferLater(self._reactor, _OPEN_AGAIN_AFTER_S)
            else:
                return

    async def stop(self) -> None:
        """Accept no more calls, wait for running transactions, close."""
        if not self._open:
            return
        self._open = False
        await self._watch.stop()
        if self._under_way:
            self._idle = Deferred()
            await self._idle
        await self._probes.over()
        self.availability.close()
        # No transaction runs: this joins idle threads.
        for pool in self._pools:
            pool.stop()
        self._engines.dispose()

    def give_up(self) -> None:
        """Fail all running, queued and future transactions, because stopping takes too long."""
        self._is_given_up = True
        for pool in self._pools:
            pool.give_up()

    @property
    def _pools(self) -> tuple[TransactionThreads, ...]:
        return (self._writer, self._reader, self._lease)

    @property
    def unavailable(self) -> str | None:
        """Why the latest transactions failed; None while the database can be used."""
        return self.availability.reason

    async def run(
        self, name: str, function: Callable[Concatenate[Session, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Run a function in one transaction and wait for its commit.

        ``function``: takes the session, then the arguments.

        Raises:
            DatabaseClosedError: the service is stopping.
            DatabaseUnavailableError: the database is away, locked or full; that is logged.
        """
        transaction = partial(_call, function, args, kwargs)
        return cast(_R, await self._submit(self._writer, DatabaseUse.WRITING, name, transaction))

    async def read(
        self, name: str, function: Callable[Concatenate[Session, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Like `run`, for a function that only reads; runs in parallel to the writers."""
        transaction = partial(_call, function, args, kwargs)
        return cast(_R, await self._submit(self._reader, DatabaseUse.READING, name, transaction))

    async def run_for_lease(
        self, name: str, function: Callable[Concatenate[Session, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Like `run`, without queueing behind other writes; SQLite has one writer for all."""
        pool = self._lease if self.is_shared else self._writer
        transaction = partial(_call, function, args, kwargs)
        return cast(_R, await self._submit(pool, DatabaseUse.WRITING, name, transaction))

    async def store(
        self, name: str, function: Callable[Concatenate[Session, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Like `run`, for what has happened and cannot be repeated: waits for the end of an outage.

        ``function``: may be carried out twice, if the answer of its first commit is lost.
        """
        while True:
            try:
                return await self.run(name, function, *args, **kwargs)
            except DatabaseUnavailableError:
                await deferLater(self._reactor, _STORE_AGAIN_AFTER_S)

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
        """Fires after the next commit of this daemon that writes a job, or `written_elsewhere`; may be cancelled."""
        waiting: Deferred[None] = Deferred(partial(self._forget_waiting, job_id))
        self._waiting.setdefault(job_id, set()).add(waiting)
        return waiting

    @property
    def has_waiting(self) -> bool:
        """Whether the next commit of any job is waited for."""
        return bool(self._waiting)

    def written_elsewhere(self, job_id: int) -> None:
        """Another daemon may have written a job."""
        for waiting in self._waiting.pop(job_id, ()):
            if not waiting.called:
                waiting.callback(None)

    def _forget_waiting(self, job_id: int, waiting: Deferred[None]) -> None:
        of_job = self._waiting.get(job_id, set())
        of_job.discard(waiting)
        if not of_job:
            self._waiting.pop(job_id, None)

    def forget(self, numbers: Collection[int]) -> None:
        """Drop jobs from the cache, because they were purged."""
        self._cache.forget(numbers)

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
                self.written_elsewhere(job_id)

    def _submit(
        self,
        pool: TransactionThreads,
        use: DatabaseUse | None,
        name: str,
        function: Callable[[Session], Any],
        *,
        is_probe: bool = False,
    ) -> Deferred[Any]:
        if not self._open or self._is_given_up:
            raise DatabaseClosedError(f"the database is closed; {name!r} was not carried out")
        if use is not None and not is_probe and pool is not self._lease:
            reason = self.availability.refusal(use)
            if reason is not None:
                error = DatabaseUnavailableError(reason)
                self.availability.failed(use, error)
                raise error
        call = QueuedCall(name, function, is_probe)
        pool.submit(call)
        self._under_way += 1
        # The caller may cancel its own Deferred; the count of running transactions must not depend on that.
        watched: Deferred[Any] = Deferred()
        request = request_transactions()
        if request is not None:
            self._awaited[call] = _Awaited(pool, call, time.monotonic() + request.longest_s, watched)
        call.result.addBoth(self._ended, call, pool, use, request, watched, time.perf_counter())
        return watched

    def _ended(
        self,
        result: Any,
        call: QueuedCall,
        pool: TransactionThreads,
        use: DatabaseUse | None,
        request: RequestTransactions | None,
        watched: Deferred[Any],
        began: float,
    ) -> None:
        self._under_way -= 1
        self.durations.observe(call.name, time.perf_counter() - began)
        outage = result.value if isinstance(result, Failure) else None
        if use is not None and isinstance(outage, DatabaseUnavailableError):
            self.availability.failed(use, outage, is_probe=call.is_probe)
            if not outage.alone:
                self._probe(use)
        elif use is not None and outage is None and pool is not self._lease:
            # A lease that is renewed proves nothing: its row may be the only one that can be written.
            self.availability.worked(use)
        if request is not None:
            request.has_written = request.has_written or (pool is self._writer and outage is None)
        is_given_up = request is not None and self._awaited.pop(call, None) is None
        if watched.called and isinstance(result, Failure) and not isinstance(outage, DatabaseUnavailableError):
            self._log.failure("transaction {name!r}, whose caller is gone, failed", failure=result, name=call.name)
        if not is_given_up:
            watched.callback(result)
        if self._idle is not None and not self._under_way:
            idle, self._idle = self._idle, None
            idle.callback(None)

    # -- outages

    def _watch_once(self) -> None:
        self._give_up_waiting()
        self.availability.log_ends()
        for use in self.availability.failing:
            self._probe(use)

    def _give_up_waiting(self) -> None:
        """Fail the calls of requests that have waited for too long."""
        now = time.monotonic()
        for call, awaited in list(self._awaited.items()):
            if awaited.give_up_at > now:
                continue
            is_withdrawn = awaited.pool.withdraw(call)
            may_be_done = not is_withdrawn and awaited.pool is self._writer
            error = DatabaseUnavailableError(
                f"transaction {call.name!r} has not ended in time", alone=True, may_be_done=may_be_done
            )
            if is_withdrawn:
                call.result.errback(error)
                continue
            del self._awaited[call]
            self.availability.failed(DatabaseUse.WRITING, error)
            if not awaited.result.called:
                awaited.result.errback(error)

    def suspect(self) -> None:
        """Find out whether the database is away: a connection of another kind is lost."""
        self._probe(DatabaseUse.READING)

    def _probe(self, use: DatabaseUse) -> None:
        if self._open and not self._is_given_up and use not in self._probing:
            self._probing.add(use)
            self._probes.start("probe the database", self._probe_once(use))

    async def _probe_once(self, use: DatabaseUse) -> None:
        pool = self._writer if use is DatabaseUse.WRITING else self._reader
        probe = partial(write_probe, worker=self.probed_worker) if use is DatabaseUse.WRITING else read_probe
        try:
            await self._submit(pool, use, "probe", probe, is_probe=True)
        finally:
            self._probing.discard(use)


def _call(function: Callable[..., _R], args: tuple[Any, ...], kwargs: dict[str, Any], session: Session) -> _R:
    return function(session, *args, **kwargs)


def _line(reason: object) -> str:
    return " ".join(str(reason).split())


def _migrate(session: Session) -> None:
    schema_revisions.migrate(session.connection())
    events.repair_order(session)

"""Writes verdicts to the database, many in one transaction: whatever has come while the last one was under way."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from pdm.workqueue.domain.jobs import Verdict
from pdm.workqueue.store import claims
from pdm.workqueue.store.database import Database, DatabaseUnavailableError
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.telemetry.job_lines import log_ended

#: Verdicts of one transaction at most; bounds how long the writer is busy with them.
_MOST_AT_ONCE = 1000
_PAUSE_AFTER_ERROR_S = 1.0


class Settler:
    """Keeps each verdict until it is in the database.

    Args:
        reactor: times the pause after an error.
        database: where to.
        worker: whose claims are settled.
        clock: the present moment, UTC.
        on_settled: called after each transaction; with True if an attempt may have left a temporary file.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IReactorTime,
        database: Database,
        worker: str,
        clock: Callable[[], datetime],
        on_settled: Callable[[bool], None],
    ) -> None:
        self._reactor = reactor
        self._database = database
        self._worker = worker
        self._clock = clock
        self._on_settled = on_settled
        self._pending: list[Verdict] = []
        self._awaited = 0
        self._busy = False
        self._idle_waiters: list[Deferred[None]] = []
        self._abandoned = False

    def submit(self, verdict: Verdict, log_closed: Deferred[bool]) -> None:
        """Settle a verdict once its log is on disk; a log that could not be written does not hold it up.

        Args:
            verdict: what became of an attempt.
            log_closed: of the log store, which says itself when a log is not complete; never fails.
        """
        self._awaited += 1

        def ready(complete: bool) -> None:
            self._awaited -= 1
            self._pending.append(verdict)
            if not self._busy:
                self._busy = True
                start_background("settle", self._settle_all())

        log_closed.addCallback(ready)

    @property
    def backlog(self) -> int:
        """Verdicts that are not in the database yet."""
        return self._awaited + len(self._pending)

    async def drained(self) -> None:
        """Wait until every verdict handed in is settled."""
        while self._awaited or self._busy:
            waiter: Deferred[None] = Deferred()
            self._idle_waiters.append(waiter)
            await waiter

    def abandon(self) -> None:
        """Write no more: the lease is lost, or the database is being closed."""
        self._abandoned = True

    async def _settle_all(self) -> None:
        try:
            while self._pending and not self._abandoned:
                verdicts = self._pending[:_MOST_AT_ONCE]
                try:
                    settled = await self._database.run("settle", claims.settle, self._worker, verdicts, self._clock())
                except DatabaseUnavailableError:
                    await deferLater(self._reactor, _PAUSE_AFTER_ERROR_S)
                    continue
                except Exception:
                    # A full disk or a database that is away: what was proven stays in memory until it is back.
                    self._log.failure("{count} verdicts could not be stored; trying again", count=len(verdicts))
                    await deferLater(self._reactor, _PAUSE_AFTER_ERROR_S)
                    continue
                del self._pending[: len(verdicts)]
                for token in settled.lost:
                    self._log.warn(
                        "job {job} element {element} attempt {attempt}: result dropped, the claim was lost",
                        job=token.job_id,
                        element=token.element_id,
                        attempt=token.attempt,
                    )
                for job in settled.finished:
                    log_ended(job)
                self._on_settled(any(verdict.residue for verdict in verdicts))
        finally:
            self._busy = False
            waiters, self._idle_waiters = self._idle_waiters, []
            for waiter in waiters:
                waiter.callback(None)

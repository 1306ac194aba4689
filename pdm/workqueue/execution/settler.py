"""Writes verdicts to the database, many in one transaction: whatever has come while the last one was under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from pdm.workqueue.domain.jobs import Token, Verdict
from pdm.workqueue.store import claims
from pdm.workqueue.store.database import Database, DatabaseClosedError, DatabaseUnavailableError
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
        worker: the incarnation whose claims are settled.
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
        self._tokens: set[Token] = set()
        self._busy = False
        self._idle_waiters: list[Deferred[None]] = []

    def submit(self, verdict: Verdict, log_closed: Deferred[bool]) -> None:
        """Settle a verdict once its log is on disk; a log that could not be written does not hold it up.

        Args:
            verdict: what became of an attempt.
            log_closed: of the log store, which says itself when a log is not complete; never fails.
        """
        self._awaited += 1
        self._tokens.add(verdict.token)

        def ready(complete: bool) -> None:
            self._awaited -= 1
            self._pending.append(verdict)
            if not self._busy:
                self._busy = True
                start_background("settle", self._settle_all())

        log_closed.addCallback(ready)

    async def note_begun(self, token: Token, found: Mapping[str, Any]) -> bool:
        """Keep what an attempt has found before it does anything; False if it must not, for its claim is lost."""
        return await self._database.run("note what is begun", claims.note_begun, self._worker, token, found)

    @property
    def backlog(self) -> int:
        """Verdicts that are not in the database yet."""
        return self._awaited + len(self._pending)

    def attempts(self) -> set[Token]:
        """Those whose results are not in the database yet."""
        return set(self._tokens)

    async def drained(self) -> None:
        """Wait until every verdict handed in is settled."""
        while self._awaited or self._busy:
            waiter: Deferred[None] = Deferred()
            self._idle_waiters.append(waiter)
            await waiter

    async def _settle_all(self) -> None:
        # After a fault, which may be a session that hangs and holds a job: the others need not wait for it.
        skip_locked = False
        at_once = _MOST_AT_ONCE
        try:
            while self._pending:
                verdicts = self._pending[:at_once]
                try:
                    settled = await self._database.run(
                        "settle", claims.settle, self._worker, verdicts, self._clock(), skip_locked=skip_locked
                    )
                except DatabaseClosedError:
                    self._log.error(
                        "{count} verdicts are lost, for the database took none: what they are about runs again",
                        count=len(self._pending),
                    )
                    self._pending.clear()
                    self._tokens.clear()
                    return
                except DatabaseUnavailableError:
                    skip_locked = True
                    await deferLater(self._reactor, _PAUSE_AFTER_ERROR_S)
                    continue
                except Exception:
                    # What was proven stays in memory. One that cannot be stored must not keep the others from it: each
                    # by itself, and that one last.
                    self._log.failure("{count} verdicts could not be stored; trying again", count=len(verdicts))
                    skip_locked = True
                    if len(verdicts) == 1:
                        self._pending.append(self._pending.pop(0))
                    at_once = 1
                    await deferLater(self._reactor, _PAUSE_AFTER_ERROR_S)
                    continue
                del self._pending[: len(verdicts)]
                at_once = min(2 * at_once, _MOST_AT_ONCE)
                self._tokens.difference_update(verdict.token for verdict in verdicts)
                for token in settled.lost:
                    if token not in settled.repeated:
                        self._log.warn(
                            "job {job} element {element} attempt {attempt}: result dropped, the claim was lost",
                            job=token.job_id,
                            element=token.element_id,
                            attempt=token.attempt,
                        )
                for job in settled.finished:
                    log_ended(job)
                self._on_settled(any(verdict.residue for verdict in verdicts))
                skip_locked = bool(settled.passed_over)
                if settled.passed_over:
                    self._tokens.update(verdict.token for verdict in settled.passed_over)
                    is_stuck = not self._pending
                    self._pending += settled.passed_over
                    if is_stuck:
                        await deferLater(self._reactor, _PAUSE_AFTER_ERROR_S)
        finally:
            self._busy = False
            waiters, self._idle_waiters = self._idle_waiters, []
            for waiter in waiters:
                waiter.callback(None)

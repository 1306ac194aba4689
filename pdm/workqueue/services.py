"""The order in which the daemon's parts start and stop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from attrs import frozen
from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from pdm.workqueue.telemetry.background import ReportedError

LifecycleStep = Callable[[], Awaitable[object] | None]


@frozen
class DaemonComponent:
    """One part of the daemon: its name for the log, how it starts, how it stops.

    A start that is interruptible may be cancelled, and leaves nothing to stop then.
    """

    name: str
    start: LifecycleStep
    stop: LifecycleStep
    interruptible: bool


async def _run_step(step: LifecycleStep) -> None:
    result = step()
    if result is not None:
        await result


class OrderedServices(Service):
    """Starts its parts one after the other and stops them in reverse, awaiting each.

    Twisted's ``MultiService`` waits for none of them: it would claim work before the database is open, and close the
    database before the last results are written.

    Args:
        on_failed: called with the failure when a part could not start; those before it have been stopped by then.
    """

    _log = Logger()

    def __init__(self, on_ready: Callable[[], None], on_failed: Callable[[Failure], None]) -> None:
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._parts: list[DaemonComponent] = []
        self._started: list[DaemonComponent] = []
        self._stop_asked = False
        self._interruptible: Deferred[None] | None = None
        self._start_ended: Deferred[None] = Deferred()

    def add(
        self,
        name: str,
        *,
        start: LifecycleStep = lambda: None,
        stop: LifecycleStep = lambda: None,
        interruptible: bool = False,
    ) -> None:
        """Add a part; it starts after those added before it."""
        self._parts.append(DaemonComponent(name, start, stop, interruptible))

    def startService(self) -> None:
        super().startService()
        starting = Deferred.fromCoroutine(self._start())
        starting.addErrback(self._on_failed)
        starting.addErrback(lambda failure: self._log.failure("after a failed start", failure))
        starting.addBoth(lambda _: self._start_ended.callback(None))

    def stopService(self) -> Deferred[None]:
        """Stop what has started; a running start ends after its current part, or before."""
        super().stopService()
        self._stop_asked = True
        if self._interruptible is not None:
            self._interruptible.cancel()
        return Deferred.fromCoroutine(self._stop())

    async def _start(self) -> None:
        for part in self._parts:
            if self._stop_asked:
                return
            try:
                starting = Deferred.fromCoroutine(_run_step(part.start))
                if part.interruptible:
                    self._interruptible = starting
                await starting
            except CancelledError:
                # Only a stop cancels; it stops what had started.
                return
            except BaseException:
                await self._stop_started()
                raise
            self._interruptible = None
            self._started.append(part)
        if not self._stop_asked:
            self._on_ready()

    async def _stop(self) -> None:
        if not self._start_ended.called:
            waiting: Deferred[None] = Deferred()
            self._start_ended.addCallback(waiting.callback)
            await waiting
        await self._stop_started()

    async def _stop_started(self) -> None:
        while self._started:
            part = self._started.pop()
            try:
                await _run_step(part.stop)
            except ReportedError:
                self._log.info("{part} was stopped with an error that is already in the log", part=part.name)
            except Exception:  # the parts below must be stopped, whatever happened to this one
                self._log.failure("{part} did not stop cleanly", part=part.name)

"""The order in which the daemon's parts start and stop, and its state for systemd, by the protocol of sd_notify(3)."""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping

from attrs import frozen
from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from pdm.workqueue.telemetry.background import ReportedError

#: Longest interval between two messages.
_INTERVAL_S = 10.0
#: Messages within the timeout of the watchdog: one that is late or lost does no harm.
_PER_WATCHDOG = 3
#: A start and a stop may take so much longer, counted from each message: migrations and results take their time.
_EXTENSION_S = 60
#: systemd cuts nothing; a status is one line of a terminal.
_LONGEST_STATUS = 200


class ServiceManager:
    """Sends the state of the daemon to systemd; does nothing without ``NOTIFY_SOCKET``.

    Timed calls of the reactor feed the watchdog, which therefore also ends a daemon whose reactor hangs.
    """

    _log = Logger()

    def __init__(self, reactor: IReactorTime, environ: MutableMapping[str, str], pid: int) -> None:
        self._reactor = reactor
        # Removed: helpers inherit the environment.
        address = environ.pop("NOTIFY_SOCKET", "")
        timeout = environ.pop("WATCHDOG_USEC", "")
        meant = environ.pop("WATCHDOG_PID", str(pid)) == str(pid)
        self._address = b"\0" + address[1:].encode() if address.startswith("@") else address
        self._watchdog = timeout.isdecimal() and int(timeout) > 0 and meant
        self._interval_s = min(_INTERVAL_S, int(timeout) / 1e6 / _PER_WATCHDOG) if self._watchdog else _INTERVAL_S
        self._settled = False
        self._status: Callable[[], str] = str
        self._sent_status = ""
        self._timer: IDelayedCall | None = None

    def start(self) -> None:
        """Begin to send: until `ready` each message extends the timeout of the start."""
        if self._address and self._timer is None:
            self._tick()

    def ready(self, status: Callable[[], str]) -> None:
        """The daemon accepts requests; `status` returns a line that describes its state from now on."""
        self._settled = True
        self._status = status
        self._send("READY=1", *self._status_lines())

    def reloading(self) -> None:
        """Files are read again, until the next `reloaded`."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        self._send("READY=1")

    def stopping(self) -> None:
        """The daemon stops; each message extends the timeout of the stop."""
        self._settled = False
        self._status = lambda: "stopping"
        self._send("STOPPING=1", *self._status_lines())

    def stop(self) -> None:
        """Send nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = self._reactor.callLater(self._interval_s, self._tick)
        lines = self._status_lines()
        if self._watchdog:
            lines.append("WATCHDOG=1")
        if not self._settled:
            lines.append(f"EXTEND_TIMEOUT_USEC={_EXTENSION_S * 1_000_000}")
        self._send(*lines)

    def _status_lines(self) -> list[str]:
        status = " ".join(self._status().split())[:_LONGEST_STATUS]
        if status == self._sent_status:
            return []
        self._sent_status = status
        return [f"STATUS={status}"]

    def _send(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto("\n".join(lines).encode(errors="replace"), self._address)
        except OSError as error:
            # The next message follows soon; systemd ends the daemon if none arrives.
            self._log.warn("systemd takes no message: {error}", error=str(error))


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

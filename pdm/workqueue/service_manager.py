"""State of the daemon for systemd, by the protocol of sd_notify(3): ready, reloading, stopping, status, watchdog."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, MutableMapping

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

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

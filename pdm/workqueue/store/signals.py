"""Signals between the nodes that share a PostgreSQL database: LISTEN and NOTIFY.

Transactions note their signals (`note`), which are sent after the commit, by the connection that also listens. NOTIFY
within these transactions would serialize their commits: PostgreSQL holds one lock of the whole server from there to
the end of the commit, the flush of its log included. A signal that is lost with its sender costs the others one
polling interval.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.node_reports import Signal, SignalKind

_LISTEN = "LISTEN pdm_workqueue"
_NOTIFY = "SELECT pg_notify('pdm_workqueue', unnest(%s::text[]))"
_NOTED = "signals"

#: The kind of a signal, and the job that is concerned, if it is one.
NotedSignal = tuple[SignalKind, int | None]


class SignalsLostError(Exception):
    """The connection for signals is lost; the text is the reason in one line."""


def note(session: Session, kind: SignalKind, job: int | None = None) -> None:
    """Signal a change to the other nodes after this transaction has committed; without effect on SQLite."""
    session.info.setdefault(_NOTED, set()).add((kind, job))


def noted_signals(session: Session) -> Collection[NotedSignal]:
    """What a transaction has noted."""
    noted: Collection[NotedSignal] = session.info.get(_NOTED, ())
    return noted


class SignalConnection:
    """A connection that listens and sends. One thread uses it; any thread may `interrupt`.

    Args:
        engine: of PostgreSQL; its connection is kept for as long as it works.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._driver: Any = None
        # `ValueError`: of a socket that was closed.
        self._errors = (sa.exc.DBAPIError, engine.dialect.loaded_dbapi.Error, OSError, ValueError)
        self._received: list[str] = []
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def open(self) -> None:
        """Connect and listen.

        Raises:
            SignalsLostError: the database cannot be reached.
        """
        try:
            pooled = self._engine.raw_connection()
            self._driver = pooled.driver_connection
            # Out of the pool: this connection is never used for anything else.
            pooled.detach()
            self._driver.autocommit = True
            # Called with what arrives during `send`.
            self._driver.add_notify_handler(lambda notification: self._received.append(notification.payload))
            self._driver.execute(_LISTEN)
        except self._errors as error:
            self.close()
            raise SignalsLostError(_line(error)) from error

    def close(self) -> None:
        """Disconnect; it may be opened again."""
        driver, self._driver = self._driver, None
        self._received.clear()
        if driver is not None:
            with contextlib.suppress(Exception):
                driver.close()

    def interrupt(self) -> None:
        """End a running or the next `receive` early."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_writer, b"\0")

    def receive(self, timeout_s: float) -> Sequence[Signal]:
        """Wait for signals, those of this node included; none after the timeout or `interrupt`.

        Raises:
            SignalsLostError: the connection is lost.
        """
        try:
            server = self._driver.pgconn
            readable, _, _ = select.select([server.socket, self._wake_reader], [], [], max(timeout_s, 0.0))
            if self._wake_reader in readable:
                with contextlib.suppress(BlockingIOError):
                    while os.read(self._wake_reader, 4096):
                        pass
            if server.socket in readable:
                server.consume_input()
            while (notification := server.notifies()) is not None:
                self._received.append(notification.extra.decode())
        except self._errors as error:
            raise SignalsLostError(_line(error)) from error
        received, self._received = self._received, []
        return [signal for text in received if (signal := _decoded(text)) is not None]

    def send(self, signals: Collection[Signal]) -> None:
        """Send signals to all nodes.

        Raises:
            SignalsLostError: the connection is lost.
        """
        try:
            self._driver.execute(_NOTIFY, ([msgspec.json.encode(signal).decode() for signal in signals],))
        except self._errors as error:
            raise SignalsLostError(_line(error)) from error


_DECODER = msgspec.json.Decoder(Signal)


def _decoded(text: str) -> Signal | None:
    try:
        return _DECODER.decode(text)
    except msgspec.MsgspecError:
        # Of a newer version, or of another program: polling finds the change.
        return None


def _line(error: Exception) -> str:
    # Without SQL, which `DBAPIError` has in its text.
    return " ".join(str(getattr(error, "orig", None) or error).split())[:300] or type(error).__name__

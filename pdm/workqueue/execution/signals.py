"""Signals of other nodes, for the parts that act on them at once; their polling finds what a lost signal announced.

A thread keeps one connection to PostgreSQL, which listens and sends. On SQLite there are no other nodes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from attrs import define, field
from twisted.logger import Logger

from pdm.workqueue.domain.node_reports import Signal, SignalKind
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.signals import NotedSignal, SignalConnection, SignalsLostError
from pdm.workqueue.telemetry.background import run_in_thread

#: Pauses before a connection is tried again: the first, and the longest; each is twice the one before.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
#: Seconds between two signals of a kind, at least; later ones are sent together.
_SPACING_S = {SignalKind.WORK: 0.05, SignalKind.EVENTS: 0.1}
#: Jobs of one kind of signal; of more, one signal without a job is sent and delivered.
_MOST_JOBS = 100
#: When the service stops, the last signals have so many seconds.
_STOP_S = 1.0
#: A node hears its own signals; one that does not within this time hears none.
_HEARD_WITHIN_S = 10.0
_IDLE_S = 10.0
#: After so many lost connections in a row the log mentions it.
_LOSSES_MENTIONED = 3

#: Called in the reactor thread with the job that is concerned; None for none, for several, or for signals that may
#: have been lost.
SignalCallback = Callable[[int | None], None]


@define(eq=False)
class _PendingSignals:
    """Signals that wait: kind → jobs."""

    jobs: dict[SignalKind, set[int | None]] = field(factory=dict)

    def add(self, kind: SignalKind, job: int | None) -> None:
        jobs = self.jobs.setdefault(kind, set())
        if None in jobs or len(jobs) >= _MOST_JOBS:
            job = None
        if job is None:
            jobs.clear()
        jobs.add(job)


@define(eq=False, kw_only=True)
class SignalListener:
    """Sends the signals of this node, and calls subscribers with those of others.

    Attributes:
        by: incarnation of this node; its own signals are not delivered.
    """

    reactor: Any
    database: Database
    by: str
    _connection: SignalConnection | None = None
    _subscribers: dict[SignalKind, list[SignalCallback]] = field(factory=dict)
    _lock: threading.Lock = field(factory=threading.Lock)
    _outgoing: _PendingSignals = field(factory=_PendingSignals)
    _incoming: _PendingSignals = field(factory=_PendingSignals)
    _sent_at: dict[SignalKind, float] = field(factory=dict)
    _thread: threading.Thread | None = None
    _ending: threading.Event = field(factory=threading.Event)
    #: In a row.
    _losses: int = 0
    _has_warned: bool = False
    _log: Logger = field(factory=Logger)

    def subscribe(self, kind: SignalKind, callback: SignalCallback) -> None:
        """Call a function with each signal of a kind from other nodes, and after each time when some may be lost."""
        self._subscribers.setdefault(kind, []).append(callback)

    def start(self) -> None:
        self._connection = self.database.signal_connection()
        if self._connection is None:
            return
        self.database.on_signals = self.send
        self.send([(SignalKind.NODES, None)])
        self._thread = threading.Thread(target=self._run, args=(self._connection,), name="signals", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Send what waits, and end the thread."""
        self.database.on_signals = lambda signals: None
        if self._thread is not None and self._connection is not None:
            # What this node gives up is for others.
            self.send([(SignalKind.NODES, None), (SignalKind.WORK, None)])
            self._ending.set()
            self._connection.interrupt()
            # It may be connecting: the thread of a process that ends is not waited for.
            await run_in_thread(self._thread.join, _STOP_S)

    def send(self, signals: Collection[NotedSignal]) -> None:
        """Send signals soon; several of a kind may become one."""
        if self._connection is None:
            return
        with self._lock:
            # The thread knows of kinds that wait already.
            is_new = any(kind not in self._outgoing.jobs for kind, _ in signals)
            for kind, job in signals:
                self._outgoing.add(kind, job)
        if is_new:
            self._connection.interrupt()

    # -- in the thread

    def _run(self, connection: SignalConnection) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._ending.is_set():
            try:
                connection.open()
                self._restored()
                pause_s = _FIRST_PAUSE_S
                self._exchange(connection)
            except SignalsLostError as error:
                self._lost(error)
            finally:
                connection.close()
            self._ending.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _exchange(self, connection: SignalConnection) -> None:
        """Send and receive until the service stops.

        Raises:
            SignalsLostError: the connection is lost.
        """
        unheard_since: float | None = None
        is_heard = False
        while True:
            is_last = self._ending.is_set()
            wait_s, due = self._due(at_once=is_last)
            if due:
                self._send(connection, due)
                if unheard_since is None:
                    unheard_since = time.monotonic()
            if is_last:
                return
            received = connection.receive(0.0 if due else wait_s)
            is_heard = is_heard or any(signal.by == self.by for signal in received)
            self._receive([signal for signal in received if signal.by != self.by])
            if not is_heard and unheard_since is not None and time.monotonic() - unheard_since > _HEARD_WITHIN_S:
                is_heard = True
                self._warn_unheard()

    def _due(self, *, at_once: bool) -> tuple[float, list[Signal]]:
        """Seconds until something is to be sent, and what is to be sent now."""
        now = time.monotonic()
        wait_s = _IDLE_S
        due = []
        with self._lock:
            for kind in list(self._outgoing.jobs):
                left_s = self._sent_at.get(kind, 0.0) + _SPACING_S.get(kind, 0.0) - now
                if left_s > 0 and not at_once:
                    wait_s = min(wait_s, left_s)
                else:
                    self._sent_at[kind] = now
                    due += [Signal(kind, self.by, job) for job in self._outgoing.jobs.pop(kind)]
        return wait_s, due

    def _send(self, connection: SignalConnection, signals: Collection[Signal]) -> None:
        try:
            connection.send(signals)
        except SignalsLostError:
            with self._lock:
                for signal in signals:
                    self._outgoing.add(signal.kind, signal.job)
            raise

    def _receive(self, signals: Collection[Signal]) -> None:
        if not signals:
            return
        with self._lock:
            is_first = not self._incoming.jobs
            for signal in signals:
                self._incoming.add(signal.kind, signal.job)
        if is_first:
            self.reactor.callFromThread(self._deliver)

    def _restored(self) -> None:
        """Have all subscribers look at the database: signals may have been lost before this connection."""
        self._losses = 0
        if self._has_warned:
            self._has_warned = False
            self._log.info("changes by other nodes are announced again")
        self._receive([Signal(kind, "") for kind in self._subscribers])

    def _lost(self, error: SignalsLostError) -> None:
        if self._ending.is_set():
            return
        self._losses += 1
        if self._losses == 1:
            self.reactor.callFromThread(self.database.suspect)
        # An outage of the whole database has a line of its own.
        is_alone = self._losses >= _LOSSES_MENTIONED and self.database.unavailable is None
        if is_alone and not self._has_warned:
            self._has_warned = True
            self._log.warn(
                "the connection on which other nodes announce changes is lost ({why}); they are found by polling",
                why=str(error),
            )

    def _warn_unheard(self) -> None:
        self._log.warn(
            "PostgreSQL delivers no notifications, so that changes by other nodes are found by polling only:"
            " [database] url must not lead through a connection pooler in transaction mode"
        )

    # -- in the reactor thread

    def _deliver(self) -> None:
        with self._lock:
            received, self._incoming = self._incoming, _PendingSignals()
        for kind, jobs in received.jobs.items():
            for callback in self._subscribers.get(kind, ()):
                for job in jobs:
                    try:
                        callback(job)
                    except Exception:
                        self._log.failure("a signal {kind} was not handled", kind=kind)

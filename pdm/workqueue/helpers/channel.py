"""The batch that a helper works on, and its events to the daemon: one JSON object a line, on descriptor 3.

Descriptors 1 and 2 are not part of the protocol, so that output of a C library never becomes an event. Events that are
written within a few milliseconds share a write(2). A pipe that the daemon does not read blocks the writer
(back-pressure): at most one such write is buffered in memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import quote_from_bytes

import msgspec

from pdm.workqueue.domain.failures import FailureScope
from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.storage import StoppedError, StorageError, internal_error, truncated
from pdm.workqueue.wire.agent_events import (
    AgentEvent,
    BegunEvent,
    CancelledEvent,
    DoneEvent,
    EntriesEvent,
    FailedEvent,
    FinishedEvent,
    HandOverEvent,
    LogEvent,
    ProgressEvent,
    RawEntry,
    RootEvent,
    StartedEvent,
    TapeEvent,
    UnnamedEvent,
    UnreadableEvent,
)
from pdm.workqueue.wire.agent_requests import FoundBefore, ListRequest, PreservedAttribute, TapeRequest, WorkRequest

_EVENTS = 3
_MAX_LOG_LENGTH = 4000
#: How long an event may wait to be written together with others. A crash loses the unreported events, so it is short.
_COALESCE_S = 0.004
#: Interval at which an item that waits for the daemon checks whether it was cancelled.
_POLL_S = 0.1
_MAX_BUFFERED = 32 * 1024
_encoder = msgspec.json.Encoder()


class EventWriter:
    """Writes events; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._bytes = 0
        self._has_some = threading.Event()
        self._flushes_soon = False
        threading.Thread(target=self._flush_soon, name="events", daemon=True).start()

    def write(self, event: AgentEvent, *, at_once: bool = False) -> None:
        """Write one event, with those that wait; ends the process if the daemon has closed the pipe.

        Args:
            event: the event.
            at_once: whether it must be written without delay.
        """
        line = _encoder.encode(event) + b"\n"
        with self._lock:
            self._waiting.append(line)
            self._bytes += len(line)
            if at_once or self._bytes > _MAX_BUFFERED:
                self._flush()
            elif not self._flushes_soon:
                self._flushes_soon = True
                self._has_some.set()

    def flush(self) -> None:
        """Write waiting events."""
        with self._lock:
            self._flush()

    def _flush_soon(self) -> None:
        while True:
            self._has_some.wait()
            self._has_some.clear()
            while self._flushes_soon:
                # Many events follow each other: to be woken for each would cost more than to look again.
                time.sleep(_COALESCE_S)
                with self._lock:
                    self._flushes_soon = bool(self._waiting)
                    self._flush()

    def _flush(self) -> None:
        rest = memoryview(b"".join(self._waiting))
        self._waiting = []
        self._bytes = 0
        while rest:
            try:
                rest = rest[os.write(_EVENTS, rest) :]
            except BrokenPipeError:
                os._exit(1)


class ActiveBatch:
    """A running request: reports exactly one outcome for each key.

    Attributes:
        tape: the request, if it is one of a tape API.
    """

    def __init__(self, request: WorkRequest | TapeRequest, events: EventWriter) -> None:
        self.tape = request if isinstance(request, TapeRequest) else None
        self._request = request
        self.id = request.id
        if isinstance(request, (ListRequest, TapeRequest)):
            keys = [request.key]
        else:
            keys = [item.key for item in request.items]
        self._open: set[int] = set(keys)
        self._events = events
        self._lock = threading.Lock()
        self._stopping = threading.Lock()
        self._stopped = False
        self._on_stop: list[Callable[[], None]] = []
        self._ends_items = False
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._withdrawn: set[int] = set()
        self._on_end: list[Callable[[set[int]], None]] = []
        self._may_go = threading.Condition()
        self._going: set[int] = set()
        self._is_at_destination = False
        #: Whether a cancellation leaves alone what was handed over to another service.
        self.keeps_handed = False
        #: Bytes of the listed source files so far.
        self.listed_bytes = 0

    @property
    def request(self) -> WorkRequest:
        """The request, if it is one about a storage.

        Raises:
            TypeError: it is one of a tape API.
        """
        if isinstance(self._request, TapeRequest):
            raise TypeError("this helper speaks to no tape API")
        return self._request

    @property
    def stopped(self) -> bool:
        """Whether it was cancelled."""
        return self._stopped

    def open_keys(self) -> list[int]:
        """Keys without an outcome."""
        return sorted(self._open)

    def stop(self) -> None:
        """Cancel: start no more items, interrupt those that run."""
        with self._stopping:
            self._stopped = True
            for callback in self._on_stop:
                callback()
            # The daemon kills a helper that does not react to a cancel: write something at once.
            self._show_life(self.open_keys())

    def end(self, keys: Iterable[int]) -> None:
        """Cancel some items only, if possible; else the whole batch."""
        wanted = self._open.intersection(keys)
        if not self._ends_items or wanted == self._open:
            self.stop()
            return
        with self._stopping:
            with self._lock:
                self._ended |= wanted
                running = wanted & self._begun
            # Items that have not started never will: `started` returns False.
            for key in sorted(wanted - running):
                self.cancelled(key)
            for callback in self._on_end:
                callback(running)
            self._show_life(sorted(running))

    def withdraw(self, keys: Iterable[int]) -> None:
        """Cancel those of some items that have not started, once items can be ended alone; what runs continues."""
        with self._stopping:
            self._withdrawn.update(keys)
            if self._ends_items:
                self._end_withdrawn()

    def _end_withdrawn(self) -> None:
        with self._lock:
            waiting = (self._withdrawn & self._open) - self._begun
            self._ended |= waiting
        for key in sorted(waiting):
            self.cancelled(key)
        self.flush()

    def _show_life(self, keys: list[int]) -> None:
        with self._lock:
            # An item may have got its outcome meanwhile: report none twice.
            for key in [key for key in keys if key in self._open][:1]:
                self.log(key, "asked to stop")
        self.flush()

    def is_ended(self, key: int) -> bool:
        """Whether an item was cancelled, alone or with the batch."""
        return self._stopped or key in self._ended

    def ends_items(self, callback: Callable[[set[int]], None]) -> None:
        """Register a function for the keys of running items that are cancelled while others continue.

        The caller must not work on an item for which `started` returns False, and must end one for which `is_ended`
        returns True. Without such a function, cancelling an item cancels the whole batch.
        """
        with self._stopping:
            self._ends_items = True
            self._on_end.append(callback)
            if self._withdrawn:
                self._end_withdrawn()

    def leave_out(self, keys: Iterable[int]) -> None:
        """Remove items that have an outcome before the batch begins."""
        gone = set(keys)
        if not isinstance(self._request, (ListRequest, TapeRequest)):
            items = [item for item in self._request.items if item.key not in gone]
            self._request = msgspec.structs.replace(self._request, items=items)

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Register a function to be called when the batch is cancelled; called at once if it already is."""
        with self._stopping:
            self._on_stop.append(callback)
            if self._stopped:
                callback()

    def started(self, key: int) -> bool:
        """Report that an item starts; False if it must not, because it was cancelled."""
        lease.check()
        with self._lock:
            if key not in self._open or key in self._ended:
                return False
            self._begun.add(key)
        self._events.write(StartedEvent(self.id, key))
        return True

    def begin(self, key: int, found: FoundBefore, longest_s: float) -> None:
        """Report the state of the storage, and wait until the daemon has stored it, before a change is made.

        Args:
            key: of the item.
            found: the state.
            longest_s: seconds to wait at most.

        Raises:
            StoppedError: the item was cancelled.
            StorageError: the daemon did not answer.
        """
        self._announce(BegunEvent(self.id, key, found), longest_s)

    def hand_over(self, keys: list[int], job: str, longest_s: float) -> None:
        """Report which items are handed over to another service, and wait until the daemon has stored it.

        Args:
            keys: of the items.
            job: URL of the job there.
            longest_s: seconds to wait at most.

        Raises:
            StoppedError: the items were cancelled.
            StorageError: the daemon did not answer.
        """
        self._announce(HandOverEvent(self.id, keys[0], keys, job), longest_s)

    def _announce(self, event: BegunEvent | HandOverEvent, longest_s: float) -> None:
        key, until = event.key, time.monotonic() + longest_s
        with self._may_go:
            # An item may be handed over more than once.
            self._going.discard(key)
        self._events.write(event)
        self.flush()
        with self._may_go:
            while key not in self._going:
                if self.is_ended(key):
                    raise StoppedError
                left = until - time.monotonic()
                if left <= 0:
                    raise internal_error("the service did not confirm the start in time")
                self._may_go.wait(min(left, _POLL_S))

    def go(self, key: int) -> None:
        """The daemon has stored the state that was reported for an item."""
        with self._may_go:
            self._going.add(key)
            self._may_go.notify_all()

    def log(self, key: int, text: str) -> None:
        """Add a line to the log of an item without an outcome."""
        if key in self._open:
            self._events.write(LogEvent(self.id, key, truncated(text, _MAX_LOG_LENGTH)))

    def progress(self, key: int, transferred: int, instant: float, average: float, elapsed: float) -> None:
        """Report bytes, bytes/s now and on average, seconds."""
        self._events.write(ProgressEvent(self.id, key, transferred, instant, average, round(elapsed, 3)))

    @contextlib.contextmanager
    def listing_destination(self) -> Iterator[None]:
        """Context in which the destination of a copy is listed; events say so."""
        self._is_at_destination = True
        try:
            yield
        finally:
            self._is_at_destination = False

    @property
    def listed_scope(self) -> FailureScope:
        """The side that is listed now."""
        return FailureScope.DESTINATION if self._is_at_destination else FailureScope.SOURCE

    def entries(self, key: int, entries: list[RawEntry]) -> None:
        if not self._is_at_destination:
            self.listed_bytes += sum(entry.size for entry in entries)
        self._events.write(EntriesEvent(self.id, key, entries, self._is_at_destination))

    def unreadable(self, key: int, path: str, error: StorageError) -> None:
        fault = error.at(self.listed_scope).fault()
        self._events.write(UnreadableEvent(self.id, key, path, fault, self._is_at_destination))

    def root(self, key: int, path: bytes | None) -> None:
        if path is not None:
            self._events.write(RootEvent(self.id, key, quote_from_bytes(path, safe="/"), self._is_at_destination))

    def unnamed(self, key: int, path: str, count: int) -> None:
        self._events.write(UnnamedEvent(self.id, key, path, count, self._is_at_destination))

    def answer(self, event: TapeEvent) -> None:
        """Report the answer of a tape API, which is the outcome of its request."""
        self._events.write(event)
        self.done(event.key)

    def done(
        self,
        key: int,
        size: int = 0,
        transferred: int = 0,
        checksum: str | None = None,
        *,
        already_there: bool = False,
        not_preserved: tuple[PreservedAttribute, ...] = (),
        free: int | None = None,
    ) -> None:
        self._close(DoneEvent(self.id, key, size, transferred, checksum, already_there, not_preserved, free))

    def failed(self, key: int, error: StorageError, *, leftover: bool = False) -> None:
        self._close(FailedEvent(self.id, key, error.fault(), leftover))

    def cancelled(self, key: int, *, leftover: bool = False) -> None:
        self._close(CancelledEvent(self.id, key, leftover))

    def finish(self) -> None:
        """End the batch; a key without an outcome is a bug of the helper, and reported as one."""
        with self._stopping:
            # A cancel from now on must not interrupt the next batch.
            self._on_stop.clear()
            self._on_end.clear()
        for key in self.open_keys():
            self.failed(key, internal_error("the helper reported no result for this element"))
        self._events.write(FinishedEvent(self.id), at_once=True)

    def flush(self) -> None:
        """Write waiting events at once, for example before an operation that may end the process."""
        self._events.flush()

    def _close(self, outcome: DoneEvent | FailedEvent | CancelledEvent) -> None:
        with self._lock:
            if outcome.key not in self._open:
                return
            self._open.remove(outcome.key)
            self._events.write(outcome)

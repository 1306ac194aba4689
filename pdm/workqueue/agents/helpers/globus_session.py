"""A GridFTP client handle that keeps its connections, as blocking calls with time limits that can be interrupted.

The library calls back on its own threads. Each operation has a number, which is all that C ever holds of ours: an
operation that was given up can end later, or never, without touching anything new.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from ctypes import byref, c_size_t, c_void_p
from typing import Any

from pdm.workqueue.agents.helpers.globus_library import (
    Completed,
    DataArrived,
    GlobusError,
    GlobusLibrary,
    MarkerArrived,
    TransferBegan,
    TransferEnded,
)
from pdm.workqueue.agents.helpers.replies import error_from
from pdm.workqueue.agents.helpers.storage import StoppedError, StorageError

#: Seconds an aborted operation gets to end before its handle is left to itself.
_ABORT_GRACE_S = 0.4
#: A connection that was idle for so long may have been closed by the server.
_IDLE_S = 1.0
#: Seconds between two looks at a running transfer.
_TICK_S = 1.0
#: Servers send performance markers every 5 s: two of them may be missed.
_LEAST_MARKER_STALL_S = 11.0
_LISTING_BUFFER = 256 * 1024
#: Pieces of a listing that may arrive before the one that is due.
_MOST_EARLY_PIECES = 64

#: One piece of news of an operation: ("end", error text or None), ("data", offset, bytes, eof), ("lost",).
_News = tuple[Any, ...]


class _Operation:
    """An operation that is under way."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        #: Keeps what the library writes into alive for as long as it may write.
        self.arguments = arguments
        self.news: queue.SimpleQueue[_News] = queue.SimpleQueue()
        self.bytes_by_stripe: dict[int, int] = {}
        #: Whether it has ended, or was given up.
        self.over = False


class _Switchboard:
    """Passes what the library calls back on to the operation it is about."""

    def __init__(self, library: GlobusLibrary) -> None:
        self._library = library
        self._numbers = itertools.count(1)
        self._operations: dict[int, _Operation] = {}
        self.sessions: dict[int, Session] = {}
        # ctypes functions must outlive every handle, so they live as long as the process.
        self.completed = Completed(self._completed)
        self.data_arrived = DataArrived(self._data_arrived)
        self.began = TransferBegan(lambda *_: None)
        self.marker = MarkerArrived(self._marker)
        self.ended = TransferEnded(lambda *_: None)

    def add(self, operation: _Operation) -> int:
        number = next(self._numbers)
        self._operations[number] = operation
        return number

    def remove(self, number: int) -> None:
        self._operations.pop(number, None)

    def _completed(self, number: int, _handle: int, error: int | None) -> None:
        operation = self._operations.pop(number, None)
        if operation is not None:
            operation.news.put(("end", self._library.error_text(error) if error else None))

    def _data_arrived(
        self, number: int, _handle: int, error: int | None, buffer: int, length: int, offset: int, eof: int
    ) -> None:
        operation = self._operations.get(number)
        if operation is not None and not error:
            operation.news.put(("data", offset, ctypes.string_at(buffer, length), bool(eof)))

    def _marker(self, session: int, _handle: int, _at: int, _tenths: bytes, stripe: int, _of: int, count: int) -> None:
        operation = self.sessions[session].operation
        if operation is not None:
            operation.bytes_by_stripe[stripe] = count


class Globus:
    """The library, set up once in a process, and what all sessions share."""

    def __init__(self) -> None:
        self.library = GlobusLibrary()
        self.switchboard = _Switchboard(self.library)
        #: Whether a handle with open connections was left to itself.
        self.abandoned = False
        #: Servers that have connected to us for a listing, and those to which we must connect.
        self.lists_kept: set[str] = set()
        self.lists_stream: set[str] = set()
        #: When connections were last cut (`time.monotonic`).
        self.cut_at = 0.0
        self._cut_guard = threading.Lock()

    def cut(self) -> None:
        """Cut all connections, so that servers end what abandoned handles had asked for.

        Lanes that are interrupted together ask for it together: once is enough, and a connection that one of them has
        made since must live.
        """
        with self._cut_guard:
            if time.monotonic() - self.cut_at > _ABORT_GRACE_S:
                self.cut_at = time.monotonic()
                _close_all_connections()


class Session:
    """A handle of one lane: connections to source and destination stay open between operations.

    Used by one thread; `interrupt` may be called by any.
    """

    _numbers = itertools.count(1)

    def __init__(self, globus: Globus) -> None:
        self._globus = globus
        self._library = globus.library
        self._number = next(self._numbers)
        globus.switchboard.sessions[self._number] = self
        self._handle: c_void_p | None = None
        self.attributes = self._attributes()
        self._destination_attributes = self._attributes()
        self._stream_attributes = self._attributes(kept_channels=False)
        self._listing_buffer = ctypes.create_string_buffer(_LISTING_BUFFER)
        self._guard = threading.Lock()
        self._interrupted = False
        self.operation: _Operation | None = None
        #: When the last operation ended (`time.monotonic`).
        self.used_at = 0.0

    def _attributes(self, *, kept_channels: bool = True) -> c_void_p:
        attributes = c_void_p()
        self._library.call("operationattr_init", byref(attributes))
        if kept_channels:
            # Mode E keeps data channels between files; without it each file and listing pays a handshake.
            self._library.call("operationattr_set_mode", byref(attributes), ord("E"))
            self._library.call("operationattr_set_list_uses_data_mode", byref(attributes), 1)
        return attributes

    def _opened(self) -> c_void_p:
        if self._handle is None:
            attributes, plugin, handle = c_void_p(), c_void_p(), c_void_p()
            switchboard = self._globus.switchboard
            self._library.call("handleattr_init", byref(attributes))
            self._library.call("handleattr_set_cache_all", byref(attributes), 1)
            self._library.call(
                "perf_plugin_init",
                byref(plugin),
                switchboard.began,
                switchboard.marker,
                switchboard.ended,
                c_void_p(self._number),
            )
            self._library.call("handleattr_add_plugin", byref(attributes), byref(plugin))
            self._library.call("handle_init", byref(handle), byref(attributes))
            self._library.call("handleattr_destroy", byref(attributes))
            self._handle = handle
        return self._handle

    @property
    def may_be_dead(self) -> bool:
        """Whether the server, or we, may have closed its connections since the last operation."""
        if self.used_at == 0.0:
            return False
        return time.monotonic() - self.used_at > _IDLE_S or self._globus.cut_at >= self.used_at

    @property
    def connected(self) -> bool:
        """Whether it has connections, or is making them."""
        return self._handle is not None

    def drop(self) -> None:
        """Close the connections; the next operation makes new ones."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(GlobusError):
                self._library.call("handle_destroy", byref(handle))

    def interrupt(self) -> None:
        """Make the running operation, and every one before `resume`, end with `StoppedError`; returns at once."""
        with self._guard:
            self._interrupted = True
            operation = self.operation
            if operation is not None:
                self._abort()
                late = threading.Timer(_ABORT_GRACE_S, operation.news.put, (("lost",),))
                late.daemon = True
                late.start()

    def resume(self) -> None:
        self._interrupted = False

    def run(self, name: str, *arguments: Any, stall_s: float, until: float) -> None:
        """Carry out an operation of the library that answers once.

        Args:
            name: of the function, without its prefix.
            arguments: those between the handle and the callback.
            stall_s: seconds the answer may take.
            until: moment (`time.monotonic`) at which it is too late in any case.
        """
        with self._begun(name, arguments) as operation:
            self._conclude(operation, self._next(operation, stall_s, until, "no answer"))

    def transfer(
        self,
        source: bytes,
        destination: bytes,
        stall_s: float,
        until: float,
        arrived: Callable[[int], None],
        measure: Callable[[], int | None],
    ) -> None:
        """Have the bytes of a file sent from one server to the other.

        Args:
            source: URL.
            destination: URL.
            stall_s: seconds without a byte.
            until: moment (`time.monotonic`) at which it is too late in any case.
            arrived: called with the bytes that have arrived, while it goes on.
            measure: asked every second how long the file at the destination is, for markers come every 5 s only; None
                if that is not known.
        """
        arguments = (source, byref(self.attributes), destination, byref(self._destination_attributes), None)
        with self._begun("third_party_transfer", arguments) as operation:
            moved, moved_at = 0, time.monotonic()
            while True:
                with contextlib.suppress(queue.Empty):
                    self._conclude(operation, operation.news.get(timeout=_TICK_S))
                    return
                measured = measure()
                total = max(sum(list(operation.bytes_by_stripe.values())), measured or 0)
                now = time.monotonic()
                if total > moved:
                    moved, moved_at = total, now
                    arrived(total)
                limit_s = stall_s if measured is not None else max(stall_s, _LEAST_MARKER_STALL_S)
                if now - moved_at > limit_s:
                    raise self._given_up(operation, f"no byte arrived for {limit_s:.0f} s", "STALLED")
                if now > until:
                    why = f"not finished in time; {moved} bytes had arrived"
                    raise self._given_up(operation, why, "TIMEOUT")

    def listing(self, url: bytes, stall_s: float, until: float, *, stream: bool) -> Generator[bytes, None, None]:
        """What a server sends for MLSD, in pieces; one piece is read ahead, no more.

        Args:
            url: of the directory.
            stall_s: seconds without a piece.
            until: moment (`time.monotonic`) at which it is too late in any case.
            stream: whether we connect to the server, which passes every firewall; else it connects to us, and keeps
                that connection for the next listing, which is ten times faster.
        """
        arguments = (url, byref(self._stream_attributes if stream else self.attributes))
        complete = False
        try:
            with self._begun("machine_list", arguments) as operation:
                number = operation.arguments[-1]
                self._read_on(number)
                due = 0
                early: dict[int, bytes] = {}
                while True:
                    news = self._next(operation, stall_s, until, "no more of the listing")
                    if news[0] != "data":
                        self._conclude(operation, news)
                        break
                    _, offset, piece, eof = news
                    if not eof:
                        self._read_on(number)
                    early[offset] = early.get(offset, b"") + piece
                    while due in early:
                        ready = early.pop(due)
                        if not ready:
                            break
                        due += len(ready)
                        yield ready
                    if len(early) > _MOST_EARLY_PIECES:
                        raise StorageError("the pieces of the listing come in no order", code="BAD_LISTING")
            complete = True
        finally:
            if not complete:
                # After a listing that failed or was left the handle says "not in the proper state" for ever.
                self._drop_when_idle()

    def _read_on(self, number: int) -> None:
        with contextlib.suppress(GlobusError):
            # Refused when the listing has failed already: its end is on its way.
            self._library.call(
                "register_read",
                byref(self._opened()),
                self._listing_buffer,
                c_size_t(_LISTING_BUFFER),
                self._globus.switchboard.data_arrived,
                c_void_p(number),
            )

    @contextlib.contextmanager
    def _begun(self, name: str, arguments: tuple[Any, ...]) -> Iterator[_Operation]:
        switchboard = self._globus.switchboard
        with self._guard:
            if self._interrupted:
                raise StoppedError
            operation = _Operation(arguments)
            number = switchboard.add(operation)
            try:
                handle = self._opened()
                operation.arguments = (*arguments, handle, number)
                self.operation = operation
                self._library.call(name, byref(handle), *arguments, switchboard.completed, c_void_p(number))
            except GlobusError as error:
                self.operation = None
                switchboard.remove(number)
                self.drop()
                raise error_from(str(error)) from None
        try:
            yield operation
        finally:
            if not operation.over:
                # The reader of a listing has gone.
                self._end_early(operation)
            with self._guard:
                self.operation = None
            self.used_at = time.monotonic()

    def _conclude(self, operation: _Operation, news: _News) -> None:
        """Turn the last news of an operation into success or an exception."""
        operation.over = True
        if news[0] == "lost":
            self._abandon()
            self._globus.cut()
            raise StoppedError
        error = news[1]
        if self._interrupted:
            if error is not None:
                self.drop()
            raise StoppedError
        if error is not None:
            trouble = error_from(error)
            if trouble.lost:
                self.drop()
            raise trouble

    def _next(self, operation: _Operation, stall_s: float, until: float, what: str) -> _News:
        """The next news, or the end of patience."""
        left_s = until - time.monotonic()
        try:
            return operation.news.get(timeout=max(min(stall_s, left_s), 0.001))
        except queue.Empty:
            if left_s < stall_s:
                raise self._given_up(operation, f"{what} in time", "TIMEOUT") from None
            raise self._given_up(operation, f"{what} for {stall_s:.0f} s", "STALLED") from None

    def _given_up(self, operation: _Operation, message: str, code: str) -> StorageError | StoppedError:
        self._end_early(operation)
        return StoppedError() if self._interrupted else StorageError(message, code=code, lost=True)

    def _end_early(self, operation: _Operation) -> None:
        """End an operation that would go on; leave the handle to itself if it does not end."""
        operation.over = True
        self._abort()
        deadline = time.monotonic() + _ABORT_GRACE_S
        while True:
            try:
                news = operation.news.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                self._abandon()
                return
            if news[0] == "end":
                self.drop()
                return

    def _drop_when_idle(self) -> None:
        if self.operation is None:
            self.drop()

    def _abort(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(GlobusError):
                # Refused when the operation has just ended.
                self._library.call("abort", byref(self._handle))

    def _abandon(self) -> None:
        """Forget the handle without a word to it: destroying one with a running operation would wait or crash."""
        self._handle = None
        self._globus.abandoned = True


def _close_all_connections() -> None:
    """Shut down every TCP connection of this process: which of them a handle owns, the library does not tell."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    connection.shutdown(socket.SHUT_RDWR)

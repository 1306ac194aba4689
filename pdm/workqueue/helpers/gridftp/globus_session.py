"""A client handle of the Globus library with persistent connections: blocking calls with timeouts, interruptible."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from ctypes import byref, c_size_t, c_void_p
from typing import Any

from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.gridftp.globus import ABORT_GRACE_S, Globus, GlobusError, News, Operation
from pdm.workqueue.helpers.gridftp.replies import error_from, is_refused_login
from pdm.workqueue.helpers.storage import StoppedError, StorageError

#: A connection that was idle for so long may have been closed by the server.
_IDLE_S = 1.0
#: Seconds between two looks at a running transfer.
_TICK_S = 1.0
#: Servers send performance markers every 5 s: two of them may be missed.
_LEAST_MARKER_STALL_S = 11.0
_LISTING_BUFFER = 256 * 1024
#: Pieces of a listing that may arrive before the one that is due.
_MOST_EARLY_PIECES = 64


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
        self.operation: Operation | None = None
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
        """Give the connections up; the next operation makes new ones."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._globus.bury(handle)

    def interrupt(self) -> None:
        """Make the running operation, and every one before `resume`, end with `StoppedError`; returns at once."""
        with self._guard:
            self._interrupted = True
            operation = self.operation
            if operation is not None:
                self._abort()
                late = threading.Timer(ABORT_GRACE_S, operation.news.put, (("lost",),))
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
    def _begun(self, name: str, arguments: tuple[Any, ...]) -> Iterator[Operation]:
        switchboard = self._globus.switchboard
        with self._guard:
            if self._interrupted:
                raise StoppedError
            operation = Operation(arguments)
            number = switchboard.add(operation)
            try:
                handle = self._opened()
                operation.arguments = (*arguments, handle, number)
                self.operation = operation
                lease.check()
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

    def _conclude(self, operation: Operation, news: News) -> None:
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
            storage_error = error_from(error)
            if storage_error.lost or is_refused_login(storage_error):
                # Kept, it would answer "please login" for ever, even to who is let in by then.
                self.drop()
            raise storage_error

    def _next(self, operation: Operation, stall_s: float, until: float, what: str) -> News:
        """The next news, or the end of patience."""
        left_s = until - time.monotonic()
        try:
            return operation.news.get(timeout=max(min(stall_s, left_s), 0.001))
        except queue.Empty:
            if left_s < stall_s:
                raise self._given_up(operation, f"{what} in time", "TIMEOUT") from None
            raise self._given_up(operation, f"{what} for {stall_s:.0f} s", "STALLED") from None

    def _given_up(self, operation: Operation, message: str, code: str) -> StorageError | StoppedError:
        self._end_early(operation)
        return StoppedError() if self._interrupted else StorageError(message, code=code, lost=True)

    def _end_early(self, operation: Operation) -> None:
        """End an operation that would go on; leave the handle to itself if it does not end."""
        operation.over = True
        self._abort()
        deadline = time.monotonic() + ABORT_GRACE_S
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

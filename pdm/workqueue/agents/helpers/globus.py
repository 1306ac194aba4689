"""What all GridFTP sessions of the process share: the library, its callbacks, and the handles that are left behind.

The library calls back on its own threads. Each operation has a number, which is all that C ever holds of ours: an
operation that was given up can end later, or never, without touching anything new.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import itertools
import os
import queue
import socket
import threading
import time
from ctypes import byref, c_void_p
from typing import Any, Protocol

from pdm.workqueue.agents.helpers.globus_library import (
    Completed,
    DataArrived,
    GlobusError,
    GlobusLibrary,
    MarkerArrived,
    TransferBegan,
    TransferEnded,
)

#: Seconds an aborted operation gets to end before its handle is left to itself.
ABORT_GRACE_S = 0.4
#: Seconds after which the library has surely left a handle.
_REST_S = 5.0

#: One piece of news of an operation: ("end", error text or None), ("data", offset, bytes, eof), ("lost",).
News = tuple[Any, ...]


class Operation:
    """An operation that is under way."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        #: Keeps what the library writes into alive for as long as it may write.
        self.arguments = arguments
        self.news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self.bytes_by_stripe: dict[int, int] = {}
        #: Whether it has ended, or was given up.
        self.over = False


class Running(Protocol):
    """What has at most one operation under way."""

    @property
    def operation(self) -> Operation | None: ...


class Switchboard:
    """Passes what the library calls back on to the operation it is about."""

    def __init__(self, library: GlobusLibrary) -> None:
        self._library = library
        self._numbers = itertools.count(1)
        self._operations: dict[int, Operation] = {}
        self.sessions: dict[int, Running] = {}
        # ctypes functions must outlive every handle, so they live as long as the process.
        self.completed = Completed(self._completed)
        self.data_arrived = DataArrived(self._data_arrived)
        self.began = TransferBegan(lambda *_: None)
        self.marker = MarkerArrived(self._marker)
        self.ended = TransferEnded(lambda *_: None)

    def add(self, operation: Operation) -> int:
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
        self.switchboard = Switchboard(self.library)
        #: Whether a handle with open connections was left to itself.
        self.abandoned = False
        #: Servers that have connected to us for a listing, and those to which we must connect.
        self.lists_kept: set[str] = set()
        self.lists_stream: set[str] = set()
        #: When connections were last cut (`time.monotonic`).
        self.cut_at = 0.0
        self._cut_guard = threading.Lock()
        #: Handles that nobody uses any more, and since when.
        self._buried: collections.deque[tuple[float, c_void_p]] = collections.deque()

    def bury(self, handle: c_void_p) -> None:
        """Destroy a handle, but not at once.

        The library tells of an operation's end before its own threads, or an `abort` of ours, have left the handle:
        destroying it then ends the process.
        """
        self._buried.append((time.monotonic(), handle))
        self.destroy_buried()

    def destroy_buried(self) -> None:
        """Destroy the handles that have rested long enough."""
        while self._buried:
            try:
                buried_at, handle = self._buried.popleft()
            except IndexError:
                return
            if time.monotonic() - buried_at < _REST_S:
                self._buried.appendleft((buried_at, handle))
                return
            with contextlib.suppress(GlobusError):
                self.library.call("handle_destroy", byref(handle))

    def cut(self) -> None:
        """Cut all connections, so that servers end what abandoned handles had asked for.

        Lanes that are interrupted together ask for it together: once is enough, and a connection that one of them has
        made since must live.
        """
        with self._cut_guard:
            if time.monotonic() - self.cut_at > ABORT_GRACE_S:
                self.cut_at = time.monotonic()
                _close_all_connections()


def _close_all_connections() -> None:
    """Shut down every TCP connection of this process: which of them a handle owns, the library does not tell."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    connection.shutdown(socket.SHUT_RDWR)

"""The Globus GridFTP client library: prototypes, callbacks, and the handles that sessions have abandoned.

The library calls back on its own threads. Each operation has a number, which is the only value of ours that C holds:
an abandoned operation may end later, or never, without touching a new one.
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
from ctypes import CFUNCTYPE, POINTER, byref, c_char, c_char_p, c_int, c_int64, c_long, c_size_t, c_uint32, c_void_p
from typing import Any, Protocol

#: Debian's package that brings the library.
PACKAGE = "libglobus-ftp-client2"

Completed = CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)
DataArrived = CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_int64, c_int)
TransferBegan = CFUNCTYPE(None, c_void_p, c_void_p, c_char_p, c_char_p, c_int)
MarkerArrived = CFUNCTYPE(None, c_void_p, c_void_p, c_long, c_char, c_int, c_int, c_int64)
TransferEnded = CFUNCTYPE(None, c_void_p, c_void_p, c_int)

_POINTER = POINTER(c_void_p)


class DataChannelProtection(ctypes.Structure):
    """globus_ftp_control_dcau_t."""

    _fields_ = (("mode", c_int), ("subject", c_char_p))


class GlobusError(Exception):
    """A call was refused at once; the text says why."""


class GlobusLibrary:
    """The loaded library.

    Raises:
        OSError: it is not installed.
        GlobusError: it could not be set up.
    """

    def __init__(self) -> None:
        self._c = ctypes.CDLL(None)
        self._c.free.argtypes = [c_void_p]
        self.common = ctypes.CDLL("libglobus_common.so.0", mode=ctypes.RTLD_GLOBAL)
        self.client = ctypes.CDLL("libglobus_ftp_client.so.2", mode=ctypes.RTLD_GLOBAL)
        self._declare()
        # Callbacks come on threads of the library, so that no thread of ours has to poll.
        if self.common.globus_thread_set_model(b"pthread") != 0:
            raise GlobusError("the Globus libraries refuse the thread model 'pthread'")
        for module in ("globus_i_ftp_client_module", "globus_i_ftp_client_perf_plugin_module"):
            if self.common.globus_module_activate(byref(c_char.in_dll(self.client, module))) != 0:
                raise GlobusError(f"the Globus libraries could not be set up ({module})")

    def _declare(self) -> None:
        common, client = self.common, self.client
        common.globus_thread_set_model.argtypes = [c_char_p]
        common.globus_module_activate.argtypes = [c_void_p]
        common.globus_error_get.argtypes = [c_uint32]
        common.globus_error_get.restype = c_void_p
        common.globus_error_print_friendly.argtypes = [c_void_p]
        common.globus_error_print_friendly.restype = c_void_p
        common.globus_object_free.argtypes = [c_void_p]
        common.globus_object_free.restype = None
        prototypes = {
            "handleattr_init": [_POINTER],
            "handleattr_destroy": [_POINTER],
            "handleattr_set_cache_all": [_POINTER, c_int],
            "handleattr_add_plugin": [_POINTER, _POINTER],
            "handle_init": [_POINTER, _POINTER],
            "handle_destroy": [_POINTER],
            "operationattr_init": [_POINTER],
            "operationattr_destroy": [_POINTER],
            "operationattr_set_mode": [_POINTER, c_int],
            "operationattr_set_list_uses_data_mode": [_POINTER, c_int],
            "operationattr_set_dcau": [_POINTER, POINTER(DataChannelProtection)],
            "third_party_transfer": [_POINTER, c_char_p, _POINTER, c_char_p, _POINTER, c_void_p, Completed, c_void_p],
            "machine_list": [_POINTER, c_char_p, _POINTER, Completed, c_void_p],
            "list": [_POINTER, c_char_p, _POINTER, Completed, c_void_p],
            "register_read": [_POINTER, c_void_p, c_size_t, DataArrived, c_void_p],
            "mlst": [_POINTER, c_char_p, _POINTER, POINTER(c_void_p), POINTER(c_size_t), Completed, c_void_p],
            "size": [_POINTER, c_char_p, _POINTER, POINTER(c_int64), Completed, c_void_p],
            "cksm": [_POINTER, c_char_p, _POINTER, c_char_p, c_int64, c_int64, c_char_p, Completed, c_void_p],
            "mkdir": [_POINTER, c_char_p, _POINTER, Completed, c_void_p],
            "rmdir": [_POINTER, c_char_p, _POINTER, Completed, c_void_p],
            "delete": [_POINTER, c_char_p, _POINTER, Completed, c_void_p],
            "move": [_POINTER, c_char_p, c_char_p, _POINTER, Completed, c_void_p],
            "abort": [_POINTER],
            "perf_plugin_init": [_POINTER, TransferBegan, MarkerArrived, TransferEnded, c_void_p],
        }
        for name, arguments in prototypes.items():
            function = getattr(client, f"globus_ftp_client_{name}")
            function.argtypes = arguments
            function.restype = c_uint32

    def call(self, name: str, *arguments: object) -> None:
        """Call ``globus_ftp_client_<name>``.

        Raises:
            GlobusError: it was refused.
        """
        result = getattr(self.client, f"globus_ftp_client_{name}")(*arguments)
        if result != 0:
            error = self.common.globus_error_get(result)
            text = self.error_text(error)
            self.common.globus_object_free(error)
            raise GlobusError(text)

    def error_text(self, error: int | None) -> str:
        """The text of an error object, which stays the caller's; lines end in newline only."""
        text = self.common.globus_error_print_friendly(error)
        if not text:
            return "the Globus library gives no reason"
        raw = ctypes.string_at(text)
        self._c.free(text)
        return raw.decode("utf-8", "backslashreplace").replace("\r\n", "\n").strip()

    def free(self, pointer: int | None) -> None:
        """Free memory that the library gave us."""
        self._c.free(pointer)


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

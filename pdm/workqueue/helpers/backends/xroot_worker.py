"""XRootD client in a process of its own, which can be killed while the library blocks.

It runs under an interpreter that has XRootD's Python bindings, and imports only them and the standard library. Frames:
a letter, the length as 4 bytes, the content. Requests (``R``) and responses (``A``, the last frame of a request) are
JSON; a response has ``ok`` or the error of the library. Between them: ``D`` bytes of a file, ``E`` entries of a
directory, ``P`` the size so far of a file in a third-party copy; in the other direction ``D`` bytes to write and ``Z``,
their end. To cancel a request, the session kills the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import struct
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

# Started with -I, which leaves the directory of this file out of the path; as the last one it hides no other module.
sys.path.append(os.path.dirname(os.path.abspath(__file__)))

import xroot_groups_worker as groups  # type: ignore[import-not-found]
from pyxrootd import client
from XRootD.client.flags import AccessMode, DirListFlags, OpenFlags, QueryCode

_HEAD = struct.Struct(">cI")
_PIECE = 1024 * 1024
#: Pieces in flight: enough for a connection with high latency; bounds the memory for a file.
_AHEAD = 4
_MODE = AccessMode.UR | AccessMode.UW | AccessMode.GR | AccessMode.OR
_DIRECTORY_MODE = _MODE | AccessMode.UX | AccessMode.GX | AccessMode.OX
_MARKER_S = 0.5
_SOON_S = 3
_CONTINUES = 1
#: Parts of a listing, of some hundred entries each, that may wait to be sent.
_MOST_WAITING = 16
#: Entries whose stat is requested at once.
_LOOKS_AHEAD = 32
#: Error numbers kXR_NotAuthorized, kXR_NotFound.
_NOT_AUTHORIZED, _NOT_FOUND = 3010, 3011

_requests = os.fdopen(os.dup(0), "rb", buffering=0)
_answers = os.fdopen(os.dup(1), "wb", buffering=0)


class FailureError(Exception):
    """An error of a request, with the status of the library where it has one."""

    def __init__(self, status: dict[str, Any]) -> None:
        super().__init__(status.get("message"))
        self.status = status


def said(message: str, what: str) -> FailureError:
    return FailureError({"message": message, "what": what})


# -- sandbox

_NO_NEW_PRIVILEGES = 38
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT, _LANDLOCK_VERSION = 444, 446, 1
#: Access rights to writing, removing and creating; REFER (moving between directories) and TRUNCATE came later.
_ALL_WRITING, _REFER, _TRUNCATE = 0x1FF2, 0x2000, 0x4000
_WITH_REFER, _WITH_TRUNCATE = 2, 3


def confine() -> None:
    """Give up write access to this machine's files, if the kernel can (Landlock, Linux 5.13).

    The library opens local files if a server redirects to them; the open fails afterwards anyway, but an empty file
    would have been created.
    """
    system = ctypes.CDLL(None, use_errno=True)
    version = system.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(_LANDLOCK_VERSION))
    if version < 1:
        return
    handled = _ALL_WRITING | (_REFER if version >= _WITH_REFER else 0) | (_TRUNCATE if version >= _WITH_TRUNCATE else 0)
    asked = ctypes.c_uint64(handled)
    rules = system.syscall(_LANDLOCK_CREATE, ctypes.byref(asked), ctypes.c_size_t(8), ctypes.c_uint(0))
    if rules >= 0:
        system.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        system.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0))
        os.close(rules)


# -- frames


def send(kind: bytes, content: bytes) -> None:
    rest = memoryview(_HEAD.pack(kind, len(content)) + content)
    while rest:
        rest = rest[_answers.write(rest) or 0 :]


def _exactly(count: int) -> bytes:
    pieces = []
    while count:
        piece = _requests.read(min(count, _PIECE))
        if not piece:
            # The parent has ended.
            os._exit(0)
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def receive() -> tuple[bytes, bytes]:
    kind, length = _HEAD.unpack(_exactly(_HEAD.size))
    return kind, _exactly(length)


# -- the library


def checked(result: tuple[dict[str, Any], Any]) -> Any:
    """The result of a call; raises its error."""
    status, given = result
    if not status["ok"]:
        raise FailureError(status)
    return given


class Call:
    """A call in flight."""

    def __init__(self, piece: bytes = b"") -> None:
        # The library reads the bytes to write later without holding a reference.
        self._piece = piece
        self._done = threading.Event()
        self._outcome: tuple[dict[str, Any], Any] | None = None

    def __call__(self, status: dict[str, Any], given: Any, hosts: Any) -> None:
        self._outcome = status, given
        self._done.set()

    def ended(self, wait_s: float) -> bool:
        return self._done.wait(wait_s)

    def result(self) -> Any:
        self._done.wait()
        assert self._outcome is not None
        return checked(self._outcome)


def begun(status: dict[str, Any], call: Call) -> Call:
    """A call that the library has accepted."""
    if not status["ok"]:
        raise FailureError(status)
    return call


class Opened:
    """An open file at a server."""

    def __init__(self, url: str, flags: int) -> None:
        self.file = client.File()
        checked(self.file.open(url, flags, _MODE if flags & OpenFlags.NEW else 0))
        # A server may redirect its clients to other servers, but not to files of this machine.
        there = self.file.get_property("LastURL") or ""
        if not there.startswith(("root://", "roots://")):
            self.close_quietly()
            raise said(f"the server redirects its clients to {there[:200]!r}", "UNSUPPORTED")

    def close(self) -> None:
        checked(self.file.close())

    def close_quietly(self) -> None:
        with contextlib.suppress(Exception):
            self.file.close(timeout=_SOON_S)


def look(server: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] = groups.thing(checked(client.FileSystem(server).stat(path)))
    return found


class Listing:
    """A running listing: the library calls from its own thread."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: deque[list[Any]] = deque()
        self.status: dict[str, Any] | None = None

    def __call__(self, status: dict[str, Any], given: Any, hosts: Any) -> None:
        entries = []
        for entry in (given or {}).get("dirlist", ()):
            info = entry["statinfo"]
            entries.append([entry["name"], groups.thing(info) if info else None])
        with self.changed:
            # Blocking this thread makes the server wait (back-pressure).
            while len(self.waiting) >= _MOST_WAITING:
                self.changed.wait()
            self.waiting.append(entries)
            if status["code"] != _CONTINUES or not status["ok"]:
                self.status = status
            self.changed.notify_all()

    def broken(self, kind: Any, error: Any, where: Any) -> None:
        """Record a name that the bindings could not decode: they report it only by this call."""
        with self.changed:
            self.status = {"ok": False, "message": f"a name that is not UTF-8: {error}", "what": "BAD_LISTING"}
            self.changed.notify()

    def pieces(self, server: str, path: str, flags: int) -> Iterator[list[Any]]:
        """The entries in parts of some hundred: name and state, None without ``STAT``."""
        sys.excepthook = self.broken
        try:
            status = client.FileSystem(server).dirlist(path, flags | DirListFlags.CHUNKED, 0, self)
            if not status["ok"]:
                raise FailureError(status)
            while True:
                with self.changed:
                    while not self.waiting and self.status is None:
                        self.changed.wait()
                    found = self.waiting.popleft() if self.waiting else None
                    self.changed.notify()
                if found is None:
                    break
                yield found
        finally:
            sys.excepthook = sys.__excepthook__
        assert self.status is not None
        if not self.status["ok"]:
            raise FailureError(self.status)


def entries(server: str, path: str) -> None:
    """The entries of a directory.

    A server (5.5) ends the listing with ``STAT`` at the first entry whose stat fails: a dangling link hides all entries
    after it. So the names are listed once more, without ``STAT``.
    """
    # Keep a hash of each name only: a directory may be very large.
    seen: set[int] = set()
    for found in Listing().pieces(server, path, DirListFlags.STAT):
        seen.update(hash(name) for name, _ in found)
        if found:
            send(b"E", json.dumps(found).encode("ascii"))
    anything = bool(seen)
    for found in Listing().pieces(server, path, 0):
        hidden = [name for name, _ in found if hash(name) not in seen]
        for at in range(0, len(hidden), _LOOKS_AHEAD):
            looked = looks(server, path, hidden[at : at + _LOOKS_AHEAD], anything)
            anything = True
            send(b"E", json.dumps(looked).encode("ascii"))


def looks(server: str, path: str, names: list[str], anything: bool) -> list[list[Any]]:
    """States of some names in a directory; a name that has none is a dangling link.

    Args:
        server: of the directory.
        path: of the directory.
        names: in it.
        anything: whether any other entry has a state: then the directory itself is accessible.
    """
    system = client.FileSystem(server)
    calls = []
    for name in names:
        call = Call()
        calls.append(begun(system.stat(f"{path.rstrip('/')}/{name}", 0, call), call))
    found: list[list[Any]] = []
    for name, call in zip(names, calls, strict=True):
        try:
            found.append([name, groups.thing(call.result())])
        except FailureError as failure:
            denied = failure.status.get("errno") == _NOT_AUTHORIZED
            if not (leads_nowhere(failure.status) or (denied and anything)):
                raise
            found.append([name, {"kind": "link", "size": 0, "mtime": None}])
    return found


def leads_nowhere(status: dict[str, Any]) -> bool:
    """Whether nothing is there, or a link that leads to itself."""
    loop = str(status.get("message")).rpartition(";")[2].strip() == "too many levels of symbolic links"
    return status.get("errno") == _NOT_FOUND or loop


def make(server: str, path: str) -> None:
    checked(client.FileSystem(server).mkdir(path, 0, _DIRECTORY_MODE))


def remove(server: str, path: str) -> None:
    checked(client.FileSystem(server).rm(path))


def remove_directory(server: str, path: str) -> None:
    checked(client.FileSystem(server).rmdir(path))


def rename(server: str, path: str, to: str) -> None:
    checked(client.FileSystem(server).mv(path, to))


def change_mode(server: str, path: str, mode: int) -> None:
    checked(client.FileSystem(server).chmod(path, mode))


def checksum(server: str, path: str, algorithm: str) -> str:
    """The server's checksum; small files are read instead, because the server starts a process for each."""
    opened = Opened(f"{server}/{path}", OpenFlags.READ)
    try:
        size = checked(opened.file.stat())["size"]
        if size <= _PIECE:
            content = checked(opened.file.read(0, size)) if size else b""
            if algorithm == "adler32":
                return f"adler32 {zlib.adler32(content):08x}"
            return f"{algorithm} {hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()}"
    finally:
        opened.close_quietly()
    return _text(checked(client.FileSystem(server).query(QueryCode.CHECKSUM, f"{path}?cks.type={algorithm}")))


def configuration(server: str, names: str) -> str:
    return _text(checked(client.FileSystem(server).query(QueryCode.CONFIG, names)))


def space(server: str, path: str) -> str:
    return _text(checked(client.FileSystem(server).query(QueryCode.SPACE, path)))


def _text(answer: bytes) -> str:
    return answer.decode("utf-8", "backslashreplace").rstrip("\0\n")


def read(server: str, path: str) -> None:
    """All bytes of a file, read a few pieces ahead."""
    opened = Opened(f"{server}/{path}", OpenFlags.READ)
    try:
        size = checked(opened.file.stat())["size"]
        offset = 0
        calls: deque[Call] = deque()
        while offset < size or calls:
            while offset < size and len(calls) < _AHEAD:
                call = Call()
                calls.append(begun(opened.file.read(offset, min(_PIECE, size - offset), 0, call), call))
                offset += _PIECE
            piece = calls.popleft().result()
            if not piece:
                # The file has shrunk; the reader checks the size.
                break
            send(b"D", piece)
        for call in calls:
            call.ended(_SOON_S)
    finally:
        opened.close_quietly()


def write(server: str, path: str, size: int) -> None:
    """Write the pieces that arrive to a new file. An error is reported at once, and later pieces are discarded."""
    opened = Opened(f"{server}/{path}?oss.asize={size}", OpenFlags.NEW | OpenFlags.WRITE)
    calls: deque[Call] = deque()
    try:
        send(b"D", b"")
        offset = 0
        while True:
            kind, piece = receive()
            if kind == b"Z":
                break
            call = Call(piece)
            calls.append(begun(opened.file.write(piece, offset, len(piece), 0, call), call))
            offset += len(piece)
            while calls and (len(calls) >= _AHEAD or calls[0].ended(0)):
                calls.popleft().result()
        while calls:
            calls.popleft().result()
        opened.close()
    except BaseException:
        opened.close_quietly()
        raise


def pull(server: str, path: str, cgi: str) -> None:
    """Have the server pull a file from another (third-party copy); ``cgi`` is the query that describes the source."""
    opened = Opened(f"{server}/{path}?{cgi}", OpenFlags.NEW | OpenFlags.UPDATE)
    try:
        # The first sync prepares the copy, the second one makes it.
        checked(opened.file.sync())
        call = Call()
        begun(opened.file.sync(0, call), call)
        told_at = time.monotonic()
        while not call.ended(0.002 if time.monotonic() - told_at < _MARKER_S else 0.02):
            if time.monotonic() - told_at > _MARKER_S:
                status, info = opened.file.stat(True, _SOON_S)
                if status["ok"]:
                    send(b"P", b"%d" % info["size"])
                told_at = time.monotonic()
        call.result()
        opened.close()
    except BaseException:
        opened.close_quietly()
        raise


WORK: dict[str, Callable[..., Any]] = {
    "stat_group": groups.own_stats,
    "read_group": functools.partial(groups.read, send),
    "write_group": functools.partial(groups.write, receive),
    "rename_group": groups.rename,
    "remove_group": groups.remove,
    "look": look,
    "entries": entries,
    "make": make,
    "remove": remove,
    "remove_directory": remove_directory,
    "rename": rename,
    "change_mode": change_mode,
    "checksum": checksum,
    "configuration": configuration,
    "space": space,
    "read": read,
    "write": write,
    "pull": pull,
}


def main() -> None:
    """Process requests until they end."""
    # Output of the library must not be mistaken for a frame.
    os.dup2(2, 1)
    confine()
    while True:
        kind, content = receive()
        if kind != b"R":
            # Calls of a failed request that are still in flight.
            continue
        request = json.loads(content)
        try:
            answer = {"ok": True, "value": WORK[request.pop("op")](**request)}
        except (FailureError, groups.GroupError) as failure:
            answer = {"ok": False, **{key: failure.status.get(key) for key in ("message", "code", "errno", "what")}}
        except Exception as error:
            # The bindings report this also for a file whose connection was lost while it was open.
            what = "CONNECTION" if "closed file" in str(error) else "INTERNAL"
            answer = {"ok": False, "message": f"{type(error).__name__}: {error}", "what": what}
        send(b"A", json.dumps(answer).encode("ascii"))


if __name__ == "__main__":
    main()

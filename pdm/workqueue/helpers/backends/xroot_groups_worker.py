"""Group operations of the XRootD worker (`xroot_worker`): all requests of a step are sent before the first response.

It runs in the same process, under the same restrictions. A request that the server refuses for one file has the
result None or False; any other error is one of the whole group.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pyxrootd import client
from XRootD.client.flags import AccessMode, OpenFlags, StatInfoFlags

Status = dict[str, Any]
_MODE = AccessMode.UR | AccessMode.UW | AccessMode.GR | AccessMode.OR
#: Codes of the library for a refused request, and for a file that does not exist.
_REFUSALS = (400, 304)
_NOT_FOUND = 3011
_SOON_S = 3


class GroupError(Exception):
    """A request failed for a reason that concerns the whole group; with the status of the library."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.get("message"))
        self.status = status


class _Pending:
    """A request that was sent; keeps a reference to its data until the response."""

    def __init__(self, kept: object = None) -> None:
        self._kept = kept
        self._done = threading.Event()
        self._outcome: tuple[Status, Any] | None = None

    def __call__(self, status: Status, given: Any, hosts: Any) -> None:
        self._outcome = status, given
        self._done.set()

    def outcome(self) -> tuple[Status, Any]:
        self._done.wait()
        assert self._outcome is not None
        return self._outcome


def _all(begin: Sequence[Callable[[_Pending], Status] | None], kept: Sequence[object] = ()) -> list[Any]:
    """Send requests and wait for all responses.

    Args:
        begin: functions that send; None for no request.
        kept: data that must stay in memory until the responses.

    Returns:
        Status and response of each request; None for no request.

    Raises:
        GroupError: a connection was lost, or the like.
    """
    pending: list[_Pending | Status | None] = []
    for number, each in enumerate(begin):
        if each is None:
            pending.append(None)
            continue
        call = _Pending(kept[number] if kept else None)
        status = each(call)
        pending.append(call if status["ok"] else status)
    found: list[Any] = [
        each.outcome() if isinstance(each, _Pending) else None if each is None else (each, None) for each in pending
    ]
    for each in found:
        if each is not None and not each[0]["ok"] and each[0].get("code") not in _REFUSALS:
            raise GroupError(each[0])
    return found


def thing(info: dict[str, Any]) -> dict[str, Any]:
    """A stat of the library, as the helper gets it."""
    flags = info["flags"]
    kind = "directory" if flags & StatInfoFlags.IS_DIR else "other" if flags & StatInfoFlags.OTHER else "file"
    return {"kind": kind, "size": info["size"], "mtime": info["modtime"]}


def _is_good(found: Any) -> bool:
    return found is not None and bool(found[0]["ok"])


def stats(server: str, paths: Sequence[str]) -> list[Any]:
    """Stats of paths, as `thing`; None for a path that does not exist, False for one that the server refuses."""
    system = client.FileSystem(server)
    found = _all([partial(system.stat, path, 0) for path in paths])
    return [
        thing(given) if status["ok"] else None if status.get("errno") == _NOT_FOUND else False
        for status, given in found
    ]


class _Files:
    """Files that are opened at a server."""

    def __init__(self, urls: Sequence[str], flags: int) -> None:
        self._files = [client.File() for _ in urls]
        mode = _MODE if flags & OpenFlags.NEW else 0
        try:
            found = _all(
                [partial(file.open, url, flags, mode, 0) for file, url in zip(self._files, urls, strict=True)],
                self._files,
            )
        except GroupError:
            self.close_quietly()
            raise
        #: Of each file, whether it is open, and was not redirected to a file of this machine.
        self.are_open = [
            _is_good(each) and (file.get_property("LastURL") or "").startswith(("root://", "roots://"))
            for file, each in zip(self._files, found, strict=True)
        ]

    def each(
        self, begin: Callable[[Any, int, _Pending], Status], wanted: Sequence[bool], kept: Sequence[object] = ()
    ) -> list[Any]:
        """Send a request for each wanted file; the results as of `_all`."""
        requests = [
            partial(begin, file, number) if is_wanted else None
            for number, (file, is_wanted) in enumerate(zip(self._files, wanted, strict=True))
        ]
        return _all(requests, kept)

    def stats(self) -> list[dict[str, Any] | None]:
        """Stats that the server sent when it opened the files, as `thing`; None for a file that is not open."""
        found: list[Any] = [
            file.stat(False) if is_open else None for file, is_open in zip(self._files, self.are_open, strict=True)
        ]
        return [thing(each[1]) if _is_good(each) else None for each in found]

    def close(self) -> list[bool]:
        """Close the open files; whether each was closed without an error."""
        closed = self.each(lambda file, number, call: file.close(0, call), [file.is_open() for file in self._files])
        return [_is_good(each) for each in closed]

    def close_quietly(self) -> None:
        with contextlib.suppress(Exception):
            self.each(lambda file, number, call: file.close(_SOON_S, call), [file.is_open() for file in self._files])


def read(
    send: Callable[[bytes, bytes], None], server: str, files: Sequence[tuple[str, int]]
) -> list[dict[str, Any] | None]:
    """Send a frame with the bytes of each file that can be read; returns the stats of the files before that.

    One byte more than the size is read, which shows whether the file has grown.
    """
    opened = _Files([f"{server}/{path}" for path, _ in files], OpenFlags.READ)
    try:
        there = opened.stats()
        wanted = [found is not None for found in there]
        contents = opened.each(lambda file, number, call: file.read(0, files[number][1] + 1, 0, call), wanted)
    finally:
        opened.close_quietly()
    stats: list[dict[str, Any] | None] = []
    for found, content in zip(there, contents, strict=True):
        is_read = _is_good(content)
        stats.append(found if is_read else None)
        if is_read:
            send(b"D", content[1] or b"")
    return stats


def write(receive: Callable[[], tuple[bytes, bytes]], server: str, files: Sequence[tuple[str, int]]) -> list[bool]:
    """Create files of given sizes, whose bytes come in one frame; whether each was written completely."""
    every, start = memoryview(receive()[1]), 0
    # The library keeps no reference to the bytes that it sends.
    contents: list[bytes] = []
    for _, size in files:
        contents.append(bytes(every[start : start + size]))
        start += size
    urls = [f"{server}/{path}?oss.asize={size}" for path, size in files]
    opened = _Files(urls, OpenFlags.NEW | OpenFlags.WRITE)
    try:
        wanted = [is_open and bool(content) for is_open, content in zip(opened.are_open, contents, strict=True)]
        written = opened.each(
            lambda file, number, call: file.write(contents[number], 0, len(contents[number]), 0, call), wanted, contents
        )
        closed = opened.close()
    except BaseException:
        opened.close_quietly()
        raise
    return [
        is_open and is_closed and (not content or _is_good(each))
        for is_open, is_closed, content, each in zip(opened.are_open, closed, contents, written, strict=True)
    ]


def rename(server: str, names: Sequence[tuple[str, str]]) -> list[bool]:
    """Rename files, replacing what is there; whether each was renamed."""
    system = client.FileSystem(server)
    return [_is_good(each) for each in _all([partial(system.mv, old, new, 0) for old, new in names])]


def remove(server: str, paths: Sequence[str]) -> list[bool]:
    """Remove files; whether each does not exist any more."""
    system = client.FileSystem(server)
    found = _all([partial(system.rm, path, 0) for path in paths])
    return [status["ok"] or status.get("errno") == _NOT_FOUND for status, _ in found]

"""Group operations of the XRootD worker (`xroot_worker`): a step is begun for all files before one answer is awaited.

It runs where `xroot_worker` does, under its restrictions. What a server refuses for one file is None or False in its
place; any other error is of the whole group.
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
#: The server has refused one request, or has not found what it is about.
_REFUSALS = (400, 304)
_NOT_FOUND = 3011
_SOON_S = 3


class GroupError(Exception):
    """The status of a request that has failed for another reason than its file."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.get("message"))
        self.status = status


class _Pending:
    """A request under way; keeps what it needs until the answer is there."""

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
    """Begin requests, wait for all of them, and give what each has brought: its status, and the answer.

    Those that are None are left out: None is what they have brought.

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
    """What the library tells of a file or folder, as it is told to the helper."""
    flags = info["flags"]
    kind = "directory" if flags & StatInfoFlags.IS_DIR else "other" if flags & StatInfoFlags.OTHER else "file"
    return {"kind": kind, "size": info["size"], "mtime": info["modtime"]}


def _is_good(found: Any) -> bool:
    return found is not None and bool(found[0]["ok"])


def looks(server: str, paths: Sequence[str]) -> list[Any]:
    """What is at paths, as `thing`; None where nothing is, False where the server does not say."""
    system = client.FileSystem(server)
    found = _all([partial(system.stat, path, 0) for path in paths])
    return [
        thing(given) if status["ok"] else None if status.get("errno") == _NOT_FOUND else False
        for status, given in found
    ]


class _Files:
    """Files that are open at a server."""

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
        #: Of each file, whether it is open, and not at a place that a server has sent its client to.
        self.are_open = [
            _is_good(each) and (file.get_property("LastURL") or "").startswith(("root://", "roots://"))
            for file, each in zip(self._files, found, strict=True)
        ]

    def each(
        self, begin: Callable[[Any, int, _Pending], Status], wanted: Sequence[bool], kept: Sequence[object] = ()
    ) -> list[Any]:
        """Begin a request for each file that is wanted; what they have brought."""
        requests = [
            partial(begin, file, number) if is_wanted else None
            for number, (file, is_wanted) in enumerate(zip(self._files, wanted, strict=True))
        ]
        return _all(requests, kept)

    def close(self) -> list[bool]:
        """Close all that are open; whether each was closed without an error."""
        closed = self.each(lambda file, number, call: file.close(0, call), [file.is_open() for file in self._files])
        return [_is_good(each) for each in closed]

    def close_quietly(self) -> None:
        with contextlib.suppress(Exception):
            self.each(lambda file, number, call: file.close(_SOON_S, call), [file.is_open() for file in self._files])


def read(
    send: Callable[[bytes, bytes], None], server: str, files: Sequence[tuple[str, int]]
) -> list[dict[str, Any] | None]:
    """What the server tells of each file before it is read, after a frame with the bytes of each that could be read.

    It is asked for a byte more than the size, which shows whether the file has grown.
    """
    there = looks(server, [path for path, _ in files])
    opened = _Files([f"{server}/{path}" for path, _ in files], OpenFlags.READ)
    try:
        wanted = [bool(found) and is_open for found, is_open in zip(there, opened.are_open, strict=True)]
        contents = opened.each(lambda file, number, call: file.read(0, files[number][1] + 1, 0, call), wanted)
    finally:
        opened.close_quietly()
    told: list[dict[str, Any] | None] = []
    for found, content in zip(there, contents, strict=True):
        is_read = _is_good(content)
        told.append(found if is_read else None)
        if is_read:
            send(b"D", content[1] or b"")
    return told


def write(receive: Callable[[], tuple[bytes, bytes]], server: str, files: Sequence[tuple[str, int]]) -> list[bool]:
    """Make new files of so many bytes, which come in one frame; whether each has all of them."""
    every, start = memoryview(receive()[1]), 0
    # The library reads from the bytes that it is given, and keeps no hold of them.
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
    """Rename files; whether each has its new name. What has that name is replaced."""
    system = client.FileSystem(server)
    return [_is_good(each) for each in _all([partial(system.mv, old, new, 0) for old, new in names])]


def remove(server: str, paths: Sequence[str]) -> list[bool]:
    """Remove files; whether nothing is left of each."""
    system = client.FileSystem(server)
    found = _all([partial(system.rm, path, 0) for path in paths])
    return [status["ok"] or status.get("errno") == _NOT_FOUND for status, _ in found]

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
from XRootD.client.flags import AccessMode, DirListFlags, OpenFlags, StatInfoFlags

Status = dict[str, Any]
#: Takes the status, the response and the hosts of a request.
Callback = Callable[[Status, Any, Any], None]
_MODE = AccessMode.UR | AccessMode.UW | AccessMode.GR | AccessMode.OR
#: Codes of the library for a refused request, and for a file that does not exist.
_REFUSALS = (400, 304)
_NOT_FOUND = 3011
_SOON_S = 3
#: From so many files of a directory on, a listing is cheaper than a request for each.
_MIN_FOR_LISTING = 4
#: Files that are renamed between two looks at what is there.
_RENAMES_EACH_LOOK = 32


class GroupError(Exception):
    """A request failed for a reason that concerns the whole group; with the status of the library."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.get("message"))
        self.status = status


class _Outcomes:
    """The responses to requests; wakes the waiting thread once, after the last of them.

    Args:
        kept: data that must stay in memory until then.
    """

    def __init__(self, kept: object) -> None:
        self._kept = kept
        self._found: dict[int, tuple[Status, Any]] = {}
        self._guard = threading.Lock()
        #: Requests without a response, and one for the thread that sends them.
        self._left = 1
        self._done = threading.Lock()
        self._done.acquire()

    def sent(self, number: int, send: Callable[[Callback], Status]) -> None:
        """Send a request; a refusal by the library itself is its response."""
        with self._guard:
            self._left += 1
        status = send(partial(self._take, number))
        if not status["ok"]:
            self._take(number, status, None, None)

    def _take(self, number: int, status: Status, given: Any, hosts: Any) -> None:
        self._found[number] = status, given
        self._end_one()

    def _end_one(self) -> None:
        with self._guard:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._done.release()

    def wait(self) -> dict[int, tuple[Status, Any]]:
        """Status and response of each request, when all have one; called once."""
        self._end_one()
        self._done.acquire()
        return self._found


def _all(begin: Sequence[Callable[[Callback], Status] | None], kept: Sequence[object] = ()) -> list[Any]:
    """Send requests and wait for all responses.

    Args:
        begin: functions that send; None for no request.
        kept: data that must stay in memory until the responses.

    Returns:
        Status and response of each request; None for no request.

    Raises:
        GroupError: a connection was lost, or the like.
    """
    outcomes = _Outcomes(kept)
    for number, each in enumerate(begin):
        if each is not None:
            outcomes.sent(number, each)
    found = outcomes.wait()
    for status, _ in found.values():
        if not status["ok"] and status.get("code") not in _REFUSALS:
            raise GroupError(status)
    return [found.get(number) for number in range(len(begin))]


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


def _listed(system: Any, directory: str, flags: int) -> dict[str, Any]:
    """Names in a directory, with ``STAT`` their stats as `thing`; none if it cannot be listed."""
    with contextlib.suppress(Exception):  # the bindings cannot decode each name
        status, found = system.dirlist(directory, flags, 0)
        if status["ok"]:
            return {each["name"]: each["statinfo"] and thing(each["statinfo"]) for each in found["dirlist"]}
    return {}


def own_stats(server: str, paths: Sequence[str], own: Sequence[str] = ()) -> list[Any]:
    """As `stats`; in directories that were made for the batch by a listing, which ends at an entry without a stat.

    Args:
        server: of the paths.
        paths: of files.
        own: those directories, which have hardly any other entries.
    """
    system = client.FileSystem(server)
    found: dict[str, Any] = {}
    for directory, inside in _by_directory(paths).items():
        if directory in own and len(inside) >= _MIN_FOR_LISTING:
            listed = _listed(system, directory, DirListFlags.STAT)
            found.update({path: listed[name] for path in inside if listed.get(name := path.rpartition("/")[2])})
    left = [path for path in paths if path not in found]
    found.update(zip(left, stats(server, left), strict=True))
    return [found[path] for path in paths]


def _by_directory(paths: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(path.rpartition("/")[0], []).append(path)
    return found


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
        self, begin: Callable[[Any, int, Callback], Status], wanted: Sequence[bool], kept: Sequence[object] = ()
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


def rename(server: str, names: Sequence[tuple[str, str]], own: Sequence[str], *, replace: bool) -> list[bool]:
    """Rename files within their directory; whether each was renamed.

    The server replaces what is there without an error. So without ``replace`` a look precedes each part: in
    directories of ``own``, as of `own_stats`, a listing of the names.
    """
    system = client.FileSystem(server)
    renamed: dict[str, bool] = {}
    olds = {new: old for old, new in names}
    for directory, inside in _by_directory(list(olds)).items():
        for start in range(0, len(inside), _RENAMES_EACH_LOOK):
            part = free = inside[start : start + _RENAMES_EACH_LOOK]
            if not replace:
                listed = _listed(system, directory, 0) if directory in own else {}
                if all(olds[new].rpartition("/")[2] in listed for new in part):
                    free = [new for new in part if new.rpartition("/")[2] not in listed]
                else:
                    free = [new for new, found in zip(part, stats(server, part), strict=True) if found is None]
            moved = _all([partial(system.mv, olds[new], new, 0) for new in free])
            renamed.update(zip(free, map(_is_good, moved), strict=True))
    return [renamed.get(new, False) for _, new in names]


def remove(server: str, paths: Sequence[str]) -> list[bool]:
    """Remove files; whether each does not exist any more."""
    system = client.FileSystem(server)
    found = _all([partial(system.rm, path, 0) for path in paths])
    return [status["ok"] or status.get("errno") == _NOT_FOUND for status, _ in found]

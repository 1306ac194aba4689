"""Group operations at WebDAV servers: several requests at once over kept connections, and sizes by a listing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.http_client import UNREACHABLE
from pdm.workqueue.helpers.backends.propfind import is_odd
from pdm.workqueue.helpers.backends.webdav import WebdavBackend, version_of_response
from pdm.workqueue.helpers.group_backend import FileContent, GroupBackend
from pdm.workqueue.helpers.storage import FileStat, FileVersion, StorageError, Timeouts

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")
#: Connections to a server, for each worker thread of the helper.
_CONNECTIONS = 4
#: From so many files of a folder on, one listing of it is cheaper than a request for each.
_MIN_FOR_LISTING = 8
#: A folder with more entries than this for each file that is looked for is not read to its end.
_MAX_ENTRIES_EACH = 20


class GroupedWebdavBackend(WebdavBackend, GroupBackend):
    """The connections of one worker thread of the helper, and those of its group operations."""

    def __init__(self) -> None:
        #: Backends for the threads of group operations, of which each has its own.
        self._parallel: list[WebdavBackend] = []
        self._threads: ThreadPoolExecutor | None = None
        #: Servers whose responses show versions (entity tags, times).
        self._shows_versions: set[str] = set()
        super().__init__()

    @property
    def timeouts(self) -> Timeouts:  # a property here, so that the other connections have them too
        return self._client.timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        self._client.timeouts = timeouts
        for backend in self._parallel:
            backend.timeouts = timeouts

    def interrupt(self) -> None:
        super().interrupt()
        for backend in self._parallel:
            backend.interrupt()

    def resume(self) -> None:
        super().resume()
        for backend in self._parallel:
            backend.resume()

    def _each(
        self, work: Callable[[WebdavBackend, _Part], _Result], parts: Sequence[_Part]
    ) -> list[_Result | StorageError]:
        """Do something for each part, some at once; the results, or why there is none.

        Raises:
            StorageError: the server cannot be reached, or has ended a connection.
            StoppedError: it must end.
        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_CONNECTIONS, "connection")
            self._parallel = [WebdavBackend() for _ in range(_CONNECTIONS)]
            self.timeouts = self._client.timeouts
            if self._interrupted:
                self.interrupt()
        results: list[_Result | StorageError | None] = [None] * len(parts)
        numbers = iter(range(len(parts)))

        def carry_out(backend: WebdavBackend) -> None:
            # Taking the next number is atomic.
            for number in numbers:
                backend.check()
                try:
                    results[number] = work(backend, parts[number])
                except StorageError as error:
                    if error.lost or error.code in UNREACHABLE or error.code is FailureCode.CREDENTIAL_EXPIRED:
                        raise
                    results[number] = error

        running = [self._threads.submit(carry_out, backend) for backend in self._parallel[: len(parts)]]
        errors = [error for each in running if (error := each.exception()) is not None]
        if errors:
            raise errors[0]
        return results  # type: ignore[return-value]  # each number was taken

    # -- what is there

    def _stats(self, urls: Sequence[StorageUrl]) -> list[FileStat | StorageError | None]:
        """What is at each URL; of many in one folder by a listing of it."""
        found: dict[StorageUrl, FileStat | StorageError | None] = {}
        by_folder: dict[StorageUrl, list[StorageUrl]] = {}
        for url in urls:
            by_folder.setdefault(url.parent, []).append(url)
        for folder, inside in by_folder.items():
            if len(inside) >= _MIN_FOR_LISTING:
                listed = self._listed(folder, _MAX_ENTRIES_EACH * len(inside))
                found |= {url: listed[url.name] for url in inside if url.name in listed}
        # Servers may leave names out: these are looked at.
        left = [url for url in urls if url not in found]
        found |= dict(zip(left, self._each(WebdavBackend.stat, left), strict=True))
        return [found[url] for url in urls]

    def _listed(self, folder: StorageUrl, most: int) -> Mapping[bytes, FileStat]:
        """Some of the entries of a folder; none if it cannot be listed."""
        try:
            with contextlib.closing(self.entries(folder)) as entries:
                return dict(itertools.islice(entries, most))
        except StorageError as error:
            if error.lost or error.code in UNREACHABLE:
                raise
            return {}

    def are_free(self, urls: Sequence[StorageUrl]) -> list[bool]:
        # Not by a listing: some leave links out.
        return [found is None for found in self._each(WebdavBackend.stat, urls)]

    def group_sizes(self, urls: Sequence[StorageUrl]) -> list[int | None]:
        return [found.size if isinstance(found, FileStat) else None for found in self._stats(urls)]

    def group_versions(self, urls: Sequence[StorageUrl]) -> list[FileVersion | None]:
        if urls[0].authority in self._shows_versions:
            return [
                found if isinstance(found, FileVersion) else None for found in self._each(WebdavBackend.version, urls)
            ]
        # The server (XRootD 5.5) shows no more with a file than its listing does.
        return [
            FileVersion(found.size, found.mtime) if isinstance(found, FileStat) else None for found in self._stats(urls)
        ]

    # -- bytes

    def read_group(self, files: Sequence[tuple[StorageUrl, int]]) -> list[FileContent | None]:
        there = self._stats([url for url, _ in files])
        wanted = [
            (url, size, found if isinstance(found, FileStat) else None)
            for (url, size), found in zip(files, there, strict=True)
        ]
        contents = [found if isinstance(found, FileContent) else None for found in self._each(_read, wanted)]
        if any(found is not None and found.version.tag for found in contents):
            self._shows_versions.add(files[0][0].authority)
        return contents

    def write_group(self, files: Sequence[tuple[StorageUrl, bytes]]) -> list[bool]:
        def write(backend: WebdavBackend, file: tuple[StorageUrl, bytes]) -> bool:
            url, content = file
            backend.write(url, iter([content]), len(content))
            return True

        return [made is True for made in self._each(write, files)]

    def renames_groups(self, url: StorageUrl, replace: bool) -> bool:
        return True

    def rename_group(self, files: Sequence[tuple[StorageUrl, StorageUrl, int]], *, replace: bool) -> list[bool]:
        def rename(backend: WebdavBackend, file: tuple[StorageUrl, StorageUrl, int]) -> bool:
            source, destination, _ = file
            # Names that a server may take for others are tried first, each alone; and MOVE may replace what is there.
            if any(map(is_odd, destination.encoded_path[1:].split("/"))) or backend.stat(destination) is not None:
                return False
            backend.move(source, destination, is_directory=False, replace=replace)
            return True

        moved = self._each(rename, files)
        found = iter(self._stats([file[1] for file, is_moved in zip(files, moved, strict=True) if is_moved is True]))
        named = []
        for (_, _, size), is_moved in zip(files, moved, strict=True):
            there = next(found) if is_moved is True else None
            named.append(isinstance(there, FileStat) and there.kind == "file" and there.size == size)
        return named

    def remove_group(self, urls: Sequence[StorageUrl]) -> list[bool]:
        def remove(backend: WebdavBackend, url: StorageUrl) -> bool:
            if backend.stat(url) is not None:
                backend.remove(url, directory=False)
            return True

        return [gone is True for gone in self._each(remove, urls)]


def _read(backend: WebdavBackend, file: tuple[StorageUrl, int, FileStat | None]) -> FileContent | None:
    """The content of a file that is there with some size; None if it is anything else."""
    url, size, there = file
    if there is None or there.kind != "file" or there.size != size:
        return None
    response, pieces = backend.get(url, there)
    version = version_of_response(response) or FileVersion(there.size, there.mtime)
    data = b""
    with contextlib.closing(pieces):
        for piece in pieces:
            data += piece
            if len(data) > size:
                break
    return FileContent(data, version)

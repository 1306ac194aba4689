"""Group operations at XRootD servers: the worker process sends the requests for all files of a group at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.xrootd import XrootdBackend, file_stat_of, server_and_path
from pdm.workqueue.helpers.group_backend import FileContent, GroupBackend
from pdm.workqueue.helpers.storage import FileStat, FileVersion


class GroupedXrootdBackend(XrootdBackend, GroupBackend):
    """The worker processes of one thread, which also take many files at once."""

    def __init__(self) -> None:
        super().__init__()
        #: Paths of directories that were made for the batch whose files are written.
        self._own: list[str] = []

    def expect_own(self, directories: Collection[StorageUrl]) -> None:
        self._own = [server_and_path(directory)[1].rstrip("/") for directory in directories]

    def renames_groups(self, url: StorageUrl, replace: bool) -> bool:
        return True

    def _call(self, op: str, urls: Sequence[StorageUrl], **arguments: Any) -> Any:
        """A request with the paths of URLs of one server."""
        server, _ = server_and_path(urls[0])
        paths = [server_and_path(url)[1] for url in urls]
        return self._worker(server).call(op, server=server, paths=paths, **arguments)

    def _stats(self, urls: Sequence[StorageUrl]) -> list[FileStat | bool | None]:
        """Stats of URLs; None for one that does not exist, False for one that the server refuses."""
        return [file_stat_of(stat) if stat else stat for stat in self._call("stat_group", urls)]

    def are_free(self, urls: Sequence[StorageUrl]) -> list[bool]:
        return [found is None for found in self._stats(urls)]

    def group_sizes(self, urls: Sequence[StorageUrl]) -> list[int | None]:
        found = self._call("stat_group", urls, own=self._own)
        return [stat["size"] if stat and stat["kind"] == "file" else None for stat in found]

    def group_versions(self, urls: Sequence[StorageUrl]) -> list[FileVersion | None]:
        return [
            FileVersion(found.size, found.mtime) if isinstance(found, FileStat) else None for found in self._stats(urls)
        ]

    def read_group(self, files: Sequence[tuple[StorageUrl, int]]) -> list[FileContent | None]:
        server, _ = server_and_path(files[0][0])
        worker = self._worker(server)
        contents: list[bytes] = []
        try:
            worker.begin("read_group", server=server, files=[(server_and_path(url)[1], size) for url, size in files])
            while (frame := worker.next())[0] != b"A":
                contents.append(frame[1])
            there = worker.answer(frame[1])
        finally:
            self._let_go(worker)
        remaining = iter(contents)
        found: list[FileContent | None] = []
        for stat in there:
            file_stat = file_stat_of(stat) if stat else None
            data = next(remaining) if stat else b""
            is_file = file_stat is not None and file_stat.kind == "file"
            found.append(
                FileContent(data, FileVersion(file_stat.size, file_stat.mtime)) if file_stat and is_file else None
            )
        return found

    def write_group(self, files: Sequence[tuple[StorageUrl, bytes]]) -> list[bool]:
        server, _ = server_and_path(files[0][0])
        worker = self._worker(server)
        try:
            sizes = [(server_and_path(url)[1], len(content)) for url, content in files]
            worker.begin("write_group", server=server, files=sizes)
            worker.send(b"D", b"".join(content for _, content in files))
            while (frame := worker.next())[0] != b"A":
                pass
            made: list[bool] = worker.answer(frame[1])
        finally:
            self._let_go(worker)
        return made

    def rename_group(self, files: Sequence[tuple[StorageUrl, StorageUrl, int]], *, replace: bool) -> list[bool]:
        server, _ = server_and_path(files[0][0])
        names = [(server_and_path(old)[1], server_and_path(new)[1]) for old, new, _ in files]
        worker = self._worker(server)
        renamed: list[bool] = worker.call("rename_group", server=server, names=names, own=self._own, replace=replace)
        return renamed

    def remove_group(self, urls: Sequence[StorageUrl]) -> list[bool]:
        gone: list[bool] = self._call("remove_group", urls)
        return gone

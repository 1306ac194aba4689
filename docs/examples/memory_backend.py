"""A storage in the memory of the helper: files that end with it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.storage import EntryIterator, FileStat, StorageError
from pdm.workqueue.helpers.storage_backend import Pieces, StorageBackend

#: URL → the bytes of a file, or None for a directory. All threads of the helper share it.
_CONTENT: dict[str, bytes | None] = {}


class MemoryBackend(StorageBackend):
    """The backend of one thread."""

    def stat(self, url: StorageUrl) -> FileStat | None:
        url = url.without_slash
        if url == url.parent:
            return FileStat("directory")
        if url not in _CONTENT:
            return None
        content = _CONTENT[url]
        return FileStat("directory") if content is None else FileStat("file", len(content), mtime=0)

    def entries(self, url: StorageUrl) -> EntryIterator:
        for found in list(_CONTENT):
            entry = StorageUrl(found)
            if entry.parent.without_slash == url.without_slash and (there := self.stat(entry)) is not None:
                yield entry.name, there

    def make_directory(self, url: StorageUrl) -> None:
        self._check_free(url)
        _CONTENT[url.without_slash] = None

    def remove(self, url: StorageUrl, *, directory: bool) -> None:
        self._content(url)
        del _CONTENT[url.without_slash]

    def rename(self, source: StorageUrl, destination: StorageUrl, *, replace: bool) -> None:
        if not replace:
            self._check_free(destination)
        _CONTENT[destination.without_slash] = self._content(source)
        del _CONTENT[source.without_slash]

    def size(self, url: StorageUrl) -> int:
        return len(self._content(url) or b"")

    def read(self, url: StorageUrl) -> Pieces:
        yield self._content(url) or b""

    def write(self, url: StorageUrl, pieces: Iterator[bytes], size: int) -> None:
        self._check_free(url)
        _CONTENT[url] = b"".join(pieces)

    def _content(self, url: StorageUrl) -> bytes | None:
        if url.without_slash not in _CONTENT:
            raise StorageError(f"{url.display} is not there", errno=errno.ENOENT)
        return _CONTENT[url.without_slash]

    def _check_free(self, url: StorageUrl) -> None:
        if self.stat(url) is not None:
            raise StorageError(f"{url.display} is there", errno=errno.EEXIST)
        above = self.stat(url.parent)
        if above is None:
            raise StorageError(f"{url.parent.display} is not there", errno=errno.ENOENT)

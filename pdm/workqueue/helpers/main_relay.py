"""Relay helper: protocols whose bytes may pass through the service, and copies between different protocols.

The scheme of a URL selects its backend. A copy within one backend is left to that backend, which may have a shorter
way (third-party copy, copy in the kernel); any other copy is streamed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

if not __package__:
    # Started by its path: the folder of the helpers must not be on the path, the project must.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from pdm.workqueue.helpers import listing, operations
from pdm.workqueue.helpers.backends.base import StorageBackend, stream_copy
from pdm.workqueue.helpers.backends.local import LocalBackend
from pdm.workqueue.helpers.backends.local_paths import Roots
from pdm.workqueue.helpers.backends.sftp import SftpBackend
from pdm.workqueue.helpers.backends.webdav import WebdavBackend
from pdm.workqueue.helpers.backends.xrootd import XrootdBackend
from pdm.workqueue.helpers.channel import ActiveBatch, serve
from pdm.workqueue.helpers.storage import (
    EntryIterator,
    FileStat,
    FileVersion,
    ProgressCallback,
    Storage,
    StorageError,
    Timeouts,
)
from pdm.workqueue.helpers.threads import WorkerThreads

_MAX_WORKERS = 4
_ITEMS_PER_WORKER = 16


def _local_backend() -> StorageBackend:
    return LocalBackend(Roots(json.loads(os.environ.get("PDM_FILE_ROOTS", "[]"))))


#: Scheme → what makes a side for it.
BACKENDS: Mapping[str, Callable[[], StorageBackend]] = {
    "file": _local_backend,
    "sftp": SftpBackend,
    "https": WebdavBackend,
    "davs": WebdavBackend,
    "root": XrootdBackend,
    "roots": XrootdBackend,
}


class RelayStorage(Storage):
    """One lane: a side for each scheme, made when it is first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], StorageBackend]] = BACKENDS) -> None:
        self._makers = makers
        self._backends: dict[str, StorageBackend] = {}
        self._stopped = False

    def _backend(self, url: str) -> StorageBackend:
        scheme = url.partition("://")[0]
        backend = self._backends.get(scheme)
        if backend is None:
            maker = self._makers.get(scheme)
            if maker is None:
                raise StorageError(f"this helper cannot reach {scheme}://", code="UNSUPPORTED", scope="service")
            backend = self._backends[scheme] = maker()
            if self._stopped:
                backend.interrupt()
        backend.timeouts = self.timeouts
        return backend

    @property
    def timeouts(self) -> Timeouts:  # a property here, so that the sides have it too
        return self._timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        for backend in self._backends.values():
            backend.timeouts = timeouts

    def stat(self, url: str) -> FileStat | None:
        return self._backend(url).stat(url)

    def real_path(self, url: str, there: FileStat) -> bytes | None:
        return self._backend(url).real_path(url, there)

    def entries(self, url: str) -> EntryIterator:
        return self._backend(url).entries(url)

    def link_at(self, url: str, *, listed: bool) -> str | None:
        return self._backend(url).link_at(url, listed=listed)

    def make_directory(self, url: str) -> None:
        self._backend(url).make_directory(url)

    def remove(self, url: str, *, directory: bool) -> None:
        self._backend(url).remove(url, directory=directory)

    def rename(self, source: str, destination: str, *, replace: bool) -> None:
        self._backend(source).rename(source, destination, replace=replace)

    def transfer(self, source: str, temporary: str, size: int, checksum: bool, arrived: ProgressCallback) -> str | None:
        source_backend, backend = self._backend(source), self._backend(temporary)
        if source_backend is backend:
            return backend.transfer(source, temporary, size, checksum, arrived)
        return stream_copy(source_backend, source, backend, temporary, size, checksum, arrived)

    def size(self, url: str) -> int:
        return self._backend(url).size(url)

    def version(self, url: str) -> FileVersion:
        return self._backend(url).version(url)

    def checksum(self, url: str) -> str:
        return self._backend(url).checksum(url)

    def interrupt(self) -> None:
        self._stopped = True
        for backend in list(self._backends.values()):
            backend.interrupt()

    def resume(self) -> None:
        self._stopped = False
        for backend in self._backends.values():
            backend.resume()

    def sync_directory(self, directory_url: str) -> None:
        self._backend(directory_url).sync_directory(directory_url)


def main() -> None:
    """Serve until the requests end."""
    workers = WorkerThreads(RelayStorage, _MAX_WORKERS)

    def carry_out(batch: ActiveBatch) -> None:
        if batch.request["op"] == "list":
            # Threads that list a local disk only wait for each other.
            most = 1 if batch.request["url"].startswith("file:") else _MAX_WORKERS
            listing.report_listing(batch, lambda: listing.list_tree(batch, workers, most))
        else:
            operations.carry_out_items(batch, batch.request["items"], workers, _ITEMS_PER_WORKER)

    serve(f"a relay of {', '.join(BACKENDS)}", carry_out)


if __name__ == "__main__":
    main()

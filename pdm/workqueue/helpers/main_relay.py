"""Relay helper: protocols whose bytes may pass through the service, and copies between different protocols.

The scheme of a URL selects its backend. A copy within one backend is left to that backend, which may have a shorter
way (third-party copy, copy in the kernel); any other copy is streamed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:
    # When started as a script, sys.path has the directory of the helpers instead of the project's.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from pdm.workqueue.domain.enums import RELAYED, ChecksumAlgorithm, JobProtocol
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import backends, grouped_copy, listing, operations, tape
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.group_backend import GroupBackend, GroupStorage
from pdm.workqueue.helpers.request_loop import serve
from pdm.workqueue.helpers.storage import (
    EntryIterator,
    FileStat,
    FileVersion,
    ProgressCallback,
    StorageError,
    Timeouts,
    at_source,
)
from pdm.workqueue.helpers.storage_backend import StorageBackend, stream_copy
from pdm.workqueue.helpers.threads import WorkerThreads
from pdm.workqueue.wire.agent_requests import CopyRequest, ListRequest

_MAX_WORKERS = 4
_ITEMS_PER_WORKER = 16


def backend_class(protocol: JobProtocol) -> type[StorageBackend]:
    """The backend of a protocol, imported at its first use: a helper seldom needs all of them."""
    module, _, name = protocol.info.backend.partition(":")
    found: type[StorageBackend] = getattr(importlib.import_module(f"{backends.__name__}.{module}"), name)
    return found


class RelayStorage(GroupStorage):
    """The storage of one thread: a backend for each scheme, made at its first use."""

    def __init__(self) -> None:
        self._backends: dict[str, StorageBackend] = {}
        self._stopped = False

    def _backend(self, url: StorageUrl) -> StorageBackend:
        backend = self._backends.get(url.scheme)
        if backend is None:
            protocol = JobProtocol.of_scheme(url.scheme)
            if protocol is None or not protocol.info.backend:
                raise StorageError(
                    f"this helper cannot reach {url.scheme}://",
                    code=FailureCode.UNSUPPORTED,
                    scope=FailureScope.SERVICE,
                )
            backend = self._backends[url.scheme] = backend_class(protocol).from_environment()
            if self._stopped:
                backend.interrupt()
        backend.timeouts = self.timeouts
        return backend

    def group_backend(self, url: StorageUrl) -> GroupBackend | None:
        backend = self._backend(url)
        return backend if isinstance(backend, GroupBackend) else None

    @property
    def timeouts(self) -> Timeouts:  # a property here, so that the backends have it too
        return self._timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        for backend in self._backends.values():
            backend.timeouts = timeouts

    def stat(self, url: StorageUrl) -> FileStat | None:
        return self._backend(url).stat(url)

    def stat_new(self, url: StorageUrl) -> FileStat | None:
        return self._backend(url).stat_new(url)

    def real_path(self, url: StorageUrl, there: FileStat) -> bytes | None:
        return self._backend(url).real_path(url, there)

    def entries(self, url: StorageUrl) -> EntryIterator:
        backend = self._backend(url)
        self.unnamed = 0
        yield from backend.entries(url)
        self.unnamed, self.unnamed_are = backend.unnamed, backend.unnamed_are

    def link_at(self, url: StorageUrl, *, listed: bool) -> str | None:
        return self._backend(url).link_at(url, listed=listed)

    def make_directory(self, url: StorageUrl) -> None:
        self._backend(url).make_directory(url)

    def remove(self, url: StorageUrl, *, directory: bool) -> None:
        self._backend(url).remove(url, directory=directory)

    def rename(self, source: StorageUrl, destination: StorageUrl, *, replace: bool) -> None:
        self._backend(source).rename(source, destination, replace=replace)

    def continue_rename(self, source: StorageUrl, destination: StorageUrl) -> bool:
        return self._backend(source).continue_rename(source, destination)

    def expect_rename(
        self,
        temporary: StorageUrl,
        destination: StorageUrl,
        stale: Sequence[StorageUrl],
        algorithm: ChecksumAlgorithm | None,
    ) -> None:
        self._backend(temporary).expect_rename(temporary, destination, stale, algorithm)

    def forget_rename(self, temporary: StorageUrl) -> None:
        self._backend(temporary).forget_rename(temporary)

    def has_temporary(self, temporary: StorageUrl) -> bool:
        return self._backend(temporary).has_temporary(temporary)

    def transfer(
        self,
        source: StorageUrl,
        temporary: StorageUrl,
        size: int,
        checksum: ChecksumAlgorithm | None,
        arrived: ProgressCallback,
    ) -> str | None:
        source_backend, backend = self._backend(source), self._backend(temporary)
        if source_backend is backend:
            return backend.transfer(source, temporary, size, checksum, arrived)
        link = at_source(source_backend.link_to, source)
        if link is not None and backend.fetch(link, source, temporary, arrived):
            return None
        if checksum is not None and at_source(source_backend.computes, source, checksum):
            # A checksum of the file itself proves more than one of the bytes that have passed.
            checksum = None
        return stream_copy(source_backend, source, backend, temporary, size, checksum, arrived)

    def size(self, url: StorageUrl) -> int:
        return self._backend(url).size(url)

    def version(self, url: StorageUrl) -> FileVersion:
        return self._backend(url).version(url)

    def attributes(self, url: StorageUrl) -> FileStat:
        return self._backend(url).attributes(url)

    def set_mtime(self, url: StorageUrl, mtime: int) -> None:
        self._backend(url).set_mtime(url, mtime)

    def set_mode(self, url: StorageUrl, mode: int) -> None:
        self._backend(url).set_mode(url, mode)

    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        return self._backend(url).checksum(url, algorithm)

    def free_bytes(self, directory_url: StorageUrl) -> int | None:
        return self._backend(directory_url).free_bytes(directory_url)

    def interrupt(self) -> None:
        self._stopped = True
        for backend in list(self._backends.values()):
            backend.interrupt()

    def resume(self) -> None:
        self._stopped = False
        for backend in self._backends.values():
            backend.resume()

    def sync_directory(self, directory_url: StorageUrl) -> None:
        self._backend(directory_url).sync_directory(directory_url)


def _list_one(batch: ActiveBatch, workers: WorkerThreads, request: ListRequest) -> None:
    # Threads that list a local disk only wait for each other.
    most = 1 if StorageUrl(request.url).scheme in JobProtocol.FILE.info.schemes else _MAX_WORKERS
    listing.list_tree(batch, request, workers, most)


def main() -> None:
    """Serve until the requests end."""
    workers = WorkerThreads(RelayStorage, _MAX_WORKERS)
    tape_client = tape.TapeClient()

    def carry_out(batch: ActiveBatch) -> None:
        if batch.tape is not None:
            tape_client.carry_out(batch, batch.tape)
            return
        request = batch.request
        if isinstance(request, ListRequest):
            work = partial(listing.list_both_ends, batch, request, workers, partial(_list_one, batch, workers))
            listing.report_listing(batch, request, work)
        elif isinstance(request, CopyRequest):
            count = 1 + len(request.items) // _ITEMS_PER_WORKER
            grouped_copy.copy(batch, request, request.items, workers, count)
        else:
            operations.carry_out_items(batch, request, workers, _ITEMS_PER_WORKER)

    schemes = [scheme for protocol in sorted(RELAYED) for scheme in protocol.info.schemes]
    serve(f"a relay of {', '.join(schemes)}", carry_out)


if __name__ == "__main__":
    main()

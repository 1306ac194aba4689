"""Compare files with their known sizes and checksums, at one end; nothing is written."""

from __future__ import annotations

import errno

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.storage import Storage, StorageError, scoped
from pdm.workqueue.helpers.threads import WorkerThreads
from pdm.workqueue.wire.agent_requests import CheckItem, CheckRequest


def check_items(batch: ActiveBatch, request: CheckRequest, workers: WorkerThreads, count: int) -> None:
    """Run a ``check`` request in ``count`` threads."""

    def work(storage: Storage, item: CheckItem) -> None:
        scoped(request.at, _compare, storage, item, request.checksum)
        batch.log(item.key, f"{item.size} bytes, {item.checksum or 'no checksum given'}: as it must be")
        batch.done(item.key, item.size, 0, item.checksum, already_there=True)

    workers.share(batch, request.items, count, work)


def _compare(storage: Storage, item: CheckItem, algorithm: ChecksumAlgorithm) -> None:
    """Raise `StorageError` if a file is not what it must be."""
    url = StorageUrl(item.url)
    size = _size(storage, url)
    if size != item.size:
        raise StorageError(f"it has {size} bytes, and had {item.size}", code=FailureCode.DIFFERS)
    if item.checksum is None:
        return
    found = f"{algorithm}:{storage.checksum(url, algorithm)}"
    if found != item.checksum:
        raise StorageError(f"it has {found}, and had {item.checksum}", code=FailureCode.DIFFERS)


def _size(storage: Storage, url: StorageUrl) -> int:
    """Bytes of a file, links followed."""
    there = storage.existing(url)
    kind = there.target_kind if there.kind == "link" else there.kind
    if kind == "directory":
        raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
    if kind == "other":
        raise StorageError(f"{url} is no file", code=FailureCode.SPECIAL_FILE)
    return there.size if there.kind == "file" else storage.size(url)

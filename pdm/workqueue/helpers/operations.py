"""Remove, rename, create and discard items, and the table of operations by request.

`carry_out_items` selects the function that carries out a request, for every helper that works on a storage.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pdm.workqueue.helpers import copying
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.directories import ensure_directory
from pdm.workqueue.helpers.storage import FRESH_S, FileStat, Storage, StorageError, parent_url, scoped
from pdm.workqueue.helpers.threads import WorkerThreads

#: Seconds after which what was listed is looked at again before it is removed.
_MAX_LISTING_AGE_S = 1800.0


def remove_items(batch: ActiveBatch, items: Sequence[dict[str, Any]], workers: WorkerThreads, count: int) -> None:
    """Carry out a ``remove_items`` request: files, links and empty directories."""

    def work(storage: Storage, item: dict[str, Any]) -> None:
        try:
            if must_recheck(item):
                check_unchanged_since_listing(item, scoped("source", storage.stat, item["url"]))
            scoped("source", storage.remove, item["url"], directory=item.get("directory", False))
        except StorageError as error:
            if not (item.get("again") and error.errno == errno.ENOENT):
                raise
            batch.log(item["key"], "it is gone: an earlier attempt has removed it")
        scoped("source", storage.sync_directory, parent_url(item["url"]))
        batch.done(item["key"])

    workers.share(batch, items, count, work)


def must_recheck(item: dict[str, Any]) -> bool:
    """Whether a file may be another by now than the one that was listed: after a pause, or a lost attempt.

    An attempt that was lost may have removed it, and its owner made a new one. Directories are removed only when they
    are empty.
    """
    listed_at = item.get("listed_at")
    if listed_at is None or item.get("directory", False):
        return False
    return bool(item.get("again")) or time.time() - listed_at > _MAX_LISTING_AGE_S


def check_unchanged_since_listing(item: dict[str, Any], there: FileStat | None) -> None:
    """Raise `StorageError` if what is to be removed was written later than it was listed."""
    if there is not None and there.mtime is not None and there.mtime > item["listed_at"] + FRESH_S:
        raise StorageError(
            f"{item['url']} was written to after it was listed, or is another file: it was not removed",
            code="CHANGED",
            scope="source",
        )


def discard_items(batch: ActiveBatch, items: Sequence[dict[str, Any]], workers: WorkerThreads, count: int) -> None:
    """Carry out a ``discard_items`` request: what is not there is done."""

    def work(storage: Storage, item: dict[str, Any]) -> None:
        for url in item.get("stale", [item["url"]]):
            try:
                storage.remove(url, directory=item.get("directory", False))
            except StorageError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise error.at("destination") from None
        batch.done(item["key"])

    workers.share(batch, items, count, work)


def make_directories(batch: ActiveBatch, items: Sequence[dict[str, Any]], workers: WorkerThreads, count: int) -> None:
    """Carry out a ``mkdir`` request."""
    parents: bool = batch.request["parents"]

    def work(storage: Storage, item: dict[str, Any]) -> None:
        if parents or item.get("again"):
            scoped("destination", ensure_directory, storage, item["url"])
        elif not _is_made(batch, storage, item):
            scoped("destination", storage.make_directory, item["url"])
        scoped("destination", storage.sync_directory, parent_url(item["url"]))
        batch.done(item["key"])

    workers.share(batch, items, count, work)


def _is_made(batch: ActiveBatch, storage: Storage, item: dict[str, Any]) -> bool:
    """Whether an earlier attempt has made a directory; if not, this one has begun when it returns."""
    url, found = item["url"], item.get("found")
    there = scoped("destination", storage.stat, url)
    if there is not None:
        if found is not None and found["destination"] is None and there.kind == "directory":
            batch.log(item["key"], "it is there: an earlier attempt, which had found nothing there, has made it")
            return True
        raise StorageError(f"{url} is there", errno=errno.EEXIST, scope="destination")
    batch.begin(item["key"], {"source": None, "destination": None}, storage.timeouts.stall_s)
    return False


def rename_items(batch: ActiveBatch, items: Sequence[dict[str, Any]], workers: WorkerThreads, count: int) -> None:
    """Carry out a ``rename_items`` request."""
    replace: bool = batch.request["overwrite"] == "always"

    def work(storage: Storage, item: dict[str, Any]) -> None:
        source, destination = item["source"], item["destination"]
        there = scoped("source", storage.stat, source)
        in_the_way = scoped("destination", storage.stat, destination)
        if there is None:
            if not _is_renamed(destination, item.get("found"), in_the_way):
                raise StorageError(f"{source} is not there", errno=errno.ENOENT, code="NOT_FOUND", scope="source")
            batch.log(item["key"], "it has its new name: an earlier attempt, which had found it, has given it")
            batch.done(item["key"])
            return
        if in_the_way is not None:
            _check_destination_free(destination, there.kind, in_the_way.kind, replace=replace)
        found = {"source": _fingerprint(there), "destination": _fingerprint(in_the_way)}
        batch.begin(item["key"], found, storage.timeouts.stall_s)
        scoped("destination", storage.rename, source, destination, replace=replace)
        for folder in {parent_url(source), parent_url(destination)}:
            scoped("destination", storage.sync_directory, folder)
        batch.done(item["key"])

    workers.share(batch, items, count, work)


def _fingerprint(file_stat: FileStat | None) -> list[Any] | None:
    """What a thing is told by later: kind, and size and mtime of what is no directory."""
    if file_stat is None:
        return None
    return [file_stat.kind] if file_stat.kind == "directory" else [file_stat.kind, file_stat.size, file_stat.mtime]


def _is_renamed(destination: str, found: dict[str, Any] | None, there: FileStat | None) -> bool:
    """Whether what is at the destination is what an attempt that had begun found at the source.

    Args:
        destination: its URL.
        found: what that attempt found; None if none had begun.
        there: what is at the destination now.
    """
    now = _fingerprint(there)
    if found is None or now is None or now[:2] != found["source"][:2]:
        return False
    if now == found["destination"] != found["source"]:
        # What was there before.
        return False
    # WebDAV servers may rename by copying.
    keeps_mtime = not destination.startswith(("https:", "davs:"))
    return not keeps_mtime or None in (*now[2:], *found["source"][2:]) or now[2:] == found["source"][2:]


def _check_destination_free(destination: str, kind: str, in_the_way: str, *, replace: bool) -> None:
    if not replace:
        raise StorageError(f"{destination} is there", errno=errno.EEXIST, code="EXISTS", scope="destination")
    if in_the_way == "directory" and kind != "directory":
        raise StorageError(
            f"{destination} is a directory", errno=errno.EISDIR, code="IS_A_DIRECTORY", scope="destination"
        )


_OPERATIONS: Mapping[str, Callable[[ActiveBatch, Sequence[dict[str, Any]], WorkerThreads, int], None]] = {
    "copy": copying.copy,
    "remove": remove_items,
    "rename": rename_items,
    "mkdir": make_directories,
    "discard": discard_items,
}


def carry_out_items(
    batch: ActiveBatch, items: Sequence[dict[str, Any]], workers: WorkerThreads, items_per_worker: int
) -> None:
    """Carry out a request that has items.

    Args:
        batch: of the request.
        items: those that have no outcome so far.
        workers: where the work is done.
        items_per_worker: from so many items on, one more lane.
    """
    _OPERATIONS[batch.request["op"]](batch, items, workers, 1 + len(items) // items_per_worker)

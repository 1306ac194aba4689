"""Removes, renames and makes, item by item."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from typing import Any

from pdm.workqueue.agents.helpers.channel import Batch
from pdm.workqueue.agents.helpers.folders import ensure_directory
from pdm.workqueue.agents.helpers.lanes import Lanes
from pdm.workqueue.agents.helpers.storage import FRESH_S, Storage, StorageError, Thing, parent_url, scoped

#: Seconds after which what was listed is looked at again before it is removed.
_LISTED_LONG_AGO_S = 1800.0


def remove(batch: Batch, items: Sequence[dict[str, Any]], lanes: Lanes, count: int) -> None:
    """Carry out a ``remove`` request: files, links and empty directories."""

    def work(storage: Storage, item: dict[str, Any]) -> None:
        try:
            if must_look(item):
                check_listed(item, scoped("source", storage.look, item["url"]))
            scoped("source", storage.remove, item["url"], directory=item.get("directory", False))
        except StorageError as trouble:
            if not (item.get("again") and trouble.errno == errno.ENOENT):
                raise
            batch.log(item["key"], "it is gone: an earlier attempt has removed it")
        scoped("source", storage.settle, parent_url(item["url"]))
        batch.done(item["key"])

    lanes.share(batch, items, count, work)


def must_look(item: dict[str, Any]) -> bool:
    """Whether a file may be another by now than the one that was listed: after a pause, or a lost attempt.

    An attempt that was lost may have removed it, and its owner made a new one. Directories are removed only when they
    are empty.
    """
    listed_at = item.get("listed_at")
    if listed_at is None or item.get("directory", False):
        return False
    return bool(item.get("again")) or time.time() - listed_at > _LISTED_LONG_AGO_S


def check_listed(item: dict[str, Any], there: Thing | None) -> None:
    """Raise `StorageError` if what is to be removed was written later than it was listed."""
    if there is not None and there.mtime is not None and there.mtime > item["listed_at"] + FRESH_S:
        raise StorageError(
            f"{item['url']} was written to after it was listed, or is another file: it was not removed",
            code="CHANGED",
            scope="source",
        )


def discard(batch: Batch, items: Sequence[dict[str, Any]], lanes: Lanes, count: int) -> None:
    """Carry out a ``discard`` request: what is not there is done."""

    def work(storage: Storage, item: dict[str, Any]) -> None:
        for url in item.get("stale", [item["url"]]):
            try:
                storage.remove(url, directory=item.get("directory", False))
            except StorageError as trouble:
                if trouble.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise trouble.at("destination") from None
        batch.done(item["key"])

    lanes.share(batch, items, count, work)


def make(batch: Batch, items: Sequence[dict[str, Any]], lanes: Lanes, count: int) -> None:
    """Carry out a ``mkdir`` request."""
    parents: bool = batch.request["parents"]

    def work(storage: Storage, item: dict[str, Any]) -> None:
        if parents or item.get("again"):
            scoped("destination", ensure_directory, storage, item["url"])
        elif not _is_made(batch, storage, item):
            scoped("destination", storage.make_directory, item["url"])
        scoped("destination", storage.settle, parent_url(item["url"]))
        batch.done(item["key"])

    lanes.share(batch, items, count, work)


def _is_made(batch: Batch, storage: Storage, item: dict[str, Any]) -> bool:
    """Whether an earlier attempt has made a directory; if not, this one has begun when it returns."""
    url, found = item["url"], item.get("found")
    there = scoped("destination", storage.look, url)
    if there is not None:
        if found is not None and found["destination"] is None and there.kind == "directory":
            batch.log(item["key"], "it is there: an earlier attempt, which had found nothing there, has made it")
            return True
        raise StorageError(f"{url} is there", errno=errno.EEXIST, scope="destination")
    batch.begin(item["key"], {"source": None, "destination": None}, storage.patience.stall_s)
    return False


def rename(batch: Batch, items: Sequence[dict[str, Any]], lanes: Lanes, count: int) -> None:
    """Carry out a ``rename`` request."""
    replace: bool = batch.request["overwrite"] == "always"

    def work(storage: Storage, item: dict[str, Any]) -> None:
        source, destination = item["source"], item["destination"]
        there = scoped("source", storage.look, source)
        in_the_way = scoped("destination", storage.look, destination)
        if there is None:
            if not _is_renamed(destination, item.get("found"), in_the_way):
                raise StorageError(f"{source} is not there", errno=errno.ENOENT, code="NOT_FOUND", scope="source")
            batch.log(item["key"], "it has its new name: an earlier attempt, which had found it, has given it")
            batch.done(item["key"])
            return
        if in_the_way is not None:
            _check_room(destination, there.kind, in_the_way.kind, replace=replace)
        found = {"source": _evidence(there), "destination": _evidence(in_the_way)}
        batch.begin(item["key"], found, storage.patience.stall_s)
        scoped("destination", storage.rename, source, destination, replace=replace)
        for folder in {parent_url(source), parent_url(destination)}:
            scoped("destination", storage.settle, folder)
        batch.done(item["key"])

    lanes.share(batch, items, count, work)


def _evidence(thing: Thing | None) -> list[Any] | None:
    """What a thing is told by later: kind, and size and mtime of what is no directory."""
    if thing is None:
        return None
    return [thing.kind] if thing.kind == "directory" else [thing.kind, thing.size, thing.mtime]


def _is_renamed(destination: str, found: dict[str, Any] | None, there: Thing | None) -> bool:
    """Whether what is at the destination is what an attempt that had begun found at the source.

    Args:
        destination: its URL.
        found: what that attempt found; None if none had begun.
        there: what is at the destination now.
    """
    now = _evidence(there)
    if found is None or now is None or now[:2] != found["source"][:2]:
        return False
    if now == found["destination"] != found["source"]:
        # What was there before.
        return False
    # WebDAV servers may rename by copying.
    keeps_mtime = not destination.startswith(("https:", "davs:"))
    return not keeps_mtime or None in (*now[2:], *found["source"][2:]) or now[2:] == found["source"][2:]


def _check_room(destination: str, kind: str, in_the_way: str, *, replace: bool) -> None:
    if not replace:
        raise StorageError(f"{destination} is there", errno=errno.EEXIST, code="EXISTS", scope="destination")
    if in_the_way == "directory" and kind != "directory":
        raise StorageError(
            f"{destination} is a directory", errno=errno.EISDIR, code="IS_A_DIRECTORY", scope="destination"
        )

"""Removes, renames and makes, item by item."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from pdm.workqueue.agents.helpers.channel import Batch
from pdm.workqueue.agents.helpers.folders import ensure_directory
from pdm.workqueue.agents.helpers.lanes import Lanes
from pdm.workqueue.agents.helpers.storage import Storage, StorageError, parent_url, scoped


def remove(batch: Batch, items: Sequence[dict[str, Any]], lanes: Lanes, count: int) -> None:
    """Carry out a ``remove`` request: files, links and empty directories."""

    def work(storage: Storage, item: dict[str, Any]) -> None:
        try:
            scoped("source", storage.remove, item["url"], directory=item.get("directory", False))
        except StorageError as trouble:
            if not (item.get("again") and trouble.errno == errno.ENOENT):
                raise
            batch.log(item["key"], "it is gone: an earlier attempt has removed it")
        scoped("source", storage.settle, parent_url(item["url"]))
        batch.done(item["key"])

    lanes.share(batch, items, count, work)


def discard(batch: Batch, items: Sequence[dict[str, Any]], lanes: Lanes, count: int) -> None:
    """Carry out a ``discard`` request: what is not there is done."""

    def work(storage: Storage, item: dict[str, Any]) -> None:
        try:
            storage.remove(item["url"], directory=item.get("directory", False))
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
        else:
            scoped("destination", storage.make_directory, item["url"])
        scoped("destination", storage.settle, parent_url(item["url"]))
        batch.done(item["key"])

    lanes.share(batch, items, count, work)


def rename(batch: Batch, items: Sequence[dict[str, Any]], lanes: Lanes, count: int) -> None:
    """Carry out a ``rename`` request."""
    replace: bool = batch.request["overwrite"] == "always"

    def work(storage: Storage, item: dict[str, Any]) -> None:
        source, destination = item["source"], item["destination"]
        there = scoped("source", storage.look, source)
        if there is None and item.get("again") and scoped("destination", storage.look, destination) is not None:
            batch.log(item["key"], "it has its new name: an earlier attempt has given it")
            batch.done(item["key"])
            return
        if there is None:
            raise StorageError(f"{source} is not there", errno=errno.ENOENT, code="NOT_FOUND", scope="source")
        in_the_way = scoped("destination", storage.look, destination)
        if in_the_way is not None:
            _check_room(destination, there.kind, in_the_way.kind, replace=replace)
        scoped("destination", storage.rename, source, destination, replace=replace)
        for folder in {parent_url(source), parent_url(destination)}:
            scoped("destination", storage.settle, folder)
        batch.done(item["key"])

    lanes.share(batch, items, count, work)


def _check_room(destination: str, kind: str, in_the_way: str, *, replace: bool) -> None:
    if not replace:
        raise StorageError(f"{destination} is there", errno=errno.EEXIST, code="EXISTS", scope="destination")
    if in_the_way == "directory" and kind != "directory":
        raise StorageError(
            f"{destination} is a directory", errno=errno.EISDIR, code="IS_A_DIRECTORY", scope="destination"
        )

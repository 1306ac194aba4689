"""Lists trees: depth first, a few folders at once, nothing kept but the folders that wait."""

from __future__ import annotations

import contextlib
import errno
import threading
from typing import Any
from urllib.parse import quote_from_bytes

from pdm.workqueue.agents.helpers.channel import Batch
from pdm.workqueue.agents.helpers.lanes import Lanes, patience
from pdm.workqueue.agents.helpers.storage import StoppedError, Storage, StorageError, Thing, bare_url, joined_url

#: An event holds at most so many entries, and about so many bytes of paths.
_ENTRIES_AN_EVENT, _BYTES_AN_EVENT = 1000, 512 * 1024
#: Folders that may wait: about 300 MB. A tree with more in one go is not listed in one job.
_MOST_WAITING = 2_000_000
#: Folders waiting for each further lane.
_WAITING_A_LANE = 16
_LARGEST_SIZE = 2**63 - 1


def list_tree(batch: Batch, lanes: Lanes, most_lanes: int) -> None:
    """Carry out a ``list`` request."""
    key = batch.request["key"]
    batch.started(key)
    try:
        _Tree(batch, lanes, most_lanes).walk()
    except StoppedError:
        batch.cancelled(key)
    except StorageError as trouble:
        batch.failed(key, trouble.at("source"))
    else:
        batch.done(key)


class _Tree:
    def __init__(self, batch: Batch, lanes: Lanes, most_lanes: int) -> None:
        self._batch = batch
        self._key: int = batch.request["key"]
        self._root: str = batch.request["url"]
        self._depth: int | None = batch.request["depth"]
        self._lanes = lanes
        self._most_lanes = most_lanes
        self._changed = threading.Condition()
        #: Folders still to be listed, as percent-encoded paths below the root; the next is the last.
        self._waiting: list[str] = []
        self._busy = 0
        self._threads: list[threading.Thread] = []
        self._trouble: StorageError | StoppedError | None = None

    def walk(self) -> None:
        first = self._lanes.storages(1)[0]
        self._prepare(first)
        there = first.look(bare_url(self._root))
        if there is None:
            raise StorageError(f"{self._root} is not there", errno=errno.ENOENT, code="NOT_FOUND")
        follow = self._batch.request.get("follow", True)
        is_directory = there.kind == "directory" or (
            there.kind == "link" and there.target_kind == "directory" and follow
        )
        if self._depth == 0 or not is_directory:
            self._batch.entries(self._key, [_entry("", there)])
            return
        # The root itself: its trouble is that of the whole listing.
        self._folder(first, "")
        self._lane(first)
        for thread in self._threads:
            thread.join()
        if self._trouble is not None:
            raise self._trouble

    def _prepare(self, storage: Storage) -> None:
        storage.resume()
        self._batch.on_stop(storage.interrupt)
        storage.patience = patience(self._batch.request["limits"], 0)

    def _lane(self, storage: Storage) -> None:
        while True:
            with self._changed:
                while not self._waiting and self._busy and self._trouble is None:
                    self._changed.wait()
                if not self._waiting or self._trouble is not None:
                    return
                path = self._waiting.pop()
                self._busy += 1
            try:
                self._folder(storage, path)
            except StorageError as trouble:
                self._batch.unreadable(self._key, path, trouble.at("source"))
            except StoppedError as stopped:
                self._trouble = stopped
            except Exception as error:
                self._trouble = StorageError(
                    f"the helper failed: {type(error).__name__}: {error}", code="INTERNAL", scope="service"
                )
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()

    def _folder(self, storage: Storage, path: str) -> None:
        """List one folder and remember those in it."""
        if self._batch.stopped:
            raise StoppedError
        # Each folder has its own time: a tree may take as long as it goes on.
        storage.patience = patience(self._batch.request["limits"], 0)
        url = joined_url(self._root, path) if path else self._root
        deeper = self._depth is None or (path.count("/") + 2 if path else 1) < self._depth
        entries: list[list[Any]] = []
        folders: list[str] = []
        room = _BYTES_AN_EVENT
        with contextlib.closing(storage.entries(url)) as found:
            for name, thing in found:
                encoded = _checked_name(name)
                below = f"{path}/{encoded}" if path else encoded
                entries.append(_entry(below, thing))
                room -= len(below) + 3 * len(thing.target or b"") + 60
                if deeper and thing.kind == "directory":
                    folders.append(below)
                if len(entries) == _ENTRIES_AN_EVENT or room <= 0:
                    self._batch.entries(self._key, entries)
                    entries, room = [], _BYTES_AN_EVENT
                    self._remember(folders)
                    folders = []
        if entries:
            self._batch.entries(self._key, entries)
        if storage.unnamed:
            self._batch.log(
                self._key,
                f"the server does not name {storage.unnamed} of the entries of {url}:"
                " most likely symbolic links that lead nowhere",
            )
        self._remember(folders)

    def _remember(self, folders: list[str]) -> None:
        if not folders:
            return
        with self._changed:
            if len(self._waiting) + len(folders) > _MOST_WAITING:
                raise StorageError(
                    f"more than {_MOST_WAITING} folders wait to be listed: list the tree in parts", code="UNSUPPORTED"
                )
            self._waiting.extend(folders)
            lanes = min(self._most_lanes, 1 + len(self._waiting) // _WAITING_A_LANE)
            if len(self._threads) + 1 < lanes:
                storage = self._lanes.storages(len(self._threads) + 2)[-1]
                self._prepare(storage)
                thread = threading.Thread(target=self._lane, args=(storage,), name="lane")
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()


def _checked_name(name: bytes) -> str:
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise StorageError(
            f"the server's listing is not valid: {name[:200]!r} is no name of an entry", code="BAD_LISTING"
        )
    return quote_from_bytes(name, safe="")


def _entry(path: str, thing: Thing) -> list[Any]:
    """A ``RawEntry`` of the wire."""
    return [
        path,
        thing.kind,
        thing.size,
        thing.mode,
        thing.mtime,
        quote_from_bytes(thing.target, safe="/") if thing.target is not None else None,
        thing.target_kind == "file",
    ]

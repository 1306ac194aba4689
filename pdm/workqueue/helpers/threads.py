"""Worker threads, which share the items of a batch; each has a storage connection of its own."""

from __future__ import annotations

import functools
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.storage import StoppedError, Storage, StorageError, Timeouts, internal_error
from pdm.workqueue.wire.agent_requests import CheckItem, CopyItem, PathItem, RenameItem

_Part = TypeVar("_Part")
_Item = TypeVar("_Item", bound=CheckItem | CopyItem | PathItem | RenameItem)


class WorkerThreads:
    """The storage connections of the threads, kept from batch to batch.

    Args:
        open_storage: makes one.
        most: maximum number.
    """

    def __init__(self, open_storage: Callable[[], Storage], most: int) -> None:
        self._open_storage = open_storage
        self._most = most
        self._storages: list[Storage] = []

    def storages(self, count: int) -> list[Storage]:
        """The first ``count`` storages; fewer if the maximum is lower."""
        count = self.limited(count)
        while len(self._storages) < count:
            self._storages.append(self._open_storage())
        return self._storages[:count]

    def share(
        self,
        batch: ActiveBatch,
        items: Iterable[_Item],
        workers: int,
        work: Callable[[Storage, _Item], None],
        *,
        begun: bool = False,
    ) -> None:
        """Work on each item in one of ``workers`` threads; returns when all are done.

        Args:
            batch: of the items.
            items: those without an outcome.
            workers: number of threads.
            work: reports the outcome of an item itself, or raises `StorageError` or `StoppedError`.
            begun: whether the items were started before: then cancelled ones are worked on, too, to clean up.
        """

        def each(storage: Storage, item: _Item) -> None:
            if begun or may_begin(batch, item.key):
                _carry_out_item(batch, storage, item, work)

        self._share_out(batch, items, workers, each)

    def share_groups(
        self,
        batch: ActiveBatch,
        groups: Sequence[Sequence[_Item]],
        workers: int,
        together: Callable[[Storage, Sequence[_Item]], Sequence[_Item]],
        alone: Callable[[Storage, _Item], None],
    ) -> None:
        """Work on each group in one of ``workers`` threads; returns when all are done.

        Args:
            batch: of the items.
            groups: of items without an outcome.
            workers: number of threads.
            together: works on a group of two or more, and returns the items to work on alone.
            alone: like ``work`` of `share`, but reports by itself that an item is started.
        """

        def each(storage: Storage, group: Sequence[_Item]) -> None:
            left = group
            if len(group) > 1:
                try:
                    left = together(storage, group)
                except Exception:
                    # One of the items may be the cause: each without an outcome is worked on alone.
                    traceback.print_exc()
                    opened = set(batch.open_keys())
                    left = [item for item in group if item.key in opened]
            for item in left:
                _carry_out_item(batch, storage, item, alone)

        self._share_out(batch, groups, workers, each)

    def limited(self, count: int) -> int:
        """The number of threads available if ``count`` are requested."""
        return min(max(count, 1), self._most)

    def _share_out(
        self, batch: ActiveBatch, parts: Iterable[_Part], workers: int, each: Callable[[Storage, _Part], None]
    ) -> None:
        waiting = deque(parts)
        storages = self.storages(min(workers, len(waiting)))
        # An item that is cancelled by itself does not start; a running one ends soon, because large ones are copied
        # alone.
        batch.ends_items(lambda keys: None)
        for storage in storages:
            storage.resume()
            batch.on_stop(storage.interrupt)

        def worker(storage: Storage) -> None:
            while True:
                try:
                    part = waiting.popleft()
                except IndexError:
                    return
                each(storage, part)

        threads = [threading.Thread(target=worker, args=(storage,), name="lane") for storage in storages[1:]]
        for thread in threads:
            thread.start()
        worker(storages[0])
        for thread in threads:
            thread.join()


def may_begin(batch: ActiveBatch, key: int) -> bool:
    """Report an item as started; False if it was cancelled and has its outcome."""
    if batch.stopped:
        batch.cancelled(key)
        return False
    return batch.started(key)


def _carry_out_item(batch: ActiveBatch, storage: Storage, item: _Item, work: Callable[[Storage, _Item], None]) -> None:
    key = item.key
    storage.log_to(functools.partial(batch.log, key))
    size = max(item.size, 0) if isinstance(item, CopyItem | CheckItem) else 0
    storage.timeouts = Timeouts.of(batch.request.limits, size)
    try:
        work(storage, item)
    except StoppedError:
        batch.cancelled(key)
    except StorageError as error:
        batch.failed(key, error)
    except Exception as error:
        text = f"the helper failed: {type(error).__name__}: {error}"
        number = error.errno if isinstance(error, OSError) else None
        batch.failed(key, internal_error(text, errno=number))

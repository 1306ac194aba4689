"""Worker threads: each has a storage connection of its own, and they share the items of a batch."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.storage import StoppedError, Storage, StorageError, Timeouts

#: What is done with one item. It reports the outcome itself, or raises `StorageError` or `StoppedError`.
Work = Callable[[Storage, dict[str, Any]], None]


class WorkerThreads:
    """The ways to the storage, kept from batch to batch.

    Args:
        open_storage: makes one more.
        most: how many there may be.
    """

    def __init__(self, open_storage: Callable[[], Storage], most: int) -> None:
        self._open_storage = open_storage
        self._most = most
        self._storages: list[Storage] = []

    def storages(self, count: int) -> list[Storage]:
        """The first ``count`` of them, as far as there may be so many."""
        count = min(max(count, 1), self._most)
        while len(self._storages) < count:
            self._storages.append(self._open_storage())
        return self._storages[:count]

    def share(
        self, batch: ActiveBatch, items: Iterable[dict[str, Any]], workers: int, work: Work, *, begun: bool = False
    ) -> None:
        """Have each item worked on by one of ``workers`` threads; returns when all are worked on.

        Args:
            batch: of the items.
            items: that have no outcome so far.
            workers: how many threads.
            work: what is done with one.
            begun: whether the items were begun before: then cancelled ones are worked on too, for they have left
                something behind.
        """
        waiting = deque(items)
        storages = self.storages(min(workers, len(waiting)))
        # An item that is ended alone is not begun; one that is under way ends soon, for large ones are alone.
        batch.ends_items(lambda keys: None)
        for storage in storages:
            storage.resume()
            batch.on_stop(storage.interrupt)

        def worker(storage: Storage) -> None:
            while True:
                try:
                    item = waiting.popleft()
                except IndexError:
                    return
                if begun or _may_begin(batch, item["key"]):
                    _carry_out_item(batch, storage, item, work)

        threads = [threading.Thread(target=worker, args=(storage,), name="lane") for storage in storages[1:]]
        for thread in threads:
            thread.start()
        worker(storages[0])
        for thread in threads:
            thread.join()


def _may_begin(batch: ActiveBatch, key: int) -> bool:
    if batch.stopped:
        batch.cancelled(key)
        return False
    return batch.started(key)


def _carry_out_item(batch: ActiveBatch, storage: Storage, item: dict[str, Any], work: Work) -> None:
    key = item["key"]
    storage.log_to(functools.partial(batch.log, key))
    storage.timeouts = timeouts(batch.request["limits"], item.get("size", 0))
    try:
        work(storage, item)
    except StoppedError:
        batch.cancelled(key)
    except StorageError as error:
        batch.failed(key, error)
    except Exception as error:
        text = f"the helper failed: {type(error).__name__}: {error}"
        number = error.errno if isinstance(error, OSError) else None
        batch.failed(key, StorageError(text, errno=number, code="INTERNAL", scope="service"))


def timeouts(limits: dict[str, Any], size: int) -> Timeouts:
    """How long one element of ``size`` bytes may take, from now."""
    slack_s = size / max(limits.get("least_rate", 500_000.0), 1.0)
    return Timeouts(limits.get("stall_s", 120.0), slack_s, time.monotonic() + limits.get("total_s", 600.0) + slack_s)

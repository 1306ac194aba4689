"""Several threads, each with its own way to the storage, share the items of a batch."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from pdm.workqueue.agents.helpers.channel import Batch
from pdm.workqueue.agents.helpers.storage import Patience, StoppedError, Storage, StorageError

#: What is done with one item. It reports the outcome itself, or raises `StorageError` or `StoppedError`.
Work = Callable[[Storage, dict[str, Any]], None]


class Lanes:
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

    def share(self, batch: Batch, items: Iterable[dict[str, Any]], lanes: int, work: Work) -> None:
        """Have each item worked on by one of ``lanes`` threads; returns when all have an outcome."""
        waiting = deque(items)
        storages = self.storages(min(lanes, len(waiting)))
        # An item that is ended alone is not begun; one that is under way ends soon, for large ones are alone.
        batch.ends_items(lambda keys: None)
        for storage in storages:
            storage.resume()
            batch.on_stop(storage.interrupt)

        def lane(storage: Storage) -> None:
            while True:
                try:
                    item = waiting.popleft()
                except IndexError:
                    return
                _one(batch, storage, item, work)

        threads = [threading.Thread(target=lane, args=(storage,), name="lane") for storage in storages[1:]]
        for thread in threads:
            thread.start()
        lane(storages[0])
        for thread in threads:
            thread.join()


def _one(batch: Batch, storage: Storage, item: dict[str, Any], work: Work) -> None:
    key = item["key"]
    if batch.stopped:
        batch.cancelled(key)
        return
    if not batch.started(key):
        return
    storage.log_to(functools.partial(batch.log, key))
    storage.patience = patience(batch.request["limits"], item.get("size", 0))
    try:
        work(storage, item)
    except StoppedError:
        batch.cancelled(key)
    except StorageError as trouble:
        batch.failed(key, trouble)
    except Exception as error:
        text = f"the helper failed: {type(error).__name__}: {error}"
        number = error.errno if isinstance(error, OSError) else None
        batch.failed(key, StorageError(text, errno=number, code="INTERNAL", scope="service"))


def patience(limits: dict[str, Any], size: int) -> Patience:
    """How long one element of ``size`` bytes may take, from now."""
    slack_s = size / max(limits.get("least_rate", 500_000.0), 1.0)
    return Patience(limits.get("stall_s", 120.0), slack_s, time.monotonic() + limits.get("total_s", 600.0) + slack_s)

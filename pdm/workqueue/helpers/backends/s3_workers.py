"""Threads for the parts of one object, and requests that are tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TypeVar

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.backends.s3_client import S3Client
from pdm.workqueue.helpers.storage import StorageError, Timeouts

_T = TypeVar("_T")
#: Parts of an object on their way at once.
PARALLEL_PARTS = 4
_TRIES = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_PASSING = (FailureCode.BUSY, FailureCode.SERVER_ERROR, FailureCode.CHECKSUM_MISMATCH)


class PartWorkers:
    """Threads for the parts of an object, each with connections of its own; they start when they are first needed."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._free: SimpleQueue[S3Client] = SimpleQueue()
        self._guard = threading.Lock()
        self._timeouts: Timeouts | None = None
        self._interrupted = False
        self.clients: list[S3Client] = []

    def submit(self, work: Callable[[S3Client], _T]) -> Future[_T]:
        """Start work in a thread, with the connections of that thread."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(PARALLEL_PARTS, "part")
        return self._threads.submit(self._run, work)

    def _run(self, work: Callable[[S3Client], _T]) -> _T:
        client = self._taken()
        try:
            return work(client)
        finally:
            self._free.put(client)

    def _taken(self) -> S3Client:
        try:
            return self._free.get_nowait()
        except Empty:
            client = S3Client()
        with self._guard:
            if self._timeouts is not None:
                client.timeouts = self._timeouts
            client.interrupted = self._interrupted
            self.clients.append(client)
        return client

    def set_timeouts(self, timeouts: Timeouts) -> None:
        """The timeouts of all work from now on."""
        with self._guard:
            self._timeouts = timeouts
            for client in self.clients:
                client.timeouts = timeouts

    def set_interrupted(self, *, interrupted: bool) -> None:
        """Fail all work, and all that begins, with `StoppedError`; or allow it again."""
        with self._guard:
            self._interrupted = interrupted
            for client in self.clients:
                if interrupted:
                    client.interrupt()
                client.interrupted = interrupted


def retried(act: Callable[[], _T], check: Callable[[], None]) -> _T:
    """The result of a request that does no harm twice, tried again after errors of the server or the connection."""
    pause_s = _FIRST_PAUSE_S
    for left in range(_TRIES - 1, -1, -1):
        try:
            return act()
        except StorageError as error:
            is_passing = error.lost or error.code in _PASSING
            wait_s = max(pause_s, error.retry_after_s or 0.0)
            if not left or not is_passing or error.unreachable or wait_s > _LONGEST_PAUSE_S:
                raise
        check()
        time.sleep(wait_s)
        pause_s *= 2
    raise AssertionError

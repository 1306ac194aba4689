"""DUMMY helper: simulates transfers with the delays, failures and hangs that the query of each URL specifies.

``files``, ``there`` (at the destination), ``size``, ``list_delay``: content and delay of a listing. ``delay``,
``hang``, ``crash``, ``fail``, ``fail_times``, ``attempt``: outcome of an element.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qsl

if not __package__:
    # When started as a script, sys.path has the directory of the helpers instead of the project's.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.request_loop import serve
from pdm.workqueue.helpers.storage import StorageError
from pdm.workqueue.wire.agent_events import RawEntry
from pdm.workqueue.wire.agent_requests import CheckItem, CheckRequest, CopyItem, ListRequest, PathItem

#: Files in one directory of a simulated listing.
_FILES_A_DIRECTORY = 1000
_PROGRESS_S = 0.2


class _Behaviour:
    """The query of a URL."""

    def __init__(self, query: str) -> None:
        values = dict(parse_qsl(query))
        self.files = int(values["files"]) if "files" in values else None
        self.there = int(values.get("there", 0))
        self.size = int(values.get("size", 0))
        self.delay_s = float(values.get("delay", 0))
        self.list_delay_s = float(values.get("list_delay", 0))
        self.hang = values.get("hang") == "1"
        self.attempt = int(values.get("attempt", 1))
        self.crash = values.get("crash") == "1" and self.attempt == 1
        fail_times = int(values["fail_times"]) if "fail_times" in values else self.attempt
        self.fail = values.get("fail") if self.attempt <= fail_times else None


@functools.lru_cache(maxsize=64)
def _behaviour(query: str) -> _Behaviour:
    """Cached: it is the same for most elements of a batch."""
    return _Behaviour(query)


def _behaviour_of(url: str) -> _Behaviour:
    return _behaviour(url.partition("?")[2])


class _Simulation:
    def __init__(self, batch: ActiveBatch) -> None:
        self._batch = batch
        #: Set whenever something is cancelled.
        self._stop = threading.Event()
        batch.on_stop(self._stop.set)
        batch.ends_items(lambda keys: self._stop.set())

    def run(self) -> None:
        request = self._batch.request
        if isinstance(request, ListRequest):
            self._one(request.key, _behaviour_of(request.url), 0, request)
            return
        for item in request.items:
            url = item.url if isinstance(item, PathItem | CheckItem) else item.source
            size = max(item.size, 0) if isinstance(item, CopyItem | CheckItem) else 0
            if self._batch.is_ended(item.key):
                self._batch.cancelled(item.key)
            else:
                self._one(item.key, _behaviour_of(url), size, None)

    def _one(self, key: int, behaviour: _Behaviour, size: int, listing: ListRequest | None) -> None:
        if not self._batch.started(key):
            return
        if behaviour.crash:
            self._batch.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        seconds = behaviour.list_delay_s if listing else behaviour.delay_s
        if not self._pass_time(key, seconds, size, for_ever=behaviour.hang):
            self._batch.cancelled(key)
        elif behaviour.fail is not None:
            why = f"failed as asked for, attempt {behaviour.attempt}"
            code = FailureCode.__members__.get(behaviour.fail)
            self._batch.failed(key, StorageError(why, code=code, scope=FailureScope.TRANSFER))
        else:
            if listing:
                if listing.destination is not None:
                    with self._batch.listing_destination():
                        self._tree(key, behaviour.there, behaviour.size, listing.depth)
                self._entries(key, behaviour, listing.depth)
            checks = isinstance(self._batch.request, CheckRequest)
            self._batch.done(key, size, 0 if checks else size, already_there=checks)

    def _pass_time(self, key: int, seconds: float, size: int, *, for_ever: bool) -> bool:
        """Wait; False if cancelled meanwhile."""
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < seconds or for_ever:
            if elapsed and seconds and not for_ever:
                rate = size / seconds
                self._batch.progress(key, int(elapsed * rate), rate, rate, elapsed)
            left_s = _PROGRESS_S if for_ever else min(seconds - elapsed, _PROGRESS_S)
            if self._stop.wait(left_s):
                self._stop.clear()
                if self._batch.is_ended(key):
                    return False
        return not self._batch.is_ended(key)

    def _entries(self, key: int, behaviour: _Behaviour, depth: int | None) -> None:
        if behaviour.files is None:
            self._batch.entries(key, [RawEntry("", "file", behaviour.size, 0o644, 0)])
            return
        if depth == 0:
            self._batch.entries(key, [RawEntry("", "directory", 0, 0o644, 0)])
            return
        self._tree(key, behaviour.files, behaviour.size, depth)

    def _tree(self, key: int, files: int, size: int, depth: int | None) -> None:
        for first in range(0, files, _FILES_A_DIRECTORY):
            directory = f"d{first // _FILES_A_DIRECTORY:05d}"
            self._batch.entries(key, [RawEntry(directory, "directory", 0, 0o755, 0)])
            if depth == 1:
                continue
            last = min(first + _FILES_A_DIRECTORY, files)
            names = (f"{directory}/f{number:07d}" for number in range(first, last))
            self._batch.entries(key, [RawEntry(name, "file", size, 0o644, 0) for name in names])


def main() -> None:
    """Serve until the requests end."""
    serve("nothing", lambda batch: _Simulation(batch).run())


if __name__ == "__main__":
    main()

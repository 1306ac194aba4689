"""The pipes to the daemon: requests come in on descriptor 0, events go out on descriptor 3, one JSON object a line.

Descriptors 1 and 2 are for noise, so that a print of a C library never becomes an event. A pipe that nobody reads
blocks the writer: that is the back-pressure, and no event is ever kept in memory instead.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pdm.workqueue.agents.helpers.storage import StorageError, shortened

_REQUESTS, _EVENTS = 0, 3
_PIECE = 1024 * 1024
#: A request of this size is a mistake of the daemon, which we do not want to run out of memory for.
_LONGEST_REQUEST = 64 * 1024 * 1024
_LONGEST_LOG = 4000


class Events:
    """Writes events; may be used by every thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def write(self, event: dict[str, Any]) -> None:
        """Write one event; ends the process if nobody listens any more."""
        line = json.dumps(event, separators=(",", ":")).encode("ascii") + b"\n"
        with self._lock:
            rest = memoryview(line)
            while rest:
                try:
                    rest = rest[os.write(_EVENTS, rest) :]
                except BrokenPipeError:
                    os._exit(1)


class Batch:
    """A request under way: keeps its promise of exactly one outcome for each key."""

    def __init__(self, request: dict[str, Any], events: Events) -> None:
        self.request = request
        self.id: int = request["id"]
        keys = [request["key"]] if "key" in request else [item["key"] for item in request["items"]]
        self._open: set[int] = set(keys)
        self._events = events
        self._lock = threading.Lock()
        self._stopping = threading.Lock()
        self._stopped = False
        self._on_stop: list[Callable[[], None]] = []

    @property
    def stopped(self) -> bool:
        """Whether it was cancelled."""
        return self._stopped

    def open_keys(self) -> list[int]:
        """Keys without an outcome so far."""
        return sorted(self._open)

    def stop(self) -> None:
        """Cancel: nothing new begins, and what runs is interrupted."""
        with self._stopping:
            self._stopped = True
            for callback in self._on_stop:
                callback()
            # Whoever cancelled waits for a sign of life: without one it kills the helper.
            for key in self.open_keys()[:1]:
                self.log(key, "asked to stop")

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Have a function called when the batch is cancelled; at once if it was already."""
        with self._stopping:
            self._on_stop.append(callback)
            if self._stopped:
                callback()

    def started(self, key: int) -> None:
        self._write("started", key)

    def log(self, key: int, text: str) -> None:
        self._write("log", key, text=shortened(text, _LONGEST_LOG))

    def progress(self, key: int, transferred: int, instant: float, average: float, elapsed: float) -> None:
        """Bytes, bytes/s now and on average, seconds."""
        self._write(
            "progress", key, transferred=transferred, instant=instant, average=average, elapsed=round(elapsed, 3)
        )

    def entries(self, key: int, entries: list[list[Any]]) -> None:
        self._write("entries", key, entries=entries)

    def unreadable(self, key: int, path: str, trouble: StorageError) -> None:
        self._write("unreadable", key, path=path, fault=trouble.fault())

    def done(self, key: int, size: int = 0, transferred: int = 0, checksum: str | None = None) -> None:
        self._close("done", key, size=size, transferred=transferred, checksum=checksum)

    def failed(self, key: int, trouble: StorageError, *, residue: bool = False) -> None:
        self._close("failed", key, fault=trouble.fault(), residue=residue)

    def cancelled(self, key: int, *, residue: bool = False) -> None:
        self._close("cancelled", key, residue=residue)

    def finish(self) -> None:
        """End the batch; a key without an outcome is a bug of the helper, told as such."""
        with self._stopping:
            # A cancel that comes now must not interrupt the next batch.
            self._on_stop.clear()
        for key in self.open_keys():
            self.failed(key, StorageError("the helper lost sight of this element", code="INTERNAL", scope="service"))
        self._events.write({"event": "finished", "id": self.id})

    def _write(self, event: str, key: int, **fields: Any) -> None:
        self._events.write({"event": event, "id": self.id, "key": key, **fields})

    def _close(self, event: str, key: int, **fields: Any) -> None:
        with self._lock:
            if key not in self._open:
                return
            self._open.remove(key)
        self._write(event, key, **fields)


def serve(tools: str, carry_out: Callable[[Batch], None]) -> None:
    """Work until the requests end; never returns.

    The calling thread reads, so that a cancel is seen at once; batches are carried out one after the other on another
    thread. The end of the requests is the end of the process, at once: whatever is under way at servers ends with
    its connections.

    Args:
        tools: what the helper works with.
        carry_out: does all of a batch but `Batch.finish`.
    """
    events = Events()
    running: list[Batch] = []
    turn = threading.Lock()

    def work(batch: Batch) -> None:
        with turn:
            try:
                carry_out(batch)
            except Exception as error:
                # What is left of the batch is reported by finish(); the reason goes to the daemon's log.
                print(f"batch {batch.id}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                import traceback

                traceback.print_exc()
            running.remove(batch)
            batch.finish()

    events.write({"event": "ready", "tools": tools})
    try:
        for request in _requests():
            if request["op"] == "cancel":
                for batch in [batch for batch in running if batch.id == request["id"]]:
                    threading.Thread(target=batch.stop, name="cancel").start()
                continue
            batch = Batch(request, events)
            running.append(batch)
            threading.Thread(target=work, args=(batch,), name="batch").start()
    except (ValueError, KeyError, TypeError) as error:
        print(f"a request that cannot be read: {error!r}", file=sys.stderr, flush=True)
        os._exit(2)
    os._exit(0)


def _requests() -> Iterator[dict[str, Any]]:
    for line in _lines(iter(lambda: os.read(_REQUESTS, _PIECE), b"")):
        request = json.loads(line)
        if not isinstance(request, dict):
            raise TypeError("a request is an object")
        yield request


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    waiting: list[bytes] = []
    length = 0
    for piece in pieces:
        *lines, rest = piece.split(b"\n")
        for line in lines:
            yield b"".join((*waiting, line))
            waiting, length = [], 0
        waiting.append(rest)
        length += len(rest)
        if length > _LONGEST_REQUEST:
            raise ValueError(f"a request is longer than {_LONGEST_REQUEST} bytes")

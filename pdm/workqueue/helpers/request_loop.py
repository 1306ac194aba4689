"""Requests of the daemon: read them from descriptor 0, and work on the batches in their order."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import msgspec

from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.channel import ActiveBatch, EventWriter
from pdm.workqueue.wire.agent_events import ReadyEvent
from pdm.workqueue.wire.agent_requests import AgentRequest, CancelRequest, LeaseRequest, ProceedRequest

_REQUESTS = 0
#: prctl(2)
_PR_SET_DUMPABLE = 4
_READ_SIZE = 1024 * 1024
#: A larger request is a bug of the daemon; reading it could exhaust the memory.
_MAX_REQUEST_SIZE = 64 * 1024 * 1024
_decoder: msgspec.json.Decoder[AgentRequest] = msgspec.json.Decoder(AgentRequest)


class _BatchQueue:
    """Batches in order of arrival; one thread works on them, one after the other."""

    def __init__(self, carry_out: Callable[[ActiveBatch], None]) -> None:
        self._carry_out = carry_out
        self._change = threading.Condition()
        self._waiting: deque[ActiveBatch] = deque()
        self._running: ActiveBatch | None = None
        threading.Thread(target=self._work, name="batch", daemon=True).start()

    def add(self, batch: ActiveBatch) -> None:
        with self._change:
            self._waiting.append(batch)
            self._change.notify()

    def cancel(self, batch_id: int, keys: list[int] | None, *, keep: bool, waiting_only: bool) -> None:
        """Cancel a batch, or some of its items, whether it runs or waits; the rest as in `CancelRequest`."""
        with self._change:
            waits = [batch for batch in self._waiting if batch.id == batch_id]
            for batch in waits:
                for key in batch.open_keys() if keys is None else keys:
                    batch.cancelled(key)
                if batch.open_keys():
                    batch.leave_out(keys or ())
                else:
                    self._waiting.remove(batch)
                    batch.finish()
            running = self._running
        if running is not None and running.id == batch_id and not waits:
            if waiting_only:
                running.withdraw(keys or ())
                return
            running.keeps_handed = keep
            # On a thread of its own: interrupting may take some time.
            threading.Thread(target=_cancel, args=(running, keys), name="cancel").start()

    def go(self, batch_id: int, key: int) -> None:
        """Let an item of the running batch continue after its `BegunEvent`."""
        with self._change:
            running = self._running
        if running is not None and running.id == batch_id:
            running.go(key)

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._waiting:
                    self._change.wait()
                batch = self._running = self._waiting.popleft()
            try:
                self._carry_out(batch)
            except Exception as error:
                # finish() reports the remaining items; the reason goes to the daemon's log.
                print(f"batch {batch.id}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                traceback.print_exc()
            with self._change:
                self._running = None
            batch.finish()


def _cancel(batch: ActiveBatch, keys: list[int] | None) -> None:
    if keys is None:
        batch.stop()
    else:
        batch.end(keys)


def disable_core_dumps() -> None:
    """Prevent core dumps: the memory of this process has credentials."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # RLIMIT_CORE is ignored if core_pattern is a pipe.
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def serve(tools: str, carry_out: Callable[[ActiveBatch], None]) -> None:
    """Work until the requests end; never returns.

    The calling thread reads requests, so that a cancel is handled at once; another thread works on the batches. When
    the requests end, the process exits at once: what runs at servers ends with its connections.

    Args:
        tools: programs and libraries of the helper, for the log.
        carry_out: does everything for a batch but `ActiveBatch.finish`.
    """
    disable_core_dumps()
    events = EventWriter()
    batches = _BatchQueue(carry_out)
    events.write(ReadyEvent(tools), at_once=True)
    try:
        for line in _lines(iter(lambda: os.read(_REQUESTS, _READ_SIZE), b"")):
            _take(_decoder.decode(line), batches, events)
    except (msgspec.DecodeError, ValueError) as error:
        print(f"a request that cannot be read: {error!r}", file=sys.stderr, flush=True)
        os._exit(2)
    os._exit(0)


def _take(request: AgentRequest, batches: _BatchQueue, events: EventWriter) -> None:
    if isinstance(request, LeaseRequest):
        lease.hold(request.until)
        return
    lease.check()
    if isinstance(request, CancelRequest):
        batches.cancel(request.id, request.keys, keep=request.keep, waiting_only=request.waiting_only)
    elif isinstance(request, ProceedRequest):
        batches.go(request.id, request.key)
    else:
        batches.add(ActiveBatch(request, events))


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
        if length > _MAX_REQUEST_SIZE:
            raise ValueError(f"a request is longer than {_MAX_REQUEST_SIZE} bytes")

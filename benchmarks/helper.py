"""Drives a helper process of the service directly, without daemon or queue: its JSON lines over real pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import msgspec
from figures import BenchmarkError

from pdm.workqueue.wire.agent_events import AgentEvent, CancelledEvent, FailedEvent, FinishedEvent, ReadyEvent
from pdm.workqueue.wire.agent_requests import WorkRequest

_SOURCES = Path(__file__).resolve().parents[1]


class Helper:
    """A running helper.

    Args:
        module: of the helper.
        environment: that it needs.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        events, written_by_helper = os.pipe()
        # The shell puts the pipe where the helper expects it, and is gone.
        move = f'exec 3>&{written_by_helper}; exec "$0" -m "$@"'
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", move, sys.executable, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(written_by_helper,),
            env={"PATH": os.defpath, "PYTHONPATH": str(_SOURCES), **environment},
        )
        os.close(written_by_helper)
        self._events = os.fdopen(events, "rb")
        self._decoder: msgspec.json.Decoder[AgentEvent] = msgspec.json.Decoder(AgentEvent)
        self._ids = 0

    def __enter__(self) -> Self:
        if not isinstance(self._event(), ReadyEvent):
            raise BenchmarkError("the helper did not begin with 'ready'")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._events.close()

    def new_id(self) -> int:
        self._ids += 1
        return self._ids

    def run(self, request: WorkRequest) -> None:
        """Have a request carried out.

        Raises:
            BenchmarkError: something of it was not done.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(request) + b"\n")
        self.process.stdin.flush()
        while not isinstance(event := self._event(), FinishedEvent):
            if isinstance(event, (FailedEvent, CancelledEvent)):
                raise BenchmarkError(f"the helper did not do its work: {event}")

    def _event(self) -> AgentEvent:
        line = self._events.readline()
        if not line:
            raise BenchmarkError(f"the helper ended, status {self.process.wait()}")
        return self._decoder.decode(line)

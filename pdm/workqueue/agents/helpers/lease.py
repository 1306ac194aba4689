"""The lease of the daemon, as its helpers keep it: once it is over, nothing more is done at any server.

Another daemon may do the same work by then, and have finished it: what a helper that was suspended does afterwards
would hit files that are none of its job. So the process ends itself, and the programs it has started; its connections
end with it. Whoever changes something at a server calls `check` right before it.

The clock is CLOCK_BOOTTIME. It is one for all processes of a machine, so the daemon's word for the end needs no travel
time added, and unlike CLOCK_MONOTONIC it counts the time for which the machine is suspended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import NoReturn

#: Exit status of a helper whose lease has ended; `wire.agent_messages.LEASE_OVER_STATUS`.
_OVER_STATUS = 75
#: Seconds between two looks at the clock: a thread sleeps by a clock that does not count a suspended machine.
_LOOK_S = 0.5

_guard = threading.Lock()
_until: float | None = None
_watched = False


def hold(until: float) -> None:
    """Take the daemon's word for the end of its lease, a moment of CLOCK_BOOTTIME in seconds."""
    global _until, _watched  # noqa: PLW0603 - a process has one daemon, and so one lease
    _until = until
    check()
    with _guard:
        if not _watched:
            _watched = True
            threading.Thread(target=_watch, name="lease", daemon=True).start()


def check() -> None:
    """End the process if the lease is over. A helper that was never told of one has no daemon to outlive."""
    if _until is not None and time.clock_gettime(time.CLOCK_BOOTTIME) >= _until:
        _end()


def _watch() -> None:
    while True:
        check()
        left = (_until or 0.0) - time.clock_gettime(time.CLOCK_BOOTTIME)
        time.sleep(min(max(left, 0.001), _LOOK_S))


def _end() -> NoReturn:
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError, ValueError):
            for pid in task.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
    os._exit(_OVER_STATUS)

"""The daemon's lease in a helper process: after it has expired, a helper changes nothing at any server.

Another daemon may have taken over the work by then and may have finished it; a helper that was suspended would then
modify files of other jobs. So the process kills itself and the programs it has started, and its connections end with
it. Code that changes something at a server calls `check` right before the request.

The clock is CLOCK_BOOTTIME: all processes of a machine share it, so the expiry time needs no allowance for latency,
and unlike CLOCK_MONOTONIC it counts the time for which the machine is suspended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import NoReturn

#: Exit status of a helper whose lease has expired; `wire.agent_requests.LEASE_OVER_STATUS`.
_EXPIRED_STATUS = 75
#: Interval in seconds between checks: a sleeping thread does not count the time of a suspended machine.
_POLL_S = 0.5

_guard = threading.Lock()
_until: float | None = None
_watched = False


def hold(until: float) -> None:
    """Set the end of the daemon's lease, in seconds of CLOCK_BOOTTIME."""
    global _until, _watched  # noqa: PLW0603 - a process has one daemon, and so one lease
    _until = until
    check()
    with _guard:
        if not _watched:
            _watched = True
            threading.Thread(target=_watch, name="lease", daemon=True).start()


def check() -> None:
    """End the process if the lease has expired. A helper without a lease has no daemon that could lose it."""
    if _until is not None and time.clock_gettime(time.CLOCK_BOOTTIME) >= _until:
        _exit()


def _watch() -> None:
    while True:
        check()
        left = (_until or 0.0) - time.clock_gettime(time.CLOCK_BOOTTIME)
        time.sleep(min(max(left, 0.001), _POLL_S))


def _exit() -> NoReturn:
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError, ValueError):
            for pid in task.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
    os._exit(_EXPIRED_STATUS)

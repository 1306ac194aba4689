"""One daemon per instance folder, and none while helpers of an earlier one still run.

The lock belongs to an open file that every helper inherits. A daemon that is killed leaves it locked until its last
helper, and whatever that started, is gone: so nothing of the old run can overlap with the new one.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_LOOK_AGAIN_S = 0.05


class InstanceLockedError(Exception):
    """Another daemon, or a helper of one, is running; the text names the folder."""


def lock_instance(folder: Path, patience_s: float = 10.0) -> int:
    """Lock a state folder; blocks for as long as ``patience_s`` seconds while helpers of a dead daemon end.

    Returns:
        The descriptor that holds the lock, inheritable by intent only.

    Raises:
        InstanceLockedError: it stays locked.
        OSError: the folder cannot be written.
    """
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    descriptor = os.open(folder / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    give_up_at = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            if _is_alive(holder) or time.monotonic() >= give_up_at:
                os.close(descriptor)
                raise InstanceLockedError(
                    f"{folder} is in use by another daemon or its helpers (last started: pid {holder or 'unknown'})"
                ) from None
            time.sleep(_LOOK_AGAIN_S)
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            return descriptor


def _is_alive(pid: str) -> bool:
    """Whether the daemon itself lives: then its end is not worth waiting for."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True

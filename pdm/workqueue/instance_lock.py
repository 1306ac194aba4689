"""One daemon per instance folder and per SQLite database, and none while helpers of an earlier one still run.

The lock belongs to an open file that every helper inherits. A daemon that is killed leaves it locked until its last
helper, and whatever that started, is gone: so nothing of the old run can overlap with the new one. Helpers that do not
end by themselves, for they are stopped or hang, are killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

_LOOK_AGAIN_S = 0.05
#: In the command lines of helpers, before the state folder of the instance that has started them.
_HELPER = b"pdm.workqueue.helpers."
#: In the command line of a daemon.
_DAEMON = b"pdmworkqueue"


class InstanceLockedError(Exception):
    """Another daemon, or a helper of one, is running; the text names the folder."""


def lock_instance(folder: Path, patience_s: float = 10.0) -> int:
    """Lock a state folder; blocks for as long as ``patience_s`` seconds while helpers of a dead daemon end.

    Those that are stopped are killed at once, and those that have not ended by then.

    Returns:
        The descriptor that holds the lock, inheritable by intent only.

    Raises:
        InstanceLockedError: it stays locked.
        OSError: the folder cannot be written.
    """
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    descriptor = _open(folder / "daemon.lock")
    give_up_at = time.monotonic() + patience_s
    has_killed = False
    while not _try_lock(descriptor):
        holder = _holder(descriptor)
        if _is_daemon(holder) or (has_killed and time.monotonic() >= give_up_at):
            os.close(descriptor)
            raise InstanceLockedError(
                f"{folder} is in use by another daemon or its helpers (last started: pid {holder or 'unknown'})"
            )
        is_late = time.monotonic() >= give_up_at
        for pid in _helpers_of(folder):
            if is_late or _is_stopped(pid):
                _kill(pid)
        if is_late:
            has_killed = True
            give_up_at += 1.0
        time.sleep(_LOOK_AGAIN_S)
    return descriptor


def lock_database(file: Path) -> int:
    """Lock an SQLite database, beside its file: one daemon at a time works with it.

    Returns:
        The descriptor that holds the lock.

    Raises:
        InstanceLockedError: another daemon has it.
        OSError: the folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Not the file itself: to close a descriptor of that would end the locks that SQLite has on it.
    descriptor = _open(file.with_name(f"{file.name}.lock"))
    if not _try_lock(descriptor):
        holder = _holder(descriptor)
        os.close(descriptor)
        raise InstanceLockedError(
            f"the database {file} is in use by another daemon (pid {holder or 'unknown'}): "
            "give each instance a database of its own, or use PostgreSQL"
        )
    return descriptor


def instance_mark(descriptor: int) -> str:
    """What only the holder of this lock can say, until the machine starts anew.

    Two folders that are copies of each other differ in it, and so do two machines that share one.
    """
    status = os.fstat(descriptor)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{status.st_dev}:{status.st_ino}"


def worker_name(state_directory: Path) -> str:
    """The name under which this instance claims: the same after each start, and no other instance's.

    A daemon that was killed takes back its claims at once by this name, without waiting for its lease to end.
    """
    path = state_directory / "worker-name"
    try:
        name = path.read_text().strip()
    except FileNotFoundError:
        name = ""
    if not name:
        state_directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        name = f"{socket.gethostname()}:{secrets.token_hex(8)}"
        path.write_text(name + "\n")
    return name


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return True


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()


def _is_daemon(pid: str) -> bool:
    """Whether the daemon itself lives: then its end is not worth waiting for. Its number may be another's by now."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    command = _command_line(int(pid))
    return command is None or _DAEMON in command


def _helpers_of(folder: Path) -> Iterator[int]:
    """Helpers that an instance has started."""
    ours = os.fsencode(folder)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            arguments = (_command_line(int(entry.name)) or b"").split(b"\0")
            if ours in arguments and any(argument.startswith(_HELPER) for argument in arguments):
                yield int(entry.name)


def _command_line(pid: int) -> bytes | None:
    """None if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] in (b"T", b"t")
    except OSError:
        return False


def _kill(pid: int) -> None:
    """Kill a helper and what it has started: it leads a process group."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)

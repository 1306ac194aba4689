"""One daemon per instance directory and per SQLite database, and none while helpers of an earlier one still run.

The flock(2) belongs to an open file that every helper inherits. After a daemon is killed it stays locked until the last
helper and its children have exited, so two runs never overlap. Helpers that are stopped (SIGSTOP) or hang are killed.
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

_RETRY_INTERVAL_S = 0.05
#: In the command lines of helpers, before the state directory of the instance that has started them.
_HELPER = b"pdm.workqueue.helpers."
#: In the command line of a daemon.
_DAEMON = b"pdmworkqueue"


class InstanceLockedError(Exception):
    """Another daemon, or a helper of one, is running; the text names the directory."""


def lock_instance(directory: Path, patience_s: float = 10.0) -> int:
    """Lock a state directory; blocks for as long as ``patience_s`` seconds while helpers of a dead daemon end.

    Those that are stopped are killed at once, and those that have not ended by then.

    Returns:
        The descriptor that holds the lock, inheritable by intent only.

    Raises:
        InstanceLockedError: it stays locked.
        OSError: the directory cannot be written.
    """
    directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    descriptor = _open(directory / "daemon.lock")
    give_up_at = time.monotonic() + patience_s
    has_killed = False
    while not _try_lock(descriptor):
        holder = _holder(descriptor)
        if _is_daemon(holder) or (has_killed and time.monotonic() >= give_up_at):
            os.close(descriptor)
            raise InstanceLockedError(
                f"{directory} is in use by another daemon or its helpers (last started: pid {holder or 'unknown'})"
            )
        is_late = time.monotonic() >= give_up_at
        for pid in _helpers_of(directory):
            if is_late or _is_stopped(pid):
                _kill(pid)
        if is_late:
            has_killed = True
            give_up_at += 1.0
        time.sleep(_RETRY_INTERVAL_S)
    return descriptor


def running_daemon(directory: Path) -> str | None:
    """The process id of the daemon that runs with a state directory, perhaps empty; None if none does."""
    try:
        descriptor = os.open(directory / "daemon.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Shared: it does not disturb another command that looks.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)
    finally:
        os.close(descriptor)
    return None


def lock_database(file: Path) -> int:
    """Lock an SQLite database, beside its file: one daemon at a time works with it.

    Returns:
        The descriptor that holds the lock.

    Raises:
        InstanceLockedError: another daemon has it.
        OSError: the directory cannot be written.
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
    """Identifier of the locked file: boot id, device and inode. Only the holder of the lock can know it.

    It differs between copies of a directory, and between two machines that share one.
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
    """Whether the daemon itself runs, so that waiting is useless. Its pid may belong to another process by now."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    command = _command_line(int(pid))
    return command is None or _DAEMON in command


def _helpers_of(directory: Path) -> Iterator[int]:
    """Helpers that an instance has started."""
    ours = os.fsencode(directory)
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
    """Kill a helper with its process group."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)

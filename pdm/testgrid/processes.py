"""Programs and processes of a test grid: installed programs, and processes found and ended by their marks.

A process number proves little: it may belong to another process by now. Every server of a grid is started with marks in
its environment, which its sessions inherit, also after they have changed their user. The kernel shows the environment
with which a process was started, so the marks identify its grid reliably. Signals go through a pidfd, which
never refers to another process.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path


class GridError(Exception):
    """The grid could not be brought up or taken down; the text says why and what to do."""


class GridMissingError(GridError):
    """Programs of the grid are not installed on this machine."""


#: program → Debian package
PACKAGES = {
    "globus-gridftp-server": "globus-gridftp-server-progs",
    "globus-url-copy": "globus-gass-copy-progs",
    "myproxy-server": "myproxy-server",
    "myproxy-logon": "myproxy",
}

# Servers and account tools live in sbin directories, which an ordinary user's PATH lacks.
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def missing_programs() -> list[str]:
    """The names of the programs that are needed and not installed."""
    return [name for name in PACKAGES if shutil.which(name, path=_SEARCH_PATH) is None]


def missing_of(*names: str) -> list[str]:
    """Those of some programs that are not installed."""
    return [name for name in names if shutil.which(name, path=_SEARCH_PATH) is None]


def require_programs() -> None:
    """Check that a grid can run here.

    Raises:
        GridMissingError: it cannot; the text names the command that installs what is missing.
    """
    missing = missing_programs()
    if missing:
        packages = " ".join(PACKAGES[name] for name in missing)
        raise GridMissingError(f"{', '.join(missing)} not found: as root, run: apt-get install {packages}")


def program_path(name: str) -> Path:
    """The full path of an installed program.

    Raises:
        GridMissingError: there is no such program.
    """
    path = shutil.which(name, path=_SEARCH_PATH)
    if path is None:
        raise GridMissingError(f"{name} not found")
    return Path(path)


#: Seconds between SIGTERM and SIGKILL, and after SIGKILL until the grid gives up.
GRACE_S = 1.0
# After how many seconds an environment that is not there yet is read again, and for how long.
_LOOK_S, _LONGEST_LOOK_S = 0.002, 2.0
# Where in /proc/PID/stat begin and end of the environment stand, counted from behind the name.
_ENV_START, _ENV_END = 47, 48

Marks = Mapping[str, str]


def marked(marks: Marks) -> list[int]:
    """The numbers of the living processes that carry all of the marks, lowest first."""
    return sorted(
        int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _carries(entry, marks)
    )


def signal_marked(marks: Marks, number: signal.Signals, spare: int | None = None) -> list[int]:
    """Send a signal to each process that carries the marks.

    Args:
        spare: the number of a process that is left alone.

    Returns:
        The numbers of those that got it.
    """
    return [pid for pid in marked(marks) if pid != spare and signal_process(pid, marks, number)]


def signal_process(pid: int, marks: Marks, number: signal.Signals) -> bool:
    """Send a signal to one process if it carries the marks; returns whether it was sent."""
    with _opened(pid, marks) as process:
        if process is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, number)
            return True
        return False


def end_marked(marks: Marks) -> int:
    """End every process that carries the marks: SIGTERM, after a grace SIGKILL; return when they are gone.

    Returns:
        How many were ended.

    Raises:
        GridError: some are still there after SIGKILL, or belong to another user.
    """
    ended: set[int] = set()
    began = time.monotonic()
    while pids := marked(marks):
        waited = time.monotonic() - began
        if waited > 2 * GRACE_S:
            raise GridError(f"processes {pids} do not end: end them by hand")
        deadline = began + (GRACE_S if waited < GRACE_S else 2 * GRACE_S)
        for pid in pids:
            ended.add(pid)
            _end(pid, marks, signal.SIGTERM if waited < GRACE_S else signal.SIGKILL, deadline)
    return len(ended)


def reap(pid: int) -> None:
    """Take the exit status of a child that has ended, so that no zombie stays; nothing if it is not ours."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _end(pid: int, marks: Marks, number: signal.Signals, deadline: float) -> None:
    with _opened(pid, marks) as process:
        if process is not None:
            try:
                signal.pidfd_send_signal(process, number)
                # A frozen process takes SIGTERM only once it runs again.
                signal.pidfd_send_signal(process, signal.SIGCONT)
            except ProcessLookupError:
                pass
            except PermissionError as error:
                raise GridError(f"process {pid} belongs to another user: take the grid down as that user") from error
            # A pidfd becomes readable when the process has ended, also while it waits as a zombie to be reaped.
            select.select([process], [], [], max(0.0, deadline - time.monotonic()))
    reap(pid)


@contextlib.contextmanager
def _opened(pid: int, marks: Marks) -> Iterator[int | None]:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield process if _carries(Path("/proc", str(pid)), marks) else None
    finally:
        os.close(process)


def _carries(entry: Path, marks: Marks) -> bool:
    try:
        environment = b"\0" + _environment(entry) + b"\0"
    except OSError:
        return False
    # The shell, while it begins, has NUL for the sign between name and value: it reads its environment so.
    return all(
        any(os.fsencode(f"\0{name}{sign}{value}\0") in environment for sign in "=\0") for name, value in marks.items()
    )


def _environment(entry: Path) -> bytes:
    """What a process was started with; empty for threads of the kernel, zombies, and who was started with nothing.

    While a program takes the place of another in a process (exec), its environment reads as empty, on a busy machine
    for long: then it is read again. One that is empty for good has a place in memory, and no length.
    """
    give_up_at = time.monotonic() + _LONGEST_LOOK_S
    while not (environment := (entry / "environ").read_bytes()) and time.monotonic() < give_up_at:
        # Only what runs a program can be read here.
        (entry / "exe").readlink()
        fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
        if fields[_ENV_START] == fields[_ENV_END] != b"0":
            break
        time.sleep(_LOOK_S)
    return environment

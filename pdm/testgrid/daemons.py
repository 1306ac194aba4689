"""What the servers of protocols other than GridFTP have in common: a marked process on a free port of loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdm.testgrid.errors import GridError
from pdm.testgrid.processes import Marks, end_marked
from pdm.testgrid.server import GRID_MARK

_SERVER_MARK = "PDM_TESTGRID_SERVER"
#: Seconds until a server must answer.
_START_S = 60.0
#: Free ports are guessed: somebody else may take one before its server does, or while it is stopped.
_TRIES = 5
_PAUSE_S = 0.3


class Daemon:
    """A server that is started and stopped by its marks; it keeps its port over `stop` and `start`.

    Args:
        folder: of the server, which exists.
        name: unique in its grid.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.port = 0
        self.pid: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def marks(self) -> Marks:
        return {GRID_MARK: str(self.folder), _SERVER_MARK: self.name}

    @property
    def output(self) -> Path:
        """What the server prints."""
        return self.folder / f"{self.name}.out"

    def command(self) -> Sequence[str]:
        """The program with its arguments, for `port`; it stays in the foreground."""
        raise NotImplementedError

    def account(self) -> tuple[int, int] | None:
        """User and group that it runs as; None for the caller's."""
        return None

    def environment(self) -> Mapping[str, str]:
        """What it needs in its environment besides."""
        return {}

    def start(self) -> None:
        """Start it and return when it takes connections.

        Raises:
            GridError: it does not come up; the text has what it printed.
        """
        if self.pid is not None:
            raise GridError(f"server {self.name} is running")
        for last in (*[False] * (_TRIES - 1), True):
            chosen = self.port
            self.port = chosen or free_port()
            pid = self._spawn(self.command())
            if self._answers():
                self.pid = pid
                return
            end_marked(self.marks)
            self._wait()
            if last:
                break
            self.port = chosen
            time.sleep(_PAUSE_S)
        raise GridError(f"server {self.name} does not come up: {self.output.read_text(errors='replace').strip()}")

    def revive(self) -> None:
        """Start it if it is stopped, or has crashed by itself as XRootD 5.5.3 does now and then; thaw it if need be."""
        self.thaw()
        if self._process is not None and self._process.poll() is not None:
            self.kill()
        if self.pid is None:
            self.start()

    def _spawn(self, command: Sequence[str]) -> int:
        environment = {
            **self.environment(),
            **self.marks,
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self.folder),
        }
        account = self.account()
        who: dict[str, Any] = {}
        if account is not None:
            who = {"user": account[0], "group": account[1], "extra_groups": []}
        with self.output.open("ab") as printed:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                # A group of its own: a ^C at the terminal is not for the servers.
                start_new_session=True,
                **who,
            )
        return self._process.pid

    def _answers(self) -> bool:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                return False
            with socket.socket() as probe:
                probe.settimeout(1.0)
                # A port on which nobody listens may be given to the probe itself, which then meets itself.
                if probe.connect_ex(("127.0.0.1", self.port)) == 0 and probe.getsockname() != probe.getpeername():
                    return True
            time.sleep(0.02)
        return False

    def stop(self) -> None:
        """End it and all its sessions; nothing if it is stopped."""
        self._signal(signal.SIGCONT)
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash does; clients see their connections close."""
        self._signal(signal.SIGKILL)
        end_marked(self.marks)
        if self.pid is not None:
            self._wait()
            self.pid = None

    def _wait(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Connections stay open, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        """Signal the server, first of all, and then its sessions: some programs write over their marks."""
        if self.pid is None:
            return
        family = [self.pid, *descendants(self.pid)]
        handles = []
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))
        for handle in handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            os.close(handle)


def descendants(pid: int) -> list[int]:
    """The living processes that a process has started, and those that they have."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # After the name, which is in brackets: state, parent.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""GridFTP and MyProxy servers of a test grid: start, stop, kill, freeze, and end their sessions."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from pdm.testgrid.identities import HostFiles, UserFiles
from pdm.testgrid.ports import listens, reserve_port
from pdm.testgrid.processes import (
    GridError,
    Marks,
    end_marked,
    marked,
    program_path,
    reap,
    signal_marked,
    signal_process,
)

#: Mark of every process of a grid: the grid's directory.
GRID_MARK = "PDM_TESTGRID"
_SERVER_MARK = "PDM_TESTGRID_SERVER"
#: Seconds until a server must listen; a start takes 20 ms.
_GRIDFTP_START_S = 15.0


@frozen
class GridFtpSettings:
    """What a server runs on.

    Attributes:
        home: what ``~`` means.
        setuid: whether a session becomes the local account of its user (needs root).
        encrypts: whether it makes no data connection that is not encrypted.
    """

    directory: Path
    name: str
    home: Path
    certificate: Path
    key: Path
    trust: Path
    gridmap: Path
    setuid: bool
    log_level: str = "ERROR,WARN,INFO"
    encrypts: bool = False

    @property
    def marks(self) -> Marks:
        return {GRID_MARK: str(self.directory), _SERVER_MARK: self.name}


class GridFtpServer:
    """A GridFTP server on loopback that takes grid proxies.

    Its port is reserved when it first starts, so that any number of grids can start at once, and is its own while it is
    stopped, too.
    """

    def __init__(self, settings: GridFtpSettings) -> None:
        self.settings = settings
        self._port = 0
        self._pid: int | None = None

    @property
    def url(self) -> str:
        """The endpoint, ``gsiftp://localhost:PORT``; it stays while the server is stopped."""
        if not self._port:
            raise GridError(f"server {self.settings.name} has not been started")
        return f"gsiftp://localhost:{self._port}"

    @property
    def log(self) -> Path:
        """What the server writes about sessions and transfers; names stand raw in it, so read it as bytes."""
        return self.settings.directory / "servers" / f"{self.settings.name}.log"

    @property
    def pid(self) -> int | None:
        """The process that listens; None while the server is stopped."""
        return self._pid

    def start(self) -> None:
        """Start the server and return when it listens.

        Raises:
            GridError: it is running already, or it does not come up; the text has what it printed.
        """
        if self._pid is not None:
            raise GridError(f"server {self.settings.name} is running")
        self._port = self._port or reserve_port()
        printed = self.log.with_suffix(".out")
        arguments = [str(program_path("globus-gridftp-server")), *self._arguments()]
        pid = os.posix_spawn(
            arguments[0],
            arguments,
            self._environment(),
            # A group of its own: a ^C at the terminal is not for the servers.
            setsid=True,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(printed), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )
        self._wait_until_it_listens(pid, printed)
        self._pid = pid

    def stop(self) -> None:
        """End the server and all its sessions; clients see their connections close. Nothing if it is stopped."""
        end_marked(self.settings.marks)
        if self._pid is not None:
            reap(self._pid)
            self._pid = None

    def kill(self) -> None:
        """End the server and all its sessions at once, frozen or not, as a crash of the machine does."""
        if self._pid is not None:
            # First the one that makes new sessions.
            signal_process(self._pid, self.settings.marks, signal.SIGKILL)
        signal_marked(self.settings.marks, signal.SIGKILL)
        self.stop()

    def sessions(self) -> list[int]:
        """The processes that serve a connection each, oldest first as a rule."""
        return [pid for pid in marked(self.settings.marks) if pid != self.pid]

    def kill_sessions(self) -> int:
        """Kill the running sessions, as a crash of the server would; new ones are served. Return how many."""
        return len(signal_marked(self.settings.marks, signal.SIGKILL, spare=self.pid))

    def freeze(self) -> None:
        """Stop the server and its sessions where they are: connections stay open, and nothing answers."""
        if self.pid is not None:
            # First the one that makes new sessions.
            signal_process(self.pid, self.settings.marks, signal.SIGSTOP)
        signal_marked(self.settings.marks, signal.SIGSTOP)

    def thaw(self) -> None:
        """Continue a frozen server (SIGCONT)."""
        signal_marked(self.settings.marks, signal.SIGCONT)

    def _arguments(self) -> list[str]:
        arguments = ["-c", "/dev/null", "-s", "-p", str(self._port)]
        arguments += ["-control-interface", "127.0.0.1", "-data-interface", "127.0.0.1"]
        arguments += ["-home-dir", str(self.settings.home)]
        # Unbuffered, so that a test sees in the log what has just happened.
        arguments += ["-d", self.settings.log_level, "-log-module", "stdio:buffer=0", "-l", str(self.log)]
        if self.settings.encrypts:
            arguments.append("-encrypt-data")
        if not self.settings.setuid:
            # 1: check who it is; 4: do not change the account.
            arguments += ["-auth-level", "5"]
        return arguments

    def _environment(self) -> dict[str, str]:
        return {
            **self.settings.marks,
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.settings.home),
            "X509_CERT_DIR": str(self.settings.trust),
            "X509_USER_CERT": str(self.settings.certificate),
            "X509_USER_KEY": str(self.settings.key),
            "GRIDMAP": str(self.settings.gridmap),
        }

    def _wait_until_it_listens(self, pid: int, printed: Path) -> None:
        deadline = time.monotonic() + _GRIDFTP_START_S
        while time.monotonic() < deadline:
            if listens(pid, self._port):
                return
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                raise GridError(f"server {self.settings.name} ended at its start: {_text(printed)}")
            time.sleep(0.005)
        end_marked(self.settings.marks)
        raise GridError(f"server {self.settings.name} does not listen after {_GRIDFTP_START_S:.0f} s: {_text(printed)}")


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip()


_MYPROXY_START_S = 15.0
_CONFIGURATION = """\
accepted_credentials "*"
authorized_retrievers "*"
default_retrievers "*"
cert_dir {trust}
"""


@frozen(eq=False)
class MyProxyServer:
    """A MyProxy server on a free port of loopback; it ends with the grid whose marks it carries.

    Attributes:
        directory: of its own, for its configuration and what is stored.
        marks: environment by which the grid finds its processes.
    """

    directory: Path
    host: HostFiles
    trust: Path
    marks: Mapping[str, str]

    @property
    def address(self) -> str:
        """``localhost:PORT``."""
        return f"localhost:{int((self.directory / 'port').read_text())}"

    def start(self) -> None:
        """Start it, and return when it listens.

        Raises:
            GridError: it does not come up.
        """
        store, port = self.directory / "store", self.directory / "port"
        self.directory.mkdir(mode=0o700)
        store.mkdir(mode=0o700)
        configuration, key = self.directory / "myproxy-server.conf", self.directory / "host.key"
        configuration.write_text(_CONFIGURATION.format(trust=self.trust))
        configuration.chmod(0o600)
        shutil.copyfile(self.host.key, key)
        key.chmod(0o600)
        arguments = ["-c", str(configuration), "-l", "localhost", "-p", "0", "-s", str(store)]
        arguments += ["-z", str(port), "-P", str(self.directory / "pid")]
        environment = {"X509_USER_CERT": str(self.host.certificate), "X509_USER_KEY": str(key)}
        started = self._run("myproxy-server", arguments, environment)
        if started.returncode:
            raise GridError(f"the MyProxy server does not start: {started.stderr.strip()}")
        deadline = time.monotonic() + _MYPROXY_START_S
        while not (port.exists() and port.read_text().strip()):
            if time.monotonic() > deadline:
                raise GridError(f"the MyProxy server does not listen after {_MYPROXY_START_S:.0f} s")
            time.sleep(0.01)

    def stop(self) -> None:
        """End it; its port and what is stored stay known."""
        end_marked(self._marks)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes; after SIGSTOP nothing answers any more."""
        signal_marked(self._marks, number)

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return marked(self._marks)

    def store(self, user: UserFiles, username: str, password: str) -> None:
        """Put a user's credential there.

        Raises:
            GridError: the server does not take it.
        """
        host, _, port = self.address.partition(":")
        arguments = ["-S", "-s", host, "-p", port, "-l", username, "-c", "48", "-t", "24"]
        arguments += ["-C", str(user.certificate), "-y", str(user.key)]
        done = self._run("myproxy-init", arguments, {}, password + "\n")
        if done.returncode:
            raise GridError(f"the MyProxy server does not take the credential: {done.stderr.strip()}")

    @property
    def _marks(self) -> dict[str, str]:
        return {**self.marks, "PDM_TESTGRID_SERVER": "myproxy"}

    def _run(
        self, name: str, arguments: list[str], environment: Mapping[str, str], typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(program_path(name)), *arguments],
            env={
                **(self._marks if name == "myproxy-server" else {}),
                "PATH": os.defpath,
                "HOME": str(self.directory),
                "X509_CERT_DIR": str(self.trust),
                **environment,
            },
            input=typed,
            # A daemon keeps what it is given: a pipe would never end.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if name != "myproxy-server" else None,
            text=True,
            timeout=60,
            check=False,
        )

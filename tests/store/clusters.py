"""A private PostgreSQL server for tests: in a temporary directory, on a Unix socket, removed afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from pdm.testgrid.storage_servers import descendants

_START_TIMEOUT_S = 30
#: A test run that is killed leaves no server behind.
_DIES_WITH_US = ["setpriv", "--pdeathsig", "QUIT"] if shutil.which("setpriv") else []


def programs() -> Path | None:
    """The directory of the newest server programs on this machine."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    other = shutil.which("initdb")
    return Path(other).parent if other else None


class PostgresqlServer:
    """A server in a directory of its own; made at once, and started by `start`.

    Attributes:
        directory: has the socket, the data and the log.
        url: of its maintenance database.

    Args:
        bin_directory: has its programs.
        settings: ``NAME=VALUE`` each.
        data: of another one that is stopped; they are copied. None for new data.
    """

    def __init__(self, bin_directory: Path, *settings: str, data: Path | None = None) -> None:
        self._programs = bin_directory
        self._settings = settings
        # PostgreSQL refuses to run as root.
        self._account = _account() if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self.directory = Path(tempfile.mkdtemp(prefix="pdm-pg-"))
        self.url = sa.URL.create(
            "postgresql+psycopg", username="pdm", database="postgres", query={"host": str(self.directory)}
        )
        if self._account is not None:
            os.chown(self.directory, pwd.getpwnam(self._account).pw_uid, -1)
        if data is not None:
            subprocess.run(["cp", "-a", data, self._data], check=True)
            return
        subprocess.run(
            [
                *(bin_directory / "initdb", "-D", self._data, "-U", "pdm", "-A", "trust"),
                *("-E", "UTF8", "--no-locale", "-N"),
            ],
            check=True,
            capture_output=True,
            user=self._account,
            cwd=self.directory,
        )

    def move_data(self, to: Path) -> None:
        """Give the data of a server that is stopped to others."""
        shutil.move(self._data, to)

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command: list[str | Path] = [*_DIES_WITH_US, self._programs / "postgres"]
        command += ["-D", self._data, "-k", self.directory, "-h", ""]
        for setting in self._settings:
            command += ["-c", setting]
        log_path = self.directory / "log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, user=self._account, cwd=self.directory)
        _wait_for(self.url, self._process, log_path)

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it: SIGINT ends its sessions, SIGQUIT leaves it as after a crash, SIGKILL leaves its sessions, too."""
        process, self._process = self._process, None
        if process is not None:
            sessions = descendants(process.pid)
            process.send_signal(number)
            process.wait(30)
            # They end once they notice; until then it cannot be started again.
            give_up_at = time.monotonic() + 30
            while any(Path("/proc", str(pid)).exists() for pid in sessions) and time.monotonic() < give_up_at:
                time.sleep(0.05)

    def remove(self) -> None:
        """End it without writing anything, and remove its directory."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def cluster(bin_directory: Path, data: Path | None = None) -> Iterator[sa.URL]:
    """A running server that need not survive a crash; gives the URL of its maintenance database."""
    server = PostgresqlServer(bin_directory, "max_connections=50", "fsync=off", data=data)
    try:
        server.start()
        yield server.url
    finally:
        server.remove()


def _account() -> str:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise RuntimeError("no account to run PostgreSQL under")


def _wait_for(url: sa.URL, server: subprocess.Popen[bytes], log: Path) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            with engine.connect():
                return
        except sa.exc.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {log.read_text()}") from None
            time.sleep(0.05)

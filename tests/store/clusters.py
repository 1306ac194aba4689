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


@contextmanager
def cluster(bin_directory: Path) -> Iterator[sa.URL]:
    """A running server; gives the URL of its maintenance database."""
    # PostgreSQL refuses to run as root.
    account = _account() if os.geteuid() == 0 else None
    directory = Path(tempfile.mkdtemp(prefix="pdm-pg-"))
    try:
        if account is not None:
            os.chown(directory, pwd.getpwnam(account).pw_uid, -1)
        data = directory / "data"
        subprocess.run(
            [bin_directory / "initdb", "-D", data, "-U", "pdm", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"],
            check=True,
            capture_output=True,
            user=account,
            cwd=directory,
        )
        with (directory / "log").open("wb") as log:
            server = subprocess.Popen(
                [
                    *_DIES_WITH_US,
                    bin_directory / "postgres",
                    "-D",
                    data,
                    "-k",
                    directory,
                    "-h",
                    "",
                    "-F",
                    "-c",
                    "max_connections=50",
                ],
                stdout=log,
                stderr=log,
                user=account,
                cwd=directory,
            )
        try:
            url = sa.URL.create(
                "postgresql+psycopg", username="pdm", database="postgres", query={"host": str(directory)}
            )
            _wait_for(url, server, directory / "log")
            yield url
        finally:
            # At once, without writing anything: the directory goes with it.
            server.send_signal(signal.SIGQUIT)
            server.wait(20)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


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

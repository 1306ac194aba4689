"""A PostgreSQL server of the benchmark's own, as durable as it comes (fsync, synchronous_commit), with its counters."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from attrs import frozen
from figures import BenchmarkError

_START_TIMEOUT_S = 60
_ACCOUNTS = ("postgres", "nobody")


@frozen
class Written:
    """What the server has written so far: transactions, bytes of its log, flushes of that to the disk."""

    commits: int
    wal_bytes: int
    wal_syncs: int

    def __sub__(self, other: Written) -> Written:
        return Written(self.commits - other.commits, self.wal_bytes - other.wal_bytes, self.wal_syncs - other.wal_syncs)


@frozen
class Postgresql:
    """A server that runs.

    Attributes:
        pid: its first process, the parent of all others.
        directory: of its socket.
    """

    pid: int
    directory: Path

    def make_database(self, name: str) -> str:
        """Make a database; its URL for the daemon."""
        with self._connected() as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return self.url(name)

    def url(self, database: str) -> str:
        """URL of a database for the daemon."""
        return f"postgresql+psycopg://pdm@/{database}?host={self.directory}"

    def written(self) -> Written:
        """What it has written so far, in all databases."""
        with self._connected() as connection:
            # Sessions give their counts to the statistics within a second.
            row = connection.execute(
                "SELECT (SELECT sum(xact_commit) FROM pg_stat_database), wal_bytes, wal_sync FROM pg_stat_wal"
            ).fetchone()
        assert row is not None
        return Written(*(int(value) for value in row))

    def size(self) -> int:
        """Bytes of all databases."""
        with self._connected() as connection:
            row = connection.execute("SELECT sum(pg_database_size(datname)) FROM pg_database").fetchone()
        assert row is not None
        return int(row[0])

    def _connected(self) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(f"host={self.directory} user=pdm dbname=postgres", autocommit=True)


@contextlib.contextmanager
def postgresql(directory: Path) -> Iterator[Postgresql]:
    """A server whose files are in a directory; ended afterwards.

    Raises:
        BenchmarkError: PostgreSQL is not installed, or does not start.
    """
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not programs:
        raise BenchmarkError("no PostgreSQL server is installed: apt install postgresql")
    account = _account() if os.geteuid() == 0 else None
    directory.mkdir(parents=True)
    if account is not None:
        os.chown(directory, pwd.getpwnam(account).pw_uid, -1)
    subprocess.run(
        [programs[-1], "-D", directory / "data", "-U", "pdm", "-A", "trust", "-E", "UTF8", "--no-locale"],
        check=True,
        capture_output=True,
        user=account,
        cwd=directory,
    )
    options = ["-D", str(directory / "data"), "-k", str(directory), "-h", "", "-c", "max_connections=100"]
    dies_with_us = ["setpriv", "--pdeathsig", "QUIT"] if shutil.which("setpriv") else []
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(
            [*dies_with_us, programs[-1].parent / "postgres", *options],
            stdout=log,
            stderr=log,
            user=account,
            cwd=directory,
        )
    try:
        found = Postgresql(server.pid, directory)
        _wait_for(found, server, directory / "log")
        yield found
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(30)


def _account() -> str:
    for name in _ACCOUNTS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise BenchmarkError(f"PostgreSQL does not run as root: none of {', '.join(_ACCOUNTS)} is an account here")


def _wait_for(found: Postgresql, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _answers(found):
        if server.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(f"PostgreSQL did not start: {log.read_text()[-2000:]}")
        time.sleep(0.05)


def _answers(found: Postgresql) -> bool:
    try:
        found.written()
    except psycopg.OperationalError:
        return False
    return True

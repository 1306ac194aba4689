"""Several real daemons on one real PostgreSQL, as an operator sets them up: each with a state directory of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService
from pdm.testgrid.storage_servers import descendants
from tests.store.clusters import PostgresqlServer, programs


class Cluster:
    """Daemons on one database: with the sites, certificates and keys of the first, and ports of their own.

    Attributes:
        postgresql: the server, which may be stopped, killed and started again.
        nodes: the daemons; their names are ``node1``, ``node2`` and so on.
    """

    def __init__(
        self,
        directory: Path,
        postgresql: PostgresqlServer,
        number: int,
        *,
        grid: Mapping[str, Any] | None = None,
        grid_directory: Path | None = None,
        settings: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.postgresql = postgresql
        # The server may have been restarted since the last query.
        self._engine = sa.create_engine(postgresql.url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
        url = postgresql.url.set(drivername="postgresql").render_as_string(hide_password=False)
        self.nodes = [TestService(directory / f"node{n}", grid, grid_directory) for n in range(1, number + 1)]
        first = self.nodes[0]
        for node in self.nodes:
            port = str(reserve_port())
            own = {
                "database": {"url": url},
                "server": {"port": port},
                "node": {"name": node.directory.name, "address": f"https://localhost:{port}"},
            }
            sections = {**own, **settings}
            node.init(**{name: {**settings.get(name, {}), **own.get(name, {})} for name in sections})
            if node is not first:
                for part in ("sites.d", "certificates"):
                    shutil.rmtree(node.directory / part)
                    shutil.copytree(first.directory / part, node.directory / part)

    def start(self) -> None:
        """Start all that do not run; the first one makes the key of the credentials."""
        first = self.nodes[0]
        if first.process is None:
            first.start()
        key = first.directory / "var" / "credentials.key"
        others = [node for node in self.nodes if node.process is None]
        for node in others:
            copy = node.directory / "var" / "credentials.key"
            if key.exists() and not copy.exists():
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(key, copy)
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda node: node.start(), others))

    def end(self) -> None:
        """Kill all, suspended or not."""
        for node in self.nodes:
            if node.process is not None:
                signal_all(node, signal.SIGCONT)
                node.kill()
        self._engine.dispose()

    def query(self, statement: str, **parameters: object) -> list[Any]:
        """The rows of a statement of SQL."""
        with self._engine.connect() as connection:
            return list(connection.execute(sa.text(statement), parameters))

    def running_on(self, job_id: int) -> set[str]:
        """The names of the nodes that run elements of a job now."""
        rows = self.query(
            "SELECT DISTINCT node FROM workers JOIN job_elements ON workers.id = worker_id"
            " WHERE job_id = :job AND status = 'RUNNING'",
            job=job_id,
        )
        return {row.node for row in rows}


@contextmanager
def cluster_of(
    number: int,
    directory: Path,
    *,
    grid: Mapping[str, Any] | None = None,
    grid_directory: Path | None = None,
    start: bool = True,
    durable: bool = False,
    **settings: Mapping[str, str],
) -> Iterator[Cluster]:
    """So many running daemons on a PostgreSQL of their own; ``settings`` are sections of all their configurations.

    ``start``: whether they are started. ``durable``: whether PostgreSQL flushes to the disk, as it does by default.

    Skips the test where PostgreSQL is not installed.
    """
    found = programs()
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    postgresql = PostgresqlServer(found, "max_connections=100", *(() if durable else ("fsync=off",)))
    try:
        postgresql.start()
        cluster = Cluster(directory, postgresql, number, grid=grid, grid_directory=grid_directory, settings=settings)
        try:
            if start:
                cluster.start()
            yield cluster
        finally:
            cluster.end()
    finally:
        postgresql.remove()


def signal_all(service: TestService, number: int) -> list[int]:
    """Signal a daemon and its helpers, as a suspended machine would; returns the pids of the helpers."""
    assert service.process is not None
    pids = descendants(service.process.pid)
    for pid in (service.process.pid, *pids):
        # A helper may end by itself at this moment.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return pids


def until(what: str, condition: Callable[[], object], timeout_s: float = 60.0) -> float:
    """Wait until a condition is true; returns the seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(0.002)
    return time.monotonic() - began


def runs(pid: int) -> bool:
    """Whether a process lives; one that has ended and is not reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

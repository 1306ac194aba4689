"""Fixtures that run the same tests on both databases."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from pdm.workqueue.store.engines import create_sqlite_file, make_engines
from pdm.workqueue.store.schema_revisions import migrate
from pdm.workqueue.WorkqueueDB import Base
from tests.store.clusters import PostgresqlServer, cluster, programs
from tests.store.stores import Store

#: Modules whose behaviour depends on the database: locks, isolation, sessions, errors. Those run on both in every run,
#: the others on the second one in a full run.
_ON_BOTH = frozenset(
    {
        *("test_claiming", "test_concurrency", "test_database", "test_hanging_sessions", "test_leases"),
        *("test_lost_answers", "test_outages", "test_planned", "test_webhooks"),
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if parameters.get("database_kind") == "postgresql" and item.path.stem not in _ON_BOTH:
            item.add_marker(pytest.mark.full)


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.URL]:
    """A private server; the result is the URL of a migrated database."""
    found = programs()
    if found is None:
        text = "THE TESTS ON POSTGRESQL CANNOT RUN: no server programs (Debian: apt-get install postgresql)"
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)
    # Made once for all workers of pytest-xdist.
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "postgresql.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "postgresql").exists():
            _make_migrated(found, shared / "postgresql")
    with cluster(found, shared / "postgresql") as url:
        yield url.set(database="queue")


def _make_migrated(bin_directory: Path, data: Path) -> None:
    server = PostgresqlServer(bin_directory, "fsync=off")
    try:
        server.start()
        _execute(server.url, "CREATE DATABASE queue")
        _migrate(server.url.set(database="queue"))
        server.stop()
        server.move_data(data)
    finally:
        server.remove()


def _execute(url: sa.URL, statement: str) -> None:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)


def _migrate(url: sa.URL) -> None:
    engines = make_engines(url.render_as_string(hide_password=False), 1)
    create_sqlite_file(engines.writer)
    with engines.writer.begin() as connection:
        migrate(connection)
    engines.dispose()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "migrated.sqlite"
    _migrate(sa.URL.create("sqlite", database=str(path)))
    return path


_numbers = count()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty_url(database_kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The URL of a database without tables."""
    if database_kind == "sqlite":
        return f"sqlite:///{tmp_path}/empty.sqlite"
    url: sa.URL = request.getfixturevalue("postgresql").set(database=f"test{next(_numbers)}")
    _execute(url.set(database="postgres"), f"CREATE DATABASE {url.database}")
    return url.render_as_string(hide_password=False)


@pytest.fixture
def url(database_kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The URL of a migrated database without rows."""
    if database_kind == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "queue.sqlite")
        return f"sqlite:///{tmp_path}/queue.sqlite"
    migrated: sa.URL = request.getfixturevalue("postgresql")
    _execute(migrated, "; ".join(f"DELETE FROM {table}" for table in reversed(Base.metadata.sorted_tables)))
    return migrated.render_as_string(hide_password=False)


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    engines = make_engines(url, 8)
    if engines.writer.dialect.name == "sqlite":
        event.listen(engines.writer, "connect", _spare_the_disk)
    yield engines.writer
    engines.dispose()


def _spare_the_disk(connection: Any, record: Any) -> None:
    # No test cuts the power; flushing to disk would take most of their time.
    connection.execute("PRAGMA synchronous=off")


@pytest.fixture
def store(engine: sa.Engine) -> Store:
    return Store(engine)

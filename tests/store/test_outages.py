"""Outages of the database: what callers get, what is logged, and that nothing is lost or done twice."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import sqlalchemy as sa
from sqlalchemy.orm import Session
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, globalLogPublisher
from zope.interface import provider

from pdm.workqueue.store import engines, outages, transaction_threads, users
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.engines import DatabaseTimeouts
from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.store.outages import DatabaseUse, RequestTransactions, begin_request, expect_rows
from tests.store.stores import START
from tests.support.postgresql_proxy import PostgresqlProxy, postgresql_proxy

reactor: Any = _reactor
Open = Callable[..., Awaitable[Database]]
on_sqlite = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize(
    "database_kind", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_BUSY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(outages, "_QUIET_S", 0.5)
    monkeypatch.setattr(outages, "_QUIET_ALONE_S", 1.0)
    monkeypatch.setattr(transaction_threads, "_SUSPECT_S", 0.3)
    monkeypatch.setattr(transaction_threads, "_CHECK_EVERY_S", 0.1)


@pytest.fixture
def lines(lost_errors: list[LogEvent]) -> Iterator[list[str]]:
    """What is logged, without lines below the level info."""
    found: list[str] = []

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        if event.get("log_level", LogLevel.info) >= LogLevel.info and "outages" in event.get("log_namespace", ""):
            found.append(formatEvent(event) or "")

    globalLogPublisher.addObserver(observe)
    yield found
    globalLogPublisher.removeObserver(observe)
    assert not [event for event in lost_errors if "log_failure" in event]
    lost_errors.clear()


_TIMEOUTS = DatabaseTimeouts(lock_s=0.4, renewal_s=2.0)


@pytest_twisted.async_yield_fixture
async def open_database() -> AsyncIterator[Open]:
    """Opens databases, and stops them in the end."""
    opened: list[Database] = []

    async def open_database(url: str, timeouts: DatabaseTimeouts, threads: int = 2) -> Database:
        database = Database.open(url, reactor, threads=threads, timeouts=timeouts)
        opened.append(database)
        await database.start()
        return database

    yield open_database
    for database in opened:
        database.give_up()
        await database.stop()


@pytest_twisted.async_fixture
async def database(url: str, open_database: Open) -> Database:
    return await open_database(url, _TIMEOUTS)


async def register(database: Database, name: str) -> None:
    await database.run("register", users.register, f"/CN={name}", "user", START)


def names(session: Session) -> list[str]:
    return [str(name) for name in session.scalars(sa.text("SELECT subject FROM users ORDER BY subject"))]


async def failed(database: Database, names: list[str]) -> list[DatabaseUnavailableError]:
    """The errors of transactions that run at the same time."""
    calls = [Deferred.fromCoroutine(register(database, name)) for name in names]
    errors = []
    for call in calls:
        with pytest.raises(DatabaseUnavailableError) as raised:
            await call
        errors.append(raised.value)
    return errors


async def until(what: Any) -> None:
    give_up_at = time.monotonic() + 20
    while not what():
        assert time.monotonic() < give_up_at
        await deferLater(reactor, 0.02)


async def recovered(database: Database, lines: list[str], begins: str) -> None:
    """Wait for the end of an outage, which has two lines of the log."""
    await until(lambda: database.unavailable is None)
    await register(database, "afterwards")
    await until(lambda: len(lines) > 1)
    begin, end = lines
    assert begins in begin
    assert end.startswith("the database can be used again, after ")


@on_sqlite
@pytest_twisted.ensureDeferred
async def test_a_locked_file_makes_nobody_wait_for_the_timeouts_of_others(
    database: Database, tmp_path: Path, lines: list[str]
) -> None:
    other = sqlite3.connect(tmp_path / "queue.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    errors = await failed(database, [str(number) for number in range(200)])
    # One busy timeout, not two hundred.
    assert time.monotonic() - began < 1.5
    assert {str(error) for error in errors} == {"another process holds its lock (database is locked)"}
    # Readers are not affected; and what is written now is refused at once.
    assert await database.read("names", names) == []
    await until(lambda: database.availability.refusal(DatabaseUse.WRITING))
    began = time.monotonic()
    await failed(database, ["one more"])
    assert time.monotonic() - began < 0.1
    other.close()
    await recovered(database, lines, "the database cannot be written: another process holds its lock")
    assert await database.read("names", names) == ["/CN=afterwards"]


@on_sqlite
@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest_twisted.ensureDeferred
async def test_nothing_is_written_to_a_file_that_was_removed(
    database: Database, tmp_path: Path, lines: list[str], suffix: str
) -> None:
    """SQLite would go on, and all that it acknowledges would be lost."""
    await register(database, "before")
    path = tmp_path / f"queue.sqlite{suffix}"
    path.rename(tmp_path / "aside")
    (error,) = await failed(database, ["lost"])
    assert f"{path} was removed or replaced" in str(error)
    path.write_bytes(b"another file")
    await failed(database, ["lost"])
    (tmp_path / "aside").rename(path)
    await recovered(database, lines, "was removed or replaced while it was open: put that file back")
    assert await database.read("names", names) == ["/CN=afterwards", "/CN=before"]


@on_sqlite
@pytest_twisted.ensureDeferred
async def test_a_file_that_is_gone_is_not_made_anew(database: Database, tmp_path: Path, lines: list[str]) -> None:
    for name in ("queue.sqlite", "queue.sqlite-wal", "queue.sqlite-shm"):
        (tmp_path / name).rename(tmp_path / f"{name}.aside")
    (error,) = await failed(database, ["lost"])
    assert "cannot be opened" in str(error) or "was removed" in str(error)
    assert not (tmp_path / "queue.sqlite").exists()
    for name in ("queue.sqlite", "queue.sqlite-wal", "queue.sqlite-shm"):
        (tmp_path / f"{name}.aside").rename(tmp_path / name)
    await recovered(database, lines, "the database cannot be written: its file ")


@on_sqlite
@pytest_twisted.ensureDeferred
async def test_a_damaged_page_is_an_outage_of_what_reads_it(
    url: str, open_database: Open, tmp_path: Path, lines: list[str]
) -> None:
    path = tmp_path / "queue.sqlite"
    with sqlite3.connect(path) as connection:
        pages = connection.execute("SELECT rootpage FROM sqlite_master WHERE tbl_name = 'users'").fetchall()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    database = await open_database(url, _TIMEOUTS)
    with path.open("r+b") as file:
        for (page,) in pages:
            file.seek((page - 1) * size)
            file.write(os.urandom(size))
    for _ in range(3):
        with pytest.raises(DatabaseUnavailableError, match="its file is damaged, restore it from a backup") as raised:
            await database.read("names", names)
        assert raised.value.alone
    (line,) = lines
    assert line.startswith("a transaction has failed while others succeed: its file is damaged")


@on_postgresql
@pytest_twisted.ensureDeferred
async def test_a_standby_is_an_outage_of_writing_alone(database: Database, url: str, lines: list[str]) -> None:
    """The error of a standby is the one of a database that is set to read only."""
    name = sa.make_url(url).database
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    await register(database, "before")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        # Sessions of before do not know.
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname = '{name}' AND pid != pg_backend_pid()"
        )
    try:
        (error,) = await failed(database, ["refused"])
        assert "read-only transaction" in str(error)
        assert await database.read("names", names) == ["/CN=before"]
    finally:
        with admin.connect() as connection:
            connection.exec_driver_sql("SET default_transaction_read_only = off")
            connection.exec_driver_sql(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    # New connections are made until one leads to a server that can be written.
    await recovered(database, lines, "the database cannot be written: cannot execute ")
    assert await database.read("names", names) == ["/CN=afterwards", "/CN=before"]


@on_postgresql
@pytest_twisted.ensureDeferred
async def test_a_lock_of_another_session_fails_single_transactions(
    database: Database, url: str, lines: list[str]
) -> None:
    other = sa.create_engine(url, poolclass=sa.NullPool)
    with other.connect() as connection, connection.begin():
        connection.exec_driver_sql("LOCK TABLE users IN EXCLUSIVE MODE")
        errors = await failed(database, ["one", "two", "three"])
        assert {error.alone for error in errors} == {True}
        assert "lock timeout" in str(errors[0])
        assert database.unavailable is None
        # The pool has two connections, and those that wait for one get an answer, too.
        assert database.availability.reason_alone is not None
    await register(database, "afterwards")
    await until(lambda: len(lines) == 2)
    assert lines[0].startswith("a transaction has failed while others succeed: canceling statement due to lock timeout")
    assert lines[1].startswith("no transaction has failed alone for 1 s; 3 had within ")
    assert await database.read("names", names) == ["/CN=afterwards"]


async def _request(database: Database, name: str, longest_s: float, transactions: list[RequestTransactions]) -> None:
    transactions.append(begin_request(longest_s))
    await register(database, name)


@on_postgresql
@pytest_twisted.ensureDeferred
async def test_a_request_does_not_wait_and_its_transaction_is_not_cut_off(
    url: str, open_database: Open, lines: list[str]
) -> None:
    database = await open_database(url, DatabaseTimeouts(lock_s=20.0), threads=1)
    other = sa.create_engine(url, poolclass=sa.NullPool)
    seen: list[RequestTransactions] = []
    with other.connect() as connection, connection.begin():
        connection.exec_driver_sql("LOCK TABLE users IN EXCLUSIVE MODE")
        runs = Deferred.fromCoroutine(_request(database, "runs", 0.5, seen))
        await deferLater(reactor, 0.1)
        waits = Deferred.fromCoroutine(_request(database, "waits", 0.5, seen))
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailableError) as running:
            await runs
        with pytest.raises(DatabaseUnavailableError) as waiting:
            await waits
        assert time.monotonic() - began < 3.0
        # The one is being carried out; the other was taken out of the queue.
        assert (running.value.may_be_done, waiting.value.may_be_done) == (True, False)
        # Work in the background waits for as long as it takes.
        patient = Deferred.fromCoroutine(register(database, "patient"))
        await deferLater(reactor, 0.7)
        assert not patient.called
    await patient
    assert await database.read("names", names) == ["/CN=patient", "/CN=runs"]
    assert [each.has_written for each in seen] == [True, False]


async def _large_request(database: Database, name: str) -> None:
    begin_request(0.5)
    expect_rows(1_000_000)
    await register(database, name)


@on_postgresql
@pytest_twisted.ensureDeferred
async def test_a_request_that_writes_many_rows_waits_longer_than_a_later_one(
    url: str, open_database: Open, lines: list[str]
) -> None:
    database = await open_database(url, DatabaseTimeouts(lock_s=20.0), threads=1)
    other = sa.create_engine(url, poolclass=sa.NullPool)
    with other.connect() as connection, connection.begin():
        connection.exec_driver_sql("LOCK TABLE users IN EXCLUSIVE MODE")
        large = Deferred.fromCoroutine(_large_request(database, "large"))
        with pytest.raises(DatabaseUnavailableError):
            await Deferred.fromCoroutine(_request(database, "small", 0.5, []))
        assert not large.called
    await large
    assert await database.read("names", names) == ["/CN=large"]


@pytest.fixture
def proxy(url: str) -> Iterator[PostgresqlProxy]:
    with postgresql_proxy(sa.make_url(url)) as proxy:
        yield proxy


@on_postgresql
@pytest_twisted.ensureDeferred
async def test_a_commit_without_an_answer_may_be_done(
    proxy: PostgresqlProxy, open_database: Open, lines: list[str]
) -> None:
    database = await open_database(proxy.url, _TIMEOUTS)
    proxy.cut_commits = 1
    (error,) = await failed(database, ["lost answer"])
    assert error.may_be_done
    await recovered(database, lines, "the database cannot be written: ")
    assert await database.read("names", names) == ["/CN=afterwards", "/CN=lost answer"]


@on_postgresql
@pytest_twisted.ensureDeferred
async def test_too_few_connections_fail_what_has_none(url: str, open_database: Open, lines: list[str]) -> None:
    name = sa.make_url(url).database
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with admin.connect() as connection:
        for statement in (
            "DROP ROLE IF EXISTS limited",
            "CREATE ROLE limited SUPERUSER LOGIN",
            f"ALTER DATABASE {name} ALLOW_CONNECTIONS true",
        ):
            connection.exec_driver_sql(statement)
    database = await open_database(sa.make_url(url).set(username="limited").render_as_string(), _TIMEOUTS)
    await register(database, "before")
    with admin.connect() as connection:
        connection.exec_driver_sql("ALTER ROLE limited NOSUPERUSER CONNECTION LIMIT 0")
        connection.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'limited'")
        errors = await failed(database, ["one", "two"])
        assert "too many connections for role" in str(errors[0]), errors
        connection.exec_driver_sql("ALTER ROLE limited SUPERUSER CONNECTION LIMIT -1")
    await recovered(database, lines, "the database cannot be written: ")
    assert await database.read("names", names) == ["/CN=afterwards", "/CN=before"]


@pytest.mark.full
@on_postgresql
@pytest_twisted.ensureDeferred
async def test_a_lease_is_renewed_although_its_connection_is_dead(
    proxy: PostgresqlProxy, open_database: Open, lines: list[str]
) -> None:
    """With a lease of 15 s a renewal has 10 s: here everything is a fifth."""
    database = await open_database(proxy.url, DatabaseTimeouts(renewal_s=0.5))
    await database.run_for_lease("renew", names)
    proxy.swallow_open()
    began = time.monotonic()
    await database.run_for_lease("renew", names)
    assert time.monotonic() - began < 2.0
    assert lines == []


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("iptables") is None, reason="packets cannot be dropped")
@on_postgresql
def test_the_kernel_gives_up_a_connection_whose_packets_vanish(proxy: PostgresqlProxy) -> None:
    made = engines.make_engines(proxy.url, 1, DatabaseTimeouts(network_s=1.0))
    drop = ["INPUT", "-i", "lo", "-p", "tcp", "--dport", str(proxy.port), "-j", "DROP"]
    with made.writer.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        if subprocess.run(["iptables", "-A", *drop], check=False, capture_output=True).returncode:
            pytest.skip("packets cannot be dropped here")
        try:
            began = time.monotonic()
            with pytest.raises(sa.exc.OperationalError) as raised:
                connection.exec_driver_sql("SELECT 1")
            assert raised.value.connection_invalidated
            assert time.monotonic() - began < 8.0
        finally:
            subprocess.run(["iptables", "-D", *drop], check=True)
    made.dispose()


@pytest.mark.full
@on_postgresql
@pytest_twisted.ensureDeferred
async def test_a_server_that_does_not_answer_is_given_up_in_seconds(
    proxy: PostgresqlProxy, open_database: Open, lines: list[str]
) -> None:
    """The network swallows all packets, while the server's own timeouts are far away."""
    database = await open_database(proxy.url, DatabaseTimeouts(connect_s=2.0))
    await register(database, "before")
    proxy.frozen = True
    began = time.monotonic()
    errors = await failed(database, [str(number) for number in range(20)])
    # A suspicion, and a connection that is not made within two seconds.
    assert time.monotonic() - began < 5.0
    # The one that was connecting, and the others.
    assert {str(error) for error in errors} <= {"connection timeout expired", "it does not answer"}
    await until(lambda: database.availability.refusal(DatabaseUse.WRITING))
    began = time.monotonic()
    await failed(database, ["at once"])
    assert time.monotonic() - began < 0.1
    proxy.frozen = False
    await recovered(database, lines, "the database cannot be written: ")
    # The statements of the connections that were cut off were never sent, or never committed.
    assert await database.read("names", names) == ["/CN=afterwards", "/CN=before"]

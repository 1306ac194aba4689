"""The database of the daemon: functions in threads, shared commits, results on the reactor."""

from __future__ import annotations

import sqlite3
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.logger import LogEvent

from pdm.workqueue.store import users
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseClosedError, DatabaseUnavailableError, DatabaseUnusableError
from tests.store.clusters import cluster, programs
from tests.store.stores import START

# What mypy knows of it is less than what it can do.
reactor: Any = _reactor


@pytest_twisted.async_yield_fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database.open(url, reactor, threads=4)
    await database.start()
    yield database
    await database.stop()


def names(session: Session) -> list[str]:
    return [str(name) for name in session.scalars(sa.text("SELECT subject FROM users ORDER BY subject"))]


@pytest_twisted.ensureDeferred
async def test_a_function_runs_in_a_transaction_of_another_thread(database: Database) -> None:
    def where(session: Session, first: int, *, second: int) -> tuple[int, int, int]:
        return first, second, threading.get_ident()

    first, second, thread = await database.run("where", where, 1, second=2)
    assert (first, second) == (1, 2)
    assert thread != threading.get_ident()


@pytest_twisted.ensureDeferred
async def test_what_is_written_can_be_read(database: Database) -> None:
    user = await database.run("register", users.register, "/CN=a", "user", START)
    assert await database.read("find", users.find, "/CN=a") == user


@pytest_twisted.ensureDeferred
async def test_a_function_that_raises_changes_nothing(database: Database) -> None:
    def fail(session: Session) -> None:
        users.register(session, "/CN=a", "user", START)
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        await database.run("fail", fail)
    assert await database.read("names", names) == []


@pytest_twisted.ensureDeferred
async def test_one_that_fails_takes_no_other_with_it(database: Database) -> None:
    """They share a commit on SQLite; the good ones are run again without the bad one."""

    def fail(session: Session) -> None:
        users.register(session, "/CN=bad", "user", START)
        raise LookupError("no")

    gate = threading.Event()
    waits = Deferred.fromCoroutine(database.run("wait", lambda session: gate.wait(10)))
    good = [
        Deferred.fromCoroutine(database.run("register", users.register, f"/CN={n}", "user", START)) for n in range(5)
    ]
    bad = Deferred.fromCoroutine(database.run("fail", fail))
    gate.set()
    await waits
    await gatherResults(good)
    with pytest.raises(LookupError, match="no"):
        await bad
    assert await database.read("names", names) == [f"/CN={n}" for n in range(5)]


@pytest.fixture
def commits(database: Database) -> Iterator[list[int]]:
    found: list[int] = []

    def count(connection: sa.Connection) -> None:
        found.append(1)

    engine = database._engines.writer
    event.listen(engine, "commit", count)
    yield found
    event.remove(engine, "commit", count)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
@pytest_twisted.ensureDeferred
async def test_what_waits_for_sqlite_shares_one_commit(database: Database, commits: list[int]) -> None:
    gate = threading.Event()
    waits = Deferred.fromCoroutine(database.run("wait", lambda session: gate.wait(10)))
    others = [
        Deferred.fromCoroutine(database.run("register", users.register, f"/CN={n}", "user", START)) for n in range(20)
    ]
    gate.set()
    await waits
    await gatherResults(others)
    assert len(commits) <= 3
    assert len(await database.read("names", names)) == 20


@pytest_twisted.ensureDeferred
async def test_what_passes_is_tried_again(database: Database) -> None:
    """The same inserted twice at the same time: the second run finds it there."""
    tries = []

    def insert_blindly(session: Session) -> int:
        tries.append(1)
        if len(tries) == 1:
            users.register(session, "/CN=a", "user", START)
            session.execute(
                sa.text("INSERT INTO users (subject, role, registered_at) VALUES ('/CN=a', 'user', '2026-01-01')")
            )
        return len(tries)

    assert await database.run("insert", insert_blindly) == 2


@pytest_twisted.ensureDeferred
async def test_persisting_errors_are_reported_in_the_end(database: Database) -> None:
    def never(session: Session) -> None:
        session.execute(sa.text("INSERT INTO users (id, subject, role, registered_at) VALUES (1, NULL, '', '')"))

    with pytest.raises((sa.exc.IntegrityError, sa.exc.DataError)):
        await database.run("never", never)


@pytest_twisted.ensureDeferred
async def test_a_cancelled_caller_does_not_undo_its_transaction(database: Database) -> None:
    gate = threading.Event()

    def register_slowly(session: Session) -> None:
        gate.wait(10)
        users.register(session, "/CN=a", "user", START)

    caller = Deferred.fromCoroutine(database.run("register", register_slowly))
    caller.cancel()
    gate.set()
    with pytest.raises(CancelledError):
        await caller
    await database.run("after", names)
    assert await database.read("names", names) == ["/CN=a"] or database._engines.writers > 1


@pytest_twisted.ensureDeferred
async def test_a_failure_without_a_caller_is_logged(database: Database, lost_errors: list[LogEvent]) -> None:
    gate = threading.Event()

    def fail_slowly(session: Session) -> None:
        gate.wait(10)
        raise LookupError("without a caller")

    caller = Deferred.fromCoroutine(database.run("fail slowly", fail_slowly))
    caller.cancel()
    gate.set()
    with pytest.raises(CancelledError):
        await caller
    await database.stop()
    (logged,) = lost_errors
    assert logged["name"] == "fail slowly"
    lost_errors.clear()


@pytest_twisted.ensureDeferred
async def test_stopping_waits_for_what_is_under_way(url: str) -> None:
    database = Database.open(url, reactor)
    await database.start()
    gate = threading.Event()

    def register_slowly(session: Session) -> str:
        gate.wait(10)
        return users.register(session, "/CN=a", "user", START).subject

    slow = Deferred.fromCoroutine(database.run("register", register_slowly))
    stopping = Deferred.fromCoroutine(database.stop())
    with pytest.raises(DatabaseClosedError, match="'late' was not carried out"):
        await database.run("late", names)
    assert not stopping.called
    gate.set()
    await stopping
    assert await slow == "/CN=a"
    await database.stop()


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
@pytest_twisted.ensureDeferred
async def test_readers_of_sqlite_cannot_write(database: Database) -> None:
    with pytest.raises(sa.exc.OperationalError, match="readonly"):
        await database.read("register", users.register, "/CN=a", "user", START)


@pytest_twisted.ensureDeferred
async def test_sqlite_is_durable_and_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "queue.sqlite"
    database = Database.open(f"sqlite:///{path}", reactor)
    await database.start()

    def pragmas(session: Session) -> list[object]:
        return [session.scalar(sa.text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")]

    # 2 is FULL: a commit that was answered survives a power cut.
    assert await database.run("pragmas", pragmas) == ["wal", 2, 1]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await database.stop()


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
@pytest_twisted.ensureDeferred
async def test_a_file_that_another_process_holds_is_waited_for(database: Database, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "queue.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release: Callable[[], object] = lambda: other.execute("COMMIT")  # noqa: E731
    timer = threading.Timer(0.3, release)
    timer.start()
    await database.run("register", users.register, "/CN=a", "user", START)
    timer.join()
    other.close()
    assert await database.read("names", names) == ["/CN=a"]


@pytest_twisted.ensureDeferred
async def test_a_database_that_cannot_be_opened_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database\n" * 100)
    database = Database.open(f"sqlite:///{tmp_path}/file", reactor)
    with pytest.raises(DatabaseUnusableError, match=r"^the database sqlite:.*file cannot be opened: [^\n]*$"):
        await database.start()
    nobody = Database.open("postgresql://u:secret@127.0.0.1:1/d", reactor)
    with pytest.raises(DatabaseUnusableError, match=r"u:\*\*\*@127.0.0.1:1/d cannot be opened") as caught:
        await nobody.start()
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.postgresql
@pytest_twisted.ensureDeferred
async def test_a_lost_server_is_logged_once_and_without_the_statement(lost_errors: list[LogEvent]) -> None:
    found = programs()
    assert found is not None
    with cluster(found) as url:
        database = Database.open(url.render_as_string(hide_password=False), _reactor)
        await database.start()
        await database.run("register", users.register, "/CN=alice", "user", START)

    calls = [
        Deferred.fromCoroutine(database.run("register", users.register, f"/CN=secret {n}", "user", START))
        for n in range(20)
    ]
    for call in calls:
        with pytest.raises(DatabaseUnavailableError) as raised:
            await call
        assert "secret" not in str(raised.value)
        assert "INSERT" not in str(raised.value)
        assert "\n" not in str(raised.value)
    assert database.unavailable is not None
    assert len(lost_errors) == 1
    lost_errors.clear()
    await database.stop()

"""Requests while the database cannot be used: a 503 each, one log line in all, and nothing lost afterwards."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.logger import LogEvent

from pdm.workqueue.store import engines
from tests.http.service import Answer, Service, reactor

_LIST = {"src_siteid": 1, "src_filepath": "data", "protocol": "DUMMY"}


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite waits for a lock for a moment only."""
    monkeypatch.setattr(engines, "_BUSY_TIMEOUT_S", 0.2)


@pytest.fixture
def lock(own_service: Service) -> Iterator[sqlite3.Connection]:
    """Another process (a backup, an administrator's shell) holds the write lock of the database."""
    connection = sqlite3.connect(own_service.directory / "workqueue.sqlite", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield connection
    connection.close()


async def recovered(service: Service) -> None:
    """Wait until a probe has found that the database can be used."""
    give_up_at = time.monotonic() + 10
    while service.database.unavailable is not None:
        assert time.monotonic() < give_up_at
        await deferLater(reactor, 0.02)


@pytest_twisted.ensureDeferred
async def test_a_locked_database_answers_503_and_is_logged_once(
    own_service: Service, lock: sqlite3.Connection, lost_errors: list[LogEvent]
) -> None:
    calls = [Deferred.fromCoroutine(own_service.call("alice", "POST", "/list", _LIST)) for _ in range(30)]
    answers: list[Answer] = await gatherResults(calls)
    assert {answer.status for answer in answers} == {503}
    assert {answer.problem for answer in answers} == {"database-unavailable"}
    assert answers[0].header("Retry-After") == "10"
    assert own_service.database.unavailable is not None
    (event,) = lost_errors
    assert "another process holds its lock" in event["reason"]
    lost_errors.clear()

    lock.execute("ROLLBACK")
    await recovered(own_service)
    answer = await own_service.call("alice", "POST", "/list", _LIST)
    assert answer.status == 200
    assert own_service.database.unavailable is None
    # None of the refused requests was carried out.
    assert [job["id"] for job in (await own_service.call("alice", "GET", "/jobs")).json] == [answer.json["id"]]


@pytest_twisted.ensureDeferred
async def test_a_repeated_request_is_carried_out_once(
    own_service: Service, lock: sqlite3.Connection, lost_errors: list[LogEvent]
) -> None:
    refused = await own_service.call("alice", "POST", "/list", _LIST, Idempotency_Key="one")
    assert refused.status == 503
    lost_errors.clear()
    lock.execute("ROLLBACK")
    await recovered(own_service)
    first = await own_service.call("alice", "POST", "/list", _LIST, Idempotency_Key="one")
    again = await own_service.call("alice", "POST", "/list", _LIST, Idempotency_Key="one")
    assert first.json["id"] == again.json["id"]


@pytest_twisted.ensureDeferred
async def test_pages_and_reading_while_nothing_can_be_written(
    own_service: Service, lock: sqlite3.Connection, lost_errors: list[LogEvent]
) -> None:
    lock.execute("ROLLBACK")
    assert (await own_service.call("alice", "POST", "/list", _LIST)).status == 200
    assert (await own_service.call(None, "GET", "/health")).json["status"] == "ok"
    lock.execute("BEGIN IMMEDIATE")
    form = {"name": "lab", "endpoints": "GRIDFTP gsiftp://one.example.org:2811\n"}
    page = await own_service.act("alice", "/web/sites/add", form)
    assert (page.status, page.header("Retry-After")) == (503, "10")
    assert page.header("Content-Type").startswith("text/html")
    assert b"The database is unavailable" in page.body
    assert b"nothing was done" in page.body
    # What is only read is read all the same.
    assert len((await own_service.call("alice", "GET", "/jobs")).json) == 1
    assert (await own_service.browse("alice", "/")).status == 200
    health = await own_service.call(None, "GET", "/health")
    assert (health.status, health.json["status"]) == (200, "paused")
    assert [fault["part"] for fault in health.json["faults"]] == ["database"]
    lost_errors.clear()
    lock.execute("ROLLBACK")
    await recovered(own_service)
    assert (await own_service.call(None, "GET", "/health")).json["status"] == "ok"
    assert (await own_service.act("alice", "/web/sites/add", form)).status == 303

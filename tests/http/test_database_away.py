"""Requests while the database cannot be used: a 503 each, one log line in all, and nothing lost afterwards."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults
from twisted.logger import LogEvent

from pdm.workqueue.store import engines
from tests.http.service import Answer, Service

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
    first = await own_service.call("alice", "POST", "/list", _LIST, Idempotency_Key="one")
    again = await own_service.call("alice", "POST", "/list", _LIST, Idempotency_Key="one")
    assert first.json["id"] == again.json["id"]

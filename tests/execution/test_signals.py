"""Signals between nodes: two listeners on one PostgreSQL, and transactions that note what has changed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_twisted
import sqlalchemy as sa
from sqlalchemy.orm import Session
from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater

from pdm.workqueue.domain.node_reports import SignalKind
from pdm.workqueue.execution.signals import SignalListener
from pdm.workqueue.store import signals
from pdm.workqueue.store.database import Database

reactor: Any = _reactor


class Node:
    """A listener, and what it has delivered."""

    def __init__(self, url: str, name: str) -> None:
        self.database = Database.open(url, reactor, threads=2)
        self.listener = SignalListener(reactor=reactor, database=self.database, by=name)
        self.heard: list[tuple[SignalKind, int | None]] = []
        for kind in SignalKind:
            self.listener.subscribe(kind, lambda job, kind=kind: self.heard.append((kind, job)))  # type: ignore[misc]

    async def start(self) -> None:
        await self.database.start()
        self.listener.start()

    async def stop(self) -> None:
        await self.listener.stop()
        await self.database.stop()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> float:
    """Wait; returns the seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, "waited in vain"
        await deferLater(reactor, 0.001)
    return time.monotonic() - began


@pytest_twisted.async_yield_fixture
async def pair(url: str) -> AsyncIterator[tuple[Node, Node]]:
    first, second = Node(url, "first"), Node(url, "second")
    try:
        for node in (first, second):
            await node.start()
        # Once connected, each looks at everything. The first hears that the second has come.
        await until(lambda: all({kind for kind, _ in node.heard} == set(SignalKind) for node in (first, second)))
        await deferLater(reactor, 0.05)
        for node in (first, second):
            node.heard.clear()
        yield first, second
    finally:
        for node in (first, second):
            await node.stop()


def _cancel(session: Session, job: int | None, *, fails: bool = False) -> None:
    signals.note(session, SignalKind.CANCEL, job)
    if fails:
        raise ValueError("rolled back")


on_postgresql = pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)


@on_postgresql
@pytest.mark.postgresql
@pytest_twisted.ensureDeferred
async def test_what_a_transaction_notes_is_heard_by_others_once_it_has_committed(pair: tuple[Node, Node]) -> None:
    first, second = pair
    with pytest.raises(ValueError, match="rolled back"):
        await first.database.run("cancel", _cancel, 6, fails=True)
    await first.database.run("cancel", _cancel, 7)
    assert await until(lambda: bool(second.heard)) < 0.1
    assert second.heard == [(SignalKind.CANCEL, 7)]
    await second.database.run("cancel", _cancel, 8)
    await until(lambda: bool(first.heard))
    # Its own signals are not for itself.
    assert first.heard == [(SignalKind.CANCEL, 8)]
    assert second.heard == [(SignalKind.CANCEL, 7)]


@on_postgresql
@pytest.mark.postgresql
@pytest_twisted.ensureDeferred
async def test_many_signals_become_few(pair: tuple[Node, Node]) -> None:
    first, second = pair
    for _ in range(500):
        first.listener.send([(SignalKind.WORK, None)])
    first.listener.send([(SignalKind.CANCEL, job) for job in range(101)])
    await until(lambda: len(second.heard) >= 2)
    await deferLater(reactor, 0.1)
    # So many jobs that it must look at the database; work is announced at once, and once more for what came later.
    assert (SignalKind.CANCEL, None) in second.heard
    assert second.heard.count((SignalKind.WORK, None)) in (1, 2)
    assert len(second.heard) <= 3


@on_postgresql
@pytest.mark.postgresql
@pytest_twisted.ensureDeferred
async def test_after_a_lost_connection_all_is_looked_at(pair: tuple[Node, Node], engine: sa.Engine) -> None:
    first, second = pair
    with engine.connect() as connection:
        ended = connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE query LIKE '%pdm_workqueue%' AND pid <> pg_backend_pid()"
            )
        )
        assert len(ended.all()) >= 2
    # It may be sent while the other one does not listen.
    first.listener.send([(SignalKind.CANCEL, 9)])
    await until(lambda: all({kind for kind, _ in node.heard} == set(SignalKind) for node in pair))
    assert (SignalKind.CANCEL, None) in second.heard
    first.listener.send([(SignalKind.CANCEL, 10)])
    await until(lambda: (SignalKind.CANCEL, 10) in second.heard)


@on_postgresql
@pytest.mark.postgresql
@pytest_twisted.ensureDeferred
async def test_what_other_programs_notify_is_ignored(pair: tuple[Node, Node], engine: sa.Engine) -> None:
    first, second = pair
    with engine.begin() as connection:
        for text in ("", "{", '{"kind":"later","by":"x"}', "x" * 7999):
            connection.execute(sa.text("SELECT pg_notify('pdm_workqueue', :text)"), {"text": text})
    first.listener.send([(SignalKind.SITES, None)])
    await until(lambda: bool(second.heard))
    assert second.heard == [(SignalKind.SITES, None)]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
@pytest_twisted.ensureDeferred
async def test_a_daemon_alone_has_no_signals(url: str) -> None:
    node = Node(url, "alone")
    await node.start()
    await node.database.run("cancel", _cancel, 7)
    await node.stop()
    assert node.heard == []

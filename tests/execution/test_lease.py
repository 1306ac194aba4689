"""The lease of a daemon: taken, renewed, lost; both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_twisted
from attrs import evolve
from twisted.internet import reactor as _reactor
from twisted.logger import LogEvent

from pdm.workqueue.agents.pool import boot_seconds
from pdm.workqueue.execution.lease import ClockWrongError, Lease, LeaseTakenError
from pdm.workqueue.store import leases
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.leases import WorkerIdentity
from pdm.workqueue.telemetry.clocks import utc_now
from tests.store.stores import START, Store

reactor: Any = _reactor
_FIRST = WorkerIdentity("w", "first", "directory 1", "host 1")


@pytest_twisted.async_yield_fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database.open(url, reactor, threads=2)
    await database.start()
    yield database
    await database.stop()


def lease_of(database: Database, worker: WorkerIdentity, lease_s: float = 600.0) -> Lease:
    return Lease(reactor=reactor, database=database, worker=worker, clock=utc_now, lease_s=lease_s)


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
@pytest.mark.postgresql
@pytest_twisted.ensureDeferred
async def test_a_live_lease_is_respected_and_a_dead_one_waited_for(database: Database, store: Store) -> None:
    first = lease_of(database, _FIRST, 1.5)
    await first.start()
    copy = lease_of(database, evolve(_FIRST, incarnation="second", instance="directory 2"), 1.5)
    # It renews every half second.
    with pytest.raises(LeaseTakenError, match=r"another daemon \(host 1\) claims under the name w"):
        await copy.start()
    assert not copy.is_held
    for task in first._tasks:
        await task.stop()
    await copy.start()
    assert copy.is_held
    await copy.stop()
    first._is_ours = False


@pytest_twisted.ensureDeferred
async def test_the_announced_end_of_the_lease_is_never_too_late(database: Database) -> None:
    lease = lease_of(database, _FIRST)
    ends: list[float] = []
    lease.on_renewed.append(ends.append)
    before = boot_seconds()
    await lease.start()
    assert before + 600 <= lease.ends_at <= boot_seconds() + 600
    await lease._renew()
    assert ends == [ends[0], lease.ends_at]
    assert ends[1] > ends[0]
    await lease.stop()
    assert not lease.is_held


@pytest_twisted.ensureDeferred
async def test_a_lease_that_was_taken_away_ends_what_runs_and_is_taken_again(
    database: Database, store: Store, lost_errors: list[LogEvent]
) -> None:
    lease = lease_of(database, _FIRST)
    seen: list[bool] = []

    async def lost() -> None:
        seen.append(lease.is_held)

    async def nothing() -> None:
        return

    lease.connect(list, nothing, lost, lambda job: None, lambda: None)
    await lease.start()
    store.run(leases.release_worker, "w", START)
    await lease._renew()
    assert seen == [False]
    assert lease.is_held
    assert "taken away" in str(lost_errors.pop()["log_format"])
    await lease.stop()


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
@pytest.mark.postgresql
@pytest_twisted.ensureDeferred
async def test_a_replaced_worker_claims_nothing(database: Database, store: Store, lost_errors: list[LogEvent]) -> None:
    lease = lease_of(database, _FIRST)
    await lease.start()
    # It was suspended, and another took its name when its lease had ended.
    store.pass_time(601)
    store.run(leases.register_worker, evolve(_FIRST, incarnation="x", instance="y", host="host 2"), START, 600.0)
    await lease._renew()
    await lease._renew()
    assert not lease.is_held
    texts = [event["log_format"].format(**event) for event in lost_errors]
    assert len(texts) == 2
    assert "nothing is claimed: another daemon (host 2) claims under the name w" in texts[1]
    lost_errors.clear()
    store.run(leases.give_up_lease, "x")
    await lease._renew()
    assert lease.is_held
    await lease.stop()


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
@pytest.mark.parametrize(
    ("off_s", "words"),
    # The duration of the query counts for the clock.
    [(3, r"(3\.0|2\.\d) s ahead of"), (-3, r"(3\.0|2\.\d) s behind"), (1, None), (-1, None)],
)
@pytest.mark.postgresql
@pytest_twisted.ensureDeferred
async def test_a_clock_that_differs_from_the_database_is_refused(
    database: Database, off_s: int, words: str | None
) -> None:
    lease = Lease(
        reactor=reactor,
        database=database,
        worker=_FIRST,
        clock=lambda: datetime.now(UTC) + timedelta(seconds=off_s),
        lease_s=15.0,
    )
    if words is None:
        await lease.start()
        await lease.stop()
        return
    with pytest.raises(ClockWrongError, match=rf"{words} that of the database: .* \(15 s\). Synchronize the clocks"):
        await lease.start()

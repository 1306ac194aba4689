"""The feed of events: each listener gets each event once and in order; a slow one is dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.notifications import Event, EventFilter, EventKind
from pdm.workqueue.domain.pacing import BreakerPolicy
from pdm.workqueue.domain.retention import RetentionPolicy
from pdm.workqueue.execution import event_feed
from pdm.workqueue.execution.endpoint_health import SiteEndpoint, SiteHealth
from pdm.workqueue.execution.event_feed import EventFeed, SlowReaderError, Subscription, SubscriptionEndedError
from pdm.workqueue.execution.retention import Retention
from pdm.workqueue.store import jobs, users
from pdm.workqueue.store.database import Database
from tests.support.records import NOW, new_job

# What mypy knows of it is less than what it can do.
reactor: Any = _reactor


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = Database.open(url, reactor)
    pytest_twisted.blockon(Deferred.fromCoroutine(made.start()))
    yield made
    pytest_twisted.blockon(Deferred.fromCoroutine(made.stop()))


@pytest.fixture
def feed(database: Database) -> Iterator[EventFeed]:
    made = EventFeed(reactor=reactor, database=database, clock=lambda: NOW)
    made.start()
    yield made
    pytest_twisted.blockon(Deferred.fromCoroutine(made.stop()))


async def submit(database: Database, user: int = 1, count: int = 1) -> list[int]:
    made = [await database.run("submit", jobs.submit, new_job(user), None, NOW) for _ in range(count)]
    return [job.id for job in made]


async def users_of(database: Database) -> tuple[int, int]:
    alice, bob = [await database.run("register", users.register, f"/CN={n}", "user", NOW) for n in ("a", "b")]
    return alice.id, bob.id


async def next_of(subscription: Subscription) -> Sequence[Event]:
    """The next events of a subscription, at least one."""
    while not (found := await subscription.read_stored() or subscription.take()):
        changed: Deferred[None] = Deferred()
        subscription.on_change = partial(_fire, changed)
        await changed
    return found


def _fire(changed: Deferred[None]) -> None:
    if not changed.called:
        changed.callback(None)


async def take(subscription: Subscription, count: int) -> list[Event]:
    taken: list[Event] = []
    while len(taken) < count:
        taken += await next_of(subscription)
    return taken


@pytest_twisted.ensureDeferred
async def test_what_is_stored_then_what_comes_without_gap_or_double(
    database: Database, feed: EventFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_feed, "_PAGE", 3)
    monkeypatch.setattr(event_feed, "_READ_AT_ONCE", 2)
    alice, _ = await users_of(database)
    expected = await submit(database, alice, 10)
    early = feed.subscribe(EventFilter(), 0)
    found = [event.job for event in await next_of(early)]
    more = Deferred.fromCoroutine(submit(database, alice, 10))
    found += [event.job for event in await take(early, 17)]
    expected += await more
    expected += await submit(database, alice, 2)
    found += [event.job for event in await take(early, 2)]
    assert found == expected
    # One that resumes in the middle.
    late = feed.subscribe(EventFilter(), early.after)
    expected = await submit(database, alice, 2)
    assert [event.job for event in await take(late, 2)] == expected
    assert late.after == (await take(early, 2))[-1].id


@pytest_twisted.ensureDeferred
async def test_listeners_get_what_they_asked_for(database: Database, feed: EventFeed) -> None:
    alice, bob = await users_of(database)
    (old,) = await submit(database, alice)
    listeners = {
        name: feed.subscribe(wanted)
        for name, wanted in {
            "all": EventFilter(),
            "alice": EventFilter(owner=alice),
            "old": EventFilter(job=old),
            "sites": EventFilter(kinds={EventKind.SITE}),
        }.items()
    }
    for listener in listeners.values():
        await listener.start()
    (ours,), (theirs,) = await submit(database, alice), await submit(database, bob)
    assert [event.job for event in await take(listeners["all"], 2)] == [ours, theirs]
    assert [event.job for event in await take(listeners["alice"], 1)] == [ours]
    for name in ("old", "sites"):
        waiting = Deferred.fromCoroutine(take(listeners[name], 1))
        await deferLater(reactor, 0.05)
        assert not waiting.called
        listeners[name].close()
        with pytest.raises(SubscriptionEndedError):
            await waiting
    assert feed.listeners == 2


@pytest_twisted.ensureDeferred
async def test_a_slow_listener_is_dropped_and_others_are_not(
    database: Database, feed: EventFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_feed, "MOST_QUEUED", 5)
    alice, _ = await users_of(database)
    slow, quick = feed.subscribe(EventFilter(), 0), feed.subscribe(EventFilter(), 0)
    expected = await submit(database, alice)
    for each in (slow, quick):
        await take(each, 1)
    waiting = Deferred.fromCoroutine(take(slow, 1))
    expected += await submit(database, alice)
    await waiting
    found: Sequence[Event] = []
    for _ in range(7):
        expected += await submit(database, alice)
        found = [*found, *await take(quick, 1 if found else 2)]
    with pytest.raises(SlowReaderError, match="more than 5 events wait"):
        await next_of(slow)
    assert [event.job for event in found] == expected[1:]
    # Nothing is lost: it continues where it was.
    again = feed.subscribe(EventFilter(), slow.after)
    assert [event.job for event in await take(again, 7)] == expected[2:]


@pytest_twisted.ensureDeferred
async def test_the_newest_progress_replaces_an_older_one(database: Database, feed: EventFeed) -> None:
    alice, _ = await users_of(database)
    (job_id,) = await submit(database, alice)
    moved = 0

    async def progress_of(job_id: int) -> Event:
        nonlocal moved
        moved += 1
        at = NOW + timedelta(seconds=moved)
        return Event(id=None, at=at, kind=EventKind.PROGRESS, job=job_id, owner=alice, data={"moved": moved})

    feed.progress_of = progress_of

    async def running() -> list[int]:
        return [job_id]

    feed.running = running
    listener = feed.subscribe(EventFilter(job=job_id))
    silent = feed.subscribe(EventFilter(job=job_id, kinds={EventKind.JOB}))
    await listener.start()
    await next_of(listener)
    first = moved
    await deferLater(reactor, 2.5 if database.is_shared else 0.8)
    (event,) = await next_of(listener)
    assert event.data["moved"] >= first + 2
    assert event.id is None
    silent.close()


@pytest_twisted.ensureDeferred
async def test_sites_are_told_once_when_they_go_and_once_when_they_return(database: Database, feed: EventFeed) -> None:
    health = SiteHealth(policy=BreakerPolicy(), on_state=feed.site_changed)
    endpoint = SiteEndpoint(7, JobProtocol.DUMMY, "dummy://h")
    away = AttemptFailure(FailureScope.SOURCE, FailureCode.CONNECTION, "refused", unreachable=True)
    listener = feed.subscribe(EventFilter(), 0)
    for minutes in range(0, 60, 10):
        health.probe_ended(endpoint, away, reachable=False, now=NOW + timedelta(minutes=minutes))
    down = (await take(listener, 1))[0].data
    assert (down["site"], down["state"], down["url"]) == (7, "down", "dummy://h")
    assert down["reason"] == "CONNECTION: refused"
    health.worked([endpoint], NOW + timedelta(hours=2))
    assert [event.data["state"] for event in await take(listener, 1)] == ["up"]


@pytest_twisted.ensureDeferred
async def test_the_end_of_the_service_ends_all(database: Database, feed: EventFeed) -> None:
    waiting = Deferred.fromCoroutine(next_of(feed.subscribe(EventFilter())))
    await deferLater(reactor, 0.05)
    await feed.stop()
    with pytest.raises(SubscriptionEndedError, match="stopping"):
        await waiting
    with pytest.raises(SubscriptionEndedError, match="stopping"):
        await next_of(feed.subscribe(EventFilter()))


@pytest_twisted.ensureDeferred
async def test_old_events_are_deleted_and_a_reader_continues_with_the_rest(
    database: Database, feed: EventFeed, tmp_path: Path
) -> None:
    kept = timedelta(days=30)
    alice, _ = await users_of(database)
    await submit(database, alice, 2)
    first = (await take(feed.subscribe(EventFilter(), 0), 1))[0].id
    retention = Retention(
        reactor=reactor,
        database=database,
        clock=lambda: NOW + kept,
        policy=RetentionPolicy(events=kept),
        incarnation="w",
        logs=tmp_path,
        receipt_of=None,  # type: ignore[arg-type]  # no job is purged
    )
    assert await retention.run()
    assert len(await feed.read(0, 10, EventFilter())) == 2
    retention.clock = lambda: NOW + kept + timedelta(seconds=1)
    assert await retention.run()
    assert await feed.read(0, 10, EventFilter()) == []
    (job,) = await submit(database, alice)
    assert [event.job for event in await take(feed.subscribe(EventFilter(), first), 1)] == [job]

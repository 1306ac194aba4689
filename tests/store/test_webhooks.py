"""Webhooks in the database: which events are queued, and which daemon sends them, on both databases."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from pdm.workqueue.domain.notifications import (
    DeliveryPolicy,
    DeliveryState,
    Event,
    EventKind,
    NewWebhook,
    SendResult,
    WebhookRecord,
)
from pdm.workqueue.store import job_changes, leases, notifications, webhooks
from pdm.workqueue.store.records import sites, workers
from pdm.workqueue.store.records import webhooks as webhook_table
from tests.store.stores import START, Store, identity

POLICY = DeliveryPolicy(give_up_s=86400.0, disable_s=259200.0)
LEASE_S = 45.0


def added(store: Store, user: int, *kinds: str) -> WebhookRecord:
    new = NewWebhook(
        user_id=user, uid="0123", url="https://example.org/", kinds=kinds or ("job",), job_id=None, secret=b"sealed"
    )
    return store.run(webhooks.create, new, None, store.now)


def entered(store: Store, read: int = 0) -> notifications.Entered:
    return store.run(notifications.enter, read, (), store.now)


def claimed(store: Store, daemon: str, slots: int = 10, of_user: int = 10) -> list[int]:
    found = store.run(webhooks.claim, daemon, slots, [], of_user, LEASE_S, store.now)
    return [each.id for each in found]


def next_of(store: Store, daemon: str, number: int) -> webhooks.DueDelivery | None:
    return store.run(webhooks.next_delivery, daemon, number, LEASE_S, store.now)


def test_each_event_is_queued_once(store: Store) -> None:
    user, other = store.user(), store.user("bob")
    webhook = added(store, user)
    job = store.submit(user)
    store.submit(other)
    assert entered(store).deliveries == 1
    # Another daemon, which has read less, enters nothing again.
    assert entered(store, read=0).deliveries == 0
    store.run(job_changes.cancel, job.id, store.now)
    assert entered(store).deliveries == 1
    assert [each.kind for each in store.run(webhooks.latest_deliveries, webhook.id)] == ["job", "job"]


def test_events_before_a_webhook_are_not_sent(store: Store) -> None:
    user = store.user()
    store.submit(user)
    added(store, user)
    assert entered(store).deliveries == 0


def test_events_that_concern_nothing_are_only_read(store: Store) -> None:
    user = store.user()
    first = store.run(notifications.find_wanted, 0, ())
    store.submit(user)
    wanted = store.run(notifications.find_wanted, first.last, ())
    assert (wanted.concerns, wanted.last > first.last) == (False, True)
    assert not wanted.has_listeners
    added(store, user)
    store.submit(user)
    again = store.run(notifications.find_wanted, wanted.last, ())
    assert (again.concerns, again.has_listeners) == (True, True)
    assert entered(store, read=wanted.last).deliveries == 1


@pytest.mark.parametrize("database_kind", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True)
def test_an_event_is_not_passed_over_while_a_webhook_is_stored(store: Store) -> None:
    user = store.user()
    first = store.run(notifications.find_wanted, 0, ())
    statements = 0

    def between(*_: object) -> None:
        nonlocal statements
        statements += 1
        if statements == 1:
            added(store, user)
            store.submit(user)

    sa.event.listen(store.engine, "after_cursor_execute", between)
    read = store.run(notifications.find_wanted, first.last, ())
    assert statements > 1
    assert store.run(notifications.enter, read.last if not read.concerns else first.last, (), store.now).deliveries == 1


def test_private_sites_are_told_to_their_owner(store: Store) -> None:
    user, other = store.user(), store.user("bob")
    mine, theirs = added(store, user, "site"), added(store, other, "site")
    values: dict[str, Any] = {"owner_id": user, "name": "S", "description": "", "default_folder": "~", "endpoints": {}}
    values |= {"authorities": "", "created_at": store.now}
    rows = [{"id": 1001, "public": False} | values, {"id": 1002, "public": True} | values]
    store.run(lambda session: session.execute(sa.insert(sites), rows))

    def found(session: Any) -> list[tuple[int, Any]]:
        events = [
            Event(id=1, at=store.now, kind=EventKind.SITE, job=None, owner=None, data={"site": site})
            for site in (1001, 1002, 1003, 7)
        ]
        rows = notifications._for_webhooks(session, events, {7})
        return [(row["webhook_id"], row["body"].partition('"site":')[2].rstrip("}")) for row in rows]

    assert sorted(store.run(found)) == sorted(
        [(mine.id, "1001"), (mine.id, "1002"), (theirs.id, "1002"), (mine.id, "7"), (theirs.id, "7")]
    )


def test_one_daemon_sends(store: Store) -> None:
    user = store.user()
    for daemon in ("a", "b"):
        store.worker(daemon)
    webhook = added(store, user)
    store.submit(user)
    entered(store)
    assert claimed(store, "a") == [webhook.id]
    assert claimed(store, "b") == []
    assert next_of(store, "b", webhook.id) is None
    due = next_of(store, "a", webhook.id)
    assert due is not None
    settled = store.run(webhooks.settle, due.delivery, SendResult(status=200), POLICY, 0.5, store.now)
    assert settled.state is DeliveryState.DELIVERED
    store.run(webhooks.release, "a", webhook.id, store.now)
    store.submit(user)
    entered(store)
    assert claimed(store, "b") == [webhook.id]


@pytest.mark.parametrize("how", ["its lease ends", "it is started again", "its work is taken over"])
def test_a_daemon_that_was_killed_holds_nothing_back(store: Store, how: str) -> None:
    user = store.user()
    for daemon in ("a", "b"):
        store.worker(daemon)
    webhook = added(store, user)
    store.submit(user)
    entered(store)
    assert claimed(store, "a") == [webhook.id]
    if how == "its lease ends":
        past = store.now - timedelta(days=1)
        store.run(lambda session: session.execute(sa.update(webhook_table).values(leased_until=past)))
    elif how == "its work is taken over":
        store.run(leases.release_worker, identity("a").name, store.now)
    else:
        again = sa.update(workers).where(workers.c.incarnation == "a").values(incarnation="a2")
        store.run(lambda session: session.execute(again))
    assert claimed(store, "b") == [webhook.id]
    assert next_of(store, "a", webhook.id) is None


def test_slots_of_a_user_are_bounded(store: Store) -> None:
    user, other = store.user(), store.user("bob")
    numbers = [added(store, each).id for each in (user, user, user, other)]
    store.submit(user)
    store.submit(other)
    entered(store)
    store.worker("a")
    assert claimed(store, "a", of_user=2) == [numbers[0], numbers[1], numbers[3]]


def test_the_order_of_a_job_holds(store: Store) -> None:
    user = store.user()
    store.worker("a")
    webhook = added(store, user)
    first, second = store.submit(user), store.submit(user)
    store.run(job_changes.cancel, first.id, store.now)
    entered(store)
    claimed(store, "a")
    due = next_of(store, "a", webhook.id)
    assert due is not None
    assert due.delivery.job_id == first.id
    store.run(webhooks.settle, due.delivery, SendResult(status=500, error="500"), POLICY, 0.5, store.now)
    due = next_of(store, "a", webhook.id)
    assert due is not None
    assert due.delivery.job_id == second.id
    store.run(webhooks.settle, due.delivery, SendResult(status=200), POLICY, 0.5, store.now)
    assert next_of(store, "a", webhook.id) is None
    assert store.run(webhooks.next_due, store.now) is not None


def test_too_many_that_wait_disable_a_webhook(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifications, "MOST_WAITING", 2)
    user = store.user()
    webhook = added(store, user)
    for _ in range(2):
        store.submit(user)
    assert entered(store).disabled == []
    store.submit(user)
    assert entered(store).disabled == [webhook.id]
    found = store.run(webhooks.fetch, webhook.id, user)
    assert found is not None
    assert (found.waiting, found.disabled_at) == (0, store.now)
    assert {each.state for each in store.run(webhooks.latest_deliveries, webhook.id)} == {DeliveryState.GIVEN_UP}


def test_pauses_grow_to_an_hour_and_end_after_a_day() -> None:
    pauses, now, attempts = [], START, 0
    while True:
        attempts += 1
        due = POLICY.next_try(attempts, START, now, 0.5)
        if due is None:
            break
        pauses.append((due - now).total_seconds())
        now = due
    assert pauses[:3] == [5.0, 10.0, 20.0]
    assert max(pauses) == 3600.0
    assert now - START == timedelta(days=1)
    assert POLICY.next_try(1, START, START, 0.5, 120.0) == START + timedelta(seconds=120)
    assert POLICY.next_try(1, START, START, 0.5, 10.0**7) == START + timedelta(seconds=3600)

"""Events: written with what they tell about, read by every reader in the same order, none skipped."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.notifications import Event, EventKind
from pdm.workqueue.store import claiming, events, expiry, held_elements, job_changes, jobs
from pdm.workqueue.store.claim_limits import ClaimLimits
from pdm.workqueue.store.records import events as rows
from tests.store.stores import EXPIRED, MISSING, START, Store, done, ended
from tests.support.records import new_job


def told(store: Store, after: int = 0, limit: int = 1000, **wanted: Any) -> list[Event]:
    return store.run(events.events_after, after, limit, **wanted)


def kinds(found: list[Event]) -> list[tuple[str, Any]]:
    return [(event.kind.value, event.data.get("status") or event.data.get("count")) for event in found]


def test_a_job_is_told_from_its_submission_to_its_end(store: Store) -> None:
    user = store.user()
    store.worker()
    job = store.copy_job(user, [3, 4])
    (batch,) = store.claim()
    store.settle(done(batch))
    found = told(store, job=job.id)
    assert kinds(found) == [("job", "SUBMITTED"), ("job", "RUNNING"), ("job", "DONE")]
    assert [(event.job, event.owner, event.at) for event in found] == [(job.id, user, START)] * 3
    assert [event.data["before"] for event in found] == [None, "SUBMITTED", "RUNNING"]
    last = found[-1].data
    assert (last["num_elements"], last["num_done"], last["bytes_done"], last["bytes_total"]) == (3, 3, 7, 7)


def test_failures_are_told_by_powers_of_ten(store: Store) -> None:
    """A million failures must not become a million events."""
    store.worker()
    job = store.copy_job(store.user(), [*[1] * 12])
    (batch,) = store.claim()
    store.settle(ended(JobStatus.FAILED, batch, failure=MISSING)[:1])
    store.settle(ended(JobStatus.FAILED, batch, failure=MISSING)[1:5])
    store.settle(ended(JobStatus.FAILED, batch, failure=MISSING)[5:])
    failures = told(store, job=job.id, kinds={EventKind.FAILURE})
    assert [(one.data["count"], one.data["element"]) for one in failures] == [(1, 1), (12, 6)]
    first = failures[0].data
    assert (first["code"], first["scope"], first["path"]) == ("NOT_FOUND", "source", "/src/0")
    assert first["message"] == "no such file"
    assert first["hint"]
    assert kinds(told(store, job=job.id))[-1] == ("job", "FAILED")


def test_held_and_resumed_are_told_once_for_a_job(store: Store) -> None:
    user = store.user()
    store.worker()
    job = store.copy_job(user, [1, 2])
    (batch,) = store.claim()
    first, second = ended(JobStatus.HELD, batch, failure=EXPIRED)
    store.settle([first])
    store.settle([second])
    store.run(held_elements.resume_held, user, store.now)
    found = told(store, job=job.id)[2:]
    assert [event.kind.value for event in found] == ["held", "job", "job", "resumed"]
    assert found[0].data["code"] == "CREDENTIAL_EXPIRED"
    assert found[0].data["reason"] == "proxy expired"
    assert [event.data["status"] for event in found[1:3]] == ["HELD", "RUNNING"]


def test_a_cancelled_job_that_was_held_is_not_told_as_resumed(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1])
    store.settle(ended(JobStatus.HELD, *store.claim(), failure=EXPIRED))
    store.run(job_changes.cancel, job.id, store.now)
    assert kinds(told(store, job=job.id))[-1] == ("job", "CANCELLED")


def test_a_transaction_that_is_rolled_back_tells_nothing(store: Store) -> None:
    user = store.user()

    def fail(session: Session) -> None:
        jobs.submit(session, new_job(user), None, store.now)
        events.write_noted(session)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.run(fail)
    assert told(store) == []


def test_pages_and_filters(store: Store) -> None:
    alice, bob = store.user("alice"), store.user("bob")
    ours = [store.submit(alice).id for _ in range(3)]
    theirs = store.submit(bob).id
    store.run(events.note_site, store.now, {"site": 1, "state": "down", "reason": "CONNECTION: refused"})
    everything = told(store)
    assert [event.job for event in everything] == [*ours, theirs, None]
    assert [event.job for event in told(store, owner=alice)] == ours
    assert [event.job for event in told(store, job=theirs)] == [theirs]
    assert [event.data["site"] for event in told(store, kinds={EventKind.SITE})] == [1]
    seen: list[int | None] = []
    after = 0
    while page := told(store, after, 2):
        seen += [event.id for event in page]
        after = page[-1].id or 0
    assert seen == [event.id for event in everything]


def test_where_a_reader_begins(store: Store) -> None:
    assert store.run(events.position, None) == store.run(events.position, 7) == (0, (0, 0))
    user = store.user()
    for _ in range(3):
        store.submit(user)
    first, second, third = told(store)
    newest = (third.id, third.order)
    assert store.run(events.position, second.id) == (second.id, second.order)
    # Of a database that was restored: what comes from now on.
    assert store.run(events.position, None) == store.run(events.position, 10**15) == newest
    store.run(lambda session: session.execute(sa.delete(rows).where(rows.c.id == first.id)))
    assert store.run(events.position, first.id) == (first.id, (0, 0))


def test_a_reader_whose_last_event_is_gone_continues_with_what_is_left(store: Store) -> None:
    user = store.user()
    for _ in range(4):
        store.submit(user)
    first, second, *rest = told(store)
    store.run(lambda session: session.execute(sa.delete(rows).where(rows.c.id <= second.id)))
    assert [event.id for event in told(store, first.id or 0)] == [event.id for event in rest]


def test_old_events_are_deleted_in_steps(store: Store) -> None:
    user = store.user()
    for _ in range(3):
        store.submit(user)
    store.pass_time(100)
    kept = [store.submit(user).id for _ in range(2)]
    assert [store.run(expiry.remove_events, store.now, 2).rows for _ in range(3)] == [2, 1, 0]
    assert [event.job for event in told(store)] == kept


@pytest.mark.postgresql
@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_a_restored_dump_is_read_at_once_and_in_order(store: Store) -> None:
    """The numbers of its transactions are those of another cluster."""
    user = store.user()
    before = [store.submit(user).id for _ in range(3)]
    assert not store.run(events.repair_order)
    first = told(store)[0].id
    store.run(lambda session: session.execute(sa.update(rows).where(rows.c.id != first).values(xact=2**40)))
    assert [event.id for event in told(store)] == [first]
    assert store.run(events.repair_order)
    after = store.submit(user).id
    found = told(store)
    assert [event.job for event in found] == [*before, after]
    assert [event.job for event in told(store, found[1].id or 0)] == [before[2], after]
    assert not store.run(events.repair_order)


@pytest.mark.postgresql
@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
@pytest.mark.parametrize("writes_first", ["the one that commits last", "the one that commits first"])
def test_a_transaction_that_commits_late_is_not_skipped(store: Store, writes_first: str) -> None:
    """Two transactions overlap. Whatever the order of their ids, a reader between the two commits skips nothing."""
    user = store.user()
    before = store.submit(user)
    late, early = Session(store.engine), Session(store.engine)
    with late, early:
        slow = jobs.submit(late, new_job(user, label="late"), None, store.now)
        if writes_first.endswith("last"):
            # Its event has the lower id.
            events.write_noted(late)
        quick = jobs.submit(early, new_job(user, label="early"), None, store.now)
        events.write_noted(early)
        early.commit()
        between = told(store)
        assert [event.job for event in between] == [before.id]
        if writes_first.endswith("first"):
            events.write_noted(late)
        late.commit()
    rest = told(store, between[-1].id or 0)
    assert {event.job for event in rest} == {slow.id, quick.id}
    # Both read from the same place again: the order is the same for all.
    assert [event.id for event in told(store)] == [event.id for event in between + rest]
    assert [event.job for event in told(store, rest[0].id or 0)] == [rest[1].job]


@pytest.mark.postgresql
@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_events_of_a_job_are_in_order_though_a_transaction_began_before_the_job(store: Store) -> None:
    """A claim takes its transaction number first, and may then claim a job that was registered meanwhile."""
    user = store.user()
    store.worker()
    limits = ClaimLimits(elements=9, batches=9, batch_elements=9, batch_bytes=9)
    with Session(store.engine, autoflush=False) as claim:
        claim.execute(sa.select(sa.func.pg_current_xact_id()))
        job = store.submit(user)
        (batch,) = claiming.claim(claim, "w", limits, store.now)
        events.write_noted(claim)
        assert told(store) == []
        claim.commit()
    store.settle(done(batch))
    found = told(store)
    assert kinds(found) == [("job", "SUBMITTED"), ("job", "RUNNING"), ("job", "DONE")]
    assert [event.id for event in told(store, found[0].id or 0)] == [event.id for event in found[1:]]
    assert store.job(job.id).status is JobStatus.DONE


@pytest.mark.postgresql
@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_a_reader_among_writers_skips_and_repeats_nothing(store: Store) -> None:
    user = store.user()
    writers = [threading.Thread(target=lambda: [store.submit(user) for _ in range(15)]) for _ in range(4)]
    for writer in writers:
        writer.start()
    seen: list[int | None] = []
    after = 0
    while any(writer.is_alive() for writer in writers) or told(store, after, 1):
        for event in told(store, after, 7):
            seen.append(event.id)
            after = event.id or 0
    for writer in writers:
        writer.join()
    assert len(seen) == len(set(seen)) == 60

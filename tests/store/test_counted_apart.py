"""Results that are stored without the lock of their job: nobody waits, and the job ends once, when all has ended."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.holds import HoldBy, JobEdit, JobHold
from pdm.workqueue.domain.jobs import Batch, JobRecord
from pdm.workqueue.domain.sites import Actor
from pdm.workqueue.store import (
    counted_apart,
    events,
    holds,
    job_changes,
    job_counts,
    job_settings,
    leases,
    results,
)
from pdm.workqueue.store.errors import ChangedMeanwhileError
from pdm.workqueue.store.records import events as events_table
from pdm.workqueue.store.records import workers
from tests.store.stores import BROKEN, Store, done, ended, token_of

pytestmark = pytest.mark.postgresql


@pytest.fixture(params=["postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settle(store: Store, *batches: Batch, worker: str = "w") -> results.SettleOutcome:
    return store.run(results.settle, worker, done(*batches), store.now, may_count_apart=True)


def add_up(store: Store) -> counted_apart.AddedUp:
    return store.run(counted_apart.add_up, store.now)


@contextmanager
def transaction(store: Store) -> Iterator[Session]:
    """Committed at its end."""
    with Session(store.engine, autoflush=False) as session, session.begin():
        session.execute(sa.text("SET LOCAL lock_timeout = '100ms'"))
        yield session
        events.write_noted(session)


def statuses(store: Store, job: JobRecord) -> list[str]:
    """The states of a job, by its events."""
    statement = sa.select(events_table.c.data).where(events_table.c.job_id == job.id, events_table.c.kind == "job")
    rows = store.run(lambda session: session.scalars(statement.order_by(events_table.c.id)).all())
    return [json.loads(row)["status"] for row in rows]


def two_nodes(store: Store, files: int = 2) -> tuple[JobRecord, Batch, Batch]:
    """A job of which two nodes run the last elements."""
    user = store.user()
    for worker in ("w", "other"):
        store.worker(worker)
    job = store.copy_job(user, [7] * files)
    (first,), (second,) = (
        store.claim(worker, batches=1, batch_elements=files // 2, elements=files // 2) for worker in ("w", "other")
    )
    return job, first, second


def test_two_nodes_settle_the_last_two_elements_at_the_same_instant(store: Store) -> None:
    job, first, second = two_nodes(store)
    with transaction(store) as one, transaction(store) as other:
        # Neither waits for the other, or the lock timeout would end it.
        for session, worker, batch in ((one, "w", first), (other, "other", second)):
            settled = results.settle(session, worker, done(batch), store.now, may_count_apart=True)
            assert settled.counted_apart == {job.id}
            assert settled.finished == ()
    # Nobody has seen the result of the other.
    assert store.job(job.id).status is JobStatus.RUNNING
    added = add_up(store)
    assert [one.id for one in added.finished] == [job.id]
    assert add_up(store) == counted_apart.AddedUp()
    found = store.job(job.id)
    assert found.status is JobStatus.DONE
    assert found.counters == store.recount(job.id)
    assert found.bytes_done == found.bytes_total == 14
    assert statuses(store, job)[-2:] == ["RUNNING", "DONE"]
    assert statuses(store, job).count("DONE") == 1


def test_a_job_does_not_end_while_an_element_is_open(store: Store) -> None:
    job, first, second = two_nodes(store, 4)
    assert settle(store, first).counted_apart == {job.id}
    assert add_up(store).finished == ()
    assert store.job(job.id).status is JobStatus.RUNNING
    assert store.job(job.id).counters == store.recount(job.id)
    # These are the last: the job is locked, and ends at once.
    settled = settle(store, second, worker="other")
    assert settled.counted_apart == frozenset()
    assert [one.id for one in settled.finished] == [job.id]
    assert statuses(store, job).count("DONE") == 1


def test_the_results_of_a_held_job_lock_it_and_the_last_one_leaves_it_held(store: Store) -> None:
    """Its last running element need not be its last open one: counted apart, it would stay RUNNING."""
    store.worker()
    job = store.copy_job(store.user(), [7] * 6)
    first, second = store.claim(batches=2, batch_elements=2, elements=4)
    assert settle(store, first).counted_apart == {job.id}, "without a hold it is not locked"
    by = JobHold(by=HoldBy.OWNER, subject="alice", message="disk is full", since=store.now)
    held = store.run(holds.hold, job.id, by, Actor(store.user(), "alice"))
    # Whoever holds it has added up what was counted apart.
    assert (held.status, held.counters.running, held.counters.done) == (JobStatus.RUNNING, 2, 3)
    assert settle(store, second).counted_apart == frozenset()
    found = store.job(job.id)
    assert (found.status, found.counters.submitted, found.hold) == (JobStatus.HELD, 2, by)
    assert found.counters == store.recount(job.id)
    assert store.claim() == []
    store.run(holds.resume, job.id, HoldBy.OWNER, Actor(store.user(), "alice"), store.now)
    settle(store, *store.claim())
    assert store.job(job.id).status is JobStatus.DONE


def test_the_results_of_a_job_with_a_limit_of_its_own_lock_it_and_make_room(store: Store) -> None:
    """Counted apart, the elements that have ended would count as running, and nothing would schedule the next ones."""
    store.worker()
    job = store.copy_job(store.user(), [7] * 6)
    store.run(job_settings.change, job.id, JobEdit(max_active=2), store.now)
    for left in (4, 2):
        batches = store.claim()
        assert sum(len(batch.elements) for batch in batches) == 2
        assert store.claim() == []
        assert settle(store, *batches).counted_apart == frozenset()
        found = store.job(job.id)
        assert (found.counters.submitted, found.counters.running) == (left, 0)
        assert found.counters == store.recount(job.id)
    settle(store, *store.claim())
    assert store.job(job.id).status is JobStatus.DONE


def test_who_locks_a_job_adds_up_and_leaves_its_end_to_add_up(store: Store) -> None:
    job, first, second = two_nodes(store, 6)
    assert settle(store, first).counted_apart
    # A failure needs the lock.
    failed, *others = ended(JobStatus.FAILED, second, failure=BROKEN)
    store.run(results.settle, "other", [failed], store.now, may_count_apart=True)
    assert store.job(job.id).counters == store.recount(job.id)
    assert store.run(job_counts.jobs_with_counts) == []
    # Both others are stored apart, each while the other is open.
    with transaction(store) as one, transaction(store) as other:
        for session, verdict in zip((one, other), others, strict=True):
            positive = verdict._replace(status=JobStatus.DONE, failure=None)
            assert results.settle(session, "other", [positive], store.now, may_count_apart=True).counted_apart
    # This one locks the job and does not derive its status: it must not hide from `add_up` that the job has ended.
    store.run(job_changes.continue_change, job.id, store.now)
    assert [one.status for one in add_up(store).finished] == [JobStatus.FAILED]
    assert store.job(job.id).counters == store.recount(job.id)


def test_results_do_not_wait_for_a_session_that_has_locked_the_job(store: Store) -> None:
    job, first, _ = two_nodes(store)
    with transaction(store) as hanging:
        job_changes.locked(hanging, job.id)
        assert settle(store, first).counted_apart == {job.id}
        # It is left, not waited for.
        assert add_up(store).left == {job.id}
    assert add_up(store).left == frozenset()
    assert store.job(job.id).counters == store.recount(job.id)


def test_what_is_being_stored_is_not_taken_back(store: Store) -> None:
    """The lease of a node ends while it stores a result: the result counts, or the element goes back, never both."""
    job, first, _ = two_nodes(store)
    counts: list[int] = []
    with Session(store.engine) as session, session.begin():
        results.settle(session, "w", done(first), store.now, may_count_apart=True)
        taken = threading.Thread(
            target=lambda: counts.append(store.run(leases.release_worker, "worker w", store.now)), daemon=True
        )
        taken.start()
        wait_for_a_lock(store)
    taken.join(30)
    assert counts == [0]
    add_up(store)
    assert store.job(job.id).counters == store.recount(job.id)
    assert store.element(job.id, first.elements[0].id).status is JobStatus.DONE


def test_what_was_taken_back_is_not_stored(store: Store) -> None:
    job, first, _ = two_nodes(store)
    errors: list[BaseException] = []

    def late() -> None:
        try:
            settle(store, first)
        except ChangedMeanwhileError as error:
            errors.append(error)

    with Session(store.engine, autoflush=False) as session, session.begin():
        assert leases.release_worker(session, "worker w", store.now) == 1
        storing = threading.Thread(target=late, daemon=True)
        storing.start()
        wait_for_a_lock(store)
    storing.join(30)
    assert len(errors) == 1
    # The daemon repeats it, and learns that the claim is lost.
    assert settle(store, first).lost == (token_of(first),)
    assert store.run(job_counts.jobs_with_counts) == []
    assert store.job(job.id).counters == store.recount(job.id)


def wait_for_a_lock(store: Store) -> None:
    """Wait until a session waits for a lock of another."""
    give_up_at = time.monotonic() + 30
    waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    while not store.run(lambda session: session.scalar(waiting)):
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_beside_a_node_of_an_earlier_version_jobs_are_locked(store: Store) -> None:
    job, first, _ = two_nodes(store)
    earlier = sa.update(workers).where(workers.c.incarnation == "other").values(counts_apart=None)
    store.run(lambda session: session.execute(earlier))
    assert settle(store, first).counted_apart == frozenset()
    assert store.job(job.id).counters == store.recount(job.id)


def test_what_a_dead_node_has_counted_apart_is_added_up(store: Store) -> None:
    job, first, second = two_nodes(store)
    with transaction(store) as one, transaction(store) as other:
        for session, worker, batch in ((one, "w", first), (other, "other", second)):
            results.settle(session, worker, done(batch), store.now, may_count_apart=True)
    for worker in ("w", "other"):
        store.run(leases.release_worker, f"worker {worker}", store.now)
    assert store.job(job.id).status is JobStatus.RUNNING
    assert [one.id for one in add_up(store).finished] == [job.id]

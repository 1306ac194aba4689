"""What the estimate of a copy is taken from."""

from __future__ import annotations

from typing import Any

from pdm.workqueue.domain.enums import JobStatus, JobType, PlannedAction
from pdm.workqueue.domain.jobs import JobRecord, NewElement
from pdm.workqueue.domain.progress import RouteSpeed
from pdm.workqueue.store import listings, results
from pdm.workqueue.store.estimates import EstimateBasis, estimate_basis
from tests.store.stores import BROKEN, LIST_LANE, Store, done, ended, token_of


def copied(store: Store, user: int, seconds: float, *files: int, **changes: Any) -> JobRecord:
    """A copy that has ended, of files of these sizes."""
    job = store.copy_job(user, files, **changes)
    batches = store.claim()
    store.pass_time(seconds)
    store.settle(done(*batches))
    assert store.job(job.id).status is JobStatus.DONE
    return store.job(job.id)


def basis(store: Store, job: JobRecord) -> EstimateBasis:
    return store.run(estimate_basis, job, store.now)


def test_only_copies_of_the_same_user_and_route_count(store: Store) -> None:
    store.worker()
    alice, bob = store.user("alice"), store.user("bob")
    asked = store.submit(alice, JobType.COPY, priority=9)
    assert basis(store, asked) == EstimateBasis(None, None)
    copied(store, bob, 10, 100, 100, priority=0)
    copied(store, alice, 10, 100, 100, priority=0, dst_siteid=3)
    copied(store, alice, 10, 100, 100, priority=0, src_siteid=4)
    assert basis(store, asked).speed is None
    copied(store, alice, 10, 100, 100, priority=0)
    assert basis(store, asked).speed == RouteSpeed(1, 20.0, 0.2)


def test_old_copies_are_left_out_and_at_most_twenty_count(store: Store) -> None:
    store.worker()
    alice = store.user("alice")
    copied(store, alice, 1, 1000)
    asked = store.submit(alice, JobType.COPY, priority=9)
    store.pass_time(14 * 86400 - 1)
    assert basis(store, asked).speed == RouteSpeed(1, 1000.0, 1.0)
    store.pass_time(1)
    store.worker()
    assert basis(store, asked).speed is None
    for _ in range(22):
        copied(store, alice, 2, 1000, priority=0)
    assert basis(store, asked).speed == RouteSpeed(20, 500.0, 0.5)


def test_dry_runs_and_failed_copies_say_nothing(store: Store) -> None:
    store.worker()
    alice = store.user("alice")
    dry = store.submit(alice, JobType.COPY, options={"dry_run": True})
    (listing,) = store.claim(types=LIST_LANE)
    element = NewElement(JobType.COPY, "/src/f", "/dst/f", 100, planned=PlannedAction.COPY, done=True)
    assert store.run(results.add_elements, "w", token_of(listing), [element])
    store.settle(done(listing))
    assert store.job(dry.id).status is JobStatus.DONE
    store.copy_job(alice, [100])
    store.settle(ended(JobStatus.FAILED, *store.claim(), failure=BROKEN))
    assert basis(store, dry).speed is None


def test_free_space_is_no_note_and_goes_with_its_attempt(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.COPY)
    (batch,) = store.claim(types=LIST_LANE)
    token = token_of(batch)
    assert basis(store, job).free_bytes is None
    assert store.run(listings.add_free_bytes, token, 2**60 + 1)
    assert basis(store, job).free_bytes == 2**60 + 1
    assert store.run(listings.count_notes, job.id) == {}
    assert store.run(listings.notes, job.id, 0, 0, 10) == []
    assert store.run(listings.begin, token)
    assert basis(store, job).free_bytes is None
    assert not store.run(listings.add_free_bytes, token._replace(attempt=2), 5)

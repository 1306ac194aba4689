"""Elements of a COPY that was compared with its destination: those that are DONE at once, and removals that wait."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from pdm.workqueue.domain.enums import JobStatus, JobType, PlannedAction
from pdm.workqueue.domain.jobs import Batch, Counters, JobRecord, NewElement
from pdm.workqueue.domain.planning import LAST_PHASE
from pdm.workqueue.store import job_changes, leases, planned_elements, results
from tests.store.stores import LIST_LANE, MISSING, Store, done, ended, token_of
from tests.support.records import job_record

MIRROR = {"sync": "size", "delete_extra": True}
MOVE = {"move": True}


def planned(action: PlannedAction, name: str, size: int = 1, **more: Any) -> NewElement:
    return NewElement(JobType.COPY, f"/src/{name}", f"/dst/{name}", size, planned=action)._replace(**more)


def deletion(name: str, phase: int = 1) -> NewElement:
    path = f"/dst/{name}"
    return NewElement(JobType.REMOVE, path, path, 7, phase > 1, phase, PlannedAction.DELETE, 1000)


def begun(store: Store, new: list[NewElement], **options: Any) -> tuple[JobRecord, Batch]:
    """A job whose listing has planned elements and still runs."""
    store.worker()
    job = store.submit(store.user(), JobType.COPY, options=options)
    (listing,) = store.claim(types=LIST_LANE)
    assert store.run(results.add_elements, "w", token_of(listing), new)
    return job, listing


def mirrored(store: Store, *deleted: NewElement) -> JobRecord:
    """A job with two copies and some deletions whose listing is DONE."""
    copies = [planned(PlannedAction.COPY, "a"), planned(PlannedAction.OVERWRITE, "b")]
    job, listing = begun(store, [*copies, *(deleted or (deletion("x"), deletion("d", LAST_PHASE - 1)))], **MIRROR)
    store.settle(done(listing))
    return job


def statuses(store: Store, job: JobRecord) -> list[str]:
    return [element.status.name for element in store.elements(job.id)]


def test_what_is_the_same_is_done_at_once(store: Store) -> None:
    same = planned(PlannedAction.SAME, "a", 100, done=True)
    job, listing = begun(store, [same, planned(PlannedAction.COPY, "b", 30, mtime=1234)], sync="size")
    record = store.job(job.id)
    assert record.counters == Counters(elements=3, submitted=1, running=1, done=1) == store.recount(job.id)
    assert (record.bytes_total, record.bytes_done) == (130, 100)
    assert (record.already_there, record.bytes_already_there) == (1, 100)
    first, second = store.element(job.id, 1), store.element(job.id, 2)
    assert (first.status, first.attempts, first.already_there) == (JobStatus.DONE, 0, True)
    assert (first.planned, second.planned, second.mtime) == (PlannedAction.SAME, PlannedAction.COPY, 1234)
    assert store.run(results.known_paths, job.id) >= {results.path_hash(JobType.COPY, "/src/a")}
    store.settle(done(listing))
    (batch,) = store.claim()
    assert [element.planned for element in batch.elements] == [PlannedAction.COPY]
    store.settle([done(batch)[0]._replace(transferred=30)])
    record = store.job(job.id)
    assert (record.status, record.bytes_done) == (JobStatus.DONE, 130)


def test_a_dry_run_ends_with_its_listing(store: Store) -> None:
    plan = [
        planned(PlannedAction.COPY, "a", 5, done=True),
        planned(PlannedAction.SAME, "b", 7, done=True),
        deletion("x")._replace(done=True),
    ]
    job, listing = begun(store, plan, dry_run=True, **MIRROR)
    assert store.claim() == []
    settled = store.settle(done(listing))
    record = store.job(job.id)
    assert settled.finished == (record,)
    assert (record.status, record.counters) == (JobStatus.DONE, Counters(elements=4, done=4))
    assert (record.bytes_total, record.bytes_done, record.already_there) == (12, 7, 1)


def test_a_source_is_removed_after_its_copy(store: Store) -> None:
    directory = NewElement(JobType.REMOVE, "/src", None, 0, True, LAST_PHASE, PlannedAction.MOVED)
    files = [planned(PlannedAction.COPY, name, 50, mtime=99) for name in "ab"]
    job, listing = begun(store, [*files, directory], **MOVE)
    (copies,) = store.claim()
    verdicts = done(copies)
    store.settle(verdicts)
    lost = store.settle(verdicts)
    assert lost.repeated == {verdict.token for verdict in verdicts}
    removals = store.elements(job.id, after=3)
    assert [(one.src_filepath, one.dst_filepath, one.size, one.mtime) for one in removals] == [
        ("/src/a", None, 50, 99),
        ("/src/b", None, 50, 99),
    ]
    assert {one.planned for one in removals} == {PlannedAction.MOVED}
    assert store.job(job.id).bytes_total == 100
    assert store.claim() == []
    store.settle(done(listing))
    (batch,) = store.claim()
    assert [element.src_filepath for element in batch.elements] == ["/src/a", "/src/b"]
    store.settle(done(batch))
    (last,) = store.claim()
    assert [element.src_filepath for element in last.elements] == ["/src"]
    store.settle(done(last))
    assert store.job(job.id).status is JobStatus.DONE
    assert store.job(job.id).counters == store.recount(job.id)


@pytest.mark.parametrize("options", [MOVE, {**MOVE, "sync": "checksum"}])
@pytest.mark.parametrize(
    ("action", "attempts", "removed"),
    [(PlannedAction.COPY, 1, 0), (PlannedAction.COPY, 2, 1), (PlannedAction.OVERWRITE, 2, 0)],
)
def test_a_source_stays_that_the_destination_had_before(
    store: Store, options: dict[str, Any], action: PlannedAction, attempts: int, removed: int
) -> None:
    job, listing = begun(store, [planned(action, "a")], **options)
    store.settle(done(listing))
    for _ in range(attempts - 1):
        store.settle(ended(JobStatus.SUBMITTED, *store.claim()))
    (copies,) = store.claim()
    store.settle([done(copies)[0]._replace(already_there=True)])
    assert len(store.elements(job.id)) == 2 + removed
    assert store.job(job.id).status.is_final == (not removed)


def test_a_source_stays_whose_copy_failed(store: Store) -> None:
    _, listing = begun(store, [planned(PlannedAction.COPY, "a"), planned(PlannedAction.COPY, "b")], **MOVE)
    store.settle(done(listing))
    (copies,) = store.claim()
    first, second = ended(JobStatus.FAILED, copies, failure=MISSING)
    store.settle([first, second._replace(status=JobStatus.DONE, failure=None)])
    (batch,) = store.claim()
    assert [(one.type, one.src_filepath) for one in batch.elements] == [(JobType.REMOVE, "/src/b")]


def test_deletions_wait_for_all_copies(store: Store) -> None:
    job = mirrored(store)
    (copies,) = store.claim()
    assert [element.type for element in copies.elements] == [JobType.COPY, JobType.COPY]
    store.settle(done(copies)[:1])
    assert store.claim() == []
    store.settle(done(copies)[1:])
    for name in ("/dst/x", "/dst/d"):
        (batch,) = store.claim()
        assert [element.dst_filepath for element in batch.elements] == [name]
        store.settle(done(batch))
    assert store.job(job.id).status is JobStatus.DONE


def test_nothing_is_deleted_after_a_failed_copy_until_it_is_retried(store: Store) -> None:
    job = mirrored(store)
    (copies,) = store.claim()
    failed, copied = ended(JobStatus.FAILED, copies, failure=MISSING)
    store.settle([failed, copied._replace(status=JobStatus.DONE, failure=None)])
    assert store.claim() == []
    assert statuses(store, job) == ["DONE", "FAILED", "DONE", "CANCELLED", "CANCELLED"]
    assert store.job(job.id).status is JobStatus.FAILED
    store.run(job_changes.retry, job.id, store.now)
    (again,) = store.claim()
    assert [element.id for element in again.elements] == [1]
    store.settle(done(again))
    for number in (3, 4):
        (batch,) = store.claim()
        assert [element.id for element in batch.elements] == [number]
        store.settle(done(batch))
    assert store.job(job.id).status is JobStatus.DONE
    assert store.job(job.id).counters == store.recount(job.id)


def test_a_failed_deletion_does_not_cancel_those_after_it(store: Store) -> None:
    job = mirrored(store)
    store.settle(done(*store.claim()))
    (batch,) = store.claim()
    store.settle(ended(JobStatus.FAILED, batch, failure=MISSING))
    (last,) = store.claim()
    store.settle(done(last))
    assert statuses(store, job) == ["DONE", "DONE", "DONE", "FAILED", "DONE"]


def test_deletions_are_cancelled_with_a_failed_listing(store: Store) -> None:
    job, listing = begun(store, [planned(PlannedAction.COPY, "a"), deletion("x")], **MIRROR)
    store.settle(ended(JobStatus.FAILED, listing, failure=MISSING))
    assert statuses(store, job) == ["FAILED", "SUBMITTED", "CANCELLED"]


def test_a_listing_that_begins_again_drops_its_deletions(store: Store) -> None:
    new = [planned(PlannedAction.COPY, "a"), deletion("x"), deletion("y")]
    job, listing = begun(store, new, **MIRROR)
    store.run(leases.release_worker, "worker w", store.now)
    store.worker("v")
    (again,) = store.claim("v", types=LIST_LANE)
    assert again.elements[0].attempts == 2
    assert not store.run(planned_elements.drop_deletions, token_of(again), store.now)
    record = store.job(job.id)
    assert record.counters == Counters(elements=2, submitted=1, running=1) == store.recount(job.id)
    assert store.run(results.add_elements, "v", token_of(again), [deletion("y")])
    assert [element.src_filepath for element in store.elements(job.id)] == ["/src", "/src/a", "/dst/y"]
    assert not store.run(planned_elements.drop_deletions, token_of(listing)._replace(job_id=99), store.now)


def test_removals_have_no_bytes_to_move(store: Store) -> None:
    mirrored(store, *(deletion(name)._replace(size=2**40) for name in "xy"))
    store.settle(done(*store.claim()))
    (batch,) = store.claim(batch_bytes=100)
    assert [element.size for element in batch.elements] == [2**40, 2**40]


def test_phases_of_a_job() -> None:
    plain = job_record()
    assert not plain.has_phases
    assert evolve(plain, options=MIRROR).has_phases
    assert evolve(plain, options=MOVE).has_phases

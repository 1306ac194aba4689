"""Jobs: registered, found, paged, cancelled, retried."""

from __future__ import annotations

from datetime import timedelta

import pytest

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.jobs import Counters, NewElement
from pdm.workqueue.store import claim_queries, job_changes, jobs
from pdm.workqueue.store.idempotency import IdempotencyConflictError, IdempotencyKey
from pdm.workqueue.store.jobs import JobFilter
from tests.store.stores import BROKEN, EXPIRED, MISSING, START, Store, done, ended, token_of
from tests.support.records import new_job, verdict


def test_a_registered_job_is_what_was_asked_for(store: Store) -> None:
    user = store.user()
    options = {"overwrite": "always", "dummy": {"files": 3}}
    new = new_job(user, JobType.COPY, options=options, label="run 7 \u2713", src_filepath="/a\nb%c#\uef80", priority=0)
    job = store.run(jobs.submit, new, None, store.now)
    assert job == store.run(jobs.fetch, job.id, user)
    assert (job.status, job.type, job.protocol) == (JobStatus.SUBMITTED, JobType.COPY, JobProtocol.DUMMY)
    assert (job.src_filepath, job.options, job.label) == (new.src_filepath, options, "run 7 \u2713")
    assert (job.timestamp, job.finished_at, job.cancel_requested) == (START, None, False)
    assert job.counters == Counters(elements=1, submitted=1)
    first = store.element(job.id, 0)
    assert (first.type, first.status, first.attempts, first.max_tries) == (JobType.LIST, JobStatus.SUBMITTED, 0, 2)


def test_a_job_is_its_owners(store: Store) -> None:
    job = store.submit(store.user("alice"))
    assert store.run(jobs.fetch, job.id, store.user("bob")) is None
    assert store.run(jobs.fetch, job.id + 1, None) is None
    assert store.run(jobs.fetch_element, job.id, 1) is None


def test_the_same_request_registers_one_job(store: Store) -> None:
    alice, bob = store.user("alice"), store.user("bob")
    key = IdempotencyKey(alice, "k", "f")
    first = store.run(jobs.submit, new_job(alice), key, store.now)
    assert store.run(jobs.submit, new_job(alice), key, store.now).id == first.id
    with pytest.raises(IdempotencyConflictError, match="another request"):
        store.run(jobs.submit, new_job(alice), IdempotencyKey(alice, "k", "g"), store.now)
    assert store.run(jobs.submit, new_job(bob), IdempotencyKey(bob, "k", "g"), store.now).id != first.id
    assert len(store.run(jobs.page, JobFilter())) == 2


def test_pages_of_jobs(store: Store) -> None:
    alice, bob = store.user("alice"), store.user("bob")
    store.worker()
    listing = store.submit(alice, JobType.LIST, label="x")
    copy = store.submit(alice, JobType.COPY)
    store.settle(done(*store.claim(batches=1)))
    store.pass_time(60)
    rename = store.submit(bob, JobType.RENAME, src_siteid=9, dst_siteid=9)

    def found(**wanted: object) -> list[int]:
        return [job.id for job in store.run(jobs.page, JobFilter(**wanted))]  # type: ignore[arg-type]

    assert found() == [listing.id, copy.id, rename.id]
    assert found(owner_id=alice) == [listing.id, copy.id]
    assert found(owner_id=alice, limit=1) == [listing.id]
    assert found(owner_id=alice, after=listing.id) == [copy.id]
    assert found(statuses=[JobStatus.DONE]) == [listing.id]
    assert found(statuses=[JobStatus.DONE, JobStatus.SUBMITTED], types=[JobType.COPY, JobType.LIST]) == [
        listing.id,
        copy.id,
    ]
    assert found(site=2) == [copy.id]
    assert found(site=9) == [rename.id]
    assert found(label="x") == [listing.id]
    assert found(since=START + timedelta(seconds=1)) == [rename.id]
    # A text that no database holds is not found.
    assert found(label="x\0") == found(label_part="\0") == []


def test_pages_of_elements(store: Store) -> None:
    store.worker()
    directory = NewElement(JobType.MKDIR, "/src/d", "/dst/d", is_directory=True)
    job = store.copy_job(store.user(), [1, 1, directory])
    batches = store.claim(batch_elements=1, batches=2)
    store.settle(ended(JobStatus.FAILED, batches[0], failure=MISSING))

    def found(**wanted: object) -> list[int]:
        return [element.id for element in store.elements(job.id, **wanted)]

    assert found() == [0, 1, 2, 3]
    assert found(limit=2, after=0) == [1, 2]
    assert found(statuses=[JobStatus.FAILED]) == [1]
    assert found(statuses=[JobStatus.FAILED, JobStatus.SUBMITTED]) == [1, 3]
    assert found(types=[JobType.MKDIR]) == [3]
    assert found(with_attempts=True) == [0, 1, 2]
    assert found(name_part="\0") == []


def test_cancelling_ends_what_waits_and_leaves_what_runs(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1, 1])
    (first,) = store.claim(batches=1, batch_elements=1)
    (held,) = store.claim(batches=1, batch_elements=1)
    store.settle(ended(JobStatus.HELD, held, failure=EXPIRED))
    record = store.run(job_changes.cancel, job.id, store.now)
    assert record == store.job(job.id)
    assert (record.status, record.cancel_requested) == (JobStatus.RUNNING, True)
    assert record.counters == Counters(elements=4, running=1, done=1, cancelled=2) == store.recount(job.id)
    # What would be tried again is cancelled instead.
    (final,) = store.settle(ended(JobStatus.SUBMITTED, first, failure=BROKEN)).finished
    assert (final.status, final.counters.cancelled) == (JobStatus.CANCELLED, 3)
    assert store.run(job_changes.cancel, job.id, store.now) == final


def test_a_job_that_was_done_all_the_same_is_done(store: Store) -> None:
    store.worker()
    job = store.submit(store.user())
    (batch,) = store.claim()
    store.run(job_changes.cancel, job.id, store.now)
    store.settle(done(batch))
    assert store.job(job.id).status is JobStatus.DONE


def test_a_large_job_is_cancelled_in_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_changes, "CHANGED_AT_ONCE", 4)
    user = store.user()
    store.worker()
    job = store.copy_job(user, [1] * 12)
    (first,) = store.claim(batches=1, batch_elements=3)
    store.settle(ended(JobStatus.HELD, first, failure=EXPIRED, counts=False))
    record = store.run(job_changes.cancel, job.id, store.now)
    assert (record.status, record.cancel_requested) == (JobStatus.RUNNING, True)
    assert record.counters == Counters(elements=13, submitted=5, done=1, cancelled=4, held=3) == store.recount(job.id)
    # Nothing of it is claimed any more, and a later call finds what is left to do.
    assert store.claim() == []
    assert store.run(claim_queries.next_due, store.now) is None
    assert store.run(job_changes.unfinished_changes) == [job.id]
    assert store.run(job_changes.retry, job.id, store.now)[1] == 0
    assert store.run(job_changes.continue_change, job.id, store.now)
    assert store.job(job.id).counters == store.recount(job.id)
    assert not store.run(job_changes.continue_change, job.id, store.now)
    final = store.job(job.id)
    assert (final.status, final.counters) == (JobStatus.CANCELLED, Counters(elements=13, done=1, cancelled=12))
    assert store.run(job_changes.unfinished_changes) == []
    assert not store.run(job_changes.continue_change, job.id, store.now)
    assert not store.run(job_changes.continue_change, job.id + 1, store.now)
    assert store.run(job_changes.retry, job.id, store.now)[1] == 12
    while store.run(job_changes.continue_change, job.id, store.now):
        pass
    assert len(store.claim()[0].elements) == 12


def test_a_large_job_is_retried_in_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_changes, "CHANGED_AT_ONCE", 4)
    store.worker()
    job = store.copy_job(store.user(), [1] * 10)
    while batches := store.claim():
        store.settle(ended(JobStatus.FAILED, *batches, failure=MISSING))
    failed = store.job(job.id)
    assert (failed.status, failed.counters.failed) == (JobStatus.FAILED, 10)
    record, count = store.run(job_changes.retry, job.id, store.now)
    # Said at once, done in parts; in between it is not final, and nothing of it begins: it cannot end half way.
    assert (count, record.status.is_final) == (10, False)
    assert record.counters == Counters(elements=11, submitted=4, done=1, failed=6) == store.recount(job.id)
    assert store.claim() == []
    assert store.run(claim_queries.next_due, store.now) is None
    assert store.run(job_changes.unfinished_changes) == [job.id]
    # A daemon that is started later continues it.
    assert store.run(job_changes.continue_change, job.id, store.now)
    assert not store.run(job_changes.continue_change, job.id, store.now)
    assert store.run(job_changes.unfinished_changes) == []
    assert store.job(job.id).counters == Counters(elements=11, submitted=10, done=1) == store.recount(job.id)
    assert sum(len(batch.elements) for batch in store.claim()) == 10
    assert not store.run(job_changes.continue_change, job.id, store.now)


def test_a_large_retry_beside_running_work_and_a_cancellation(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_changes, "CHANGED_AT_ONCE", 4)
    store.worker()
    job = store.copy_job(store.user(), [1] * 10)
    (first, running) = (store.claim(batches=1, batch_elements=size)[0] for size in (8, 1))
    store.settle(ended(JobStatus.FAILED, first, failure=MISSING))
    assert store.run(job_changes.retry, job.id, store.now)[1] == 8
    # What comes back meanwhile does not open the job before its time.
    store.settle(ended(JobStatus.SUBMITTED, running, failure=BROKEN))
    assert store.claim() == []
    assert store.run(job_changes.unfinished_changes) == [job.id]
    record = store.run(job_changes.cancel, job.id, store.now)
    while store.run(job_changes.continue_change, job.id, store.now):
        assert store.job(job.id).counters == store.recount(job.id)
    record = store.job(job.id)
    assert (record.status, record.counters.cancelled) == (JobStatus.CANCELLED, 6)
    assert store.run(job_changes.retry, job.id, store.now)[1] == 10
    assert store.run(job_changes.retry, job.id, store.now)[1] == 6, "repeated, it continues"
    while store.run(job_changes.continue_change, job.id, store.now):
        pass
    assert sum(len(batch.elements) for batch in store.claim()) == 10


def test_a_job_that_waits_is_cancelled_at_once(store: Store) -> None:
    job = store.submit(store.user())
    record = store.run(job_changes.cancel, job.id, store.now)
    assert (record.status, record.finished_at) == (JobStatus.CANCELLED, store.now)


def test_what_is_done_cannot_be_cancelled(store: Store) -> None:
    store.worker()
    job = store.submit(store.user())
    store.settle(done(*store.claim()))
    before = store.job(job.id)
    assert store.run(job_changes.cancel, job.id, store.now) == before


def test_a_retry_sets_what_failed_going_with_a_new_budget(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1])
    (batch,) = store.claim()
    store.settle([verdict(token_of(batch, 0)), verdict(token_of(batch, 1), JobStatus.FAILED, failure=MISSING)])
    assert store.job(job.id).status is JobStatus.FAILED
    record, count = store.run(job_changes.retry, job.id, store.now)
    assert (count, record.status, record.finished_at) == (1, JobStatus.RUNNING, None)
    element = store.element(job.id, 2)
    assert (element.status, element.attempts, element.lost) == (JobStatus.SUBMITTED, 1, 1)
    (again,) = store.claim()
    assert token_of(again).attempt == 2
    store.settle(done(again))
    assert store.job(job.id).status is JobStatus.DONE
    assert store.run(job_changes.retry, job.id, store.now) == (store.job(job.id), 0)


def test_a_cancelled_job_can_be_retried_when_its_cancellation_is_through(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1])
    (running,) = store.claim(batches=1, batch_elements=1)
    store.run(job_changes.cancel, job.id, store.now)
    assert store.run(job_changes.retry, job.id, store.now)[1] == 0
    store.settle(ended(JobStatus.CANCELLED, running))
    record, count = store.run(job_changes.retry, job.id, store.now)
    assert (count, record.cancel_requested) == (2, False)
    store.settle(done(*store.claim()))
    assert store.job(job.id).status is JobStatus.DONE


def test_a_failed_listing_can_be_retried(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.LIST)
    store.settle(ended(JobStatus.FAILED, *store.claim(), failure=MISSING))
    store.run(job_changes.retry, job.id, store.now)
    store.settle(done(*store.claim()))
    assert store.job(job.id).status is JobStatus.DONE


@pytest.mark.parametrize("function", [job_changes.cancel, job_changes.retry])
def test_what_is_not_there_is_not_changed(store: Store, function: object) -> None:
    with pytest.raises(LookupError, match="no job 99"):
        store.run(function, 99, store.now)  # type: ignore[arg-type]


def test_counters_that_do_not_sum_up_are_refused_by_the_database(store: Store) -> None:
    import sqlalchemy as sa

    from pdm.workqueue.WorkqueueDB import Job

    job = store.submit(store.user())
    with pytest.raises(sa.exc.IntegrityError, match="counters_sum"):
        store.run(lambda session: session.execute(sa.update(Job).where(Job.id == job.id).values(num_done=1)))
    assert store.run(claim_queries.next_due, store.now) is not None

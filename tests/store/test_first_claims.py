"""Elements that are claimed in the transaction that adds them."""

from __future__ import annotations

from uuid import uuid4

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import Batch, JobRecord, NewElement
from pdm.workqueue.http import transactions
from pdm.workqueue.store import first_claims, job_changes, leases
from pdm.workqueue.store.first_claims import FirstClaim
from pdm.workqueue.store.idempotency import IdempotencyKey
from tests.store.stores import LIST_LANE, Store, done, token_of
from tests.support.records import new_job

FILE = NewElement(JobType.COPY, "/src/0", "/dst/0", size=7)


def register(
    store: Store, user: int, type_: JobType = JobType.COPY, key: IdempotencyKey | None = None
) -> tuple[JobRecord, Batch | None]:
    claim = FirstClaim("w", store.now)
    (job, _), batch = store.run(
        transactions.register_and_claim, new_job(user, type_, log_uid=uuid4().hex), key, store.now, None, (), claim
    )
    return job, batch


def add(store: Store, listing: Batch, claim: bool = True) -> tuple[bool, Batch | None]:
    permission = FirstClaim("w", store.now) if claim else None
    return store.run(first_claims.add_and_claim, "w", token_of(listing), [FILE], permission)


def test_a_job_and_its_only_file_run_as_soon_as_they_are_stored(store: Store) -> None:
    store.worker()
    user = store.user()
    job, listing = register(store, user)
    # The answer to its user tells of the job as it was registered.
    assert (job.status, job.counters.submitted) == (JobStatus.SUBMITTED, 1)
    assert listing is not None
    assert (listing.type, token_of(listing).attempt) == (JobType.LIST, 1)
    assert store.job(job.id).status is JobStatus.RUNNING
    assert store.job(job.id).counters == store.recount(job.id)
    assert store.job(job.id).started_at == store.now
    # Nothing of it waits for another claim.
    assert store.claim() == []
    added, copy = add(store, listing)
    assert added
    assert copy is not None
    assert [(one.id, one.status, one.attempts, one.src_filepath) for one in copy.elements] == [
        (1, JobStatus.RUNNING, 1, "/src/0")
    ]
    assert store.claim() == []
    assert store.job(job.id).counters == store.recount(job.id)
    assert not store.settle(done(listing)).has_waiting
    outcome = store.settle(done(copy))
    assert [one.id for one in outcome.finished] == [job.id]
    assert store.job(job.id).status is JobStatus.DONE
    assert store.job(job.id).bytes_done == 7


def test_a_job_of_one_operation_runs_at_once(store: Store) -> None:
    store.worker()
    job, batch = register(store, store.user(), JobType.MKDIR)
    assert batch is not None
    assert store.claim() == []
    store.settle(done(batch))
    assert store.job(job.id).status is JobStatus.DONE


def test_without_a_lease_the_job_waits(store: Store) -> None:
    job, batch = register(store, store.user())
    assert batch is None
    assert store.job(job.id).status is JobStatus.SUBMITTED
    store.worker()
    assert [one.job.id for one in store.claim(types=LIST_LANE)] == [job.id]


def test_a_repeated_request_is_not_claimed_again(store: Store) -> None:
    store.worker()
    user = store.user()
    key = IdempotencyKey(user, "once", "body")
    first, batch = register(store, user, key=key)
    again, nothing = register(store, user, key=key)
    assert batch is not None
    assert (again.id, nothing) == (first.id, None)
    assert store.element(first.id, 0).attempts == 1


def test_a_daemon_that_dies_after_it_has_registered_loses_nothing_and_repeats_nothing(store: Store) -> None:
    store.worker()
    job, listing = register(store, store.user())
    assert listing is not None
    _, copy = add(store, listing)
    assert copy is not None
    store.pass_time(1000)
    store.worker("next")
    assert store.run(leases.release_expired, store.now) == 2
    # What the dead one still says of it changes nothing.
    assert len(store.settle(done(listing, copy)).lost) == 2
    again = store.claim("next")
    assert sorted((one.type, token_of(one).element_id, token_of(one).attempt) for one in again) == [
        (JobType.LIST, 0, 2),
        (JobType.COPY, 1, 2),
    ]
    store.settle(done(*again), "next")
    assert store.job(job.id).status is JobStatus.DONE
    assert store.job(job.id).counters == store.recount(job.id)


def test_nothing_is_added_to_a_job_that_was_cancelled_during_its_listing(store: Store) -> None:
    store.worker()
    job, listing = register(store, store.user())
    assert listing is not None
    store.run(job_changes.cancel, job.id, store.now)
    assert add(store, listing) == (False, None)


def test_without_permission_an_element_is_only_added(store: Store) -> None:
    store.worker()
    job, listing = register(store, store.user())
    assert listing is not None
    assert add(store, listing, claim=False) == (True, None)
    assert store.element(job.id, 1).status is JobStatus.SUBMITTED
    assert store.settle(done(listing)).has_waiting
    assert [token_of(one).element_id for one in store.claim()] == [1]

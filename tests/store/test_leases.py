"""Leases: taken, renewed, lost; release of what dead daemons ran."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.jobs import ClaimToken, Counters, JobRecord
from pdm.workqueue.domain.lifecycle import MOST_CRASHES
from pdm.workqueue.store import claim_queries, job_changes, jobs, leases, leftover_files, results
from tests.store.stores import BROKEN, LEASE_S, Store, done, ended, identity, name_of, token_of
from tests.support.records import verdict


def test_a_renewed_lease_is_not_taken_away(store: Store) -> None:
    store.worker()
    store.submit(store.user())
    store.claim()
    for _ in range(3):
        store.pass_time(40)
        assert store.run(leases.renew, "w", store.now, LEASE_S) == leases.Renewal(False, frozenset())
        assert store.run(leases.release_expired, store.now) == 0


def test_what_a_dead_daemon_ran_runs_again_elsewhere(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1])
    (batch,) = store.claim()
    claimed_at = store.now
    store.pass_time(LEASE_S)
    store.worker("heir")
    assert store.run(leases.release_expired, store.now) == 2
    assert store.run(leases.release_expired, store.now) == 0
    waiting = store.element(job.id, 1)
    assert (waiting.status, waiting.attempts, waiting.lost) == (JobStatus.SUBMITTED, 1, 1)
    assert store.job(job.id).counters == Counters(elements=3, submitted=2, done=1) == store.recount(job.id)
    # The dead one's late result fits nothing.
    (again,) = store.claim("heir")
    assert store.settle(done(batch)).lost == tuple(batch.token(element) for element in batch.elements)
    store.settle(done(again), "heir")
    assert store.job(job.id).status is JobStatus.DONE
    lost, last = store.run(jobs.attempts, job.id, 1)
    assert (lost.worker, lost.status, lost.started_at, lost.ended_at) == (
        name_of(),
        JobStatus.FAILED,
        claimed_at,
        store.now,
    )
    assert lost.failure is not None
    assert lost.failure.code is FailureCode.CRASHED
    assert (last.worker, last.attempt) == (name_of("heir"), 2)


def test_a_lost_lease_is_reported_once_it_is_taken_away(store: Store) -> None:
    store.worker()
    store.pass_time(LEASE_S + 100)
    # Late, but no daemon has taken the claims.
    assert not store.run(leases.renew, "w", store.now, LEASE_S).lost
    store.pass_time(LEASE_S)
    store.run(leases.release_expired, store.now)
    assert store.run(leases.renew, "w", store.now, LEASE_S).lost
    store.submit(store.user())
    assert store.claim() == []
    store.worker()
    assert len(store.claim()) == 1


def test_an_unknown_worker_has_no_lease(store: Store) -> None:
    assert store.run(leases.renew, "nobody", store.now, LEASE_S).lost


def test_one_daemon_can_be_declared_dead(store: Store) -> None:
    store.worker()
    store.worker("other")
    user = store.user()
    store.submit(user)
    store.claim()
    store.submit(user)
    store.claim("other")
    assert store.run(leases.release_worker, name_of(), store.now) == 1
    assert store.run(leases.release_worker, "nobody", store.now) == 0
    assert store.run(leases.renew, "w", store.now, LEASE_S).lost
    assert not store.run(leases.renew, "other", store.now, LEASE_S).lost


def test_a_worker_that_registers_again_runs_nothing(store: Store) -> None:
    store.worker()
    job = store.submit(store.user())
    store.claim()
    assert store.register().back == 1
    assert store.element(job.id, 0).status is JobStatus.SUBMITTED


def test_a_dead_listing_is_listed_again(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.COPY)
    store.claim()
    store.run(leases.release_worker, name_of(), store.now)
    store.worker()
    (again,) = store.claim()
    assert (again.job.id, again.type, token_of(again).attempt) == (job.id, JobType.LIST, 2)


def test_what_a_dead_daemon_ran_of_a_cancelled_job_is_cancelled(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1])
    store.claim()
    store.run(job_changes.cancel, job.id, store.now)
    store.run(leases.release_worker, name_of(), store.now)
    assert store.job(job.id).status is JobStatus.CANCELLED
    # The copy that was cut off may have left its temporary file.
    assert [element.id for element, _ in store.run(leftover_files.leftovers, 10)] == [1]


def test_renewal_returns_cancelled_jobs_that_run_here(store: Store) -> None:
    store.worker()
    store.worker("other")
    user = store.user()
    mine = store.submit(user)
    batch = store.claim()
    store.submit(user)
    theirs = store.claim("other")
    for one in (*batch, *theirs):
        store.run(job_changes.cancel, one.job.id, store.now)
    assert store.run(leases.renew, "w", store.now, LEASE_S).cancelled_jobs == {mine.id}
    store.settle(ended(JobStatus.SUBMITTED, *batch, failure=BROKEN))
    assert store.run(leases.renew, "w", store.now, LEASE_S).cancelled_jobs == frozenset()
    assert store.job(mine.id).status is JobStatus.CANCELLED


def test_what_every_daemon_dies_of_fails_in_the_end(store: Store) -> None:
    job = store.copy_job(store.user(), [1], store.worker())
    for crashes in range(1, MOST_CRASHES + 1):
        (batch,) = store.claim()
        assert token_of(batch).attempt == crashes
        store.run(leases.release_worker, name_of(), store.now)
        element = store.element(job.id, 1)
        # Twice at once; then it has to wait, so that a daemon which cannot come up does not use all tries up.
        assert (element.not_before is None) == (crashes <= 2 or crashes == MOST_CRASHES)
        store.pass_time(700)
        store.worker()
    assert element.status is JobStatus.FAILED
    assert element.failure is not None and "not tried again" in element.failure.message
    assert store.job(job.id).status is JobStatus.FAILED
    assert store.claim() == []


def test_any_other_end_begins_the_count_of_crashes_anew(store: Store) -> None:
    job = store.copy_job(store.user(), [1], store.worker())
    for attempt in range(1, MOST_CRASHES + 5):
        (batch,) = store.claim()
        if attempt == 5:
            store.settle(ended(JobStatus.SUBMITTED, batch, counts=False))
        else:
            store.run(leases.release_worker, name_of(), store.now)
        store.pass_time(700)
        store.worker()
        assert store.element(job.id, 1).status is JobStatus.SUBMITTED


def _as(incarnation: str, instance: str = "", name: str = "w") -> leases.WorkerIdentity:
    return leases.WorkerIdentity(name_of(name), incarnation, instance, f"host of {incarnation}")


def _register(store: Store, worker: leases.WorkerIdentity, *, alone: bool = False) -> leases.Registration:
    return store.run(leases.register_worker, worker, store.now, LEASE_S, alone=alone)


def test_a_copy_of_an_instance_respects_the_lease(store: Store) -> None:
    assert _register(store, _as("first", "directory 1")).held_by is None
    store.submit(store.user())
    batches = store.claim("first")
    copy = _as("second", "directory 2")
    held = _register(store, copy)
    assert held.held_by == "host of first"
    assert 0 < held.held_for_s <= LEASE_S
    assert store.claim("second") == []
    # It is alive: the lease ends later and later.
    store.pass_time(20)
    store.run(leases.renew, "first", store.now, LEASE_S)
    again = _register(store, copy)
    assert again.held_until is not None and held.held_until is not None
    assert again.held_until > held.held_until - timedelta(seconds=20 if store.engine.dialect.name != "sqlite" else 0)
    assert not store.settle(done(*batches), "first").lost
    # It is not: what it held is free, and it has lost.
    store.pass_time(LEASE_S + 1)
    assert _register(store, copy).held_by is None
    assert store.run(leases.renew, "first", store.now, LEASE_S).lost
    assert store.settle(done(*batches), "first").lost


def test_a_restart_takes_its_own_claims_back_at_once(store: Store) -> None:
    _register(store, _as("first", "directory"))
    job = store.submit(store.user())
    (batch,) = store.claim("first")
    assert _register(store, _as("second", "directory")) == leases.Registration(back=1)
    # What the earlier life says now fits nothing.
    assert store.settle(done(batch), "first").lost == (token_of(batch),)
    assert not store.run(results.add_elements, "first", token_of(batch), [])
    assert store.claim("first") == []
    (again,) = store.claim("second")
    assert (again.job.id, token_of(again).attempt) == (job.id, 2)


def test_the_lock_on_the_database_is_exclusive(store: Store) -> None:
    """On SQLite: whatever leases the clock says there are, no other daemon lives."""
    _register(store, _as("other", name="other"))
    store.submit(store.user())
    store.claim("other")
    assert _register(store, _as("mine"), alone=True).back == 1
    assert store.run(leases.renew, "other", store.now, LEASE_S).lost


def test_a_lease_that_was_given_up_is_free(store: Store) -> None:
    _register(store, _as("first"))
    store.run(leases.give_up_lease, "first")
    assert _register(store, _as("second")).held_by is None


def test_twenty_crashes_end_only_what_was_begun(store: Store) -> None:
    """A daemon that is killed again and again: what waited in a batch had nothing to do with it."""
    job = store.copy_job(store.user(), [1, 1], store.worker())

    def only_first(of_job: JobRecord, tokens: Collection[ClaimToken]) -> list[ClaimToken]:
        assert of_job.id == job.id
        return [token for token in tokens if token.element_id == 1]

    for crash in range(MOST_CRASHES):
        claimed = {token_of(batch, n) for batch in store.claim() for n in range(len(batch.elements))}
        assert ClaimToken(job.id, 2, crash + 1) in claimed
        worker = identity()
        store.run(leases.register_worker, worker, store.now, LEASE_S, begun=only_first)
        store.pass_time(700)
        store.worker()
    begun, waited = store.elements(job.id)[1:]
    assert (begun.status, begun.attempts) == (JobStatus.FAILED, MOST_CRASHES)
    assert (waited.status, waited.attempts, waited.lost) == (JobStatus.SUBMITTED, MOST_CRASHES, MOST_CRASHES)
    # It has no attempt that could have said anything, so there is no log that could be missing.
    assert store.run(jobs.attempts, job.id, 2) == []
    (batch,) = store.claim()
    store.settle(done(batch))
    assert store.element(job.id, 2).status is JobStatus.DONE


def test_what_was_put_off_until_a_later_hour_comes_back_with_the_clock(store: Store) -> None:
    store.worker()
    user = store.user()
    put_off, listing, soon = store.submit(user), store.submit(user, JobType.LIST), store.submit(user)
    batches = store.claim(batch_elements=1)
    old = store.now + timedelta(hours=2)
    store.settle(
        [
            verdict(token_of(batch), JobStatus.SUBMITTED, not_before=at + timedelta(seconds=30), failure=BROKEN)
            for batch in batches
            for at in [store.now if batch.job.id == soon.id else old]
        ]
    )
    assert store.run(claim_queries.bring_forward, old, store.now) == 2
    assert {batch.job.id for batch in store.claim(batch_elements=1)} == {put_off.id, listing.id}
    store.pass_time(31)
    assert [batch.job.id for batch in store.claim(batch_elements=1)] == [soon.id]

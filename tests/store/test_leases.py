"""Leases: who holds one, who lost it, and what happens to the elements of the dead."""

from __future__ import annotations

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.jobs import Counters
from pdm.workqueue.domain.retry import MOST_CRASHES
from pdm.workqueue.store import claims, jobs
from tests.store.stores import BROKEN, LEASE_S, Store, done, ended, token_of


def test_a_renewed_lease_is_not_taken_away(store: Store) -> None:
    store.worker()
    store.submit(store.user())
    store.claim()
    for _ in range(3):
        store.pass_time(40)
        assert store.run(claims.renew, "w", store.now, LEASE_S) == claims.Renewal(False, frozenset())
        assert store.run(claims.release_expired, store.now) == 0


def test_what_a_dead_daemon_ran_runs_again_elsewhere(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1])
    (batch,) = store.claim()
    claimed_at = store.now
    store.pass_time(LEASE_S)
    store.worker("heir")
    assert store.run(claims.release_expired, store.now) == 2
    assert store.run(claims.release_expired, store.now) == 0
    waiting = store.element(job.id, 1)
    assert (waiting.status, waiting.attempts, waiting.lost) == (JobStatus.SUBMITTED, 1, 1)
    assert store.job(job.id).counters == Counters(elements=3, submitted=2, done=1) == store.recount(job.id)
    # The dead one's late result fits nothing.
    (again,) = store.claim("heir")
    assert store.settle(done(batch)).lost == tuple(batch.token(element) for element in batch.elements)
    store.settle(done(again), "heir")
    assert store.job(job.id).status is JobStatus.DONE
    lost, last = store.run(jobs.attempts, job.id, 1)
    assert (lost.worker, lost.status, lost.started_at, lost.ended_at) == ("w", JobStatus.FAILED, claimed_at, store.now)
    assert lost.failure is not None
    assert lost.failure.code is FailureCode.CRASHED
    assert (last.worker, last.attempt) == ("heir", 2)


def test_a_lost_lease_is_told_once_it_is_taken_away(store: Store) -> None:
    store.worker()
    store.pass_time(LEASE_S + 100)
    # Late, but nobody has taken anything: all is well.
    assert not store.run(claims.renew, "w", store.now, LEASE_S).lost
    store.pass_time(LEASE_S)
    store.run(claims.release_expired, store.now)
    assert store.run(claims.renew, "w", store.now, LEASE_S).lost
    store.submit(store.user())
    assert store.claim() == []
    store.worker()
    assert len(store.claim()) == 1


def test_a_worker_nobody_knows_has_no_lease(store: Store) -> None:
    assert store.run(claims.renew, "nobody", store.now, LEASE_S).lost


def test_one_daemon_can_be_declared_dead(store: Store) -> None:
    store.worker()
    store.worker("other")
    user = store.user()
    store.submit(user)
    store.claim()
    store.submit(user)
    store.claim("other")
    assert store.run(claims.release_worker, "w", store.now) == 1
    assert store.run(claims.release_worker, "nobody", store.now) == 0
    assert store.run(claims.renew, "w", store.now, LEASE_S).lost
    assert not store.run(claims.renew, "other", store.now, LEASE_S).lost


def test_who_registers_again_runs_nothing(store: Store) -> None:
    store.worker()
    job = store.submit(store.user())
    store.claim()
    assert store.register().back == 1
    assert store.element(job.id, 0).status is JobStatus.SUBMITTED


def test_a_dead_listing_is_listed_again(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.COPY)
    store.claim()
    store.run(claims.release_worker, "w", store.now)
    store.worker()
    (again,) = store.claim()
    assert (again.job.id, again.type, token_of(again).attempt) == (job.id, JobType.LIST, 2)


def test_what_a_dead_daemon_ran_of_a_cancelled_job_is_cancelled(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1])
    store.claim()
    store.run(jobs.cancel, job.id, store.now)
    store.run(claims.release_worker, "w", store.now)
    assert store.job(job.id).status is JobStatus.CANCELLED
    # The copy that was cut off may have left its temporary file.
    assert [element.id for element, _ in store.run(claims.residues, 10)] == [1]


def test_renewal_tells_of_cancelled_jobs_that_run_here(store: Store) -> None:
    store.worker()
    store.worker("other")
    user = store.user()
    mine = store.submit(user)
    batch = store.claim()
    store.submit(user)
    theirs = store.claim("other")
    for one in (*batch, *theirs):
        store.run(jobs.cancel, one.job.id, store.now)
    assert store.run(claims.renew, "w", store.now, LEASE_S).cancelled_jobs == {mine.id}
    store.settle(ended(JobStatus.SUBMITTED, *batch, failure=BROKEN))
    assert store.run(claims.renew, "w", store.now, LEASE_S).cancelled_jobs == frozenset()
    assert store.job(mine.id).status is JobStatus.CANCELLED


def test_what_every_daemon_dies_of_fails_in_the_end(store: Store) -> None:
    job = store.copy_job(store.user(), [1], store.worker())
    for crashes in range(1, MOST_CRASHES + 1):
        (batch,) = store.claim()
        assert token_of(batch).attempt == crashes
        store.run(claims.release_worker, "w", store.now)
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
            store.run(claims.release_worker, "w", store.now)
        store.pass_time(700)
        store.worker()
        assert store.element(job.id, 1).status is JobStatus.SUBMITTED

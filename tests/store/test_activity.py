"""Rates of jobs, attempts by route over time, and who waits: exact where few, scaled samples where many."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.limits import Route
from pdm.workqueue.store import activity
from pdm.workqueue.store.activity import Ended, TimeBuckets, job_rate, route_activity
from pdm.workqueue.store.node_work import node_states
from pdm.workqueue.store.queue import queue_shares
from tests.store.stores import MISSING, START, Store, done, ended, name_of
from tests.support.records import verdict


def _copy_in_steps(store: Store, sizes: list[int], step: int, **changes: Any) -> int:
    """A copy of files of which `step` end each minute."""
    job = store.copy_job(store.user(), sizes, **changes)
    while batches := [b for b in store.claim(batches=1, batch_elements=step) if b.job.id == job.id]:
        store.pass_time(60)
        store.settle(
            [
                verdict(batch.token(element), at=store.now - timedelta(seconds=10), transferred=element.size)
                for batch in batches
                for element in batch.elements
            ]
        )
        store.worker()
    return job.id


def test_the_rate_of_a_job_is_what_ended_in_each_part_of_its_time(store: Store) -> None:
    store.worker()
    job = store.job(_copy_in_steps(store, [10, 10, 20, 20, 40, 40], 2))
    assert job.status is JobStatus.DONE
    rate = store.run(job_rate, job, store.now, 3)
    assert rate is not None
    assert not rate.sampled
    assert [(each.done, each.bytes) for each in rate.ended] == [(2, 20), (2, 40), (2, 80)]
    assert rate.buckets.since == job.started_at
    assert rate.buckets.end >= (job.finished_at or START)


def test_a_job_that_has_not_begun_has_no_rate(store: Store) -> None:
    assert store.run(job_rate, store.submit(store.user()), store.now, 3) is None


def test_the_rate_of_a_large_job_is_estimated_from_a_part(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.worker()
    job = store.job(_copy_in_steps(store, [7] * 1200, 300))
    monkeypatch.setattr(activity, "MOST_ELEMENTS", 240)
    rate = store.run(job_rate, job, store.now, 4)
    assert rate is not None
    assert rate.sampled
    assert sum(each.bytes for each in rate.ended) == pytest.approx(job.bytes_done)
    for each in rate.ended:
        assert each.done == pytest.approx(300, rel=0.4)


def test_routes_have_their_successes_and_failures(store: Store) -> None:
    store.worker()
    _copy_in_steps(store, [5, 6], 1, src_siteid=3, dst_siteid=4)
    store.pass_time(3600)
    store.worker()
    store.submit(store.user(), JobType.MKDIR, src_siteid=8, dst_siteid=None)
    store.settle(ended(JobStatus.FAILED, *store.claim(), failure=MISSING, at=store.now))
    store.pass_time(3)
    found = store.run(route_activity, TimeBuckets.until(store.now, timedelta(hours=24), 24))
    assert not found.sampled
    assert found.routes.keys() == {Route(3, 4), Route(8, None)}
    assert found.routes[Route(8, None)] == [*(Ended() for _ in range(23)), Ended(0, 1, 0)]
    copies = found.routes[Route(3, 4)]
    assert (sum(each.done for each in copies), sum(each.bytes for each in copies)) == (3, 11)
    assert copies[-1] == Ended()
    assert found.failures == {(MISSING.scope.value, MISSING.code.value): 1}
    later = store.run(route_activity, TimeBuckets.until(store.now + timedelta(days=2), timedelta(hours=24), 24))
    assert (later.routes, later.failures) == ({}, {})


def test_of_many_jobs_some_stand_for_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.worker()
    user = store.user()
    for _ in range(60):
        store.submit(user, JobType.MKDIR, src_siteid=8, dst_siteid=None)
    while batches := store.claim(batches=10):
        store.settle([verdict(b.token(e), at=store.now) for b in batches for e in b.elements])
    store.pass_time(3)
    buckets = TimeBuckets.until(store.now, timedelta(hours=1), 4)
    assert store.run(route_activity, buckets).routes[Route(8, None)][-1].done == 60
    monkeypatch.setattr(activity, "MOST_JOBS", 20)
    found = store.run(route_activity, buckets)
    assert found.sampled
    assert found.routes[Route(8, None)][-1].done == 60


def test_the_queue_is_by_user_and_route(store: Store) -> None:
    store.worker()
    alice, bob = store.user("alice"), store.user("bob")
    store.copy_job(alice, [1, 2, 3], src_siteid=3, dst_siteid=4)
    store.claim(batches=1, batch_elements=1)
    waiting = [store.submit(bob, JobType.MKDIR, src_siteid=8, dst_siteid=None) for _ in range(2)]
    ended_job = store.submit(alice, JobType.MKDIR, src_siteid=9, dst_siteid=None)
    (other,) = [one for one in store.claim(batches=9) if one.job.id == ended_job.id]
    store.settle(done(other))
    shares = {(share.user_id, share.route): share for share in store.run(queue_shares)}
    assert shares.keys() == {(alice, Route(3, 4)), (bob, Route(8, None))}
    copy = shares[alice, Route(3, 4)]
    assert (copy.jobs, copy.waiting + copy.running, copy.held) == (1, 3, 0)
    assert copy.running >= 1
    assert copy.oldest_waiting is None
    assert shares[bob, Route(8, None)].jobs == len(waiting)


def test_a_job_that_waits_the_longest_is_named(store: Store) -> None:
    user = store.user("alice")
    first = store.submit(user, JobType.MKDIR)
    store.submit(user, JobType.MKDIR)
    (share,) = store.run(queue_shares)
    assert (share.jobs, share.waiting, share.running, share.oldest_waiting) == (2, 2, 0, first.id)
    assert share.subject.endswith("CN=alice")


def test_daemons_are_listed_with_what_they_run(store: Store) -> None:
    store.worker()
    store.submit(store.user(), JobType.MKDIR)
    store.claim()
    (state,) = store.run(node_states, store.now)
    assert (state.worker, state.running, state.alive) == (name_of(), 1, True)
    assert state.lease_until is not None

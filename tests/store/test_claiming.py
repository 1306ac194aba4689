"""What a claim takes, in which order, and what it leaves."""

from __future__ import annotations

from datetime import timedelta

import pytest

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch, NewElement
from pdm.workqueue.domain.limits import FIRST_BATCH_SIZE, work_kind
from pdm.workqueue.store import claim_queries, held_elements, job_changes, leases, results
from pdm.workqueue.store.claim_limits import ClaimLimits
from tests.store.stores import BROKEN, EXPIRED, LIST_LANE, START, WORK_LANE, Store, done, ended, token_of
from tests.support.records import verdict


def job_ids(batches: list[Batch]) -> list[int]:
    """Of all elements, in order."""
    return [element.job_id for batch in batches for element in batch.elements]


def numbers(batches: list[Batch]) -> list[list[int]]:
    return [[element.id for element in batch.elements] for batch in batches]


def test_a_claimed_element_runs_and_is_not_claimed_again(store: Store) -> None:
    job = store.submit(store.user())
    store.worker()
    (batch,) = store.claim()
    assert (batch.job.id, batch.type, batch.job.status) == (job.id, JobType.MKDIR, JobStatus.RUNNING)
    (element,) = batch.elements
    assert (element.status, element.attempts) == (JobStatus.RUNNING, 1)
    assert store.element(job.id, 0) == element
    assert store.job(job.id) == batch.job
    assert store.claim() == []


def test_only_a_worker_with_a_lease_claims(store: Store) -> None:
    store.submit(store.user())
    assert store.claim("nobody") == []
    store.worker()
    store.pass_time(61)
    if store.engine.dialect.name == "postgresql":
        assert store.claim() == []
    store.run(leases.release_expired, store.now)
    assert store.claim() == []
    store.worker()
    assert len(store.claim()) == 1


def test_listings_have_their_own_lane(store: Store) -> None:
    user = store.user()
    store.worker()
    mkdir, listing = store.submit(user), store.submit(user, JobType.LIST)
    assert [batch.job.id for batch in store.claim(types=LIST_LANE)] == [listing.id]
    assert [batch.job.id for batch in store.claim(types=WORK_LANE)] == [mkdir.id]


def test_both_lanes_at_once_give_listings_first(store: Store) -> None:
    user = store.user()
    store.worker()
    mkdir, listing = store.submit(user), store.submit(user, JobType.LIST)
    assert [batch.job.id for batch in store.claim()] == [listing.id, mkdir.id]


def test_half_a_lane_is_refused() -> None:
    with pytest.raises(ValueError, match="all but listings"):
        ClaimLimits(elements=1, batches=1, batch_elements=1, batch_bytes=1, types=frozenset({JobType.COPY}))


def test_within_a_user_priority_counts_then_age(store: Store) -> None:
    user = store.user()
    store.worker()
    late, early, first = (store.submit(user, priority=priority) for priority in (5, 5, 0))
    assert job_ids(store.claim()) == [first.id, late.id, early.id]


def test_a_job_of_lower_priority_waits_for_all_of_the_higher(store: Store) -> None:
    user = store.user()
    store.worker()
    large = store.copy_job(user, [1] * 50, priority=1)
    store.submit(user, priority=2)
    taken = store.claim(batches=2, batch_elements=10)
    assert [batch.job.id for batch in taken] == [large.id, large.id]


def test_users_take_turns(store: Store) -> None:
    store.worker()
    alice, bob = store.user("alice"), store.user("bob")
    store.copy_job(alice, [1] * 100)
    store.copy_job(bob, [1] * 100)
    owners = [batch.job.user_id for batch in store.claim(batches=6, batch_elements=5)]
    assert sorted(owners) == [alice] * 3 + [bob] * 3


def test_a_new_user_is_served_at_once_behind_thousands_of_jobs(store: Store) -> None:
    store.worker()
    alice, bob = store.user("alice"), store.user("bob")
    for _ in range(30):
        store.submit(alice)
    store.claim(batches=2)
    mine = store.submit(bob)
    assert [batch.job.id for batch in store.claim(batches=1)] == [mine.id]


def test_small_files_go_together_and_a_large_one_alone(store: Store) -> None:
    store.worker()
    store.copy_job(store.user(), [10, 10, 10, 500, 10, 10])
    assert numbers(store.claim(batch_elements=4, batch_bytes=100)) == [[1, 2, 3], [4], [5, 6]]


def test_a_batch_has_no_more_elements_than_allowed(store: Store) -> None:
    store.worker()
    store.copy_job(store.user(), [1] * 7)
    assert numbers(store.claim(batches=2, batch_elements=3)) == [[1, 2, 3], [4, 5, 6]]
    assert numbers(store.claim(batches=2, batch_elements=3)) == [[7]]
    assert store.claim() == []


def test_a_claim_has_no_more_elements_than_allowed(store: Store) -> None:
    store.worker()
    store.copy_job(store.user(), [1] * 7)
    assert numbers(store.claim(batches=4, batch_elements=3, elements=4)) == [[1, 2, 3], [4]]


def test_a_batch_is_of_one_type(store: Store) -> None:
    store.worker()
    directory = NewElement(JobType.MKDIR, "/src/d", "/dst/d", is_directory=True)
    store.copy_job(store.user(), [1, directory, 1, directory])
    taken = store.claim()
    assert {batch.type: [element.id for element in batch.elements] for batch in taken} == {
        JobType.COPY: [1, 3],
        JobType.MKDIR: [2, 4],
    }


def test_small_jobs_that_are_alike_share_a_batch(store: Store) -> None:
    store.worker()
    alice, bob = store.user("alice"), store.user("bob")
    alike = [store.submit(alice).id for _ in range(5)]
    other_route = store.submit(alice, src_siteid=3).id
    other_options = store.submit(alice, options={"parents": True}).id
    other_user = store.submit(bob).id
    alike += [store.submit(alice).id for _ in range(2)]
    taken = store.claim(batch_elements=6)
    assert sorted(map(sorted, (batch.jobs for batch in taken))) == sorted(
        [alike[:6], alike[6:], [other_route], [other_options], [other_user]]
    )
    for batch in taken:
        assert [batch.job_of(element) for element in batch.elements] == [
            store.job(element.job_id) for element in batch.elements
        ]
    store.settle(done(*taken))
    assert {store.job(number).status for number in (*alike, other_route, other_user)} == {JobStatus.DONE}


def test_batches_of_small_jobs_are_as_large_as_those_of_a_large_job(store: Store) -> None:
    store.worker()
    user = store.user()
    for _ in range(700):
        store.submit(user)
    # The share of each is of all that waits, not of the jobs that a claim locks.
    taken = store.claim(batches=3, batch_elements=100, batch_sizes={}, sharers=8, types=WORK_LANE)
    assert list(map(len, numbers(taken))) == [FIRST_BATCH_SIZE] * 3
    assert len({job for batch in taken for job in batch.jobs}) == 3 * FIRST_BATCH_SIZE


def test_a_batch_may_be_larger_where_other_users_have_work_for_the_other_agents(store: Store) -> None:
    store.worker()
    store.copy_job(store.user("dave"), [1] * 160)
    # Elements that are not due are not claimed for any user.
    store.settle(ended(JobStatus.SUBMITTED, *store.claim(), not_before=START + timedelta(hours=1)))
    store.copy_job(store.user("alice"), [1] * 160)
    assert list(map(len, numbers(store.claim(batches=1, sharers=8)))) == [20]
    for name in ("bob", "carol"):
        store.copy_job(store.user(name), [1] * 160)
    assert list(map(len, numbers(store.claim(batches=1, sharers=8)))) == [54]


def test_a_batch_takes_the_rest_of_one_job_and_the_beginning_of_the_next(store: Store) -> None:
    store.worker()
    user = store.user()
    first, second = store.copy_job(user, [1] * 5), store.copy_job(user, [1] * 9)
    taken = store.claim(batches=3, batch_elements=4)
    assert [(element.job_id, element.id) for batch in taken for element in batch.elements] == [
        *((first.id, number) for number in range(1, 6)),
        *((second.id, number) for number in range(1, 8)),
    ]
    assert (store.job(first.id).counters.running, store.job(second.id).counters.running) == (5, 7)


def test_listings_never_share(store: Store) -> None:
    store.worker()
    user = store.user()
    wanted = [[store.submit(user, JobType.COPY).id] for _ in range(3)]
    assert [list(batch.jobs) for batch in store.claim(types=LIST_LANE)] == wanted


def test_a_job_of_other_types_is_not_forgotten_behind_a_full_batch(store: Store) -> None:
    store.worker()
    user = store.user()
    directory = NewElement(JobType.MKDIR, "/src/d", "/dst/d", is_directory=True)
    first, second = store.copy_job(user, [1, 1]), store.copy_job(user, [directory])
    taken = store.claim()
    assert [(batch.type, list(batch.jobs)) for batch in taken] == [
        (JobType.COPY, [first.id]),
        (JobType.MKDIR, [second.id]),
    ]


def test_batches_are_of_the_size_of_their_kind_and_leave_something_for_others(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1] * 200)
    sizes = {work_kind(job): 40}
    assert list(map(len, numbers(store.claim(batches=2, batch_sizes=sizes)))) == [40, 40]
    assert list(map(len, numbers(store.claim(batches=1, batch_sizes={})))) == [FIRST_BATCH_SIZE]
    assert list(map(len, numbers(store.claim(batches=2, batch_sizes=sizes, sharers=2)))) == [28, 16]


def test_what_agents_die_of_is_handed_out_alone(store: Store) -> None:
    store.worker()
    store.copy_job(store.user(), [1] * 4)
    crashed = AttemptFailure(FailureScope.SERVICE, FailureCode.CRASHED, "signal 11")
    for _ in range(2):
        (batch,) = store.claim()
        assert len(batch.elements) == 4
        store.settle(ended(JobStatus.SUBMITTED, batch, failure=crashed, counts=False))
    assert numbers(store.claim()) == [[1], [2], [3], [4]]


def test_what_is_put_off_waits_for_its_time_and_holds_nothing_up(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1] * 3)
    (batch,) = store.claim(batch_elements=1, batches=1)
    later = store.now + timedelta(seconds=30)
    store.settle(ended(JobStatus.SUBMITTED, batch, failure=BROKEN, not_before=later))
    assert store.element(job.id, 1).not_before == later
    assert numbers(store.claim()) == [[2, 3]]
    assert store.claim() == []
    assert store.run(claim_queries.next_due, store.now) == later
    store.pass_time(30)
    (again,) = store.claim()
    assert [(element.id, element.attempts) for element in again.elements] == [(1, 2)]


def test_nothing_due_is_known(store: Store) -> None:
    user = store.user()
    assert store.run(claim_queries.next_due, store.now) is None
    store.submit(user)
    assert store.run(claim_queries.next_due, store.now) == store.now


def test_elements_can_run_during_the_listing(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.COPY)
    (listing,) = store.claim()
    assert store.run(results.add_elements, "w", token_of(listing), [NewElement(JobType.COPY, "/src/a", "/dst/a", 3)])
    (files,) = store.claim()
    store.settle(done(files))
    # The counters say that all but the listing is done: the job is not final.
    assert store.job(job.id).status is JobStatus.RUNNING
    assert store.run(results.add_elements, "w", token_of(listing), [NewElement(JobType.COPY, "/src/b", "/dst/b", 4)])
    store.settle(done(listing))
    assert store.job(job.id).status is JobStatus.RUNNING
    store.settle(done(*store.claim()))
    final = store.job(job.id)
    assert (final.status, final.bytes_total, final.bytes_done) == (JobStatus.DONE, 7, 7)


def directory(path: str, phase: int) -> NewElement:
    return NewElement(JobType.REMOVE, path, is_directory=True, phase=phase)


def test_directories_go_after_all_that_is_in_them(store: Store) -> None:
    store.worker()
    job = store.remove_job(store.user(), [directory("/src", 10), directory("/src/d", 9), 1, 1])
    (files,) = store.claim()
    assert [element.id for element in files.elements] == [3, 4]
    assert store.claim() == []
    first, second = done(files)
    store.settle([first])
    assert store.claim() == []
    store.settle([second])
    (inner,) = store.claim()
    assert [element.src_filepath for element in inner.elements] == ["/src/d"]
    assert store.claim() == []
    store.settle(done(inner))
    (outer,) = store.claim()
    assert [element.src_filepath for element in outer.elements] == ["/src"]
    store.settle(done(outer))
    assert store.job(job.id).status is JobStatus.DONE


def test_directories_wait_for_the_listing(store: Store) -> None:
    store.worker()
    store.submit(store.user(), JobType.REMOVE)
    (listing,) = store.claim()
    new = [NewElement(JobType.REMOVE, "/src/a"), directory("/src/d", 9)]
    assert store.run(results.add_elements, "w", token_of(listing), new)
    store.settle(done(*store.claim()))
    assert store.claim() == []
    store.settle(done(listing))
    assert numbers(store.claim()) == [[2]]


def test_directories_wait_for_a_listing_that_is_put_off(store: Store) -> None:
    store.worker()
    store.submit(store.user(), JobType.REMOVE)
    (listing,) = store.claim()
    assert store.run(results.add_elements, "w", token_of(listing), [directory("/src/d", 9)])
    later = store.now + timedelta(seconds=30)
    store.settle(ended(JobStatus.SUBMITTED, listing, failure=BROKEN, not_before=later))
    assert store.claim() == []
    store.pass_time(30)
    (again,) = store.claim()
    store.settle(done(again))
    assert numbers(store.claim()) == [[1]]


def test_directories_wait_for_what_is_put_off_or_held(store: Store) -> None:
    user = store.user()
    store.worker()
    store.remove_job(user, [1, 1, directory("/src", 9)])
    (files,) = store.claim()
    later = store.now + timedelta(seconds=30)
    store.settle(
        [
            verdict(token_of(files, 0), JobStatus.SUBMITTED, failure=BROKEN, not_before=later),
            verdict(token_of(files, 1), JobStatus.HELD, failure=EXPIRED, counts=False),
        ]
    )
    assert store.claim() == []
    store.pass_time(30)
    store.settle(done(*store.claim()))
    assert store.claim() == []
    assert store.run(held_elements.resume_held, user, store.now).count == 1
    store.settle(done(*store.claim()))
    assert numbers(store.claim()) == [[3]]


def test_directories_stay_where_the_listing_failed(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.REMOVE)
    (listing,) = store.claim()
    new = [NewElement(JobType.REMOVE, "/src/a"), directory("/src/d", 9)]
    assert store.run(results.add_elements, "w", token_of(listing), new)
    store.settle(ended(JobStatus.FAILED, listing, failure=BROKEN))
    store.settle(done(*store.claim()))
    record = store.job(job.id)
    assert record.status is JobStatus.FAILED
    assert [element.status for element in store.elements(job.id)] == [
        JobStatus.FAILED,
        JobStatus.DONE,
        JobStatus.CANCELLED,
    ]
    # A retry lists again, and the directory waits for it.
    store.run(job_changes.retry, job.id, store.now)
    (again,) = store.claim()
    assert again.type is JobType.LIST
    store.settle(done(again))
    store.settle(done(*store.claim()))
    assert store.job(job.id).status is JobStatus.DONE


def test_a_cancelled_job_is_not_claimed(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1] * 3)
    store.run(job_changes.cancel, job.id, START)
    assert store.claim() == []
    assert store.run(claim_queries.next_due, store.now) is None

"""Jobs that wait for others: what is released or cancelled, in which state of which job; and deadlines."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.jobs import CancelCode, JobRecord, NewElement, Predecessors
from pdm.workqueue.domain.sites import Actor, NewSite
from pdm.workqueue.store import chains, job_changes, selected_retries, sites
from pdm.workqueue.store.chains import NoPredecessorError
from pdm.workqueue.store.selected_retries import RetrySelection
from tests.store.stores import LIST_LANE, Store, done, ended


def chained(store: Store, *after: int, any_end: bool = False, type_: JobType = JobType.MKDIR) -> JobRecord:
    """A job that waits for others."""
    user = store.user()
    job = store.submit(user, type_, after=Predecessors(after, any_end))
    return store.run(chains.begin_waiting, job, store.now)


def end(store: Store, job_id: int, status: JobStatus = JobStatus.DONE) -> None:
    """Claim a job of one element, and end it."""
    (batch,) = store.claim(batches=1, batch_elements=1)
    assert batch.job.id == job_id
    store.settle(done(batch) if status is JobStatus.DONE else ended(status, batch))


def release(store: Store, job_id: int) -> bool:
    """Tell those that wait for a job; returns whether there is work."""
    return store.run(chains.release, job_id, store.now).has_work


@pytest.mark.parametrize("type_", [JobType.MKDIR, JobType.COPY])
def test_a_job_begins_when_all_it_waits_for_are_done(store: Store, type_: JobType) -> None:
    store.worker()
    first, second = store.submit(store.user()), store.submit(store.user())
    waiting = chained(store, second.id, first.id, type_=type_)
    assert store.job(first.id).is_awaited
    assert not store.job(waiting.id).is_awaited
    batches = store.claim(batch_elements=1) + store.claim(types=LIST_LANE)
    assert {batch.job.id for batch in batches} == {first.id, second.id}
    store.settle(done(batches[0]))
    assert not release(store, batches[0].job.id)
    assert store.claim() == []
    assert [job.id for job in store.run(chains.awaited_jobs, waiting.id)] == [batches[1].job.id]
    store.settle(done(batches[1]))
    assert release(store, batches[1].job.id)
    assert [batch.job.id for batch in store.claim()] == [waiting.id]
    assert not release(store, batches[1].job.id)


@pytest.mark.parametrize("any_end", [False, True])
@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.CANCELLED])
def test_a_job_is_cancelled_if_one_that_it_waits_for_fails(store: Store, status: JobStatus, any_end: bool) -> None:
    store.worker()
    first = store.submit(store.user())
    other = store.submit(store.user(), priority=9)
    waiting = chained(store, first.id, other.id, any_end=any_end)
    last = chained(store, waiting.id)
    if status is JobStatus.CANCELLED:
        store.run(job_changes.cancel, first.id, store.now)
    else:
        end(store, first.id, status)
    assert store.run(chains.ended_predecessors) == [first.id]
    assert not release(store, first.id)
    if any_end:
        assert store.job(waiting.id).status is JobStatus.SUBMITTED
        end(store, other.id)
        assert release(store, other.id)
        return
    found = store.job(waiting.id)
    assert (found.status, found.cancel_requested, found.finished_at) == (JobStatus.CANCELLED, True, store.now)
    assert found.cancel_reason is not None
    assert found.cancel_reason.code is CancelCode.PREDECESSOR
    assert f"job {first.id}, " in found.cancel_reason.message
    assert f"ended {status.name}" in found.cancel_reason.message
    # Nothing is left of what it waited for; and what waits for it is told as well.
    assert store.run(chains.awaited_jobs, waiting.id) == []
    assert store.run(chains.ended_predecessors) == [waiting.id]
    release(store, waiting.id)
    assert store.job(last.id).status is JobStatus.CANCELLED
    assert store.run(chains.ended_predecessors) == []
    for job in (first, waiting, last):
        assert store.recount(job.id) == store.job(job.id).counters


def test_what_has_ended_before_is_looked_at_at_once(store: Store) -> None:
    store.worker()
    good, bad = store.submit(store.user()), store.submit(store.user(), priority=6)
    end(store, good.id)
    end(store, bad.id, JobStatus.FAILED)
    cancelled = chained(store, good.id, bad.id)
    assert cancelled.status is JobStatus.CANCELLED
    ready = [chained(store, good.id), chained(store, good.id, bad.id, any_end=True)]
    assert store.run(chains.ended_predecessors) == []
    assert {number for batch in store.claim() for number in batch.jobs} == {job.id for job in ready}


def test_only_older_jobs_of_the_same_user_can_be_waited_for(store: Store) -> None:
    own, foreign = store.submit(store.user()), store.submit(store.user("bob"))
    with pytest.raises(NoPredecessorError, match=f"there is no job {foreign.id}") as caught:
        chained(store, own.id, foreign.id)
    assert caught.value.job_id == foreign.id
    for number in (999, store.submit(store.user()).id + 2):
        # The second is the number that the new job itself would have.
        with pytest.raises(NoPredecessorError):
            chained(store, number)


def test_a_failed_job_that_is_retried_in_time_is_waited_for_again(store: Store) -> None:
    """Its daemon was killed before it had told."""
    store.worker()
    first = store.submit(store.user())
    waiting = chained(store, first.id)
    end(store, first.id, JobStatus.FAILED)
    store.run(job_changes.retry, first.id, store.now)
    assert not release(store, first.id)
    assert store.job(waiting.id).status is JobStatus.SUBMITTED
    end(store, first.id)
    assert release(store, first.id)


def test_a_waiting_job_is_cancelled_at_once_and_waits_again_after_a_retry(store: Store) -> None:
    store.worker()
    first = store.submit(store.user())
    waiting = chained(store, first.id)
    assert store.run(job_changes.cancel, waiting.id, store.now).status is JobStatus.CANCELLED
    assert store.job(waiting.id).cancel_reason is None
    record, count = store.run(job_changes.retry, waiting.id, store.now)
    assert count == 1
    store.run(chains.begin_waiting, record, store.now)
    assert [batch.job.id for batch in store.claim()] == [first.id]
    # Cancelled once more: what it waited for ends, and leaves it alone.
    store.run(job_changes.cancel, waiting.id, store.now)
    store.run(job_changes.retry, first.id, store.now)
    assert not release(store, first.id)
    assert store.job(waiting.id).status is JobStatus.CANCELLED


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("ends", ["before", "during", "after"])
def test_a_large_job_that_waits_is_retried_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch, selected: bool, ends: str
) -> None:
    """`ends`: when the job that it waits for ends, before the retry, during or after it."""
    for module in (job_changes, selected_retries):
        monkeypatch.setattr(module, "CHANGED_AT_ONCE", 2)
    store.worker()
    first = store.submit(store.user(), priority=0)
    files = [NewElement(JobType.COPY, f"/src/{number}", f"/dst/{number}", size=1) for number in range(5)]
    job = store.submit(store.user(), JobType.COPY, first=files[0], more=files[1:], after=Predecessors([first.id]))
    store.run(chains.begin_waiting, job, store.now)
    store.run(job_changes.cancel, job.id, store.now)
    while store.run(job_changes.continue_change, job.id, store.now):
        pass
    assert store.job(job.id).status is JobStatus.CANCELLED
    if ends == "before":
        end(store, first.id)

    selection = RetrySelection()
    if selected:
        record = store.run(selected_retries.retry_selected, job.id, store.now, selection).job
    else:
        record, _count = store.run(job_changes.retry, job.id, store.now)
    store.run(chains.begin_waiting, record, store.now)
    if ends == "during":
        end(store, first.id)
        store.run(chains.release, first.id, store.now)
    if ends != "after":
        assert store.claim() == []
    while (
        store.run(selected_retries.continue_retry, job.id, store.now, selection)
        if selected
        else store.run(job_changes.continue_change, job.id, store.now)
    ):
        pass
    assert store.job(job.id).counters.submitted == 5
    assert store.recount(job.id) == store.job(job.id).counters
    if ends == "after":
        end(store, first.id)
        assert store.claim() == []
        assert release(store, first.id)
    (batch,) = store.claim()
    assert (batch.job.id, len(batch.elements)) == (job.id, 5)


def test_of_jobs_that_end_at_the_same_time_the_last_one_releases(store: Store) -> None:
    store.worker()
    ends = [store.submit(store.user()) for _ in range(4)]
    waiting = chained(store, *(job.id for job in ends))
    batches = {batch.job.id: batch for batch in store.claim(batch_elements=1)}
    barrier = threading.Barrier(len(ends))
    released: list[bool] = []

    def settle_and_tell(job_id: int) -> None:
        store.settle(done(batches[job_id]))
        barrier.wait()
        released.append(release(store, job_id))

    threads = [threading.Thread(target=settle_and_tell, args=(job.id,)) for job in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(released) == [False, False, False, True]
    assert [batch.job.id for batch in store.claim()] == [waiting.id]


def test_many_jobs_that_wait_for_one_are_told_in_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "RELEASED_AT_ONCE", 2)
    monkeypatch.setattr(chains, "_WAITING_FOR", chains._WAITING_FOR.limit(2))
    store.worker()
    first = store.submit(store.user())
    waiting = {chained(store, first.id).id for _ in range(3)}
    end(store, first.id)
    assert store.run(chains.release, first.id, store.now).more
    assert not store.run(chains.release, first.id, store.now).more
    assert {number for batch in store.claim() for number in batch.jobs} == waiting


def test_a_site_that_a_waiting_job_needs_stays(store: Store) -> None:
    user = store.user()
    by = Actor(user, "/DC=test/CN=alice")
    new = NewSite(
        owner_id=user,
        public=False,
        name="needed",
        description="",
        default_folder="~",
        endpoints={JobProtocol.DUMMY: ("dummy://needed",)},
        limit_in=None,
        limit_out=None,
        authorities="",
        myproxy=None,
    )
    site = store.run(sites.create, new, by, store.now)
    first = store.submit(user)
    job = store.submit(user, src_siteid=site.id, after=Predecessors([first.id]))
    store.run(chains.begin_waiting, job, store.now)
    with pytest.raises(sites.SiteInUseError, match="1 jobs"):
        store.run(sites.remove, site.id, by, store.now)
    store.run(job_changes.cancel, job.id, store.now)
    store.run(sites.remove, site.id, by, store.now)


def test_a_job_is_cancelled_at_its_deadline(store: Store) -> None:
    store.worker()
    deadline = store.now + timedelta(seconds=10)
    waiting = store.submit(store.user(), deadline=deadline)
    later = store.submit(store.user(), deadline=deadline + timedelta(hours=1))
    ended_before = store.submit(store.user(), deadline=deadline, priority=0)
    end(store, ended_before.id)
    assert store.run(job_changes.next_deadline) == deadline
    store.pass_time(9.9)
    assert store.run(job_changes.cancel_overdue, store.now) == []
    store.pass_time(0.1)
    (cancelled,) = store.run(job_changes.cancel_overdue, store.now)
    assert (cancelled.id, cancelled.status) == (waiting.id, JobStatus.CANCELLED)
    assert store.job(waiting.id).cancel_reason == cancelled.cancel_reason
    assert cancelled.cancel_reason is not None
    assert cancelled.cancel_reason.code is CancelCode.DEADLINE
    assert store.run(job_changes.next_deadline) == deadline + timedelta(hours=1)
    # A retry is a new request: a deadline that is over does not end it at once, another one stays.
    record, _ = store.run(job_changes.retry, waiting.id, store.now)
    assert (record.deadline, record.cancel_reason) == (None, None)
    assert store.job(waiting.id) == record
    store.run(job_changes.cancel, later.id, store.now)
    assert store.run(job_changes.next_deadline) is None
    assert store.run(job_changes.retry, later.id, store.now)[0].deadline == later.deadline
    assert store.run(job_changes.next_deadline) == later.deadline


def test_what_runs_at_the_deadline_is_cancelled_when_it_ends(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), deadline=store.now + timedelta(seconds=1))
    (batch,) = store.claim()
    store.pass_time(2)
    (overdue,) = store.run(job_changes.cancel_overdue, store.now)
    assert (overdue.status, overdue.cancel_requested) == (JobStatus.RUNNING, True)
    assert store.run(job_changes.cancel_overdue, store.now) == []
    store.settle(ended(JobStatus.SUBMITTED, batch))
    found = store.job(job.id)
    assert found.status is JobStatus.CANCELLED
    assert found.cancel_reason == overdue.cancel_reason

"""Elements that are HELD while a site is polled: set aside, visited by one daemon, resumed, done, failed, withdrawn."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from attrs import evolve

from pdm.workqueue.domain.credentials import ALL_SITES
from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.holds import HOLDS, MOST_IN_WAIT, Wait, WaitKind, WaitPhase
from pdm.workqueue.domain.jobs import ClaimToken, JobRecord, NewElement, Predecessors
from pdm.workqueue.store import chains, held_elements, job_changes, jobs, retention, wait_visits, waits
from pdm.workqueue.store.first_claims import FirstClaim, add_and_claim
from pdm.workqueue.store.records import wait_elements
from pdm.workqueue.store.records import waits as waits_table
from pdm.workqueue.store.wait_visits import WaitVisit
from tests.store.stores import LIST_LANE, Store, done, ended
from tests.support.records import new_job

LEASE_S = 30.0
LOST = AttemptFailure(FailureScope.SOURCE, FailureCode.LOST, "it is lost")


def staged(store: Store, files: int, **options: Any) -> JobRecord:
    """A COPY that stages so many files, and an empty directory; its listing is done."""
    new = [NewElement(JobType.COPY, f"/a/{n}", f"/b/{n}", 1) for n in range(files)]
    new.append(NewElement(JobType.MKDIR, "/a/d", "/b/d", is_directory=True))
    return store.copy_job(store.user(), new, options={"stage": True, **options})


def take(store: Store, worker: str = "w", most: int = 10) -> list[Wait]:
    return store.run(wait_visits.take_due, worker, {}, most, most, LEASE_S, store.now)


def gathered(store: Store) -> list[Wait]:
    """The waits that the elements of all jobs are split into, taken by a daemon."""
    store.pass_time(2)
    deadline = store.now + timedelta(days=1)
    for gatherer in take(store):
        assert gatherer.phase is WaitPhase.GATHER
        assert store.run(wait_visits.split, gatherer, deadline, store.now)
    return take(store)


def settle(store: Store, wait: Wait, **found: Any) -> JobRecord | None:
    visit = WaitVisit(wait=wait, due_at=store.now + timedelta(seconds=10), **found)
    return store.run(wait_visits.settle_visit, visit, store.now)


def count_rows(store: Store) -> tuple[int, int]:
    def counts(session: Any) -> tuple[int, int]:
        found = [session.scalar(sa.select(sa.func.count()).select_from(t)) for t in (waits_table, wait_elements)]
        return found[0], found[1]

    return store.run(counts)


def test_staged_files_are_held_and_resumed(store: Store) -> None:
    store.worker()
    job = staged(store, 3)
    counters = store.job(job.id).counters
    assert (counters.held, counters.submitted) == (3, 1)
    assert store.element(job.id, 1).failure == HOLDS[WaitKind.STAGE]
    # The directory needs nothing.
    (batch,) = store.claim()
    assert [one.type for one in batch.elements] == [JobType.MKDIR]
    store.settle(done(batch))
    assert store.job(job.id).status is JobStatus.HELD
    (wait,) = gathered(store)
    assert (wait.phase, wait.site_id, wait.kind) == (WaitPhase.LOOK, 1, WaitKind.STAGE)
    assert [one.path for one in store.run(wait_visits.members, wait)] == ["/a/0", "/a/1", "/a/2"]
    wait = evolve(wait, phase=WaitPhase.POLL, request="r")
    assert settle(store, wait, resumed=[1, 2], ready=[2], failed={3: LOST}) is None
    (batch,) = store.claim()
    assert [(one.id, one.attempts, one.failure) for one in batch.elements] == [(1, 1, None), (2, 1, None)]
    store.settle(done(batch))
    after = store.job(job.id)
    assert (after.status, after.counters.done, after.counters.failed) == (JobStatus.FAILED, 4, 1)
    store.pass_time(11)
    (wait,) = take(store)
    assert (wait.phase, wait.request) == (WaitPhase.POLL, "r")
    # The one that was on disk already left the wait at once.
    assert [(one.id, one.ready, one.status) for one in store.run(wait_visits.members, wait)] == [
        (2, True, JobStatus.DONE),
        (3, False, JobStatus.FAILED),
    ]
    settle(store, wait, left=[2, 3])
    assert count_rows(store) == (0, 0)


def test_a_wait_is_visited_by_one_daemon(store: Store) -> None:
    store.worker("w")
    store.worker("v")
    staged(store, 2)
    (wait,) = gathered(store)
    assert take(store, "v") == []
    assert store.run(wait_visits.next_due, [], store.now) is None
    # The lease ends: another daemon visits it, and what the first one finds later is not written.
    store.pass_time(1)
    if store.engine.dialect.name == "postgresql":
        with store.engine.begin() as connection:
            connection.execute(sa.update(waits_table).values(leased_until=store.now))
    else:
        store.pass_time(LEASE_S)
    (again,) = take(store, "v")
    assert (again.id, again.turn) == (wait.id, wait.turn + 1)
    assert not store.run(wait_visits.begin_request, wait)
    assert settle(store, wait, resumed=[1]) is None
    assert store.element(wait.job_id, 1).status is JobStatus.HELD
    assert store.run(wait_visits.begin_request, again)
    # An announced request is known after a crash.
    settle(store, evolve(again, phase=WaitPhase.UNSURE), resumed=[1])
    store.pass_time(11)
    assert [one.phase for one in take(store, "v")] == [WaitPhase.UNSURE]


def test_many_files_become_several_waits_and_a_site_gets_a_few_visits(store: Store) -> None:
    store.worker()
    job = staged(store, 2 * MOST_IN_WAIT + 1)
    store.pass_time(2)
    (gatherer,) = take(store)
    assert store.run(wait_visits.split, gatherer, store.now + timedelta(days=1), store.now)
    assert len(store.run(wait_visits.take_due, "w", {}, 2, 10, LEASE_S, store.now)) == 2
    assert store.run(wait_visits.take_due, "w", {1: 0}, 2, 10, LEASE_S, store.now) == []
    assert store.run(wait_visits.next_due, [1], store.now) is None
    (last,) = store.run(wait_visits.take_due, "w", {1: 1}, 2, 10, LEASE_S, store.now)
    assert [one.id for one in store.run(wait_visits.members, last)] == [2 * MOST_IN_WAIT + 1]
    assert store.job(job.id).counters.held == 2 * MOST_IN_WAIT + 1


def test_a_new_credential_resumes_no_element_that_waits_for_tape(store: Store) -> None:
    store.worker()
    job = staged(store, 2)
    for after in ((0, -1), (job.id, 1)):
        resumed = store.run(held_elements.resume_held, job.user_id, store.now, ALL_SITES, frozenset(JobProtocol), after)
        assert resumed.count == 0
    assert store.job(job.id).counters.held == 2


def test_cancel_and_retry(store: Store) -> None:
    store.worker()
    job = staged(store, 2)
    (wait,) = gathered(store)
    settle(store, evolve(wait, phase=WaitPhase.POLL, request="r"), resumed=[1], ready=[1])
    store.settle(done(*store.claim()))
    assert store.run(job_changes.cancel, job.id, store.now).status is JobStatus.CANCELLED
    # It is visited at once, and withdrawn.
    (wait,) = take(store)
    assert [(one.id, one.status) for one in store.run(wait_visits.members, wait)] == [
        (1, JobStatus.DONE),
        (2, JobStatus.CANCELLED),
    ]
    # What was cancelled is staged again; the earlier request has nothing to do with it any more.
    store.run(job_changes.retry, job.id, store.now)
    assert (store.element(job.id, 2).status, store.job(job.id).status) == (JobStatus.HELD, JobStatus.HELD)
    settle(store, wait, left=[1, 2], resumed=[2])
    assert store.element(job.id, 2).status is JobStatus.HELD
    (new,) = gathered(store)
    assert [one.id for one in store.run(wait_visits.members, new)] == [2]


def test_a_copy_is_done_once_it_is_archived(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [5, 7], options={"archive": True, "move": True})
    (batch,) = store.claim()
    store.settle(done(batch))
    held = store.job(job.id)
    assert (held.status, held.counters.held, held.bytes_done) == (JobStatus.HELD, 2, 0)
    assert store.element(job.id, 1).failure == HOLDS[WaitKind.ARCHIVE]
    attempt = store.run(jobs.fetch_attempt, job.id, 1, 1)
    assert attempt is not None and attempt.status is JobStatus.DONE
    # Nothing of it is claimed again, and no source is removed.
    assert store.claim() == [] and held.counters.elements == 3
    (wait,) = gathered(store)
    assert (wait.phase, wait.site_id) == (WaitPhase.POLL, 2)
    assert [one.path for one in store.run(wait_visits.members, wait)] == [
        store.element(job.id, 1).dst_filepath,
        store.element(job.id, 2).dst_filepath,
    ]
    settle(store, wait, done=[1], failed={2: LOST})
    after = store.job(job.id)
    assert (after.counters.done, after.counters.failed, after.bytes_done) == (2, 1, 5)
    # Only the source of what is on tape is removed.
    (batch,) = store.claim()
    assert [one.type for one in batch.elements] == [JobType.REMOVE]
    assert count_rows(store) == (1, 1)


def test_an_archived_copy_of_a_cancelled_job(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [5], options={"archive": True})
    batches = store.claim()
    store.run(job_changes.cancel, job.id, store.now)
    store.settle(done(*batches))
    assert (store.job(job.id).status, count_rows(store)) == (JobStatus.CANCELLED, (0, 0))


def test_items_are_held_until_predecessors_have_ended(store: Store) -> None:
    store.worker()
    user = store.user()
    first = store.submit(user)
    items = [NewElement(JobType.COPY, f"/a/{n}", f"/b/{n}", 1) for n in range(2)]
    new = new_job(
        user,
        JobType.COPY,
        options={"stage": True, "items": 2},
        first=items[0],
        more=items[1:],
        after=Predecessors((first.id,)),
    )

    def register(session: Any) -> JobRecord:
        submitted = chains.begin_waiting(session, jobs.submit(session, new, None, store.now), store.now)
        return waits.hold_items(session, submitted, new, store.now)

    job = store.run(register)
    assert (job.status, job.counters.held) == (JobStatus.HELD, 2)
    store.pass_time(2)
    (gatherer,) = take(store)
    assert not store.run(wait_visits.split, gatherer, store.now, store.now)
    (batch,) = store.claim()
    store.settle(done(batch))
    store.run(chains.release, first.id, store.now)
    store.pass_time(10)
    (wait,) = gathered(store)
    settle(store, wait, resumed=[0, 1])
    assert [len(batch.elements) for batch in store.claim()] == [2]


def test_elements_that_a_site_drops_become_another_wait(store: Store) -> None:
    store.worker()
    job = staged(store, 3)
    (wait,) = gathered(store)
    settle(store, evolve(wait, phase=WaitPhase.POLL, request="r"), dropped=[2, 3], polls_of_dropped=4)
    assert take(store) == []
    store.pass_time(11)
    (new,) = [one for one in take(store) if one.id != wait.id]
    assert (new.phase, new.request, new.polls, new.deadline) == (WaitPhase.LOOK, None, 4, wait.deadline)
    assert [one.id for one in store.run(wait_visits.members, new)] == [2, 3]
    found = store.run(wait_visits.summaries, job.id)
    assert [(one.kind, one.requests, one.message) for one in found] == [(WaitKind.STAGE, 1, None)]


def test_waits_are_purged_with_their_job(store: Store) -> None:
    store.worker()
    job = staged(store, 2)
    gathered(store)
    store.run(job_changes.cancel, job.id, store.now)
    assert count_rows(store) == (1, 2)
    store.pass_time(1)
    old = store.run(retention.ended_jobs, store.now, None, 10)
    assert store.run(retention.purge, old, store.now, store.now) == [job.id]
    while store.run(retention.remove_rows, 1000).more:
        pass
    assert count_rows(store) == (0, 0)


@pytest.mark.parametrize("option", ["stage", "archive"])
def test_a_dry_run_waits_for_nothing(store: Store, option: str) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1], options={option: True, "dry_run": True})
    assert store.job(job.id).counters.held == 0
    store.settle(done(*store.claim()))
    assert store.job(job.id).status is JobStatus.DONE
    assert count_rows(store) == (0, 0)


def test_a_listing_does_not_claim_a_file_that_is_staged(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.COPY, options={"stage": True})
    (listing,) = store.claim(types=LIST_LANE)
    token = ClaimToken(job.id, 0, 1)
    new = [NewElement(JobType.COPY, "/a", "/b", 1)]
    added, batch = store.run(add_and_claim, "w", token, new, FirstClaim("w", store.now))
    assert added and batch is None
    store.settle(ended(JobStatus.DONE, listing))
    assert store.job(job.id).counters.held == 1

"""Jobs that a person holds: nothing of them is claimed, whatever becomes of their elements; and a job's own limit."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.holds import HoldBy, JobEdit, JobHold
from pdm.workqueue.domain.jobs import JobRecord, NewElement, Predecessors
from pdm.workqueue.domain.notifications import EventKind
from pdm.workqueue.domain.sites import Actor
from pdm.workqueue.store import (
    chains,
    events,
    first_claims,
    held_elements,
    holds,
    job_changes,
    job_settings,
    leases,
    queue,
    results,
    users,
)
from pdm.workqueue.store.first_claims import FirstClaim
from pdm.workqueue.store.holds import OperatorHoldError
from tests.store.stores import BROKEN, EXPIRED, LIST_LANE, MISSING, WORK_LANE, Store, done, ended, name_of, token_of

_ALICE, _OPERATOR = "/DC=test/CN=alice", "/DC=test/CN=operator"


def _actor(store: Store) -> Actor:
    return Actor(store.user(), _ALICE)


def hold(store: Store, job_id: int, by: HoldBy = HoldBy.OWNER, until: datetime | None = None) -> JobRecord:
    subject = _ALICE if by is HoldBy.OWNER else _OPERATOR
    new = JobHold(by=by, subject=subject, message="disk is full", since=store.now, until=until)
    return store.run(holds.hold, job_id, new, _actor(store))


def resume(store: Store, job_id: int, by: HoldBy = HoldBy.OWNER) -> JobRecord:
    return store.run(holds.resume, job_id, by, _actor(store), store.now)


def claimed(store: Store, job_id: int, **limits: Any) -> int:
    """Elements of a job that a claim takes; nothing else is there to claim."""
    batches = store.claim(**limits)
    assert all(batch.job.id == job_id for batch in batches)
    return sum(len(batch.elements) for batch in batches)


def told(store: Store, job_id: int) -> list[tuple[str, Any]]:
    """The events of a job beside changes of its status, each with who is behind it."""
    found = store.run(events.events_after, 0, 100, job=job_id)
    return [(event.kind.value, event.data.get("by")) for event in found if event.kind is not EventKind.JOB]


def test_a_held_job_is_claimed_once_it_is_resumed(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 2, 3])
    held = hold(store, job.id)
    assert (held.status, held.hold and held.hold.message) == (JobStatus.HELD, "disk is full")
    assert store.job(job.id) == held
    other = store.submit(store.user("bob"))
    assert [batch.job.id for batch in store.claim()] == [other.id], "it does not block others"
    assert resume(store, job.id).status is JobStatus.RUNNING
    assert claimed(store, job.id) == 3
    assert told(store, job.id) == [("held", "owner"), ("resumed", "owner")]
    actions = [(each.action, each.target, each.details) for each in store.run(users.page_audit, 0, 10)]
    assert actions == [("job.hold", f"job {job.id}", "disk is full"), ("job.resume", f"job {job.id}", "")]


def test_what_runs_ends_by_itself_and_is_not_tried_again_before_the_resumption(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 2, 3, 4])
    first, second = store.claim(batches=2, batch_elements=1)
    assert hold(store, job.id).status is JobStatus.RUNNING
    store.settle(done(first))
    assert store.job(job.id).status is JobStatus.RUNNING
    store.settle(ended(JobStatus.SUBMITTED, second, failure=BROKEN))
    assert store.job(job.id).status is JobStatus.HELD
    assert claimed(store, job.id) == 0
    resume(store, job.id)
    assert claimed(store, job.id) == 3


def test_a_job_that_ends_while_it_is_held_is_not_held_any_more(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1])
    (batch,) = store.claim()
    hold(store, job.id)
    store.settle(done(batch))
    found = store.job(job.id)
    assert (found.status, found.hold) == (JobStatus.DONE, None)
    assert told(store, job.id) == [("held", "owner")]
    assert hold(store, job.id) == found, "one that has ended is not changed"


def test_a_listing_that_runs_adds_elements_of_which_none_is_claimed(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.COPY)
    (batch,) = store.claim(types=LIST_LANE)
    hold(store, job.id)
    new = [NewElement(JobType.COPY, "/a", "/b", size=1)]
    added, batch_of_new = store.run(first_claims.add_and_claim, "w", token_of(batch), new, FirstClaim("w", store.now))
    assert (added, batch_of_new) == (True, None)
    store.settle(done(batch))
    assert store.job(job.id).status is JobStatus.HELD
    assert claimed(store, job.id) == 0
    resume(store, job.id)
    assert claimed(store, job.id) == 1


def test_a_listing_that_waits_is_held_too(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.COPY)
    assert hold(store, job.id).status is JobStatus.HELD
    assert claimed(store, job.id) == 0
    assert resume(store, job.id).status is JobStatus.SUBMITTED
    (batch,) = store.claim()
    store.settle(ended(JobStatus.SUBMITTED, batch, failure=BROKEN, not_before=store.now + timedelta(seconds=60)))
    hold(store, job.id)
    resume(store, job.id)
    assert claimed(store, job.id) == 0, "its pause is not shorter"
    store.pass_time(60)
    assert store.run(leases.renew, "w", store.now, 60.0) is not None
    assert claimed(store, job.id) == 1


def test_a_daemon_that_dies_leaves_it_held(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 2])
    store.claim()
    hold(store, job.id)
    store.pass_time(100)
    store.worker("other")
    assert store.run(leases.release_expired, store.now) == 2
    assert store.job(job.id).status is JobStatus.HELD
    assert claimed(store, job.id, worker="other") == 0
    resume(store, job.id)
    assert claimed(store, job.id, worker="other") == 2


def test_it_can_be_cancelled_and_retried(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 2])
    hold(store, job.id)
    cancelled = store.run(job_changes.cancel, job.id, store.now)
    assert (cancelled.status, cancelled.hold) == (JobStatus.CANCELLED, None)
    assert told(store, job.id) == [("held", "owner")]
    assert hold(store, job.id) == store.job(job.id)
    store.run(job_changes.retry, job.id, store.now)
    assert claimed(store, job.id) == 2


def test_a_retry_of_a_held_job_begins_once_it_is_resumed(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 2])
    first, second = store.claim(batches=2, batch_elements=1)
    store.settle(ended(JobStatus.FAILED, first, failure=MISSING))
    hold(store, job.id)
    store.run(job_changes.retry, job.id, store.now)
    store.settle(done(second))
    assert store.job(job.id).status is JobStatus.HELD
    assert claimed(store, job.id) == 0
    resume(store, job.id)
    assert claimed(store, job.id) == 1


def test_a_large_retry_is_put_back_while_it_is_held(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_changes, "CHANGED_AT_ONCE", 2)
    store.worker()
    job = store.copy_job(store.user(), [1] * 5)
    store.settle(ended(JobStatus.FAILED, *store.claim(), failure=MISSING))
    store.run(job_changes.retry, job.id, store.now)
    hold(store, job.id)
    resume(store, job.id)
    assert claimed(store, job.id) == 0, "not before all is put back"
    hold(store, job.id)
    assert store.run(job_changes.unfinished_changes) == [job.id]
    while store.run(job_changes.continue_change, job.id, store.now):
        pass
    assert (store.job(job.id).counters.submitted, claimed(store, job.id)) == (5, 0)
    resume(store, job.id)
    assert claimed(store, job.id) == 5


def test_a_job_that_waits_for_another_goes_on_waiting(store: Store) -> None:
    store.worker()
    first = store.submit(store.user())
    second = store.submit(store.user(), after=Predecessors([first.id]))
    store.run(chains.begin_waiting, second, store.now)
    hold(store, second.id)
    resume(store, second.id)
    (batch,) = store.claim()
    assert batch.job.id == first.id
    hold(store, second.id)
    store.settle(done(batch))
    store.run(chains.release, first.id, store.now)
    assert claimed(store, second.id) == 0
    resume(store, second.id)
    assert claimed(store, second.id) == 1


def test_a_new_credential_does_not_resume_it(store: Store) -> None:
    store.worker()
    user = store.user()
    job = store.copy_job(user, [1, 2])
    one, two = store.claim(batches=2, batch_elements=1)
    store.settle(ended(JobStatus.HELD, one, two, failure=EXPIRED))
    hold(store, job.id)
    assert store.run(held_elements.resume_held, user, store.now).count == 2
    assert store.job(job.id).status is JobStatus.HELD
    assert claimed(store, job.id) == 0
    resume(store, job.id)
    assert claimed(store, job.id) == 2
    assert told(store, job.id) == [("held", "service"), ("held", "owner"), ("resumed", "service"), ("resumed", "owner")]


def test_it_is_resumed_at_its_end(store: Store) -> None:
    store.worker()
    job = store.submit(store.user())
    forever = store.submit(store.user())
    until = store.now + timedelta(seconds=50)
    hold(store, job.id, until=until)
    hold(store, forever.id)
    assert store.run(holds.next_end) == until
    assert store.run(holds.resume_ended, store.now) == 0
    store.pass_time(50)
    assert store.run(holds.resume_ended, store.now) == 1
    assert store.run(holds.resume_ended, store.now) == 0
    assert store.run(holds.next_end) is None
    assert claimed(store, job.id) == 1
    assert told(store, job.id) == [("held", "owner"), ("resumed", "service")]
    assert store.job(forever.id).status is JobStatus.HELD


def test_the_hold_of_an_operator_is_ended_by_operators_only(store: Store) -> None:
    job = store.submit(store.user())
    hold(store, job.id)
    hold(store, job.id, HoldBy.OPERATOR)
    for act in (hold, resume):
        with pytest.raises(OperatorHoldError, match=r"an operator .*operator.* holds it, .*: disk is full"):
            act(store, job.id)
    assert resume(store, job.id, HoldBy.OPERATOR).hold is None
    hold(store, job.id)
    assert resume(store, job.id, HoldBy.OPERATOR).hold is None


def test_it_is_among_the_jobs_that_have_not_ended(store: Store) -> None:
    store.worker()
    user = store.user()
    job = store.submit(user)
    hold(store, job.id)
    (share,) = store.run(queue.queue_shares)
    assert (share.user_id, share.jobs, share.waiting) == (user, 1, 1)


def test_a_phase_that_has_ended_while_it_was_held_opens_the_next_one(store: Store) -> None:
    store.worker()
    files = [NewElement(JobType.REMOVE, "/src/a"), NewElement(JobType.REMOVE, "/src", is_directory=True, phase=1)]
    job = store.remove_job(store.user(), files)
    (batch,) = store.claim()
    hold(store, job.id)
    store.settle(done(batch))
    assert claimed(store, job.id) == 0
    resume(store, job.id)
    assert claimed(store, job.id) == 1


# -- limits of a job's own


def change(store: Store, job_id: int, **changes: Any) -> JobRecord:
    return store.run(job_settings.change, job_id, JobEdit(**changes), store.now)


def test_no_more_elements_run_at_once_than_the_job_allows(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1] * 7)
    assert change(store, job.id, max_active=3).max_active == 3
    first = store.claim()
    assert sum(len(batch.elements) for batch in first) == 3
    store.worker("other")
    assert claimed(store, job.id, worker="other") == 0
    store.settle(done(first[0]))
    again = store.claim("other")
    assert sum(len(batch.elements) for batch in again) == 3
    change(store, job.id, max_active=None)
    assert claimed(store, job.id) == 1


def test_a_listing_that_runs_does_not_count(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.COPY)
    change(store, job.id, max_active=1)
    (listing,) = store.claim()
    new = [NewElement(JobType.COPY, f"/{n}", f"/c{n}", size=1) for n in range(2)]
    assert store.run(results.add_elements, "w", token_of(listing), new)
    assert claimed(store, job.id) == 1
    assert claimed(store, job.id) == 0
    store.settle(done(listing))
    assert claimed(store, job.id) == 0


def test_a_job_at_its_limit_does_not_hide_others_and_goes_on_after_a_crash(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1])
    change(store, job.id, max_active=1)
    assert claimed(store, job.id) == 1
    others = [store.submit(store.user()).id for _ in range(3)]
    assert {batch.job.id for batch in store.claim(batches=1, types=WORK_LANE, batch_elements=1)} == {others[0]}
    store.pass_time(100)
    store.worker("other")
    store.run(leases.release_expired, store.now)
    assert name_of("other")
    found = [batch for batch in store.claim("other") if batch.job.id == job.id]
    assert sum(len(batch.elements) for batch in found) == 1


def test_a_priority_counts_from_the_next_claim_on(store: Store) -> None:
    store.worker()
    first, second = store.submit(store.user()), store.submit(store.user())
    assert change(store, second.id, priority=0).priority == 0
    (batch,) = store.claim(batches=1, batch_elements=1)
    assert batch.job.id == second.id
    store.settle(done(batch))
    assert change(store, second.id, priority=3) == store.job(second.id), "one that has ended is not changed"
    assert store.job(second.id).priority == 0
    assert first.priority == store.job(first.id).priority

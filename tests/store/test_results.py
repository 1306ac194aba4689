"""Results of attempts: what they change, and what they must not change."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ClaimToken, Counters, LogSpan, NewElement
from pdm.workqueue.store import (
    attempt_states,
    claim_queries,
    credentials,
    held_elements,
    job_changes,
    jobs,
    leases,
    leftover_files,
    results,
)
from pdm.workqueue.store.credentials import EncryptedCredential
from pdm.workqueue.store.records import attempt_row, attempts, elements, workers
from tests.store.stores import BROKEN, EXPIRED, MISSING, START, Store, done, ended, name_of, token_of
from tests.support.records import verdict


def test_what_is_done_is_counted_and_kept(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [100, 200])
    (batch,) = store.claim()
    proofs = [
        verdict(token_of(batch, 0), transferred=100, checksum="ADLER32:00000001"),
        verdict(token_of(batch, 1), transferred=200, checksum="ADLER32:00000002", not_preserved="mode"),
    ]
    settled = store.settle(proofs)
    record = store.job(job.id)
    assert settled == results.SettleOutcome((), (record,))
    assert (record.status, record.finished_at) == (JobStatus.DONE, store.now)
    assert record.counters == Counters(elements=3, done=3) == store.recount(job.id)
    assert (record.bytes_total, record.bytes_done) == (300, 300)
    element = store.element(job.id, 2)
    assert (element.status, element.transferred, element.elapsed_s, element.checksum, element.failure) == (
        JobStatus.DONE,
        200,
        2.0,
        "ADLER32:00000002",
        None,
    )
    assert (store.element(job.id, 1).not_preserved, element.not_preserved) == (None, "mode")
    attempt = store.run(jobs.fetch_attempt, job.id, 2, 1)
    assert attempt is not None
    assert (attempt.status, attempt.worker, attempt.transferred) == (JobStatus.DONE, name_of(), 200)
    assert (attempt.started_at, attempt.ended_at) == (START, START + timedelta(seconds=2))
    assert store.run(jobs.attempts, job.id, 2) == [attempt]
    assert store.run(jobs.fetch_attempt, job.id, 2, 2) is None


def test_an_attempt_knows_where_its_log_is(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1, 1])
    (batch,) = store.claim()
    spans = [LogSpan(0, 300), LogSpan(2**40, 2**33), None]
    first, second, third = batch.elements
    store.settle(
        [
            verdict(batch.token(first), log=spans[0]),
            verdict(batch.token(second), JobStatus.FAILED, failure=MISSING, log=spans[1]),
            verdict(batch.token(third), JobStatus.FAILED, failure=MISSING),
        ]
    )
    found = [store.run(jobs.fetch_attempt, job.id, element.id, 1) for element in batch.elements]
    assert [attempt.log for attempt in found if attempt is not None] == spans


def test_an_attempt_that_succeeds_has_no_row_of_its_own(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1, 1], max_tries=3)
    (batch,) = store.claim()
    first, second, third = (batch.token(element) for element in batch.elements)
    store.settle(
        [
            verdict(first, log=LogSpan(0, 9), counts=False),
            verdict(second, already_there=True, transferred=1, leftover=True),
            verdict(third, JobStatus.SUBMITTED, failure=BROKEN, log=LogSpan(9, 5)),
        ]
    )
    store.pass_time(10)
    (batch,) = store.claim()
    later = verdict(batch.token(batch.elements[0]), at=store.now, log=LogSpan(2**40, 7))
    store.settle([later])
    assert store.settle([later]).repeated == {later.token}
    assert store.settle([later._replace(ended_at=store.now)]).repeated == frozenset()
    assert [(e.status, e.lost, e.already_there) for e in store.elements(job.id, after=0)] == [
        (JobStatus.DONE, 1, False),
        (JobStatus.DONE, 0, True),
        (JobStatus.DONE, 0, False),
    ]
    assert [element.id for element, _ in store.run(leftover_files.leftovers, 10)] == [second.element_id]
    kept = [store.run(jobs.attempts, job.id, number) for number in (1, 2, 3)]
    assert [[(one.attempt, one.status, one.failure, one.log) for one in those] for those in kept] == [
        [(1, JobStatus.DONE, None, LogSpan(0, 9))],
        [(1, JobStatus.DONE, None, None)],
        [(1, JobStatus.FAILED, BROKEN, LogSpan(9, 5)), (2, JobStatus.DONE, None, LogSpan(2**40, 7))],
    ]
    last = kept[2][1]
    assert (last.started_at, last.ended_at, last.worker) == (store.now, store.now + timedelta(seconds=2), name_of())
    assert _stored_attempts(store) == [(third.job_id, third.element_id, 1)]


def _stored_attempts(store: Store) -> list[tuple[int, int, int]]:
    columns = (attempts.c.job_id, attempts.c.element_id, attempts.c.attempt)
    return [tuple(row) for row in store.run(lambda session: session.execute(sa.select(*columns)).all())]


def test_an_attempt_that_succeeded_under_an_earlier_version_has_a_row(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1])
    store.settle(done(*store.claim()))
    of_first = (elements.c.job_id == job.id, elements.c.id == 1)
    earlier = {"worker_id": None, "started_at": None}
    (before,) = store.run(jobs.attempts, job.id, 1)
    worker_id = sa.select(workers.c.id).where(workers.c.name == before.worker).scalar_subquery()
    row = attempt_row(ClaimToken(job.id, 1, 1), JobStatus.DONE, before.started_at, before.ended_at, 0, 1, None)
    store.run(lambda session: session.execute(sa.update(elements).where(*of_first).values(earlier)))
    store.run(lambda session: session.execute(sa.insert(attempts).values({**row, "worker_id": worker_id})))
    assert store.run(jobs.attempts, job.id, 1) == [before]
    assert store.run(jobs.fetch_attempt, job.id, 2, 1) is not None
    again = verdict(ClaimToken(job.id, 1, 1), transferred=1)
    assert store.settle([again]).repeated == {again.token}


def test_latest_attempts_and_their_workers(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1, 1])
    (batch,) = store.claim()
    first, second, third = batch.elements
    assert store.run(jobs.worker_of_element, job.id, first.id) == name_of()
    store.settle(
        [
            verdict(batch.token(first), JobStatus.SUBMITTED, failure=BROKEN, log=LogSpan(0, 10)),
            verdict(batch.token(second), log=LogSpan(10, 10)),
        ]
    )
    assert store.run(jobs.worker_of_element, job.id, first.id) is None
    assert store.run(jobs.worker_of_element, job.id, second.id) is None
    (again,) = store.claim()
    store.settle(done(again))
    latest = store.run(jobs.latest_attempts, job.id, 1, 3)
    assert {number: (found.attempt, found.status) for number, found in latest.items()} == {
        first.id: (2, JobStatus.DONE),
        second.id: (1, JobStatus.DONE),
    }
    assert store.run(jobs.latest_attempts, job.id, third.id, third.id) == {}
    assert [found.attempt for found in store.run(jobs.attempts, job.id, first.id)] == [1, 2]


def test_one_failure_fails_the_job_when_all_has_ended(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1])
    (batch,) = store.claim()
    first, second = batch.elements
    assert store.settle([verdict(batch.token(first), JobStatus.FAILED, failure=MISSING)]).finished == ()
    assert store.job(job.id).status is JobStatus.RUNNING
    (finished,) = store.settle([verdict(batch.token(second))]).finished
    assert (finished.status, finished.id) == (JobStatus.FAILED, job.id)
    assert store.element(job.id, first.id).failure == MISSING
    (attempt,) = store.run(jobs.attempts, job.id, first.id)
    assert (attempt.status, attempt.failure) == (JobStatus.FAILED, MISSING)


def test_a_failed_listing_fails_the_job(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.COPY)
    (listing,) = store.claim()
    (finished,) = store.settle(ended(JobStatus.FAILED, listing, failure=MISSING, skipped=4)).finished
    assert (finished.id, finished.status, finished.skipped) == (job.id, JobStatus.FAILED, 4)


def test_a_retry_is_a_new_attempt(store: Store) -> None:
    store.worker()
    job = store.submit(store.user())
    (first,) = store.claim()
    store.settle(ended(JobStatus.SUBMITTED, first, failure=BROKEN))
    waiting = store.element(job.id, 0)
    assert (waiting.status, waiting.attempts, waiting.lost, waiting.failure) == (JobStatus.SUBMITTED, 1, 0, BROKEN)
    # It has begun: it is not SUBMITTED again, although nothing runs.
    assert store.job(job.id).status is JobStatus.RUNNING
    (second,) = store.claim()
    assert token_of(second) == ClaimToken(job.id, 0, 2)
    store.settle(done(second))
    assert store.element(job.id, 0).failure is None
    assert [attempt.status for attempt in store.run(jobs.attempts, job.id, 0)] == [JobStatus.FAILED, JobStatus.DONE]


def test_an_attempt_that_does_not_count_is_known_as_lost(store: Store) -> None:
    store.worker()
    job = store.submit(store.user())
    (batch,) = store.claim()
    store.settle(ended(JobStatus.SUBMITTED, batch, counts=False))
    element = store.element(job.id, 0)
    assert (element.attempts, element.lost) == (1, 1)
    # It was broken off, not failed.
    (attempt,) = store.run(jobs.attempts, job.id, 0)
    assert (attempt.status, attempt.failure) == (JobStatus.CANCELLED, None)


@pytest.mark.parametrize("wrong", ["another attempt", "another worker", "settled before", "no such element"])
def test_a_verdict_without_its_claim_writes_nothing(store: Store, wrong: str) -> None:
    store.worker()
    store.worker("other")
    job = store.submit(store.user())
    (batch,) = store.claim()
    token, worker = token_of(batch), "w"
    if wrong == "another attempt":
        token = ClaimToken(job.id, 0, 2)
    elif wrong == "another worker":
        worker = "other"
    elif wrong == "settled before":
        store.settle(ended(JobStatus.FAILED, batch, failure=MISSING))
    else:
        token = ClaimToken(job.id + 1, 0, 1)
    before = store.job(job.id), store.element(job.id, 0), store.run(jobs.attempts, job.id, 0)
    assert store.settle([verdict(token)], worker) == results.SettleOutcome((token,), ())
    assert (store.job(job.id), store.element(job.id, 0), store.run(jobs.attempts, job.id, 0)) == before


def test_a_verdict_counts_once_in_one_call(store: Store) -> None:
    store.worker()
    job = store.submit(store.user())
    (batch,) = store.claim()
    token = token_of(batch)
    settled = store.settle([verdict(token), verdict(token, JobStatus.FAILED, failure=MISSING)])
    assert settled.lost == (token,)
    assert store.job(job.id).counters == Counters(elements=1, done=1)


def test_a_late_verdict_does_not_take_the_place_of_the_live_one(store: Store) -> None:
    store.worker()
    job = store.submit(store.user())
    (first,) = store.claim()
    store.worker()
    (second,) = store.claim()
    settled = store.settle([verdict(token_of(first), JobStatus.FAILED, failure=MISSING), verdict(token_of(second))])
    assert settled.lost == (token_of(first),)
    assert store.job(job.id).status is JobStatus.DONE


def test_lost_and_live_verdicts_of_many_jobs_go_together(store: Store) -> None:
    user = store.user()
    store.worker()
    for _ in range(5):
        store.submit(user)
    store.copy_job(user, [1, 2, 3])
    batches = store.claim()
    verdicts = done(*batches)
    gone = verdicts.pop(3)
    store.settle([gone])
    settled = store.settle([*verdicts, gone])
    assert settled.lost == (gone.token,)
    assert len(settled.finished) == 5
    assert {store.job(batch.job.id).status for batch in batches} == {JobStatus.DONE}


def test_held_elements_wait_for_their_user(store: Store) -> None:
    alice, bob = store.user("alice"), store.user("bob")
    store.worker()
    mine, listing, others = store.submit(alice), store.submit(alice, JobType.LIST), store.submit(bob)
    store.settle(ended(JobStatus.HELD, *store.claim(), failure=EXPIRED, counts=False))
    assert {store.job(job.id).status for job in (mine, listing, others)} == {JobStatus.HELD}
    assert store.job(mine.id).counters == Counters(elements=1, held=1)
    assert store.claim() == []
    assert store.run(held_elements.resume_held, alice, store.now) == held_elements.Resumed(2, None)
    assert store.run(held_elements.resume_held, alice, store.now).count == 0
    assert {batch.job.id for batch in store.claim()} == {mine.id, listing.id}
    assert store.job(others.id).status is JobStatus.HELD
    assert store.element(mine.id, 0).lost == 1


def test_many_held_elements_go_on_in_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_elements, "CHANGED_AT_ONCE", 4)
    monkeypatch.setattr(held_elements, "_HELD_JOBS_AT_ONCE", 3)
    user = store.user()
    store.worker()
    held = [store.copy_job(user, [1] * count) for count in (6, 1, 5)] + [store.submit(user) for _ in range(4)]
    elsewhere = [store.submit(user, src_siteid=7) for _ in range(5)]

    def hold() -> None:
        while batches := store.claim(batches=50):
            store.settle(ended(JobStatus.HELD, *batches, failure=EXPIRED, counts=False))

    hold()
    counts: list[int] = []
    after: tuple[int, int] | None = (0, -1)
    while after is not None:
        resumed = store.run(held_elements.resume_held, user, store.now, 1, None, after)
        counts.append(resumed.count)
        after = resumed.after
        # Each is resumed once, although the credential is no good and all of it is held again at once.
        hold()
    assert (sum(counts), max(counts)) == (16, 4)
    assert {store.element(job.id, 0).attempts for job in elsewhere} == {1}
    assert {store.element(job.id, 0).attempts for job in held[3:]} == {2}
    assert {store.element(held[0].id, number).attempts for number in range(1, 7)} == {2}
    assert all(store.job(job.id).counters == store.recount(job.id) for job in held)


def test_users_held_in_spite_of_a_new_credential_are_found(store: Store) -> None:
    """The daemon that took it had no time to let all go on."""
    user, other = store.user(), store.user("bob")
    store.worker()
    jobs_ = [store.submit(each, protocol=JobProtocol.GRIDFTP) for each in (user, other)]
    store.settle(ended(JobStatus.HELD, *store.claim(), failure=EXPIRED, counts=False))

    def found(kind: CredentialKind = CredentialKind.PROXY) -> list[int]:
        return store.run(held_elements.held_despite_credential, kind, [JobProtocol.GRIDFTP])

    assert found() == []
    store.pass_time(100)
    for kind, site in ((CredentialKind.TOKEN, 0), (CredentialKind.PROXY, 99)):
        store.run(credentials.put, user, EncryptedCredential(kind, "a", None, b"", site), store.now)
    assert found() == []
    assert found(CredentialKind.SSH_KEY) == []
    store.run(credentials.put, user, EncryptedCredential(CredentialKind.PROXY, "a", None, b""), store.now)
    assert found() == [user]
    assert store.run(held_elements.held_despite_credential, CredentialKind.PROXY, [JobProtocol.SSH]) == []
    # What was tried with it and is held again is not found again.
    store.pass_time(10)
    store.run(held_elements.resume_held, user, store.now)
    store.settle(ended(JobStatus.HELD, *store.claim(), failure=EXPIRED, counts=False))
    assert found() == []
    assert store.job(jobs_[1].id).status is JobStatus.HELD


def test_many_later_phases_are_closed_in_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_changes, "CLOSED_AT_ONCE", 3)
    store.worker()
    job = store.submit(store.user(), JobType.REMOVE)
    (listing,) = store.claim()
    directories = [NewElement(JobType.REMOVE, f"d{number}", None, phase=1) for number in range(8)]
    file = NewElement(JobType.REMOVE, "f", None)
    assert store.run(results.add_elements, "w", token_of(listing), [*directories, file])
    store.settle(ended(JobStatus.FAILED, listing, failure=MISSING))
    assert store.job(job.id).counters.cancelled == 3
    (batch,) = store.claim()
    assert [element.src_filepath for element in batch.elements] == ["f"]
    assert store.job(job.id).counters.cancelled == 6
    # Claims that find nothing else close the rest, whichever daemon is there to do it.
    for cancelled in (8, 8):
        assert store.claim() == []
        assert store.job(job.id).counters.cancelled == cancelled
        assert store.job(job.id).counters == store.recount(job.id)
    store.settle(done(batch))
    assert store.job(job.id).status is JobStatus.FAILED
    assert store.run(claim_queries.next_due, store.now) is None


def test_a_job_is_held_only_when_nothing_else_can_move(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1])
    (batch,) = store.claim()
    store.settle([verdict(token_of(batch, 0), JobStatus.HELD, failure=EXPIRED)])
    assert store.job(job.id).status is JobStatus.RUNNING
    store.settle([verdict(token_of(batch, 1))])
    assert store.job(job.id).status is JobStatus.HELD


def test_what_tools_say_fits_every_database(store: Store) -> None:
    store.worker()
    job = store.submit(store.user())
    (batch,) = store.claim()
    hostile = AttemptFailure(FailureScope.SOURCE, FailureCode.UNKNOWN, "nul \0 half \ud800 " + "x" * 5000)
    store.settle(ended(JobStatus.FAILED, batch, failure=hostile, transferred=2**70, checksum="\0"))
    failure = store.element(job.id, 0).failure
    assert failure is not None
    assert failure.message.startswith("nul ␀ half ? xxx")
    assert len(failure.message) == 2000
    assert store.element(job.id, 0).transferred == 2**63 - 1


def test_sums_of_hostile_sizes_stop_at_the_largest_number(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [2**63 - 1, 2**63 - 1])
    store.settle(done(*store.claim()))
    record = store.job(job.id)
    assert (record.bytes_total, record.bytes_done) == (2**63 - 1, 2**63 - 1)


def test_leftovers_are_found_until_they_are_cleared(store: Store) -> None:
    store.worker()
    job = store.copy_job(store.user(), [1, 1, 1])
    (batch,) = store.claim()
    store.settle(
        [
            verdict(token_of(batch, 0), JobStatus.FAILED, failure=MISSING, leftover=True),
            verdict(token_of(batch, 1), JobStatus.SUBMITTED, failure=BROKEN, leftover=True),
            verdict(token_of(batch, 2), JobStatus.FAILED, failure=MISSING),
        ]
    )
    ((element, owner),) = store.run(leftover_files.leftovers, 10)
    assert (element, owner) == (store.element(job.id, 1), store.job(job.id))
    store.run(leftover_files.clear_leftovers, [ClaimToken(job.id, 1, 7)])
    assert len(store.run(leftover_files.leftovers, 10)) == 1
    store.run(leftover_files.clear_leftovers, [ClaimToken(job.id, 1, 1)])
    assert store.run(leftover_files.leftovers, 10) == []
    # A next attempt that fails does not make the first one's file go away; one that succeeds has removed it.
    (again,) = store.claim()
    store.settle(ended(JobStatus.FAILED, again, failure=MISSING))
    assert [element.id for element, _ in store.run(leftover_files.leftovers, 10)] == [2]
    store.run(job_changes.retry, job.id, store.now)
    store.settle(done(*store.claim()))
    assert store.run(leftover_files.leftovers, 10) == []


def test_leftovers_of_several_elements_are_cleared_at_once_and_read_page_by_page(store: Store) -> None:
    store.worker()
    user = store.user()
    job = store.copy_job(user, [1, 1, 1])
    store.settle(ended(JobStatus.FAILED, *store.claim(), failure=MISSING, leftover=True))
    first = store.run(leftover_files.leftovers, 2)
    assert [element.id for element, _ in first] == [1, 2]
    assert [element.id for element, _ in store.run(leftover_files.leftovers, 2, (job.id, 2))] == [3]
    assert store.run(leftover_files.leftovers, 2, (job.id, 3)) == []
    store.run(leftover_files.clear_leftovers, [ClaimToken(job.id, element.id, 1) for element, _ in first])
    assert [element.id for element, _ in store.run(leftover_files.leftovers, 10)] == [3]


def test_only_the_running_listing_extends_its_job(store: Store) -> None:
    store.worker()
    store.worker("other")
    job = store.submit(store.user(), JobType.COPY)
    (listing,) = store.claim()
    token = token_of(listing)
    new = [NewElement(JobType.COPY, "/src/a", "/dst/a", 5)]
    assert not store.run(results.add_elements, "other", token, new)
    assert not store.run(results.add_elements, "w", ClaimToken(job.id, 0, 2), new)
    assert not store.run(results.add_elements, "w", ClaimToken(job.id + 1, 0, 1), new)
    assert store.run(results.add_elements, "w", token, new)
    assert store.run(results.add_elements, "w", token, [])
    store.settle(done(listing))
    assert not store.run(results.add_elements, "w", token, new)
    assert [element.id for element in store.elements(job.id)] == [0, 1]
    assert store.run(results.known_paths, job.id) == {results.path_hash(JobType.COPY, "/src/a")}


def test_a_job_that_is_to_end_does_not_grow(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.COPY)
    (listing,) = store.claim()
    store.run(job_changes.cancel, job.id, store.now)
    assert not store.run(results.add_elements, "w", token_of(listing), [NewElement(JobType.COPY, "/src/a", "/dst/a")])


def test_what_a_rename_found_outlives_its_daemon_and_needs_a_claim(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.RENAME)
    (batch,) = store.claim()
    found = {"source": ["file", 7, 12.5], "destination": None}
    assert batch.elements[0].found_before is None
    assert not store.run(attempt_states.record_initial_state, "w", ClaimToken(job.id, 0, 2), found)
    assert not store.run(attempt_states.record_initial_state, "another", token_of(batch), found)
    assert store.run(attempt_states.record_initial_state, "w", token_of(batch), found)
    store.run(leases.release_worker, name_of(), store.now)
    store.worker("v")
    (again,) = store.claim("v")
    assert again.elements[0].found_before == found
    # A refusal shows that it was not done.
    store.settle(ended(JobStatus.FAILED, again, failure=MISSING), "v")
    store.run(job_changes.retry, job.id, store.now)
    (last,) = store.claim("v")
    assert last.elements[0].found_before is None

"""Schedules in the database: a run is made once, whoever comes, and history is bounded."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.schedules import MOST_RUNS, NewSchedule, RunOutcome, ScheduleEdit, ScheduleRecord
from pdm.workqueue.store import schedules
from pdm.workqueue.store.idempotency import IdempotencyConflictError, IdempotencyKey
from pdm.workqueue.store.records import jobs
from pdm.workqueue.store.schedules import PlannedRun, TooManySchedulesError
from tests.store.stores import Store, done, ended
from tests.support.records import new_job

HOUR = timedelta(hours=1)


def created(store: Store, user: int, key: IdempotencyKey | None = None, **changes: Any) -> ScheduleRecord:
    new = NewSchedule(
        user_id=user,
        recurrence="every 1h",
        timezone="UTC",
        submission={"type": "MKDIR"},
        next_due=store.now + HOUR,
    )
    return store.run(schedules.create, new, key, store.now, **changes)


def made(store: Store, schedule: ScheduleRecord, planned: PlannedRun | None = None) -> schedules.MadeRun | None:
    if planned is None:
        planned = PlannedRun(new_job(schedule.user_id, schedule_id=schedule.id))
    return store.run(schedules.make_run, schedule, planned, store.now, store.now + HOUR)


def test_a_due_schedule_becomes_a_job_and_is_due_again(store: Store) -> None:
    user = store.user()
    schedule = created(store, user)
    assert store.run(schedules.due, store.now) == []
    assert store.run(schedules.next_due) == schedule.next_due
    store.pass_time(3600)
    assert store.run(schedules.due, store.now) == [schedule]
    run = made(store, schedule)
    assert run is not None and run.job is not None
    assert (run.run.outcome, run.run.job_id, run.run.due_at) == (RunOutcome.SUBMITTED, run.job.id, schedule.next_due)
    assert store.job(run.job.id).schedule_id == schedule.id
    assert store.run(schedules.next_due) == store.now + HOUR
    # As it was read before: nothing is made twice.
    assert made(store, schedule) is None
    assert store.run(schedules.runs, schedule.id) == [run.run]
    assert store.run(schedules.last_runs, [schedule.id]) == {schedule.id: run.run}


def test_several_daemons_make_one_run(store: Store) -> None:
    schedule = created(store, store.user())
    store.pass_time(3600)
    results: list[object] = []
    barrier = threading.Barrier(4)

    def make() -> None:
        barrier.wait()
        try:
            results.append(made(store, schedule))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(result).__name__ for result in results].count("MadeRun") == 1, results
    assert results.count(None) == 3, results
    assert len(store.run(schedules.runs, schedule.id)) == 1
    assert store.run(lambda session: session.scalar(sa.select(sa.func.count()).select_from(jobs))) == 1


@pytest.mark.parametrize("status", [JobStatus.DONE, JobStatus.FAILED])
def test_a_run_is_skipped_until_the_job_before_has_ended(store: Store, status: JobStatus) -> None:
    schedule = created(store, store.user())
    store.pass_time(3600)
    first = made(store, schedule)
    assert first is not None and first.job is not None
    store.pass_time(3600)
    (schedule,) = store.run(schedules.due, store.now)
    second = made(store, schedule)
    assert second is not None
    assert (second.job, second.run.outcome) == (None, RunOutcome.SKIPPED)
    assert second.run.message == f"overlap: job {first.job.id} of an earlier run has not ended"
    store.worker()
    (batch,) = store.claim()
    store.settle(done(batch) if status is JobStatus.DONE else ended(status, batch))
    store.pass_time(3600)
    (schedule,) = store.run(schedules.due, store.now)
    third = made(store, schedule)
    assert third is not None and third.run.outcome is RunOutcome.SUBMITTED
    runs = store.run(schedules.runs, schedule.id)
    assert [run.job_status for run in runs] == [JobStatus.SUBMITTED, None, status]


def test_what_cannot_be_submitted_is_noted_and_the_schedule_stays(store: Store) -> None:
    schedule = created(store, store.user())
    for planned, words in (
        (PlannedRun(None, message="site 1 is drained"), "site 1 is drained"),
        (PlannedRun(new_job(schedule.user_id), [999]), "there is no site 999"),
    ):
        store.pass_time(3600)
        (due,) = store.run(schedules.due, store.now)
        run = made(store, due, planned)
        assert run is not None
        assert (run.job, run.run.outcome, run.run.message) == (None, RunOutcome.FAILED, words)
    assert store.run(schedules.next_due) == store.now + HOUR


def edited(store: Store, schedule: ScheduleRecord, **changes: Any) -> ScheduleRecord | None:
    return store.run(schedules.edit, schedule.id, ScheduleEdit(**changes), lambda _: store.now + HOUR)


def test_a_run_that_was_planned_before_an_edit_is_not_made(store: Store) -> None:
    schedule = created(store, store.user())
    store.pass_time(3600)
    changed = edited(store, schedule, submission={"type": "RENAME"})
    assert changed is not None and changed.next_due == schedule.next_due
    assert store.run(schedules.fetch, schedule.id, None) == changed
    assert made(store, schedule) is None
    assert made(store, changed) is not None
    times = edited(store, schedule, recurrence="every 2h")
    assert times is not None
    assert (times.recurrence, times.submission, times.next_due) == ("every 2h", {"type": "RENAME"}, store.now + HOUR)


def test_a_paused_schedule_does_not_run_and_one_that_is_removed_leaves_its_jobs(store: Store) -> None:
    schedule = created(store, store.user())
    store.pass_time(3600)
    run = made(store, schedule)
    assert run is not None and run.job is not None
    paused = edited(store, schedule, paused=True)
    assert paused is not None and paused.next_due is None
    assert store.run(schedules.next_due) is None
    assert made(store, schedule) is None
    resumed = edited(store, schedule, paused=False)
    assert resumed is not None and resumed.next_due == store.now + HOUR
    store.pass_time(60)
    assert edited(store, schedule, paused=False) == resumed
    store.run(schedules.remove, schedule.id)
    assert store.run(schedules.fetch, schedule.id, None) is None
    assert store.job(run.job.id).schedule_id == schedule.id
    assert made(store, resumed) is None


def test_a_time_has_one_run_even_if_the_clock_was_set_back(store: Store) -> None:
    schedule = created(store, store.user())
    store.pass_time(3600)
    made(store, schedule)
    edited(store, schedule, paused=True)
    store.run(schedules.edit, schedule.id, ScheduleEdit(paused=False), lambda _: schedule.next_due)
    assert made(store, schedule) is None
    assert len(store.run(schedules.runs, schedule.id)) == 1
    assert store.run(schedules.next_due) == store.now + HOUR


def test_the_history_is_bounded(store: Store) -> None:
    schedule = created(store, store.user())
    for _ in range(MOST_RUNS + 3):
        store.pass_time(3600)
        (schedule,) = store.run(schedules.due, store.now)
        made(store, schedule, PlannedRun(None, message="no"))
    runs = store.run(schedules.runs, schedule.id)
    assert len(runs) == MOST_RUNS
    assert runs[0].due_at == store.now


def test_a_repeated_request_makes_one_schedule(store: Store) -> None:
    user, other = store.user(), store.user("bob")
    key = IdempotencyKey(user, "k", "body")
    first = created(store, user, key)
    assert created(store, user, key) == first
    assert created(store, other, IdempotencyKey(other, "k", "body")).id != first.id
    with pytest.raises(IdempotencyConflictError):
        created(store, user, IdempotencyKey(user, "k", "another"))
    assert [each.id for each in store.run(schedules.of_user, user)] == [first.id]
    assert store.run(schedules.fetch, first.id, other) is None


def test_a_user_has_a_limited_number(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MOST_SCHEDULES", 2)
    user = store.user()
    for _ in range(2):
        created(store, user)
    with pytest.raises(TooManySchedulesError, match="you have 2 schedules"):
        created(store, user)

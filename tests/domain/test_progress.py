"""Rates, time left and progress of jobs, as plain arithmetic."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import Counters, JobRecord
from pdm.workqueue.domain.progress import Moving, RateHistory, SmoothedRate, job_progress, listing_status, time_left
from tests.support.records import job_record

_S = JobStatus
BEGUN = datetime(2026, 11, 23, 12, tzinfo=UTC)
NOW = BEGUN + timedelta(seconds=10)


def job(
    status: JobStatus = _S.RUNNING, type_: JobType = JobType.COPY, counters: Counters | None = None, **more: Any
) -> JobRecord:
    """A COPY of ten files of 100 bytes, of which two are done and three run."""
    fields: dict[str, Any] = {
        "id": 7,
        "timestamp": BEGUN - timedelta(seconds=100),
        "counters": counters or Counters(elements=11, done=3, running=3, submitted=5),
        "bytes_total": 1000,
        "bytes_done": 200,
        "started_at": BEGUN,
    }
    return job_record(type=type_, status=status, **{**fields, **more})


def test_a_steady_rate_is_exact_from_the_first_moments_on() -> None:
    rate = SmoothedRate(100.0)
    for tick in range(1, 60_001):
        rate.add(5, 100 + tick / 1000)
        if tick in (600, 5000, 60_000):
            assert rate.at(100 + tick / 1000) == pytest.approx(5000, rel=0.01)


def test_a_rate_that_changes_is_followed_within_a_minute() -> None:
    rate = SmoothedRate(0.0)
    for tick in range(1, 601):
        rate.add(100, tick / 10)
    for tick in range(601, 1201):
        rate.add(10, tick / 10)
    assert rate.at(120.0) == pytest.approx(100, rel=0.2)


def test_rare_events_are_averaged_over_several_of_them() -> None:
    rate = SmoothedRate(0.0)
    for minute in range(1, 11):
        rate.add(1, minute * 60.0)
        told = rate.at(minute * 60.0 + 50)
        assert told is not None
        assert told == pytest.approx(1 / 60, rel=0.7), "neither a spike at an event nor nothing between two"


def test_what_stands_still_has_no_rate_after_a_while() -> None:
    rate = SmoothedRate(0.0)
    assert rate.at(100.0) is None
    rate.add(1000, 0.1)
    assert rate.at(0.2) is None, "too soon to tell"
    assert rate.at(1.0) == pytest.approx(1000, rel=0.1)
    told = rate.at(300.0)
    assert told is not None
    assert told < 0.01


def test_a_clock_that_stands_or_goes_back_is_no_fault() -> None:
    rate = SmoothedRate(10.0)
    rate.add(1, 10.0)
    rate.add(1, 9.0)
    assert rate.at(5.0) is None
    assert rate.at(12.0) == pytest.approx(1.0, rel=0.1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(0, 10**12)), max_size=50))
def test_a_rate_is_never_above_the_fastest_nor_below_nothing(steps: list[tuple[float, int]]) -> None:
    rate = SmoothedRate(0.0)
    now = 0.0
    for passed, amount in steps:
        now += passed
        rate.add(amount, now)
        told = rate.at(now)
        assert told is None or 0 <= told <= 2 * sum(amount for _, amount in steps) + 1


@pytest.mark.parametrize(
    ("bytes_left", "instant", "files_left", "files_per_second", "expected"),
    [
        (1000, 100.0, 10, 0.5, 20.0),
        (1000, 10.0, 10, 0.5, 100.0),
        (1000, 10.0, 10, None, 100.0),
        (1000, 10.0, 10, 0.0, 100.0),
        (0, None, 10, 2.0, 5.0),
        (0, None, 10, None, None),
        (1000, None, 10, 2.0, None),
        (1000, 0.0, 10, 2.0, None),
        (10**15, 0.001, 1, None, None),
        (0, 10.0, 0, 2.0, None),
    ],
)
def test_the_slower_of_two_rates_decides(
    bytes_left: int, instant: float | None, files_left: int, files_per_second: float | None, expected: float | None
) -> None:
    assert time_left(bytes_left, instant, files_left, files_per_second) == expected


def test_a_running_job() -> None:
    seen = job_progress(job(), _S.DONE, Moving(150, 65.0, 0.5), NOW)
    assert (seen.listing, seen.bytes_done, seen.bytes_moving, seen.bytes_total) == (False, 200, 150, 1000)
    assert (seen.files_done, seen.files_total) == (2, 10)
    assert (seen.instant, seen.average, seen.files_per_second, seen.elapsed) == (65.0, 35.0, 0.5, 10.0)
    assert seen.eta == 16.0, "eight files at 0.5 a second take longer than 650 bytes at 65 a second"


def test_during_the_listing_the_total_is_unknown() -> None:
    seen = job_progress(job(), _S.RUNNING, Moving(150, 65.0, 0.5), NOW)
    assert (seen.listing, seen.bytes_total, seen.files_total, seen.eta) == (True, None, None, None)
    assert (seen.bytes_done, seen.bytes_moving, seen.files_done, seen.instant) == (200, 150, 3, 65.0)


def test_a_listing_that_has_failed_for_good_adds_nothing_more() -> None:
    counters = Counters(elements=11, failed=1, done=2, running=3, submitted=5)
    seen = job_progress(job(counters=counters), _S.FAILED, None, NOW)
    assert (seen.listing, seen.files_done, seen.files_total, seen.bytes_total) == (False, 2, 10, 1000)


def test_what_another_daemon_moves_is_not_known_and_not_zero() -> None:
    seen = job_progress(job(), _S.DONE, None, NOW)
    assert (seen.bytes_moving, seen.instant, seen.files_per_second, seen.eta) == (None, None, None, None)
    assert (seen.bytes_done, seen.average) == (200, 20.0)


def test_what_moves_never_exceeds_what_there_is() -> None:
    assert job_progress(job(), _S.DONE, Moving(5000, 1.0, None), NOW).bytes_moving == 800
    assert job_progress(job(bytes_done=1000), _S.DONE, Moving(5, 1.0, None), NOW).bytes_moving == 0


@pytest.mark.parametrize("status", [_S.DONE, _S.FAILED, _S.CANCELLED])
def test_a_job_that_has_ended_has_an_average_and_no_rates(status: JobStatus) -> None:
    counters = Counters(elements=11, done=3, failed=8) if status is not _S.DONE else Counters(elements=11, done=11)
    ended = job(status, counters=counters, finished_at=BEGUN + timedelta(seconds=4))
    seen = job_progress(ended, _S.DONE, Moving(9, 9.0, 9.0), NOW)
    assert (seen.instant, seen.files_per_second, seen.eta, seen.bytes_moving) == (None, None, None, 0)
    assert (seen.elapsed, seen.average, seen.listing) == (4.0, 50.0, False)


def test_a_job_that_waits_or_is_held_or_cancelled_has_no_end_in_sight() -> None:
    waiting = job(_S.SUBMITTED, counters=Counters(elements=1, submitted=1), started_at=None, bytes_total=0)
    seen = job_progress(waiting, _S.SUBMITTED, None, NOW)
    assert (seen.listing, seen.elapsed, seen.average, seen.eta, seen.bytes_moving) == (True, None, None, None, 0)
    held = job(_S.RUNNING, counters=Counters(elements=11, done=3, running=3, held=5))
    assert job_progress(held, _S.DONE, Moving(1, 1.0, 1.0), NOW).eta is None
    assert job_progress(job(cancel_requested=True), _S.DONE, Moving(1, 1.0, 1.0), NOW).eta is None


def test_a_job_without_bytes_has_no_rate_of_them() -> None:
    removal = job(type_=JobType.REMOVE, bytes_total=0, bytes_done=0)
    seen = job_progress(removal, _S.DONE, Moving(0, 0.0, 4.0), NOW)
    assert (seen.instant, seen.average, seen.bytes_total) == (None, None, 0)
    assert (seen.files_per_second, seen.eta) == (4.0, 2.0)


def test_a_job_of_one_element_is_that_one() -> None:
    made = job(type_=JobType.MKDIR, counters=Counters(elements=1, running=1), bytes_total=0, bytes_done=0)
    seen = job_progress(made, _S.DONE, Moving(0, None, None), NOW)
    assert (seen.listing, seen.files_done, seen.files_total) == (False, 0, 1)


@pytest.mark.parametrize(
    ("status", "type_", "counters", "expected"),
    [
        (_S.SUBMITTED, JobType.COPY, Counters(elements=1, submitted=1), _S.SUBMITTED),
        (_S.RUNNING, JobType.REMOVE, Counters(elements=1, running=1), _S.RUNNING),
        (_S.DONE, JobType.COPY, Counters(elements=5, done=5), _S.DONE),
        (_S.FAILED, JobType.COPY, Counters(elements=1, failed=1), _S.FAILED),
        (_S.RUNNING, JobType.COPY, Counters(elements=3, done=1, running=2), None),
        (_S.RUNNING, JobType.MKDIR, Counters(elements=1, running=1), _S.DONE),
        (_S.RUNNING, JobType.LIST, Counters(elements=1, running=1), _S.DONE),
    ],
)
def test_numbers_may_tell_where_the_listing_stands(
    status: JobStatus, type_: JobType, counters: Counters, expected: JobStatus | None
) -> None:
    assert listing_status(job(status, type_, counters)) is expected


@given(st.lists(st.tuples(st.floats(0, 5000), st.integers(0, 1000)), max_size=60))
def test_a_history_has_all_amounts_in_a_bounded_number_of_columns(added: list[tuple[float, int]]) -> None:
    history, now_s = RateHistory(0.0), 0.0
    for pause_s, amount in added:
        now_s += pause_s
        history.add(amount, now_s)
    rates = history.rates()
    assert len(rates) <= 120
    assert sum(rates) * history.column_s == pytest.approx(sum(amount for _, amount in added))

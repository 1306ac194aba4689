"""When schedules run: intervals, cron in time zones, and what is refused."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.execution.recurrence import recurrence

_START = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)


def times(text: str, zone: str, after: datetime, count: int) -> list[str]:
    found = []
    for _ in range(count):
        following = recurrence(text, zone).after(after, _START)
        assert following is not None
        assert following.tzinfo is UTC
        found.append(f"{following:%Y-%m-%d %H:%M}")
        after = following
    return found


def test_intervals_are_counted_from_the_start() -> None:
    assert times("every 6h", "UTC", _START, 2) == ["2026-03-01 18:00", "2026-03-02 00:00"]
    assert recurrence("every  1m", "UTC").text == "every 1m"
    assert recurrence("every 1m", "UTC").after(_START + timedelta(seconds=61), _START) == _START + timedelta(minutes=2)
    # The clock was set back to before the schedule was made.
    assert recurrence("every 1d", "UTC").after(_START - timedelta(days=9), _START) == _START + timedelta(days=1)


def test_cron_runs_by_the_clock_of_its_time_zone() -> None:
    assert times("0 3 * * *", "UTC", _START, 2) == ["2026-03-02 03:00", "2026-03-03 03:00"]
    assert times("0 3 * * mon-fri", "America/New_York", _START, 1) == ["2026-03-02 08:00"]
    assert times("*/20 * * * *", "UTC", _START, 3) == ["2026-03-01 12:20", "2026-03-01 12:40", "2026-03-01 13:00"]


def test_what_the_clock_leaves_out_runs_after_the_gap() -> None:
    """In Paris, 02:00 to 03:00 is missing on 2026-03-29 (UTC + 1 becomes UTC + 2)."""
    eve = datetime(2026, 3, 28, 12, tzinfo=UTC)
    assert times("30 2 * * *", "Europe/Paris", eve, 2) == ["2026-03-29 01:00", "2026-03-30 00:30"]
    assert times("0 * * * *", "Europe/Paris", eve + timedelta(hours=12), 3) == [
        "2026-03-29 01:00",
        "2026-03-29 02:00",
        "2026-03-29 03:00",
    ]


def test_what_the_clock_shows_twice_runs_once() -> None:
    """In Paris, 02:00 to 03:00 comes twice on 2026-10-25; each hour is an hour all the same."""
    eve = datetime(2026, 10, 24, 12, tzinfo=UTC)
    assert times("30 2 * * *", "Europe/Paris", eve, 2) == ["2026-10-25 00:30", "2026-10-26 01:30"]
    assert times("30 * * * *", "Europe/Paris", eve + timedelta(hours=12), 3) == [
        "2026-10-25 00:30",
        "2026-10-25 01:30",
        "2026-10-25 02:30",
    ]


@pytest.mark.parametrize(
    ("text", "zone", "words"),
    [
        ("", "UTC", "five fields of cron"),
        ("0 3 * *", "UTC", "five fields of cron"),
        ("* * * * * *", "UTC", "five fields of cron"),
        ("60 * * * *", "UTC", "Bad minute"),
        (f"{'9' * 90} * * * *", "UTC", "five fields"),
        ("0 0 30 2 *", "UTC", "Bad day-of-month"),
        ("0 0 * 2 mon#5", "UTC", ""),
        ("0 0 31 2,4 *", "UTC", "Bad day-of-month"),
        ("every 59s", "UTC", "from every 1m"),
        ("every 0m", "UTC", "from every 1m"),
        ("every 367d", "UTC", "from every 1m"),
        ("every day", "UTC", "from every 1m"),
        ("0 3 * * *", "Europe/Nowhere", "there is no time zone 'Europe/Nowhere'"),
        ("0 3 * * *", "../../etc/passwd", "there is no time zone"),
        ("0 3 * * *", "", "there is no time zone"),
        ("0 3 * * *", "x" * 10_000, "there is no time zone"),
        ("x" * 10_000, "UTC", "five fields of cron"),
    ],
)
def test_what_is_no_recurrence_is_refused_in_words(text: str, zone: str, words: str) -> None:
    if not words:
        # In a leap year that begins as it must.
        assert recurrence(text, zone).after(_START, _START) is not None
        return
    with pytest.raises(ValueError, match=words):
        recurrence(text, zone)


_FIELD = st.text(alphabet="0123456789*/,-L#W? monjan", max_size=12)


@given(st.lists(_FIELD, min_size=5, max_size=5))
def test_any_text_is_a_recurrence_or_refused_in_bounded_time(fields: list[str]) -> None:
    began = time.process_time()
    try:
        found = recurrence(" ".join(fields), "Europe/Paris").after(_START, _START)
    except ValueError:
        pass
    else:
        assert found is None or found > _START
    assert time.process_time() - began < 1.0

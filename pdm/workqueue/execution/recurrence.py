"""When a schedule runs: cron expressions in a time zone, and intervals."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from attrs import frozen
from cronsim import CronSim, CronSimError

LONGEST_RECURRENCE, LONGEST_ZONE = 100, 64
_EVERY = re.compile(r"every ([0-9]{1,6})([mhdw])", re.ASCII)
_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_LONGEST_INTERVAL = timedelta(days=366)
_CRON_FIELDS = 5
_EXPECTED = (
    "five fields of cron are expected (minute, hour, day of the month, month, day of the week: '0 3 * * *'), or an"
    " interval such as 'every 6h' (m, h, d, w)"
)


@frozen
class Recurrence:
    """The times of a schedule.

    Args:
        text: as it was asked for.
        following: the first time after another one; both have a time zone. None if there is none.
    """

    text: str
    following: Callable[[datetime, datetime], datetime | None]

    def after(self, now: datetime, start: datetime) -> datetime | None:
        """The first time after ``now``, UTC; intervals are counted from ``start``."""
        return self.following(now, start)


@lru_cache(maxsize=1000)
def recurrence(text: str, timezone: str) -> Recurrence:
    """Read a recurrence.

    Raises:
        ValueError: it is neither a cron expression nor an interval, or the time zone does not exist.
    """
    words = " ".join(text.split())
    if len(words) > LONGEST_RECURRENCE:
        raise ValueError(_EXPECTED)
    zone = _zone(timezone)
    if words.startswith("every "):
        return Recurrence(words, _every(words))
    return Recurrence(words, _cron(words, zone))


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        if len(name) <= LONGEST_ZONE:
            return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        pass
    raise ValueError(f"there is no time zone {name[:LONGEST_ZONE]!r}: a name such as UTC or Europe/Paris is expected")


def _every(words: str) -> Callable[[datetime, datetime], datetime]:
    match = _EVERY.fullmatch(words)
    interval = timedelta() if match is None else int(match[1]) * _UNITS[match[2]]
    if not timedelta() < interval <= _LONGEST_INTERVAL:
        raise ValueError(f"{_EXPECTED}; from every 1m to every 366d")

    def following(now: datetime, start: datetime) -> datetime:
        return start + max((now - start) // interval + 1, 1) * interval

    return following


def _cron(words: str, zone: tzinfo) -> Callable[[datetime, datetime], datetime | None]:
    if len(words.split()) != _CRON_FIELDS:
        raise ValueError(_EXPECTED)

    def following(now: datetime, _start: datetime) -> datetime | None:
        found = next(CronSim(words, now.astimezone(zone)), None)
        return None if found is None else found.astimezone(UTC)

    try:
        # No expression depends on the year.
        is_ever = following(datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)) is not None
    except (CronSimError, ValueError, AssertionError) as error:
        raise ValueError(f"{_EXPECTED}; {str(error)[:100] or 'not a cron expression'}") from error
    if not is_ever:
        raise ValueError(f"there is no such day: {words!r} would never run")
    return following

"""How far a job is, how fast it goes and when it will be done: arithmetic, with the time as an argument."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime

from attrs import define, field, frozen

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import JobRecord

#: Seconds over which a rate is smoothed at least.
SMOOTHED_OVER_S = 15.0
#: Where events are rarer than that, a rate is smoothed over about so many of them.
_SMOOTHED_EVENTS = 4
#: Weight of the newest gap between two events.
_NEWEST_GAP = 0.2
#: Seconds before which a rate would be a guess.
_LEAST_SPAN_S = 0.5
#: A longer estimate says nothing.
_LONGEST_LEFT_S = 10 * 365 * 86400.0
#: Job types whose first element is a listing, from which the rest follows.
_BEGIN_WITH_LISTING = frozenset({JobType.COPY, JobType.REMOVE})


@define(eq=False)
class SmoothedRate:
    """Amounts per second, the recent ones weighing more: exponential smoothing that is exact from the first value on.

    Amounts fade with a time constant of `SMOOTHED_OVER_S`, or of a few events where these are rarer. What they are
    divided by, the time that has been watched, fades along: so a rate does not begin too low.

    Attributes:
        last_s: seconds on some clock; where it begins to watch, then of the newest event.
    """

    last_s: float
    _amount: float = 0.0
    _span_s: float = 0.0
    _gap_s: float = 0.0
    _events: int = 0

    def add(self, amount: float, now_s: float) -> None:
        """Record an amount since the last event."""
        passed_s = now_s - self.last_s
        if passed_s > 0:
            self._gap_s += _NEWEST_GAP * (passed_s - self._gap_s) if self._events else passed_s
            self._amount, self._span_s = self._faded(passed_s)
            self.last_s = now_s
        self._amount += amount
        self._events += 1

    def at(self, now_s: float) -> float | None:
        """Amount per second; None until it is known."""
        amount, span_s = self._faded(max(now_s - self.last_s, 0.0))
        return amount / span_s if self._events and span_s >= _LEAST_SPAN_S else None

    def _faded(self, passed_s: float) -> tuple[float, float]:
        """Amount and span when so many seconds more have passed."""
        over_s = max(SMOOTHED_OVER_S, _SMOOTHED_EVENTS * self._gap_s)
        kept = math.exp(-passed_s / over_s)
        return self._amount * kept, self._span_s * kept + over_s * (1 - kept)


#: Columns of a history, and seconds of one at first.
_MOST_COLUMNS, _FIRST_COLUMN_S = 120, 1.0


@define(eq=False)
class RateHistory:
    """Amounts over time in at most `_MOST_COLUMNS` columns: when they are full, each two become one.

    Attributes:
        begun_s: seconds on some clock, where the first column begins.
        column_s: seconds of a column.
    """

    begun_s: float
    column_s: float = _FIRST_COLUMN_S
    _amounts: list[float] = field(factory=list)

    def add(self, amount: float, now_s: float) -> None:
        """Record an amount; in constant time, amortized."""
        column = int((now_s - self.begun_s) / self.column_s)
        amounts = self._amounts
        if column >= len(amounts):
            while column >= _MOST_COLUMNS:
                amounts[:] = [sum(amounts[at : at + 2]) for at in range(0, len(amounts), 2)]
                self.column_s *= 2
                column //= 2
            amounts.extend([0.0] * (column + 1 - len(amounts)))
        amounts[max(column, 0)] += amount

    def rates(self) -> list[float]:
        """Amount per second of each column until the last one with an amount."""
        return [amount / self.column_s for amount in self._amounts]


@frozen
class RateColumns:
    """A rate over time, in columns of equal length.

    Attributes:
        begun_at: when the first one begins, in seconds.
        column_s: length of a column, in seconds, above 0.
    """

    begun_at: float
    column_s: float
    rates: Sequence[float]

    def at(self, timestamp: float) -> float:
        """The rate at a time; 0 before the first column and after the last one."""
        number = (timestamp - self.begun_at) / self.column_s
        return self.rates[int(number)] if 0 <= number < len(self.rates) else 0.0


def summed_rates(parts: Sequence[RateColumns]) -> RateColumns | None:
    """The sum of some rates in at most `_MOST_COLUMNS` columns; None if there are none."""
    parts = [part for part in parts if part.rates]
    if len(parts) < 2:
        return parts[0] if parts else None
    begun_at = min(part.begun_at for part in parts)
    length_s = max(part.begun_at + part.column_s * len(part.rates) for part in parts) - begun_at
    column_s = max(length_s / _MOST_COLUMNS, *(part.column_s for part in parts))
    middles = [begun_at + (number + 0.5) * column_s for number in range(math.ceil(length_s / column_s))]
    return RateColumns(begun_at, column_s, [sum(part.at(middle) for part in parts) for middle in middles])


@frozen
class Moving:
    """The running part of a job.

    Attributes:
        transferred: bytes that have moved and are not among the proven ones.
        instant: bytes/s, smoothed.
        files_per_second: elements that end, smoothed.
    """

    transferred: int
    instant: float | None
    files_per_second: float | None


@frozen
class JobProgress:
    """Progress of a job; None is unknown.

    Attributes:
        listing: whether it is still being found out how much there is to do.
        bytes_done: proven.
        bytes_total: None while it is listed.
        bytes_moving: moved, and not proven yet.
        files_done: elements that are done, without the listing.
        files_total: None while it is listed.
        instant: bytes/s now.
        average: bytes/s since the job was begun, or over all of it once it has ended.
        files_per_second: elements that end, now.
        elapsed: seconds since it was begun, until now or its end.
        eta: seconds until it is done, at the present rates.
        silent: where parts of it run whose progress is not counted: ``on node X, which does not answer``.
    """

    listing: bool
    bytes_done: int
    bytes_total: int | None
    bytes_moving: int | None
    files_done: int
    files_total: int | None
    instant: float | None
    average: float | None
    files_per_second: float | None
    elapsed: float | None
    eta: float | None
    silent: Sequence[str] = ()


def _begins_with_listing(job: JobRecord) -> bool:
    return job.type in _BEGIN_WITH_LISTING and not job.has_items


def listing_status(job: JobRecord) -> JobStatus | None:
    """State of a job's listing, if its counters show it; None if the element must be read.

    A job that begins with something else is as good as listed.
    """
    counters = job.counters
    if not _begins_with_listing(job) or job.status is JobStatus.DONE:
        return JobStatus.DONE
    if counters.elements > 1:
        return None
    return JobStatus.DONE if counters.done else job.status


def job_progress(
    job: JobRecord, listing: JobStatus, moving: Moving | None, now: datetime, silent: Sequence[str] = ()
) -> JobProgress:
    """How far a job is.

    Args:
        listing: state of its listing.
        moving: what runs of it, None where that is not known.
        silent: where parts of it run that are not in `moving`.
    """
    counters, ended = job.counters, job.status.is_final
    is_listed = listing.is_final or ended
    uncounted = 1 if _begins_with_listing(job) else 0
    files_total = counters.elements - uncounted if is_listed else None
    files_done = counters.done - (uncounted if listing is JobStatus.DONE else 0)
    if ended or not counters.running:
        # Nothing runs anywhere, so nothing moves: that is known without a board.
        transferred: int | None = 0
        instant = files_per_second = None
    elif moving is None:
        transferred = instant = files_per_second = None
    else:
        transferred = min(moving.transferred, max(job.bytes_total - job.bytes_done, 0))
        instant, files_per_second = moving.instant, moving.files_per_second
    elapsed = _elapsed(job, now)
    left = None
    if is_listed and counters.running and not counters.held and not job.cancel_requested and not silent:
        files_left = counters.submitted + counters.running
        bytes_left = max(job.bytes_total - job.bytes_done - (transferred or 0), 0)
        left = time_left(bytes_left, instant, files_left, files_per_second)
    has_bytes = job.bytes_total > 0
    # Files that were there already were not moved: they do not count in rates.
    moved = job.bytes_done - job.bytes_already_there + (transferred or 0)
    has_rate = has_bytes and (moved > 0 or not job.already_there)
    return JobProgress(
        listing=not is_listed,
        bytes_done=job.bytes_done,
        bytes_total=job.bytes_total if is_listed else None,
        bytes_moving=transferred,
        files_done=files_done,
        files_total=files_total,
        instant=instant if has_bytes else None,
        average=moved / elapsed if elapsed and has_rate else None,
        files_per_second=files_per_second,
        elapsed=elapsed,
        eta=left,
        silent=silent,
    )


def time_left(bytes_left: int, instant: float | None, files_left: int, files_per_second: float | None) -> float | None:
    """Seconds until all is done at these rates: the slower of the two decides; None if unknown.

    Large files move bytes for long without one of them ending: a rate of files that is not known yet holds nothing up.
    """
    by_bytes = bytes_left / instant if bytes_left and instant else None
    by_files = files_left / files_per_second if files_left and files_per_second else None
    if bytes_left and by_bytes is None:
        return None
    known = [seconds for seconds in (by_bytes, by_files) if seconds is not None]
    return max(known) if known and max(known) <= _LONGEST_LEFT_S else None


def _elapsed(job: JobRecord, now: datetime) -> float | None:
    if job.started_at is None:
        return None
    return max(((job.finished_at or now) - job.started_at).total_seconds(), 0.0)


@frozen
class FinishedCopy:
    """What one copy has moved: bytes, elements, and the seconds that it took."""

    bytes_moved: int
    elements: int
    seconds: float


@frozen
class RouteSpeed:
    """Speed of earlier copies of a route.

    Attributes:
        jobs: number of copies that it was taken from.
        bytes_per_second: half of all bytes were moved at least so fast.
        files_per_second: half of all elements ended at least so fast.
    """

    jobs: int
    bytes_per_second: float | None
    files_per_second: float | None

    def seconds(self, size: int, files: int) -> float | None:
        """Seconds for so many bytes and files: the slower of both decides; None if that is not known."""
        return time_left(size, self.bytes_per_second, files, self.files_per_second)


def route_speed(copies: Sequence[FinishedCopy]) -> RouteSpeed | None:
    """The speed of some copies of one route; None if there are none.

    Each copy has an average rate of bytes and one of elements, and only one of them was its limit: a copy of large
    files says nothing about files per second. So a copy counts with the bytes, or the elements, that it has moved.
    """
    timed = [copy for copy in copies if copy.seconds > 0]
    if not timed:
        return None
    return RouteSpeed(
        len(timed),
        _weighted_median((copy.bytes_moved / copy.seconds, copy.bytes_moved) for copy in timed),
        _weighted_median((copy.elements / copy.seconds, copy.elements) for copy in timed),
    )


def _weighted_median(rates: Iterable[tuple[float, int]]) -> float | None:
    """The rate that at least half of the weight reaches; None if there is no weight."""
    fastest_first = sorted(((rate, weight) for rate, weight in rates if weight > 0), reverse=True)
    total = sum(weight for _, weight in fastest_first)
    reached = 0
    for rate, weight in fastest_first:
        reached += weight
        if 2 * reached >= total:
            return rate
    return None

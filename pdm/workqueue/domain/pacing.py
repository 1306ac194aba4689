"""Adaptive limits: the number of streams of a route, and the circuit breaker of an endpoint. Times are arguments.

Streams follow additive increase, multiplicative decrease. Throughput is that of all streams of the route together:
bytes/s where files are large, elements/s where they are small. An additional stream is kept only if it adds a fair part
of what one stream should; otherwise it is removed, and the next trial waits twice as long as the last one.

The circuit breaker has three states. Closed: requests are sent. After some failures in a row it opens, and nothing is
sent for a pause. Then it is half open, and a single probe may be sent: if that works it is closed again, otherwise it
opens for a longer pause.
"""

from __future__ import annotations

import enum
from datetime import datetime, timedelta

from attrs import define, field, frozen

from pdm.workqueue.domain.failures import FailureCode

#: Codes that may mean that a route is overloaded.
ROUTE_FAILURES = frozenset({FailureCode.CONNECTION, FailureCode.TIMEOUT, FailureCode.STALLED, FailureCode.CRASHED})
#: The fewest streams of a route.
MIN_STREAMS = 1

#: Share of attempts that may fail in such a way, and how many must have.
_BAD_SHARE = 0.25
_LEAST_FAILED = 3
#: A stream more stays if it brings this part of what one of those before it did on the average.
_WORTH = 0.3
#: Below this part of what it was, throughput has fallen clearly.
_FALLEN = 0.6
#: With fewer streams busy than this part of the limit, there is not enough work to measure.
_BUSY = 0.75
#: A window ends when each stream has ended so many batches in it.
_BATCHES_A_STREAM = 2
#: The part of a batch's time that must lie in a window for it to count there.
_INSIDE = 0.75
#: Windows between two trials at first, and at most.
_FIRST_HOLD, _LONGEST_HOLD = 4, 64
#: Mean bytes of an element from which on bytes count.
_LARGE = 2**20
_BYTES, _ELEMENTS = "bytes/s", "elements/s"


@frozen
class BatchRun:
    """Result of a batch.

    Attributes:
        seconds: that it took on its stream.
        failed: how many of them with one of `ROUTE_FAILURES`.
    """

    seconds: float
    elements: int
    moved: int
    attempts: int
    failed: int


@define
class _Window:
    since: datetime
    batches: int = 0
    seconds: float = 0.0
    elements: int = 0
    moved: int = 0
    attempts: int = 0
    failed: int = 0
    # Streams times seconds, until their number last changed.
    busy: float = 0.0


@frozen
class _Speed:
    value: float
    unit: str

    def __str__(self) -> str:
        if self.unit == _BYTES:
            return f"{self.value / 1e6:.1f} MB/s"
        return f"{self.value:.1f} {self.unit}"


@define
class Pacer:
    """The limit of one route.

    Attributes:
        window_s: seconds of work between two decisions, at least.
        reason: why the limit is as it is: the latest decision, in a sentence.
    """

    limit: int
    most: int
    window_s: float
    changed_at: datetime
    reason: str = "as many as a route begins with"
    decided_at: datetime = field(init=False)
    running: int = 0
    _running_since: datetime = field(init=False)
    _window: _Window = field(init=False)
    _speed: _Speed | None = None
    # Throughput of the present limit; that of one stream less, while one more is tried.
    _here: _Speed | None = None
    _before: _Speed | None = None
    _hold: int = _FIRST_HOLD
    _try_at: datetime | None = None

    def __attrs_post_init__(self) -> None:
        self.most = max(self.most, MIN_STREAMS)
        self.limit = min(max(self.limit, MIN_STREAMS), self.most)
        self.decided_at = self._running_since = self.changed_at
        self._window = _Window(self.changed_at)

    @property
    def throughput(self) -> float | None:
        """Of the last window; None before the first has ended."""
        return None if self._speed is None else self._speed.value

    @property
    def unit(self) -> str | None:
        """Of the throughput."""
        return None if self._speed is None else self._speed.unit

    def runs(self, count: int, now: datetime) -> None:
        """Set the number of running streams."""
        self._window.busy += self.running * _seconds(max(self._running_since, self._window.since), now)
        self.running, self._running_since = count, now

    def bound(self, most: int, now: datetime) -> bool:
        """Set the maximum; returns whether the limit changed."""
        self.most = max(most, MIN_STREAMS)
        if self.limit <= self.most:
            return False
        self._move(self.most, f"the sites and the configuration allow {self.most} at most", now)
        return True

    def ended(self, run: BatchRun, now: datetime) -> bool:
        """Record a batch that has ended; returns whether the limit changed."""
        window = self._window
        if _seconds(window.since, now) < run.seconds * _INSIDE:
            # It says more about the limit before.
            return False
        window.batches += 1
        window.seconds += run.seconds
        window.elements += run.elements
        window.moved += run.moved
        window.attempts += run.attempts
        window.failed += run.failed
        before = self.limit
        if window.failed >= _LEAST_FAILED and window.failed >= _BAD_SHARE * window.attempts:
            self._failing(now)
        elif _seconds(window.since, now) >= self.window_s and window.batches >= _BATCHES_A_STREAM * self.limit:
            self._evaluate(now)
        return self.limit != before

    def _failing(self, now: datetime) -> None:
        window = self._window
        share = f"{window.failed} of {window.attempts} attempts failed by connection, time-out, stall or crash"
        self._hold, self._try_at = _FIRST_HOLD, None
        if self.limit > MIN_STREAMS:
            self._move(self.limit // 2, f"{share}: halved", now)
        else:
            self._move(MIN_STREAMS, f"{share}: there cannot be fewer", now)

    def _evaluate(self, now: datetime) -> None:
        window = self._window
        self.runs(self.running, now)
        busy = window.busy / _seconds(window.since, now)
        unit, work = (
            (_BYTES, window.moved) if window.moved >= _LARGE * window.elements else (_ELEMENTS, window.elements)
        )
        speed = self._speed = _Speed(work / window.seconds * busy if window.seconds else 0.0, unit)
        if busy < _BUSY * self.limit:
            self._keep(f"there was work for {busy:.1f} of its {self.limit} streams only", now)
        elif self._before is not None and self._before.unit == unit:
            self._evaluate_trial(speed, self._before, now)
        elif self._here is not None and self._here.unit == unit and speed.value < _FALLEN * self._here.value:
            self._fallen(speed, self._here, now)
        else:
            self._before = None
            self._here = speed
            self._try_more(f"{self.limit} bring {speed}", now)

    def _evaluate_trial(self, speed: _Speed, before: _Speed, now: datetime) -> None:
        gain = speed.value / before.value - 1 if before.value else 1.0
        wanted = _WORTH / (self.limit - 1)
        if gain >= wanted:
            self._hold, self._try_at, self._before, self._here = _FIRST_HOLD, None, None, speed
            self._try_more(f"the last one more brought {gain:+.0%}, {speed}", now)
            return
        self._try_at = now + timedelta(seconds=self._hold * self.window_s)
        self._hold = min(2 * self._hold, _LONGEST_HOLD)
        self._move(self.limit - 1, f"one more brought {gain:+.0%} only ({speed} after {before}): taken back", now)
        self._here = before

    def _fallen(self, speed: _Speed, before: _Speed, now: datetime) -> None:
        words = f"throughput fell from {before} to {speed}"
        if self.limit > MIN_STREAMS:
            self._move(self.limit // 2, f"{words}: halved", now)
        else:
            self._here = speed
            self._keep(f"{words}: there cannot be fewer", now)

    def _try_more(self, why: str, now: datetime) -> None:
        if self.limit >= self.most:
            self._keep(f"{why}: there may be no more", now)
        elif self._try_at is not None and now < self._try_at:
            self._keep(f"{why}; one more brought nothing, and is tried again at {self._try_at:%H:%M:%S} UTC", now)
        else:
            before = self._here
            self._move(self.limit + 1, f"{why}: one more is tried", now)
            self._before = before

    def _keep(self, reason: str, now: datetime) -> None:
        self.reason, self.decided_at = reason, now
        self._window = _Window(now)

    def _move(self, limit: int, reason: str, now: datetime) -> None:
        """Set the limit; measurements of the last one are dropped."""
        if limit != self.limit:
            self.limit, self.changed_at = limit, now
        self._here = self._before = None
        self._keep(reason, now)


def _seconds(since: datetime, until: datetime) -> float:
    return max((until - since).total_seconds(), 0.0)


class BreakerState(enum.StrEnum):
    """State of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@frozen
class BreakerPolicy:
    """Threshold and pauses of a breaker.

    Attributes:
        first_pause_s: seconds for which it opens at first; doubles with each probe that fails.
    """

    threshold: int = 3
    first_pause_s: float = 5.0
    longest_pause_s: float = 120.0


@frozen
class Breaker:
    """State of one endpoint's breaker; immutable: each outcome makes a new one.

    Attributes:
        failures: in a row.
        opened: how often in a row it opened.
        open_until: when the present pause ends; None while it is closed.
    """

    failures: int = 0
    failing_since: datetime | None = None
    opened: int = 0
    open_until: datetime | None = None

    def phase(self, now: datetime) -> BreakerState:
        """Its state at a time (UTC)."""
        if self.open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self.open_until else BreakerState.HALF_OPEN

    def failed(self, policy: BreakerPolicy, now: datetime, *, certain: bool = False) -> Breaker:
        """After one more failure; a late one, while it is open already, does not extend the pause.

        Args:
            policy: how patient it is.
            certain: whether it opens at once, whatever the threshold.
        """
        failures, since = self.failures + 1, self.failing_since or now
        phase = self.phase(now)
        if phase is BreakerState.OPEN or (phase is BreakerState.CLOSED and failures < policy.threshold and not certain):
            return Breaker(failures, since, self.opened, self.open_until)
        # The exponent is bounded: a site may be away for years.
        pause_s = min(policy.first_pause_s * 2.0 ** min(self.opened, 40), policy.longest_pause_s)
        return Breaker(failures, since, self.opened + 1, now + timedelta(seconds=pause_s))

    def moved(self, step: timedelta) -> Breaker:
        """The same by a clock that was set ahead by a step."""
        since, until = self.failing_since, self.open_until
        return Breaker(self.failures, since and since + step, self.opened, until and until + step)

    def worked(self) -> Breaker:
        """After a success: closed, and all counters are reset."""
        return Breaker()

"""Monotonic clocks, a watch that detects steps of the system clock, and the latency of the reactor.

The time of day may be set by an administrator or a time service, forward or back, by hours. Durations must not follow
it, so they are measured by CLOCK_MONOTONIC.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from pdm.workqueue.telemetry.background import Periodic
from pdm.workqueue.telemetry.metrics import REACTOR_LAG, HistogramTally

#: Less is no step: time services correct that much by a slower or faster clock.
_LEAST_STEP_S = 1.0
_CLOCK_INTERVAL_S = 1.0


def use_monotonic_clock(reactor: Any) -> None:
    """Have a reactor that does not run yet measure time by CLOCK_MONOTONIC.

    Twisted takes the time of day: after a step forward all timers fire at once, after one back none does.
    """
    reactor.seconds = time.monotonic


def utc_now() -> datetime:
    return datetime.now(UTC)


class MonotonicUtc:
    """The time, UTC, as it was when the process began to ask, and moved on by CLOCK_MONOTONIC since."""

    def __init__(self) -> None:
        self._start = datetime.now(UTC)
        self._began = time.monotonic()

    def __call__(self) -> datetime:
        return self._start + timedelta(seconds=time.monotonic() - self._began)


@define(eq=False)
class ClockWatch:
    """Looks once a second whether the time of day was set, and calls those that store future timestamps.

    Attributes:
        listeners: each is called with how far the time of day was moved, forward if it is positive.
    """

    reactor: IReactorTime
    listeners: Sequence[Callable[[timedelta], None]]
    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    _ahead_s: float = field(init=False)
    _periodic: Periodic | None = None
    _log: Logger = field(factory=Logger)

    def __attrs_post_init__(self) -> None:
        self._ahead_s = self.wall() - self.monotonic()

    def start(self) -> None:
        self._periodic = Periodic(self.reactor, "check the clock", _CLOCK_INTERVAL_S, self.check)
        self._periodic.start()

    async def stop(self) -> None:
        if self._periodic is not None:
            await self._periodic.stop()

    def check(self) -> None:
        """Detect whether the time of day was set since the last check."""
        ahead_s = self.wall() - self.monotonic()
        step_s, self._ahead_s = ahead_s - self._ahead_s, ahead_s
        if abs(step_s) < _LEAST_STEP_S:
            return
        self._log.warn("the clock of this machine was set by {seconds:+.0f} s", seconds=step_s)
        for listener in self.listeners:
            listener(timedelta(seconds=step_s))


#: How often the latency is measured. A longer block is always seen; a shorter one may be measured as less.
_LAG_INTERVAL_S = 0.02
#: A longer latency is logged.
LATE_S = 0.05
#: At most one line in so many seconds.
_LAG_LOG_INTERVAL_S = 60.0


class ReactorLag:
    """Measures the latency of the reactor: how much later than scheduled a periodic call runs.

    Attributes:
        worst_s: the highest latency so far.
        latencies: all that were measured.
    """

    _log = Logger()

    def __init__(self, reactor: IReactorTime) -> None:
        self._reactor = reactor
        self._timer: IDelayedCall | None = None
        self._planned_at = 0.0
        self._next_log_at = 0.0
        self._unlogged_s = 0.0
        self.worst_s = 0.0
        self.latencies: HistogramTally[tuple[()]] = HistogramTally(REACTOR_LAG, ())

    def start(self) -> None:
        """Begin to measure."""
        self._next_log_at = self._reactor.seconds()
        self._plan()

    def stop(self) -> None:
        """Stop, and log the worst latency."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._log.info("the reactor was at most {lag:.0f} ms late", lag=self.worst_s * 1000)

    def _plan(self) -> None:
        self._planned_at = self._reactor.seconds() + _LAG_INTERVAL_S
        self._timer = self._reactor.callLater(_LAG_INTERVAL_S, self._measure)

    def _measure(self) -> None:
        now = self._reactor.seconds()
        late_s = now - self._planned_at
        self.worst_s = max(self.worst_s, late_s)
        self.latencies.observe((), max(late_s, 0.0))
        self._unlogged_s = max(self._unlogged_s, late_s)
        if self._unlogged_s > LATE_S and now >= self._next_log_at:
            self._log.warn("the reactor was {lag:.0f} ms late: something blocks it", lag=self._unlogged_s * 1000)
            self._unlogged_s = 0.0
            self._next_log_at = now + _LAG_LOG_INTERVAL_S
        self._plan()

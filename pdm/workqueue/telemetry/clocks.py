"""Clocks that no step of the system's time changes, and a watch that notices such steps.

The time of day may be set, by a person or by a time service: forward, back, by hours. What measures how long something
takes must not follow. Moments that are stored or shown, and the validity of certificates, do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.telemetry.background import Periodic

#: Less is no step: time services correct that much by a slower or faster clock.
_LEAST_STEP_S = 1.0
_LOOK_EVERY_S = 1.0


def steady(reactor: Any) -> None:
    """Have a reactor that does not run yet measure time by CLOCK_MONOTONIC.

    Twisted takes the time of day: after a step forward all timers fire at once, after one back none does.
    """
    reactor.seconds = time.monotonic


class SteadyUtc:
    """The present moment, UTC, as it was when the process began to ask, and moved on by CLOCK_MONOTONIC since."""

    def __init__(self) -> None:
        self._start = datetime.now(UTC)
        self._began = time.monotonic()

    def __call__(self) -> datetime:
        return self._start + timedelta(seconds=time.monotonic() - self._began)


@define(eq=False)
class ClockWatch:
    """Looks once a second whether the time of day was set, and tells whoever keeps moments of the future.

    Attributes:
        listeners: each is called with how far the time of day was moved, forward if it is positive.
        wall: the time of day, in seconds.
        monotonic: seconds of a clock that is never set.
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
        self._periodic = Periodic(self.reactor, "look at the clock", _LOOK_EVERY_S, self.look)
        self._periodic.start()

    async def stop(self) -> None:
        if self._periodic is not None:
            await self._periodic.stop()

    def look(self) -> None:
        """Find out whether the time of day was set since the last look."""
        ahead_s = self.wall() - self.monotonic()
        step_s, self._ahead_s = ahead_s - self._ahead_s, ahead_s
        if abs(step_s) < _LEAST_STEP_S:
            return
        self._log.warn("the clock of this machine was set by {seconds:+.0f} s", seconds=step_s)
        for told in self.listeners:
            told(timedelta(seconds=step_s))

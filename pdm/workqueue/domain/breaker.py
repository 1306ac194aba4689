"""When a place that cannot be reached is left alone: a circuit breaker, pure.

Closed: all is well. After some failures in a row it opens: nothing is sent there for a pause. Then it is half open: one
probe may go there. If that works it is closed again; if not, it opens for a longer pause.
"""

from __future__ import annotations

import enum
from datetime import datetime, timedelta

from attrs import frozen


class Phase(enum.StrEnum):
    """Where a breaker stands."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@frozen
class BreakerPolicy:
    """How patient a breaker is.

    Attributes:
        threshold: failures in a row that open it.
        first_pause_s: seconds for which it opens at first; doubles with each probe that fails.
        longest_pause_s: upper bound of that.
    """

    threshold: int = 3
    first_pause_s: float = 5.0
    longest_pause_s: float = 120.0


@frozen
class Breaker:
    """What is known of a place; each outcome makes a new one.

    Attributes:
        failures: in a row.
        failing_since: when the first of them was.
        opened: how often in a row it opened.
        open_until: when the present pause ends; None while it is closed.
    """

    failures: int = 0
    failing_since: datetime | None = None
    opened: int = 0
    open_until: datetime | None = None

    def phase(self, now: datetime) -> Phase:
        """Where it stands at a moment (UTC)."""
        if self.open_until is None:
            return Phase.CLOSED
        return Phase.OPEN if now < self.open_until else Phase.HALF_OPEN

    def failed(self, policy: BreakerPolicy, now: datetime, *, certain: bool = False) -> Breaker:
        """After one more failure; what comes late, while it is open already, prolongs nothing.

        Args:
            policy: how patient it is.
            now: the present moment, UTC.
            certain: whether it opens at once, whatever the threshold.
        """
        failures, since = self.failures + 1, self.failing_since or now
        phase = self.phase(now)
        if phase is Phase.OPEN or (phase is Phase.CLOSED and failures < policy.threshold and not certain):
            return Breaker(failures, since, self.opened, self.open_until)
        # The exponent is bounded: a site may be away for years.
        pause_s = min(policy.first_pause_s * 2.0 ** min(self.opened, 40), policy.longest_pause_s)
        return Breaker(failures, since, self.opened + 1, now + timedelta(seconds=pause_s))

    def moved(self, step: timedelta) -> Breaker:
        """The same by a clock that was set ahead by a step."""
        since, until = self.failing_since, self.open_until
        return Breaker(self.failures, since and since + step, self.opened, until and until + step)

    def worked(self) -> Breaker:
        """After a success: closed, and all is forgotten."""
        return Breaker()

"""How late the reactor is: whatever blocks it for long holds up every request and every agent."""

from __future__ import annotations

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

#: How often it is looked at. What blocks for longer than this cannot be missed, less than this it may look shorter.
_EVERY_S = 0.02
#: More than this is told of.
LATE_S = 0.05
#: At most one line in so many seconds.
_TELL_EVERY_S = 60.0


class ReactorLag:
    """Plans a call again and again, and notes how much later than planned it comes.

    Args:
        reactor: that is watched.

    Attributes:
        worst_s: the most seconds ever.
    """

    _log = Logger()

    def __init__(self, reactor: IReactorTime) -> None:
        self._reactor = reactor
        self._timer: IDelayedCall | None = None
        self._planned_at = 0.0
        self._tell_at = 0.0
        self._untold_s = 0.0
        self.worst_s = 0.0

    def start(self) -> None:
        """Begin to look."""
        self._tell_at = self._reactor.seconds()
        self._plan()

    def stop(self) -> None:
        """Look no more, and log the worst."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._log.info("the reactor was at most {lag:.0f} ms late", lag=self.worst_s * 1000)

    def _plan(self) -> None:
        self._planned_at = self._reactor.seconds() + _EVERY_S
        self._timer = self._reactor.callLater(_EVERY_S, self._look)

    def _look(self) -> None:
        now = self._reactor.seconds()
        late_s = now - self._planned_at
        self.worst_s = max(self.worst_s, late_s)
        self._untold_s = max(self._untold_s, late_s)
        if self._untold_s > LATE_S and now >= self._tell_at:
            self._log.warn("the reactor was {lag:.0f} ms late: something blocks it", lag=self._untold_s * 1000)
            self._untold_s = 0.0
            self._tell_at = now + _TELL_EVERY_S
        self._plan()

"""Looks of our own at endpoints: after a failure that does not tell whose fault it was, and when a pause ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from pdm.workqueue.execution.checking import DoorCheck
from pdm.workqueue.execution.health import Door, SiteHealth
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.sites.site import Site
from pdm.workqueue.telemetry.background import Background

#: Seconds between two looks at an endpoint, at least.
_LEAST_PAUSE_S = 1.0


@define(eq=False)
class EndpointProbes:
    """Logs in to an endpoint and lists the default folder of its site, as ``pdm site check`` does.

    It uses the credential of the user whose work failed there last, and no file of anybody.

    Attributes:
        check: looks at one endpoint for a user.
    """

    reactor: IReactorTime
    clock: Callable[[], datetime]
    sites: SiteRegistry
    health: SiteHealth
    check: Callable[[int, Site, Door], Awaitable[DoorCheck]]
    _under_way: set[Door] = field(factory=set)
    #: Endpoints to be looked at again after the look that is under way: it may have begun before the failure.
    _again: dict[Door, int] = field(factory=dict)
    _timers: dict[Door, IDelayedCall] = field(factory=dict)
    _looks: Background = field(factory=Background)
    _stopping: bool = False
    _log: Logger = field(factory=Logger)

    def start(self) -> None:
        self.health.look = self.look
        self.health.on_pause = self._paused

    async def stop(self) -> None:
        """Begin no further look, and wait for those that are under way."""
        self._stopping = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        await self._looks.over()

    def look(self, door: Door, user_id: int) -> None:
        """Look at an endpoint soon."""
        if self._stopping:
            return
        if door in self._under_way or door in self._timers:
            self._again[door] = user_id
        else:
            self._under_way.add(door)
            self._looks.start("look at an endpoint", self._look(door, user_id))

    def _paused(self, door: Door, until: datetime) -> None:
        """Look at an endpoint when its pause ends."""
        self._at((until - self.clock()).total_seconds(), door)

    def _at(self, seconds: float, door: Door) -> None:
        if self._stopping:
            return
        timer = self._timers.pop(door, None)
        if timer is not None:
            timer.cancel()
        self._timers[door] = self.reactor.callLater(max(seconds, 0.0), self._due, door)

    def _due(self, door: Door) -> None:
        del self._timers[door]
        asked = self._again.pop(door, None)
        user_id = asked or self.health.user_of(door)
        if user_id is not None and (asked is not None or self.health.waits_for_look(door, self.clock())):
            self.look(door, user_id)

    async def _look(self, door: Door, user_id: int) -> None:
        try:
            site = self.sites.by_id(door.site_id)
            if site is None:
                return
            self.health.begin_look(door)
            checked = await self.check(user_id, site, door)
            self.health.seen(door, checked.failure, checked.answers, self.clock())
        finally:
            self._under_way.discard(door)
            if door not in self._timers and (door in self._again or self.health.waits_for_look(door, self.clock())):
                self._at(_LEAST_PAUSE_S, door)

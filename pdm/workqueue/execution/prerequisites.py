"""What this machine lacks for a protocol: told at the start, and what was held for it goes on once it is installed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping

from attrs import define, field
from twisted.logger import Logger

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.execution.ends import reached_by_protocol
from pdm.workqueue.movers import BUILT_IN, MOVERS
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.store import claims
from pdm.workqueue.store.claims import HeldRoute
from pdm.workqueue.store.database import Database

#: Takes a user, a site and protocols of jobs, and puts back what is held of them.
Resume = Callable[[int, int, Collection[JobProtocol]], Awaitable[object]]


@define(eq=False)
class Prerequisites:
    """Programs and libraries of the protocols.

    Attributes:
        find_missing: runs the checks as a helper would be run: name of a protocol → what is missing. OSError if they
            could not be run for a reason that says nothing about protocols.
        resume: puts back what is held.
    """

    database: Database
    sites: SiteRegistry
    find_missing: Callable[[], Awaitable[Mapping[str, str]]]
    resume: Resume
    _log: Logger = field(factory=Logger)

    async def warn(self) -> None:
        """Warn of what is missing for protocols that sites offer."""
        missing = await self._missing()
        offered = {protocol for site in self.sites.all() for protocol in site.endpoints}
        for protocol in sorted(offered):
            if protocol in missing:
                self._log.warn(
                    "{protocol} cannot be used: {why}; jobs that need it are held until it can",
                    protocol=protocol.name,
                    why=missing[protocol],
                )

    async def resume_held(self) -> None:
        """Put back what was held for something that is there by now."""
        routes = await self.database.read(
            "what is held for software", claims.held_routes, FailureCode.DEPENDENCY_MISSING
        )
        if not routes:
            return
        missing = (await self._missing()).keys()
        blocked: set[tuple[int, int, JobProtocol]] = set()
        open_: set[tuple[int, int, JobProtocol]] = set()
        for route in routes:
            # What is put back is chosen by the site, so one route that is still blocked there keeps the others.
            place = route.user_id, route.source if route.destination is None else route.destination, route.protocol
            (open_ if missing.isdisjoint(self._protocols_of(route)) else blocked).add(place)
        for user_id, site_id, protocol in sorted(open_ - blocked):
            await self.resume(user_id, site_id, {protocol})

    def _protocols_of(self, route: HeldRoute) -> set[JobProtocol]:
        found = {route.protocol}
        site = None if route.destination is None else self.sites.by_id(route.destination)
        if site is not None and (there := reached_by_protocol(route.protocol, site)) is not None:
            found.add(there)
        return found

    async def _missing(self) -> dict[JobProtocol, str]:
        """What is missing, by protocol: software, or all of its mover."""
        found = await self.find_missing()
        missing = {protocol: "no mover for it is installed" for protocol in JobProtocol if protocol not in MOVERS}
        for protocol, mover in MOVERS.items():
            # What the movers of other packages need only they know.
            if mover is BUILT_IN.get(protocol) and protocol.name in found:
                missing[protocol] = found[protocol.name]
        return missing

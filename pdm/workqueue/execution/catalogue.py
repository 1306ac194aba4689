"""Sites of the database and restrictions in memory: read again when another daemon has changed them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.domain.catalogue import Directory, Restricted, Restriction, SiteRecord
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.execution.ends import reached_by
from pdm.workqueue.execution.health import SiteHealth
from pdm.workqueue.sites.registry import Site, SiteRegistry
from pdm.workqueue.store import catalogue
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import Periodic

#: Seconds until a change by another daemon is seen, at most, besides the time of the look.
_PERIOD_S = 2.0


@define(eq=False)
class Catalogue:
    """Keeps the registry of sites, and the restrictions, as the database has them.

    Attributes:
        sites: gets the sites.
        health: which of them can be reached.
        on_change: called after each change: something may be claimed now.
    """

    reactor: IReactorTime
    database: Database
    sites: SiteRegistry
    health: SiteHealth
    on_change: Callable[[], None] = lambda: None
    _version: int | None = None
    _restrictions: dict[tuple[Restricted, int], Restriction] = field(factory=dict)
    _periodic: Periodic | None = None
    _log: Logger = field(factory=Logger)

    async def start(self) -> None:
        await self.refresh()
        self._periodic = Periodic(self.reactor, "look for changed sites", _PERIOD_S, self.refresh)
        self._periodic.start()

    async def stop(self) -> None:
        if self._periodic is not None:
            await self._periodic.stop()

    async def refresh(self) -> None:
        """Read what has changed, if anything has."""
        fresh = await self.database.read("look for changed sites", catalogue.load, self._version)
        if fresh is not None and (self._version is None or fresh.version > self._version):
            self._take(fresh)

    def _take(self, fresh: Directory) -> None:
        self._version = fresh.version
        self.sites.take_stored(site_of(record) for record in fresh.sites)
        self.health.take_sites(self.sites.all())
        self._restrictions = {(one.kind, one.number): one for one in fresh.restrictions}
        self.on_change()

    def restriction(self, kind: Restricted, number: int) -> Restriction | None:
        """What an operator has restricted; None for what is free."""
        return self._restrictions.get((kind, number))

    def restricted(self, kind: Restricted) -> list[int]:
        """The numbers of what is restricted."""
        return [number for of_kind, number in self._restrictions if of_kind is kind]

    def waits(self, job: JobRecord, now: datetime) -> list[str]:
        """Why a job has to wait, a sentence each; empty if nothing holds it up but its turn."""
        if job.status.is_final or not job.counters.submitted:
            return []
        found = []
        banned = self.restriction(Restricted.USER, job.user_id)
        if banned is not None:
            found.append(f"its user is banned: {banned.message}")
        for number in dict.fromkeys([job.src_siteid, job.dst_siteid]):
            site = None if number is None else self.sites.by_id(number)
            if site is None:
                continue
            drained = self.restriction(Restricted.SITE, site.id)
            if drained is not None:
                found.append(f"site {site.name} ({site.id}) is drained: {drained.message}")
            sentence = self.health.sentence(site, reached_by(job, site) or job.protocol, now)
            if sentence is not None:
                found.append(sentence)
        return found


def site_of(record: SiteRecord) -> Site:
    """A site of the database as the registry has it."""
    content = record.content
    return Site(
        id=record.id,
        name=content.name,
        description=content.description,
        default_folder=content.default_folder,
        endpoints={protocol: urls[0] for protocol, urls in content.endpoints.items()},
        alternatives={protocol: tuple(urls[1:]) for protocol, urls in content.endpoints.items() if len(urls) > 1},
        owner_id=content.owner_id,
        public=content.public,
        limit_in=content.limit_in,
        limit_out=content.limit_out,
        authorities=content.authorities,
        myproxy=content.myproxy,
    )

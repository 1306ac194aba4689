"""Sites and restrictions in memory, and the protocols by which jobs reach sites.

They are reloaded when another daemon has changed them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.sites import Restriction, RestrictionKind, SiteRecord, SiteSnapshot
from pdm.workqueue.execution.endpoint_health import SiteHealth
from pdm.workqueue.movers import MOVERS, TOOL_MOVERS, mover_of
from pdm.workqueue.movers.mover import Access, Mover, credential_need, destination_protocol
from pdm.workqueue.sites.registry import Site, SiteRegistry, moved_by_tools
from pdm.workqueue.store import sites
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import Periodic, start_background

#: A site of a route, and the protocol by which it is reached.
RouteEnd = tuple[Site, JobProtocol]


def job_moved_by_tools(job: JobRecord, sites: SiteRegistry) -> bool:
    """Whether the tools mover runs the elements of a job."""
    known = [site for site in map(sites.by_id, job.sites) if site is not None]
    return moved_by_tools(job.protocol, job.options.get("mover"), known)


def reached_by(job: JobRecord, site: Site, *, by_tools: bool) -> JobProtocol | None:
    """The protocol that reaches a site of a job; None if the site does not offer it any more."""
    if site.id == job.src_siteid:
        return destination_protocol(site.endpoints, job.protocol, frozenset())
    return reached_by_protocol(job.protocol, site, by_tools=by_tools)


def job_mover(job: JobRecord, sites: SiteRegistry, *, by_tools: bool) -> Mover | None:
    """The mover of a job's elements, by the protocols at both ends; None if the service has none."""
    destination = None if job.dst_siteid is None else sites.by_id(job.dst_siteid)
    reached = None if destination is None else reached_by(job, destination, by_tools=by_tools)
    return mover_of(job.protocol, reached, by_tools=by_tools)


def reached_by_protocol(asked: JobProtocol, destination: Site, *, by_tools: bool = False) -> JobProtocol | None:
    """The protocol that reaches the destination of jobs of a protocol; None if the site does not offer it."""
    mover = mover_of(asked, by_tools=by_tools)
    return destination_protocol(destination.endpoints, asked, frozenset() if mover is None else mover.relays_to)


def protocols_reaching(access: Access) -> Mapping[CredentialKind, frozenset[JobProtocol]]:
    """Kind of credential → protocols of jobs that may wait for one, at either end."""
    needs = {protocol: credential_need(mover, access) for protocol, mover in MOVERS.items()}
    kinds = {protocol: frozenset(() if need is None else need.kinds) for protocol, need in needs.items()}
    return {
        kind: frozenset(
            protocol
            for protocol, mover in MOVERS.items()
            if any(kind in kinds.get(each, ()) for each in (protocol, *mover.relays_to))
        )
        for kind in CredentialKind
    }


def _any_mover_reaches(asked: JobProtocol, destination: Site) -> JobProtocol | None:
    """Like `reached_by_protocol`, with any mover, because the job's mover is not known here."""
    if moved_by_tools(asked, None, [destination]):
        return reached_by_protocol(asked, destination, by_tools=True)
    native = reached_by_protocol(asked, destination)
    if native is not None or asked not in TOOL_MOVERS:
        return native
    return reached_by_protocol(asked, destination, by_tools=True)


def blocked_sites(sites: SiteRegistry, paused: Iterable[tuple[int, JobProtocol]]) -> frozenset[tuple[int, JobProtocol]]:
    """Sites with the protocols of jobs that cannot reach them.

    ``paused`` are sites with the protocols that are paused; the result adds the protocols of jobs that would be relayed
    to them.
    """
    found = set(paused)
    for number, protocol in list(found):
        site = sites.by_id(number)
        if site is not None:
            found.update((number, asked) for asked in JobProtocol if _any_mover_reaches(asked, site) is protocol)
    return frozenset(found)


#: Seconds until a change by another daemon is noticed, at most, plus the time of the query.
_PERIOD_S = 2.0


@define(eq=False, kw_only=True)
class SiteDirectory:
    """Keeps the registry of sites and the restrictions in step with the database.

    Attributes:
        on_change: called after each change: something may be claimed now.
        other_waits: why a job waits for what is no site, a sentence each.
    """

    reactor: IReactorTime
    database: Database
    sites: SiteRegistry
    health: SiteHealth
    on_change: Callable[[], None] = lambda: None
    other_waits: Callable[[JobRecord], list[str]] = lambda job: []
    _version: int | None = None
    _restrictions: dict[tuple[RestrictionKind, int], Restriction] = field(factory=dict)
    _periodic: Periodic | None = None
    _log: Logger = field(factory=Logger)

    async def start(self) -> None:
        await self.refresh()
        self._periodic = Periodic(self.reactor, "refresh sites", _PERIOD_S, self.refresh)
        self._periodic.start()

    async def stop(self) -> None:
        if self._periodic is not None:
            periodic, self._periodic = self._periodic, None
            await periodic.stop()

    def changed_elsewhere(self) -> None:
        """Another daemon has changed sites or restrictions."""
        if self._periodic is not None:
            start_background("refresh sites", self.refresh())

    async def refresh(self) -> None:
        """Reload sites and restrictions if they have changed."""
        fresh = await self.database.read("refresh sites", sites.load_snapshot, self._version)
        if fresh is not None and (self._version is None or fresh.version > self._version):
            self._take(fresh)

    def _take(self, fresh: SiteSnapshot) -> None:
        self._version = fresh.version
        self.sites.take_stored(site_of(record) for record in fresh.sites)
        self.health.take_sites(self.sites.all())
        self._restrictions = {(one.kind, one.number): one for one in fresh.restrictions}
        self.on_change()

    def restriction(self, kind: RestrictionKind, number: int) -> Restriction | None:
        """The restriction of a site or user, if any."""
        return self._restrictions.get((kind, number))

    def restricted(self, kind: RestrictionKind) -> list[int]:
        """The ids of restricted sites or users."""
        return [number for of_kind, number in self._restrictions if of_kind is kind]

    def waits(self, job: JobRecord, now: datetime) -> list[str]:
        """Why a job waits, a sentence each; empty if only for its place in the queue."""
        if job.status.is_final or not job.counters.submitted:
            return []
        found = []
        banned = self.restriction(RestrictionKind.USER, job.user_id)
        if banned is not None:
            found.append(f"its user is banned: {banned.message}")
        by_tools = job_moved_by_tools(job, self.sites)
        for number in dict.fromkeys([job.src_siteid, job.dst_siteid]):
            site = None if number is None else self.sites.by_id(number)
            if site is None:
                continue
            drained = self.restriction(RestrictionKind.SITE, site.id)
            if drained is not None:
                found.append(f"site {site.name} ({site.id}) is drained: {drained.message}")
            reached = reached_by(job, site, by_tools=by_tools)
            sentence = self.health.sentence(site, job.protocol if reached is None else reached, now)
            if sentence is not None:
                found.append(sentence)
        return [*found, *self.other_waits(job)]


def site_of(record: SiteRecord) -> Site:
    """Convert a site of the database for the registry."""
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
        mover=content.mover,
        tape=content.tape,
        fts=content.fts,
        unlisted=content.unlisted,
        oidc=content.oidc,
    )

"""The streams of this daemon: how many run per route, site, user and job, and adaptive limits of routes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime
from typing import Protocol

from attrs import frozen
from twisted.logger import Logger

from pdm.workqueue.domain.jobs import Batch, JobRecord
from pdm.workqueue.domain.limits import (
    LimitKey,
    LimitKind,
    Route,
    StreamLedger,
    StreamQuota,
    StreamSlot,
    batch_keys,
    common_keys,
    route_of,
)
from pdm.workqueue.domain.pacing import MIN_STREAMS, BatchRun, Pacer
from pdm.workqueue.sites.registry import Site, SiteRegistry

#: Routes that are remembered while nothing runs on them.
_MOST_IDLE = 1000


@frozen(kw_only=True)
class StreamLimits:
    """How many streams may run at once.

    Attributes:
        route: maximum of a route; the adaptive limit may be lower.
        route_start: initial limit of a route.
        window_s: seconds of work between two decisions about a route's limit.
        site_in: into one site, unless its description has another limit.
        site_out: out of one site, likewise.
        job: with elements of one job.
    """

    total: int
    route: int
    route_start: int
    window_s: float
    site_in: int
    site_out: int
    user: int
    job: int


@frozen(kw_only=True)
class RouteState:
    """State of a route.

    Attributes:
        limit: between ``least`` and ``most``.
        throughput: latest measurement, of all streams together, in ``unit``; None before the first.
        reason: of the latest decision about the limit, a sentence.
    """

    route: Route
    running: int
    limit: int
    least: int
    most: int
    throughput: float | None
    unit: str | None
    reason: str
    decided_at: datetime
    changed_at: datetime


class LimitShares(Protocol):
    """What this daemon may run of the limits of all daemons on one database."""

    @property
    def members(self) -> int:
        """The number of daemons."""

    @property
    def streams_of_all(self) -> int:
        """Streams that all daemons can run at once."""

    @property
    def idle_elsewhere(self) -> int:
        """Streams of the other daemons that are idle; if there are any, none may claim more than can run at once."""

    def allowance(self, key: LimitKey, limit: int) -> int:
        """Streams of a key that may run here; ``limit``: of all daemons."""

    def part(self, limit: int) -> int:
        """The same of a key that is not `named`."""

    def named(self) -> Collection[LimitKey]:
        """Keys with a share of their own."""

    def note_running(self, key: LimitKey) -> None:
        """The number of streams of a key has changed."""


@frozen
class StreamUsage:
    """What this daemon runs.

    Attributes:
        running: streams of each key.
        demand: streams of each key that there would be without limits of all daemons.
        claimed: keys of all claimed batches.
    """

    running: Mapping[LimitKey, int]
    demand: Mapping[LimitKey, int]
    claimed: frozenset[LimitKey]


class Streams:
    """The streams of this daemon.

    Attributes:
        shares: of the limits of all daemons; None if this one has all.
    """

    _log = Logger()

    def __init__(self, *, limits: StreamLimits, sites: SiteRegistry, clock: Callable[[], datetime]) -> None:
        self._limits = limits
        self._sites = sites
        self._clock = clock
        self._ledger = StreamLedger(self._limit_of, self._running)
        self._pacers: dict[Route, Pacer] = {}
        self.shares: LimitShares | None = None

    @property
    def total(self) -> int:
        """Streams that may run here at once."""
        return self._limits.total

    @property
    def free(self) -> int:
        """How many more may run here."""
        return max(self._limits.total - self._ledger.streams, 0)

    @property
    def idle_elsewhere(self) -> int:
        """Streams of other daemons that are idle."""
        return 0 if self.shares is None else self.shares.idle_elsewhere

    def has_room(self, slot: StreamSlot, *, elsewhere: bool) -> bool:
        """Whether one more stream like that of a batch may run, here or at another daemon."""
        if elsewhere and all(self._ledger.running(key) < self.limit_of_all(key) for key in slot.keys):
            return True
        return self.free > 0 and self._ledger.is_open(slot.keys)

    @property
    def has_supply(self) -> bool:
        """Whether at least half of the streams have a claimed batch that comes next."""
        return self._ledger.waiting > 0 and 2 * self._ledger.waiting >= self._ledger.streams

    @property
    def total_of_all(self) -> int:
        """Streams that may run at once on all daemons."""
        return self._limits.total if self.shares is None else self.shares.streams_of_all

    def running(self, key: LimitKey) -> int:
        """Streams of a key here."""
        return self._ledger.running(key)

    def usage(self) -> StreamUsage:
        """What runs here, and what would run without limits of all daemons."""
        running = dict(self._ledger.all_running())
        demand = dict(running)
        free = self.free
        for keys in self._ledger.awaited():
            paced = any(isinstance(named, Route) and demand.get((kind, named), 0) >= self._pacer(named).limit
                        for kind, named in keys)  # fmt: skip
            if free > 0 and not paced:
                free -= 1
                for key in keys:
                    demand[key] = demand.get(key, 0) + 1
        return StreamUsage(running, demand, frozenset(self._ledger.claimed()))

    def slot(self, batch: Batch) -> StreamSlot:
        """The slot of a claimed batch that is no listing."""
        return self._ledger.slot(batch_keys(batch))

    def capacity(self) -> int:
        """How many more batches may be claimed: one per free stream, and as many in advance."""
        total, waiting, free = self._limits.total, self._ledger.waiting, self.free
        if self.idle_elsewhere:
            return max(free - waiting, 0)
        return free + max(total - waiting, 0)

    def quota(self) -> StreamQuota:
        """How many more batches may be claimed per route, site, user and job."""
        # Batches in advance must not all be blocked: beyond that, only what may run at once is claimed.
        shares = self.shares
        has_places = self._ledger.waiting < self._limits.total
        ahead = 2 if has_places and not self.idle_elsewhere else 1
        keys = {*self._ledger.claimed(), *((LimitKind.ROUTE, route) for route in self._pacers)}
        for site in self._sites.all():
            if site.limit_in or site.limit_out:
                keys |= {(LimitKind.INTO, site.id), (LimitKind.OUT_OF, site.id)}
        first = self._limits
        starts = {
            LimitKind.ROUTE: min(self._route_start, first.route, first.total),
            LimitKind.INTO: first.site_in,
            LimitKind.OUT_OF: first.site_out,
            LimitKind.USER: first.user,
            LimitKind.JOB: first.job,
        }
        if shares is not None:
            keys |= {*shares.named()}
            starts = {kind: min(limit, shares.part(self._common_limit(kind))) for kind, limit in starts.items()}
        return StreamQuota(
            {key: self._ledger.left(key, ahead) for key in keys},
            {kind: limit * ahead for kind, limit in starts.items()},
        )

    def reached_limits(self, job: JobRecord) -> list[str]:
        """The limits that prevent another stream for a job, a sentence each."""
        found = []
        if self._ledger.streams >= self._limits.total:
            found.append(f"all {self._limits.total} streams that may run at once are busy")
        for key in (*common_keys(job), (LimitKind.JOB, job.id)):
            # Without a running stream no limit is reached; and a query must not create a pacer.
            running = self._ledger.running(key)
            if running and running >= self._limit_of(key):
                found.append(f"as many streams as there may be {self._limit_words(key)} are busy ({running})")
        return found

    def _limit_words(self, key: LimitKey) -> str:
        """Describe a limit: ``into site B``."""
        kind, named = key
        if isinstance(named, Route):
            if named.destination is None:
                return f"at {self._site_words(named.source)}"
            return f"from {self._site_words(named.source)} to {self._site_words(named.destination)}"
        return (
            f"for one {kind.value}"
            if kind in (LimitKind.USER, LimitKind.JOB)
            else f"{'into' if kind is LimitKind.INTO else 'out of'} {self._site_words(named)}"
        )

    def _site_words(self, number: object) -> str:
        site = self._sites.by_id(number) if isinstance(number, int) else None
        return f"site {number}" if site is None else f"site {site.name}"

    def ended(self, batch: Batch, run: BatchRun) -> None:
        """Let the pacer of a route learn from a batch that has run."""
        route = route_of(batch.job)
        pacer, now = self._pacer(route), self._clock()
        before, decided_at = pacer.limit, pacer.decided_at
        pacer.ended(run, now)
        self._log_decision(route, pacer, before, decided_at)

    def routes(self) -> list[RouteState]:
        """The state of all routes on which something ran, by their sites."""
        return [
            RouteState(
                route=route,
                running=self._ledger.running((LimitKind.ROUTE, route)),
                limit=pacer.limit,
                least=MIN_STREAMS,
                most=pacer.most,
                throughput=pacer.throughput,
                unit=pacer.unit,
                reason=pacer.reason,
                decided_at=pacer.decided_at,
                changed_at=pacer.changed_at,
            )
            for route, pacer in sorted(
                self._pacers.items(), key=lambda item: (item[0].source, item[0].destination or 0)
            )
        ]

    def of_sites(self) -> Iterator[tuple[Site, LimitKind, int, int]]:
        """Sites of files, and others with streams: `LimitKind.INTO` or `OUT_OF`, number of streams, and their limit."""
        for site in self._sites.all():
            for kind in (LimitKind.INTO, LimitKind.OUT_OF):
                running = self._ledger.running((kind, site.id))
                if running or site.owner_id is None:
                    yield site, kind, running, self._site_limit(kind, site.id)

    # -- limits

    def limit_of_all(self, key: LimitKey) -> int:
        """Streams of a key that may run at once on all daemons."""
        kind, named = key
        if kind is LimitKind.INTO or kind is LimitKind.OUT_OF:
            return self._site_limit(kind, named)
        return self._common_limit(kind)

    def _common_limit(self, kind: LimitKind) -> int:
        """The limit of all keys of a kind; of a site, unless that has another one."""
        limits = self._limits
        return {
            LimitKind.ROUTE: limits.route,
            LimitKind.USER: limits.user,
            LimitKind.JOB: limits.job,
            LimitKind.INTO: limits.site_in,
            LimitKind.OUT_OF: limits.site_out,
        }[kind]

    def _limit_of(self, key: LimitKey) -> int:
        named = key[1]
        limit = self._bounded(named).limit if isinstance(named, Route) else self.limit_of_all(key)
        if self.shares is None:
            return limit
        return min(limit, self.shares.allowance(key, self.limit_of_all(key)))

    @property
    def _route_start(self) -> int:
        """Streams with which a route begins here: the daemons begin with as many as one alone, or with one each."""
        start = self._limits.route_start
        return start if self.shares is None else max(start // self.shares.members, MIN_STREAMS)

    def _site_limit(self, kind: LimitKind, number: object) -> int:
        site = self._sites.by_id(number) if isinstance(number, int) else None
        own = None if site is None else site.limit_in if kind is LimitKind.INTO else site.limit_out
        usual = self._limits.site_in if kind is LimitKind.INTO else self._limits.site_out
        if site is None or own is None:
            return usual
        # Operators may exceed the common limit in their files; users may not.
        return own if site.owner_id is None else min(own, usual)

    def _most(self, route: Route) -> int:
        sites = (self.limit_of_all(key) for key in route.limit_keys() if key[0] is not LimitKind.ROUTE)
        return min(self._limits.total, self._limits.route, *sites)

    def _bounded(self, route: Route) -> Pacer:
        """The pacer of a route, with the current limits of its sites."""
        pacer, most = self._pacer(route), self._most(route)
        if pacer.most != most:
            before, decided_at = pacer.limit, pacer.decided_at
            pacer.bound(most, self._clock())
            self._log_decision(route, pacer, before, decided_at)
        return pacer

    def _pacer(self, route: Route) -> Pacer:
        pacer = self._pacers.get(route)
        if pacer is None:
            if len(self._pacers) >= _MOST_IDLE:
                self._pacers = {known: kept for known, kept in self._pacers.items() if kept.running}
            pacer = Pacer(self._route_start, self._most(route), self._limits.window_s, self._clock())
            self._pacers[route] = pacer
        return pacer

    def _running(self, key: LimitKey, count: int) -> None:
        if self.shares is not None:
            self.shares.note_running(key)
        if isinstance(key[1], Route):
            self._pacer(key[1]).runs(count, self._clock())

    def _log_decision(self, route: Route, pacer: Pacer, before: int, decided_at: datetime) -> None:
        if pacer.limit != before:
            self._log.info(
                "route {source} -> {destination}: {before} streams become {limit}: {reason}",
                source=route.source,
                destination=route.source if route.destination is None else route.destination,
                before=before,
                limit=pacer.limit,
                reason=pacer.reason,
            )
        elif pacer.decided_at != decided_at:
            self._log.debug("route {route} keeps its streams: {reason}", route=route, reason=pacer.reason)

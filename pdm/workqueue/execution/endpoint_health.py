"""Endpoint health: circuit breakers that learn from attempts, and are consulted before work is claimed and started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from attrs import define, field, frozen
from twisted.logger import Logger

from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord
from pdm.workqueue.domain.lifecycle import MOST_UNCOUNTED
from pdm.workqueue.domain.pacing import Breaker, BreakerPolicy, BreakerState
from pdm.workqueue.sites.registry import Site

_log = Logger()

#: The server may be down, or only this request fails.
_NO_ANSWER = frozenset({FailureCode.CONNECTION, FailureCode.TIMEOUT, FailureCode.STALLED})
#: These do not show whether the server was reached.
_TELLS_NOTHING = frozenset(
    {
        FailureCode.CRASHED,
        FailureCode.INTERNAL,
        FailureCode.UNKNOWN,
        FailureCode.CREDENTIAL_EXPIRED,
        FailureCode.CREDENTIAL_MISSING,
        FailureCode.CREDENTIAL_UNFIT,
        FailureCode.ISSUER_UNAVAILABLE,
        FailureCode.DEPENDENCY_MISSING,
        FailureCode.BAD_LISTING,
    }
)
#: Maximum number of elements in ``_culprits``; the oldest are dropped, and get their uncounted attempts again.
_MOST_CULPRITS = 10_000


class SiteEndpoint(NamedTuple):
    """One endpoint of a site."""

    site_id: int
    protocol: JobProtocol
    url: str


@frozen(kw_only=True)
class EndpointHealth:
    """State of an endpoint.

    Attributes:
        failures: consecutive.
        next_try: when a paused endpoint is tried again.
    """

    phase: BreakerState
    failures: int
    failing_since: datetime | None
    next_try: datetime | None
    reason: str


@define(eq=False, kw_only=True)
class SiteHealth:
    """The breakers of all endpoints, in memory: after a restart all count as reachable.

    A failure without an answer may be the fault of the server or of the request: then the endpoint is probed by a
    request of our own (`execution.endpoint_checks`). Only failures that show that the server is down count for its
    breaker, and an endpoint whose pause has ended is probed before it gets an element.

    Attributes:
        patience_s: seconds after which failures count for elements again, so that jobs end.
        on_change: called when an endpoint is paused, or reachable again.
        on_state: called with an endpoint that does not work, and why, or that works again, for which that is None.
    """

    policy: BreakerPolicy = field(factory=BreakerPolicy)
    patience_s: float = 86400.0
    on_change: Callable[[], None] = lambda: None
    on_state: Callable[[SiteEndpoint, str | None], None] = lambda endpoint, reason: None
    #: Starts a probe of an endpoint with the credential of a user.
    probe: Callable[[SiteEndpoint, int], None] | None = None
    #: Called when an endpoint is paused, with the end of the pause.
    on_pause: Callable[[SiteEndpoint, datetime], None] = lambda endpoint, until: None
    #: Called with a paused endpoint that another daemon reaches: the pause need not end before its probe.
    end_pause: Callable[[SiteEndpoint], None] = lambda endpoint: None
    _breakers: dict[SiteEndpoint, Breaker] = field(factory=dict)
    _reasons: dict[SiteEndpoint, str] = field(factory=dict)
    _busy: Counter[SiteEndpoint] = field(factory=Counter)
    #: Site and protocol → endpoints, of sites that were used so far.
    _endpoints: dict[tuple[int, JobProtocol], tuple[SiteEndpoint, ...]] = field(factory=dict)
    #: User whose work failed there last.
    _users: dict[SiteEndpoint, int] = field(factory=dict)
    #: Elements (job, number) that got no answer there, until a probe shows why.
    _suspected: dict[SiteEndpoint, set[tuple[int, int]]] = field(factory=dict)
    #: Those of them that the running probe will explain.
    _under_probe: dict[SiteEndpoint, set[tuple[int, int]]] = field(factory=dict)
    #: Element → number of attempts that were its own fault, although they were not counted.
    _culprits: dict[tuple[int, int], int] = field(factory=dict)
    #: Endpoints whose probe was inconclusive: an element is the next probe.
    _inconclusive: set[SiteEndpoint] = field(factory=set)

    # -- before work

    def choose(self, site: Site, protocol: JobProtocol, now: datetime) -> SiteEndpoint:
        """The endpoint for a batch: one that needs a probe and has none, else the least busy working one.

        Raises:
            LookupError: the site does not offer the protocol.
        """
        endpoints = _endpoints_of(site, protocol)
        if not endpoints:
            raise LookupError(f"site {site.id} does not offer {protocol.name}")
        self._endpoints[site.id, protocol] = endpoints

        def rank(endpoint: SiteEndpoint) -> tuple[int, int]:
            phase = self._usable_phase(endpoint, now)
            if phase is BreakerState.HALF_OPEN:
                return (0 if not self._busy[endpoint] else 2), self._busy[endpoint]
            return (1 if phase is BreakerState.CLOSED else 3), self._busy[endpoint]

        return min(endpoints, key=rank)

    def begin(self, endpoints: Iterable[SiteEndpoint]) -> None:
        """Count a batch that uses endpoints."""
        self._busy.update(endpoints)

    def end(self, endpoints: Iterable[SiteEndpoint]) -> None:
        for endpoint in endpoints:
            self._busy[endpoint] -= 1
            if not self._busy[endpoint]:
                del self._busy[endpoint]

    def phase(self, endpoint: SiteEndpoint, now: datetime) -> BreakerState:
        breaker = self._breakers.get(endpoint)
        return BreakerState.CLOSED if breaker is None else breaker.phase(now)

    def paused(self, now: datetime) -> frozenset[tuple[int, JobProtocol]]:
        """Sites and protocols for which nothing may start: all their endpoints are paused."""
        return frozenset(route for route, phases in self._routes(now) if phases == {BreakerState.OPEN})

    def probed(self, now: datetime) -> frozenset[tuple[int, JobProtocol]]:
        """Sites and protocols without a working endpoint, of which one may be tried."""
        return frozenset(
            route
            for route, phases in self._routes(now)
            if BreakerState.HALF_OPEN in phases and BreakerState.CLOSED not in phases
        )

    def next_change(self, now: datetime) -> datetime | None:
        """The end of the next pause; None if no endpoint is paused."""
        times = [breaker.open_until for breaker in self._breakers.values() if breaker.phase(now) is BreakerState.OPEN]
        return min((time for time in times if time is not None), default=None)

    def of_site(self, site: Site, now: datetime) -> Iterator[tuple[SiteEndpoint, EndpointHealth]]:
        """State of the endpoints of a site."""
        for protocol in sorted(site.endpoints):
            for url in site.endpoint_urls(protocol):
                endpoint = SiteEndpoint(site.id, protocol, url)
                breaker = self._breakers.get(endpoint, Breaker())
                yield (
                    endpoint,
                    EndpointHealth(
                        phase=breaker.phase(now),
                        failures=breaker.failures,
                        failing_since=breaker.failing_since,
                        next_try=breaker.open_until,
                        reason=self._reasons.get(endpoint, ""),
                    ),
                )

    def failing(self, now: datetime) -> Counter[int]:
        """Site → number of its endpoints that do not work."""
        return Counter(
            endpoint.site_id
            for endpoint, breaker in self._breakers.items()
            if breaker.phase(now) is not BreakerState.CLOSED
        )

    def sentence(self, site: Site, protocol: JobProtocol, now: datetime) -> str | None:
        """Why work with a protocol waits for a site; None if it does not."""
        found = [health for endpoint, health in self.of_site(site, now) if endpoint.protocol is protocol]
        if not found or any(health.phase is BreakerState.CLOSED for health in found):
            return None
        best = min(found, key=lambda health: health.next_try or now)
        since = "" if best.failing_since is None else f" since {best.failing_since:%Y-%m-%dT%H:%M:%SZ}"
        when = "it is being tried"
        if best.phase is BreakerState.OPEN and best.next_try is not None:
            when = f"it is tried again at {best.next_try:%Y-%m-%dT%H:%M:%SZ}"
        return f"site {site.name} ({site.id}) cannot be reached{since}, {when}: {best.reason}"

    def _routes(self, now: datetime) -> Iterator[tuple[tuple[int, JobProtocol], set[BreakerState]]]:
        suspects = {
            (endpoint.site_id, endpoint.protocol) for endpoint, breaker in self._breakers.items() if breaker.open_until
        }
        for route in suspects:
            yield route, {self._usable_phase(endpoint, now) for endpoint in self._endpoints[route]}

    def _usable_phase(self, endpoint: SiteEndpoint, now: datetime) -> BreakerState:
        """The state for elements: they wait for the probe of an endpoint whose pause has ended."""
        phase = self.phase(endpoint, now)
        if (
            phase is BreakerState.HALF_OPEN
            and self.probe is not None
            and not self._is_probed_by_elements(endpoint, now)
        ):
            return BreakerState.OPEN
        return phase

    def _is_probed_by_elements(self, endpoint: SiteEndpoint, now: datetime) -> bool:
        # After ``patience_s`` each element tries itself, so that jobs end.
        return (
            endpoint in self._inconclusive
            or _failing_seconds(self._breakers.get(endpoint, Breaker()), now) >= self.patience_s
        )

    def take_sites(self, sites: Iterable[Site]) -> None:
        """Update the endpoints after sites have changed; drops the state of removed ones."""
        known = {(site.id, protocol): site for site in sites for protocol in site.endpoints}
        for route in list(self._endpoints):
            site = known.get(route)
            if site is None:
                del self._endpoints[route]
            else:
                self._endpoints[route] = _endpoints_of(site, route[1])
        for endpoint in list(self._breakers):
            if endpoint not in self._endpoints.get((endpoint.site_id, endpoint.protocol), ()):
                del self._breakers[endpoint]
                self._reasons.pop(endpoint, None)
                self._inconclusive.discard(endpoint)
        for known_of in (self._users, self._suspected, self._under_probe):
            for endpoint in [
                endpoint
                for endpoint in known_of
                if endpoint not in self._endpoints.get((endpoint.site_id, endpoint.protocol), ())
            ]:
                del known_of[endpoint]

    def clock_was_set(self, step: timedelta) -> None:
        """Move the ends of pauses with the clock."""
        for endpoint, breaker in self._breakers.items():
            self._breakers[endpoint] = breaker.moved(step)

    # -- outcomes

    def worked(self, endpoints: Iterable[SiteEndpoint], now: datetime) -> None:
        """Close the breakers of endpoints that have worked."""
        for endpoint in endpoints:
            breaker = self._breakers.pop(endpoint, None)
            self._reasons.pop(endpoint, None)
            self._inconclusive.discard(endpoint)
            if breaker is not None and breaker.open_until is not None:
                _log.info("site {site}: {url} can be reached again", site=endpoint.site_id, url=endpoint.url)
                self.on_state(endpoint, None)
                self.on_change()

    def failed(
        self,
        job: JobRecord,
        element: ElementRecord,
        endpoints: Mapping[int, SiteEndpoint],
        failure: AttemptFailure,
        now: datetime,
    ) -> bool:
        """Learn from a failed attempt.

        ``endpoints``: site → endpoint that it used.

        Returns:
            Whether the attempt is excused: an endpoint is unreachable, which is not the element's fault.
        """
        used = [endpoints[site] for site in sites_of_element(job, element) if site in endpoints]
        blamed = _blamed(job, used, endpoints, failure.scope)
        if failure.code not in _NO_ANSWER:
            if failure.code not in _TELLS_NOTHING and blamed is not None:
                # An answer, even a refusal, shows that the server is up.
                self.worked([blamed], now)
            return False
        suspected = False
        if blamed is not None:
            self._users[blamed] = job.user_id
            if failure.unreachable:
                self._note(blamed, failure, now)
                suspected = True
            elif failure.code is FailureCode.CONNECTION:
                suspected = self._suspect(blamed, job, element)
            elif self.probe is None:
                self._note(blamed, failure, now)
            else:
                self.probe(blamed, job.user_id)
        # A site with another working endpoint is reachable.
        alone = [
            self._breakers[endpoint] for endpoint in used if endpoint in self._breakers and self._is_last(endpoint, now)
        ]
        if any(_failing_seconds(breaker, now) >= self.patience_s for breaker in alone):
            return False
        open_ = [
            endpoint
            for endpoint in used
            if endpoint in self._breakers and self._breakers[endpoint].open_until is not None
        ]
        # Attempts that cannot connect do no harm, so they may be retried for long; others are limited.
        return (suspected or bool(open_)) and (failure.unreachable or element.lost < MOST_UNCOUNTED)

    def _suspect(self, endpoint: SiteEndpoint, job: JobRecord, element: ElementRecord) -> bool:
        """Whether an attempt whose connection broke may be the server's fault; a probe will tell."""
        key = job.id, element.id
        if self._culprits.get(key):
            # The server was up when the element failed like this before.
            return False
        if self.probe is None:
            return element.lost == 0
        self._suspected.setdefault(endpoint, set()).add(key)
        self.probe(endpoint, job.user_id)
        return True

    def begin_probe(self, endpoint: SiteEndpoint) -> None:
        """A probe starts: it explains earlier failures, not those that arrive meanwhile."""
        self._under_probe.setdefault(endpoint, set()).update(self._suspected.pop(endpoint, set()))

    def forget(self, job_id: int, element_id: int) -> None:
        """Drop the state of an element that has failed for good: a retry by its user starts anew."""
        self._culprits.pop((job_id, element_id), None)

    def own_faults(self, job_id: int, element_id: int) -> int:
        """Number of uncounted attempts of an element that were its own fault."""
        return self._culprits.get((job_id, element_id), 0)

    def probe_ended(
        self, endpoint: SiteEndpoint, failure: AttemptFailure | None, reachable: bool | None, now: datetime
    ) -> None:
        """Take in the result of a probe; ``reachable`` is None if the probe was inconclusive."""
        suspects = self._under_probe.pop(endpoint, set())
        if reachable is False and failure is not None:
            self._note(endpoint, failure, now, certain=True)
            return
        for key in suspects:
            self._culprits[key] = self._culprits.get(key, 0) + 1
        while len(self._culprits) > _MOST_CULPRITS:
            del self._culprits[next(iter(self._culprits))]
        if reachable:
            self.worked([endpoint], now)
        elif self.phase(endpoint, now) is BreakerState.HALF_OPEN:
            self._inconclusive.add(endpoint)
            self.on_change()

    def user_of(self, endpoint: SiteEndpoint) -> int | None:
        """The user whose credential a probe can use: whose work failed there last."""
        return self._users.get(endpoint)

    def broken(self) -> dict[SiteEndpoint, int]:
        """Endpoints that are not used, with the user whose work failed there last."""
        return {
            endpoint: self._users[endpoint]
            for endpoint, breaker in self._breakers.items()
            if breaker.open_until is not None and endpoint in self._users
        }

    def suspect(self, endpoint: SiteEndpoint, user_id: int, *, is_broken: bool) -> None:
        """Another daemon cannot reach an endpoint, or reaches it again: probe it if this one believes otherwise."""
        breaker = self._breakers.get(endpoint)
        is_paused = breaker is not None and breaker.open_until is not None
        if self.probe is not None and is_paused is not is_broken:
            self._users.setdefault(endpoint, user_id)
            if not is_broken:
                self.end_pause(endpoint)
            self.probe(endpoint, user_id)

    def waits_for_probe(self, endpoint: SiteEndpoint, now: datetime) -> bool:
        """Whether an endpoint is not used until a probe succeeds."""
        breaker = self._breakers.get(endpoint)
        is_paused = breaker is not None and breaker.open_until is not None
        return is_paused and not self._is_probed_by_elements(endpoint, now)

    def _is_last(self, endpoint: SiteEndpoint, now: datetime) -> bool:
        """Whether no other endpoint of the site works with the same protocol."""
        others = self._endpoints.get((endpoint.site_id, endpoint.protocol), ())
        return not any(self.phase(other, now) is BreakerState.CLOSED for other in others if other != endpoint)

    def _note(self, endpoint: SiteEndpoint, failure: AttemptFailure, now: datetime, *, certain: bool = False) -> None:
        before = self._breakers.get(endpoint, Breaker())
        after = before.failed(self.policy, now, certain=certain)
        self._breakers[endpoint] = after
        self._endpoints.setdefault((endpoint.site_id, endpoint.protocol), (endpoint,))
        self._reasons[endpoint] = f"{failure.code}: {' '.join(failure.message.split())[:300]}"
        if after.opened != before.opened and after.open_until is not None:
            _log.warn(
                "site {site}: {url} is paused until {until}, after {failures} failures: {reason}",
                site=endpoint.site_id,
                url=endpoint.url,
                until=f"{after.open_until:%Y-%m-%dT%H:%M:%SZ}",
                failures=after.failures,
                reason=self._reasons[endpoint],
            )
            self._inconclusive.discard(endpoint)
            if before.open_until is None:
                self.on_state(endpoint, self._reasons[endpoint])
            self.on_pause(endpoint, after.open_until)
            self.on_change()


def _endpoints_of(site: Site, protocol: JobProtocol) -> tuple[SiteEndpoint, ...]:
    return tuple(SiteEndpoint(site.id, protocol, url) for url in site.endpoint_urls(protocol))


def sites_of_element(job: JobRecord, element: ElementRecord) -> tuple[int, ...]:
    """The sites that an element uses."""
    if job.dst_siteid is None:
        return (job.src_siteid,)
    if job.checked_site is not None:
        return (job.checked_site,)
    if element.type is JobType.COPY or (element.type is JobType.LIST and job.lists_destination):
        return job.src_siteid, job.dst_siteid
    if element.type is JobType.LIST:
        return (job.src_siteid,)
    # Directories that are made and extra files that are removed are at the destination; moved sources are not.
    return (job.src_siteid,) if element.dst_filepath is None else (job.dst_siteid,)


def _blamed(
    job: JobRecord, used: list[SiteEndpoint], endpoints: Mapping[int, SiteEndpoint], scope: FailureScope
) -> SiteEndpoint | None:
    if scope not in (FailureScope.SOURCE, FailureScope.DESTINATION):
        # Between the sites, or in the service: no single endpoint is to blame.
        return None
    if len(used) == 1:
        return used[0]
    site = job.src_siteid if scope is FailureScope.SOURCE else job.dst_siteid
    return None if site is None else endpoints.get(site)


def _failing_seconds(breaker: Breaker, now: datetime) -> float:
    if breaker.failing_since is None:
        return 0.0
    return (now - breaker.failing_since) / timedelta(seconds=1)

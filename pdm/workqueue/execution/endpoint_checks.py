"""Check endpoints by a login and a listing, with a user's credential, through an agent.

Users ask for a check (``pdm site check``). The service itself probes an endpoint after a failure that does not show
whether the server or the request is to blame, and when the pause of its breaker ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, DeferredList, DeferredSemaphore
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from pdm.workqueue.agents.pool import AgentPool, ask
from pdm.workqueue.agents.process import AgentProcess, AgentStartError
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.execution.credentials import CredentialUnusableError
from pdm.workqueue.execution.endpoint_health import SiteEndpoint, SiteHealth
from pdm.workqueue.execution.preparing import Preparation
from pdm.workqueue.movers import MOVERS, TOOL_MOVERS, mover_of
from pdm.workqueue.movers.mover import Mover
from pdm.workqueue.sites.registry import Site, SiteRegistry, moved_by_tools
from pdm.workqueue.sites.storage_urls import storage_url
from pdm.workqueue.telemetry.background import Background, ReportedError
from pdm.workqueue.wire.agent_requests import ListRequest, TimeLimits

#: Seconds for one endpoint, its login and its listing.
_ENDPOINT_TIMEOUT_S = 20.0
#: Seconds for a whole site, including the wait for a free agent: clients get the results so far.
SITE_CHECK_TIMEOUT_S = 45.0
#: Endpoints that are checked at once, for all users: their agents are outside the limits for jobs.
_AT_ONCE = 4
_NOT_REACHED = frozenset({FailureCode.CONNECTION, FailureCode.TIMEOUT, FailureCode.STALLED})
_LOGIN_REFUSED = frozenset(
    {
        FailureCode.CERTIFICATE,
        FailureCode.HOST_KEY,
        FailureCode.CREDENTIAL_REFUSED,
        FailureCode.CREDENTIAL_EXPIRED,
    }
)
#: The check ended before the endpoint was contacted.
_NOT_ASKED = frozenset(
    {
        FailureCode.CREDENTIAL_MISSING,
        FailureCode.CREDENTIAL_UNFIT,
        FailureCode.ISSUER_UNAVAILABLE,
        FailureCode.DEPENDENCY_MISSING,
        FailureCode.CRASHED,
        FailureCode.INTERNAL,
        FailureCode.UNSUPPORTED,
    }
)


class SiteCheckRunningError(Exception):
    """The user has another check running: one at a time, because agents are shared."""


@frozen
class EndpointCheck:
    """Result of a check.

    Attributes:
        failure: why the default directory could not be listed; None if it could.
    """

    endpoint: SiteEndpoint
    failure: AttemptFailure | None
    seconds: float

    @property
    def reachable(self) -> bool | None:
        """Whether a server answers; None if unknown."""
        if self.failure is None:
            return True
        late = self.failure.scope is FailureScope.SERVICE and self.failure.code is FailureCode.TIMEOUT
        if late or self.failure.code in _NOT_ASKED:
            return None
        return self.failure.code not in _NOT_REACHED

    @property
    def answers(self) -> bool | None:
        """Whether a server exists, even if it closes the connection when it is asked for the default directory."""
        broken = self.failure is not None and self.failure.code is FailureCode.CONNECTION
        return True if broken and self.failure is not None and not self.failure.unreachable else self.reachable

    @property
    def login(self) -> bool | None:
        """Whether the user can log in."""
        if not self.reachable or self.failure is None:
            return self.reachable or None
        return self.failure.code not in _LOGIN_REFUSED

    @property
    def listing(self) -> bool | None:
        """Whether the default directory exists and can be listed."""
        if not self.login:
            return None
        return self.failure is None


@define(eq=False, kw_only=True)
class SiteCheck:
    """Lists the default directory of a site at each of its endpoints.

    Attributes:
        timeout_s: seconds for a whole site; later endpoints are reported as not checked.
    """

    preparation: Preparation
    pool: AgentPool
    timeout_s: float = SITE_CHECK_TIMEOUT_S
    _turns: DeferredSemaphore = field(factory=lambda: DeferredSemaphore(_AT_ONCE))
    _busy: set[int] = field(factory=set)
    _log: Logger = field(factory=Logger)

    async def check(self, user_id: int, site: Site) -> Sequence[EndpointCheck]:
        """Check a few endpoints at once; results in the order of the protocols.

        Raises:
            SiteCheckRunningError: the user has another check running.
        """
        if user_id in self._busy:
            raise SiteCheckRunningError
        self._busy.add(user_id)
        until = self.preparation.context.reactor.seconds() + self.timeout_s
        endpoints = [
            SiteEndpoint(site.id, protocol, url)
            for protocol in sorted(site.endpoints)
            for url in site.endpoint_urls(protocol)
        ]
        found: dict[SiteEndpoint, EndpointCheck] = {}
        checks = [
            Deferred.fromCoroutine(self._check_in_turn(user_id, site, endpoint, until, found)) for endpoint in endpoints
        ]
        # The client may disconnect: running checks are completed, and only then the user may start another.
        over = DeferredList(checks).addCallback(lambda _: self._busy.discard(user_id))
        await self._wait(over)
        late = _failure(FailureCode.TIMEOUT, f"not checked within {self.timeout_s:g} s: the service is busy")
        return [found.get(endpoint) or EndpointCheck(endpoint, late, self.timeout_s) for endpoint in endpoints]

    async def check_endpoint(self, user_id: int, site: Site, endpoint: SiteEndpoint) -> EndpointCheck:
        """Check one endpoint, for `EndpointProbes`."""
        until = self.preparation.context.reactor.seconds() + self.timeout_s
        found: dict[SiteEndpoint, EndpointCheck] = {}
        await self._check_in_turn(user_id, site, endpoint, until, found)
        late = _failure(FailureCode.TIMEOUT, f"not checked within {self.timeout_s:g} s: the service is busy")
        return found.get(endpoint) or EndpointCheck(endpoint, late, self.timeout_s)

    async def _wait(self, over: Deferred[None]) -> None:
        """Wait for the end of all checks, or for the timeout."""
        enough: Deferred[None] = Deferred()

        def end(result: object) -> object:
            if timer.active():
                timer.cancel()
            if not enough.called:
                enough.callback(None)
            return result

        timer = self.preparation.context.reactor.callLater(self.timeout_s, end, None)
        over.addCallback(end)
        try:
            await enough
        finally:
            if timer.active():
                timer.cancel()

    async def _check_in_turn(
        self, user_id: int, site: Site, endpoint: SiteEndpoint, until: float, found: dict[SiteEndpoint, EndpointCheck]
    ) -> None:
        await self._turns.acquire()
        try:
            if self.preparation.context.reactor.seconds() < until:
                found[endpoint] = await self._timed_check(user_id, site, endpoint, until)
        except Exception as error:
            if not isinstance(error, ReportedError):
                self._log.failure("an endpoint of site {site} could not be checked", site=site.id)
            why = _failure(FailureCode.INTERNAL, "a fault of the service: ask an operator")
            found[endpoint] = EndpointCheck(endpoint, why, 0.0)
        finally:
            self._turns.release()

    async def _timed_check(self, user_id: int, site: Site, endpoint: SiteEndpoint, until: float) -> EndpointCheck:
        context = self.preparation.context
        began = context.reactor.seconds()
        failure = await self._list(user_id, site, endpoint, until)
        checked = EndpointCheck(endpoint, failure, context.reactor.seconds() - began)
        if checked.login:
            # So waiting elements need not wait for the next probe.
            context.health.worked([endpoint], context.clock())
        return checked

    async def _list(self, user_id: int, site: Site, endpoint: SiteEndpoint, until: float) -> AttemptFailure | None:
        protocol = endpoint.protocol
        by_tools = moved_by_tools(protocol, None, [site])
        mover = mover_of(protocol, by_tools=by_tools)
        if mover is None:
            return _failure(FailureCode.UNSUPPORTED, f"this service does not support {protocol.name}")
        try:
            movers: Mapping[JobProtocol, Mover] = TOOL_MOVERS if by_tools else MOVERS
            kind = await self.preparation.agent_kind(user_id, mover, [(site, protocol)], movers)
        except CredentialUnusableError as error:
            return error.failure
        try:
            agent = await self.pool.acquire(kind, alone=True)
            try:
                if self.preparation.context.reactor.seconds() >= until:
                    return _failure(FailureCode.TIMEOUT, "there was no free helper in time: the service is busy")
                return await self._ask(agent, mover, storage_url(site, protocol, site.default_folder, endpoint.url))
            finally:
                self.pool.release(agent, kind)
        except AgentStartError as error:
            return _failure(FailureCode.CRASHED, str(error))
        finally:
            self.preparation.release_credential(kind)

    async def _ask(self, agent: AgentProcess, mover: Mover, url: str) -> AttemptFailure | None:
        limits = TimeLimits(stall_s=_ENDPOINT_TIMEOUT_S / 2, total_s=_ENDPOINT_TIMEOUT_S - 2)
        request = ListRequest(self.preparation.next_request_id(), 0, url, 0, limits)
        answer = await ask(agent, request, self.preparation.context.reactor, _ENDPOINT_TIMEOUT_S)
        if answer.timed_out:
            return AttemptFailure(
                FailureScope.SOURCE, FailureCode.TIMEOUT, f"no listing within {_ENDPOINT_TIMEOUT_S:g} s"
            )
        fault = answer.faults.get(request.key)
        if fault is not None:
            return mover.classify(fault)
        return None if answer.error is None else _failure(FailureCode.CRASHED, answer.error)


def _failure(code: FailureCode, message: str) -> AttemptFailure:
    return AttemptFailure(FailureScope.SERVICE, code, message)


#: Minimum seconds between two probes of an endpoint.
_LEAST_PAUSE_S = 1.0


@define(eq=False, kw_only=True)
class EndpointProbes:
    """Logs in to an endpoint and lists the default directory of its site, as ``pdm site check`` does.

    Uses the credential of the user whose work failed there last, and reads no file of a user.
    """

    reactor: IReactorTime
    clock: Callable[[], datetime]
    sites: SiteRegistry
    health: SiteHealth
    check: Callable[[int, Site, SiteEndpoint], Awaitable[EndpointCheck]]
    _under_way: set[SiteEndpoint] = field(factory=set)
    #: Endpoints to probe again after the running probe, which may have begun before the failure → user.
    _again: dict[SiteEndpoint, int] = field(factory=dict)
    _timers: dict[SiteEndpoint, IDelayedCall] = field(factory=dict)
    _probes: Background = field(factory=Background)
    _stopping: bool = False
    _log: Logger = field(factory=Logger)

    def start(self) -> None:
        self.health.probe = self.probe
        self.health.on_pause = self._paused
        self.health.end_pause = self._end_pause

    async def stop(self) -> None:
        """Start no further probe, and wait for running ones."""
        self._stopping = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        await self._probes.over()

    def probe(self, endpoint: SiteEndpoint, user_id: int) -> None:
        """Probe an endpoint soon."""
        if self._stopping:
            return
        if endpoint in self._under_way or endpoint in self._timers:
            self._again[endpoint] = user_id
        else:
            self._under_way.add(endpoint)
            self._probes.start("probe an endpoint", self._probe(endpoint, user_id))

    def _paused(self, endpoint: SiteEndpoint, until: datetime) -> None:
        """Probe an endpoint when its pause ends."""
        self._at((until - self.clock()).total_seconds(), endpoint)

    def _end_pause(self, endpoint: SiteEndpoint) -> None:
        """Have the next probe not wait for the end of the pause."""
        timer = self._timers.pop(endpoint, None)
        if timer is not None:
            timer.cancel()

    def _at(self, seconds: float, endpoint: SiteEndpoint) -> None:
        if self._stopping:
            return
        self._end_pause(endpoint)
        self._timers[endpoint] = self.reactor.callLater(max(seconds, 0.0), self._due, endpoint)

    def _due(self, endpoint: SiteEndpoint) -> None:
        del self._timers[endpoint]
        asked = self._again.pop(endpoint, None)
        user_id = asked or self.health.user_of(endpoint)
        if user_id is not None and (asked is not None or self.health.waits_for_probe(endpoint, self.clock())):
            self.probe(endpoint, user_id)

    async def _probe(self, endpoint: SiteEndpoint, user_id: int) -> None:
        try:
            site = self.sites.by_id(endpoint.site_id)
            if site is None:
                return
            self.health.begin_probe(endpoint)
            checked = await self.check(user_id, site, endpoint)
            self.health.probe_ended(endpoint, checked.failure, checked.answers, self.clock())
        finally:
            self._under_way.discard(endpoint)
            if endpoint not in self._timers and (
                endpoint in self._again or self.health.waits_for_probe(endpoint, self.clock())
            ):
                self._at(_LEAST_PAUSE_S, endpoint)

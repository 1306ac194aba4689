"""Speaks to the tape APIs of sites through helpers, which have the user's credential."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attrs import define, evolve, field

from pdm.workqueue.agents.pool import AgentPool, Answer, ask
from pdm.workqueue.agents.process import AgentStartError, LeaseOverError
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import OUTCOME_UNKNOWN, AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.execution.credentials import CredentialUnusableError
from pdm.workqueue.execution.preparing import Preparation
from pdm.workqueue.execution.waits import SiteUnansweredError
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.wire.agent_events import TapeEvent
from pdm.workqueue.wire.agent_requests import TapeRequest, TimeLimits

Action = Literal["discover", "archiveinfo", "stage", "status", "cancel", "release", "delete"]
#: Seconds for which an API that an endpoint names is used without asking again.
_DISCOVERED_S = 3600.0
#: Sites whose discovered APIs are remembered.
_MOST_DISCOVERED = 1000
#: Seconds by which a helper may be late.
_SLACK_S = 5.0


@define(eq=False, kw_only=True)
class TapeApis:
    """The tape APIs of all sites.

    Attributes:
        timeout_s: seconds of one request.
    """

    preparation: Preparation
    pool: AgentPool
    timeout_s: float
    #: Endpoint → its API, and until when that is used.
    _discovered: dict[str, tuple[str, float]] = field(factory=dict)

    async def ask(
        self,
        user_id: int,
        site: Site,
        action: Action,
        paths: Sequence[str] = (),
        *,
        request: str = "",
        lifetime_s: float = 0.0,
    ) -> TapeEvent:
        """Send one request to the tape API of a site; ``paths`` are percent-encoded.

        Raises:
            SiteUnansweredError: there was none, or the request was refused.
        """
        api = site.tape or await self._discover(user_id, site)
        try:
            return await self._ask(
                user_id, site, api, action, list(paths), request=request, lifetime_s=round(lifetime_s)
            )
        except SiteUnansweredError as error:
            if error.failure.unreachable or error.failure.code is FailureCode.NOT_FOUND:
                self._discovered.pop(site.endpoints.get(JobProtocol.HTTPS, ""), None)
            raise

    async def _discover(self, user_id: int, site: Site) -> str:
        endpoint = site.endpoints.get(JobProtocol.HTTPS)
        if endpoint is None:
            raise SiteUnansweredError(
                _no_api(f"site {site.name} has no tape API: its definition names none (tape = URL)")
            )
        now = self.preparation.context.reactor.seconds()
        api, until = self._discovered.get(endpoint, ("", 0.0))
        if now >= until:
            api = (await self._ask(user_id, site, endpoint, "discover", [])).api
            if not api:
                message = (
                    f"site {site.name} has no tape API: {endpoint} names none, nor does its definition (tape = URL)"
                )
                raise SiteUnansweredError(_no_api(message))
            while len(self._discovered) >= _MOST_DISCOVERED:
                del self._discovered[next(iter(self._discovered))]
            self._discovered[endpoint] = api, now + _DISCOVERED_S
        return api

    async def _ask(
        self,
        user_id: int,
        site: Site,
        api: str,
        action: Action,
        paths: list[str],
        *,
        request: str = "",
        lifetime_s: int = 0,
    ) -> TapeEvent:
        preparation, protocol = self.preparation, JobProtocol.HTTPS
        # Credentials and authorities belong to URLs of sites: the API may be at another port than the endpoint.
        server = f"https://{StorageUrl(api).authority}"
        # A token may be for any of them.
        urls = {**site.alternatives, protocol: tuple(site.endpoint_urls(protocol))}
        here = evolve(site, endpoints={**site.endpoints, protocol: server}, alternatives=urls)
        try:
            kind = await preparation.agent_kind(user_id, MOVERS[protocol], [(here, protocol)], MOVERS)
        except CredentialUnusableError as error:
            raise SiteUnansweredError(error.failure) from error
        try:
            agent = await self.pool.acquire(kind, alone=True)
            try:
                limits = TimeLimits(stall_s=self.timeout_s, total_s=self.timeout_s)
                message = TapeRequest(preparation.next_request_id(), 0, action, api, limits, paths, request, lifetime_s)
                answer = await ask(agent, message, preparation.context.reactor, self.timeout_s + _SLACK_S)
            finally:
                self.pool.release(agent, kind)
        except (AgentStartError, LeaseOverError) as error:
            failure = AttemptFailure(FailureScope.SERVICE, FailureCode.CRASHED, str(error) or "the lease is over")
            raise SiteUnansweredError(failure) from error
        finally:
            preparation.release_credential(kind)
        return _event_of(answer)


def _event_of(answer: Answer) -> TapeEvent:
    if answer.faults:
        fault = answer.faults[0]
        if fault is None:
            raise SiteUnansweredError(_unknown("it was cancelled"), is_unsure=True)
        failure = MOVERS[JobProtocol.HTTPS].classify(fault)
        raise SiteUnansweredError(failure, is_unsure=failure.code in OUTCOME_UNKNOWN and not failure.unreachable)
    if answer.error is not None or answer.tape is None:
        raise SiteUnansweredError(_unknown(answer.error or "the helper gave no answer"), is_unsure=True)
    return answer.tape


def _unknown(message: str) -> AttemptFailure:
    return AttemptFailure(FailureScope.SERVICE, FailureCode.CRASHED, message)


def _no_api(message: str) -> AttemptFailure:
    return AttemptFailure(FailureScope.SERVICE, FailureCode.UNSUPPORTED, message)

"""What a batch needs before an agent runs it: endpoints, credentials, trusted authorities, and the request."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from attrs import define, evolve, field

from pdm.workqueue.agents.pool import AgentKind, AgentPool
from pdm.workqueue.domain.credentials import CredentialNeed
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch, JobRecord
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.execution.attempts import AttemptContext
from pdm.workqueue.execution.credentials import (
    CREDENTIALS_VARIABLE,
    Credentials,
    CredentialUnusableError,
    UsableCredentials,
)
from pdm.workqueue.execution.endpoint_health import SiteEndpoint
from pdm.workqueue.execution.site_directory import RouteEnd, job_moved_by_tools, job_mover, reached_by
from pdm.workqueue.execution.token_checks import token_failure, unfit_elements
from pdm.workqueue.execution.transfer_services import FTS_MOVERS, TransferServices
from pdm.workqueue.movers import MOVERS, TOOL_MOVERS
from pdm.workqueue.movers.mover import Access, BuiltRequest, Mover, credential_need
from pdm.workqueue.sites.registry import Site, SiteRegistry
from pdm.workqueue.sites.storage_urls import EndpointUrls
from pdm.workqueue.wire.agent_requests import CopyRequest, ListRequest, TimeLimits, WorkRequest
from pdm.workqueue.wire.options import Options, read_options

#: Environment variable of a helper: authorities of single endpoints, a JSON object, URL → directory.
TRUST_VARIABLE = "PDM_TRUST"


class NotPossibleError(Exception):
    """A batch cannot be started."""

    def __init__(self, failure: AttemptFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@define
class PreparedBatch:
    """A batch that can be started.

    Attributes:
        kind: of agent; its credential is held until `Preparation.release_credential`.
        built: the request for the agent, and the elements that are not in it.
        unfit: elements that the user's tokens do not permit, by key.
    """

    kind: AgentKind
    built: BuiltRequest
    options: Options
    endpoints: Mapping[int, SiteEndpoint]
    unfit: Mapping[int, AttemptFailure] = field(factory=dict)

    @property
    def permitted_request(self) -> WorkRequest | None:
        """The request without `unfit` elements; None if nothing is left."""
        request = self.built.request
        if request is None or not self.unfit:
            return request
        if isinstance(request, ListRequest):
            return None
        items: Any = [item for item in request.items if item.key not in self.unfit]
        return msgspec.structs.replace(request, items=items) if items else None


@define(eq=False, kw_only=True)
class Preparation:
    """Prepares batches and site checks.

    Attributes:
        access: settings for every helper; roots and the user's credential are added.
        services: the FTS3 services of sites.
        trust: makes the directory of authorities for a site that has its own.
    """

    sites: SiteRegistry
    pool: AgentPool
    credentials: Credentials
    context: AttemptContext
    element: TimeLimits
    access: Access
    services: TransferServices
    trust: Callable[[Path | None, Collection[str]], Awaitable[Path | None]] | None = None
    _next_id: int = 0

    async def prepare(self, batch: Batch, service: str | None = None) -> PreparedBatch:
        """Prepare a batch; ``service``: URL of the FTS3 that transfers its files.

        Raises:
            NotPossibleError: a site, an endpoint or a credential is missing.
        """
        job = batch.job
        by_tools = job_moved_by_tools(job, self.sites)
        mover = FTS_MOVERS[job.protocol] if service else job_mover(job, self.sites, by_tools=by_tools)
        if mover is None:
            raise NotPossibleError(missing_mover(job.protocol))
        movers: Mapping[JobProtocol, Mover] = TOOL_MOVERS if by_tools else FTS_MOVERS if service else MOVERS
        ends = [self._route_end(job, number, by_tools=by_tools) for number in sorted(job.sites)]
        try:
            kind = await self.agent_kind(job.user_id, mover, ends, movers)
        except CredentialUnusableError as error:
            raise NotPossibleError(error.failure) from error
        now = self.context.clock()
        endpoints = {site.id: self.context.health.choose(site, protocol, now) for site, protocol in ends}
        urls = {site.id: EndpointUrls(site, protocol, endpoints[site.id].url).of for site, protocol in ends}
        options = read_options(job.type, job.options)
        try:
            built = mover.request_for(
                batch, lambda site_id, path: urls[site_id](path), options, self.element, self.next_request_id()
            )
            unfit = self._unfit(batch, built.request, kind, ends)
        except BaseException:
            self.release_credential(kind)
            raise
        if service is not None and isinstance(built.request, CopyRequest):
            parameters = self.services.parameters(service)
            built = evolve(built, request=msgspec.structs.replace(built.request, service=parameters))
        return PreparedBatch(kind, built, options, endpoints, unfit)

    def _unfit(
        self, batch: Batch, request: WorkRequest | None, kind: AgentKind, ends: Sequence[RouteEnd]
    ) -> Mapping[int, AttemptFailure]:
        claims = self.credentials.claims(kind.credential)
        if request is None or not claims:
            return {}
        return unfit_elements(batch, request, {site.id: site for site, _ in ends}, claims)

    def next_request_id(self) -> int:
        self._next_id += 1
        return self._next_id

    async def agent_kind(
        self, user_id: int, mover: Mover, ends: Sequence[RouteEnd], movers: Mapping[JobProtocol, Mover]
    ) -> AgentKind:
        """The kind of agent for a user at some sites; its credential is held until `release`.

        Args:
            user_id: of the user.
            mover: runs the elements.
            ends: the sites, with the protocol by which each is reached.
            movers: of all protocols: the native ones, those by the tools, or those by FTS3.

        Raises:
            CredentialUnusableError: no valid credential is stored.
        """
        access, trusted = await self._trust_settings(ends)
        usable = UsableCredentials("", {})
        if needs := self._needs_at(ends, movers):
            usable = await self.credentials.usable_each(user_id, needs, self.context.clock())
            self._check_tokens(usable, [site for site, _ in ends])
        environment = dict(mover.environment(evolve(access, credential=usable.proxy, roots=self._roots())))
        # For all endpoints: agents do not depend on the one that a batch uses.
        if credential_files := usable.variable({site.id: site.endpoint_urls(reached_by) for site, reached_by in ends}):
            environment[CREDENTIALS_VARIABLE] = credential_files
        if trusted:
            environment[TRUST_VARIABLE] = json.dumps(trusted, sort_keys=True)
        return AgentKind(mover.helper, usable.fingerprint, environment)

    def _check_tokens(self, usable: UsableCredentials, sites: Sequence[Site]) -> None:
        """Release the credentials, and raise `CredentialUnusableError`, if a token does not fit its site."""
        now = self.context.clock()
        for site in sites:
            claims = usable.claims.get(site.id)
            failure = None if claims is None else token_failure(site, claims, now)
            if failure is not None:
                self._release(usable.fingerprint)
                raise CredentialUnusableError(failure.code, failure.message)

    async def _trust_settings(self, ends: Sequence[RouteEnd]) -> tuple[Access, dict[str, str]]:
        """The access settings with the authorities for all servers; or authorities by endpoint, if they differ.

        A site's own authorities are valid for its endpoints only: if a route trusted those of both sites, one site
        could impersonate the other.
        """
        if self.trust is None or not any(site.authorities for site, _ in ends):
            return self.access, {}
        usual = self.access.trust_dir
        directories = {
            site.id: await self.trust(usual, {site.authorities} if site.authorities else set()) for site, _ in ends
        }
        if len(set(directories.values())) == 1:
            return evolve(self.access, trust_dir=directories.popitem()[1]), {}
        trust_by_url: dict[str, str] = {}
        for site, protocol in ends:
            for url in site.endpoint_urls(protocol):
                # Sites that share an endpoint but trust different authorities get the usual ones: the login fails.
                if trust_by_url.setdefault(url, str(directories[site.id])) != str(directories[site.id]):
                    trust_by_url[url] = str(usual or "")
        return self.access, trust_by_url

    def _needs_at(self, ends: Sequence[RouteEnd], movers: Mapping[JobProtocol, Mover]) -> dict[int, CredentialNeed]:
        needs = [(site, credential_need(movers[protocol], self.access)) for site, protocol in ends]
        return {site.id: need.at(site.owner_id) for site, need in needs if need is not None}

    def _route_end(self, job: JobRecord, number: int, *, by_tools: bool) -> RouteEnd:
        site = self.sites.by_id(number)
        protocol = None if site is None else reached_by(job, site, by_tools=by_tools)
        if site is None or protocol is None:
            what = "is not known any more" if site is None else f"does not offer {job.protocol.name} any more"
            raise NotPossibleError(
                AttemptFailure(FailureScope.SERVICE, FailureCode.UNSUPPORTED, f"site {number} {what}")
            )
        return site, protocol

    def _roots(self) -> list[str]:
        return [
            StorageUrl(site.endpoints[JobProtocol.FILE]).text_path
            for site in self.sites.all()
            if JobProtocol.FILE in site.endpoints
        ]

    def release_credential(self, kind: AgentKind) -> None:
        """Release the credential of a kind of agent."""
        if kind.credential:
            self._release(kind.credential)

    def _release(self, fingerprint: str) -> None:
        if self.credentials.release(fingerprint) and not self.pool.works_with(fingerprint):
            # No agent was started with it.
            self.credentials.remove_unused(fingerprint)


def missing_mover(protocol: JobProtocol) -> AttemptFailure:
    """The error for jobs of a protocol whose mover the service does not have any more."""
    message = f"the service has no mover for {protocol.name} any more"
    return AttemptFailure(FailureScope.SERVICE, FailureCode.DEPENDENCY_MISSING, message)

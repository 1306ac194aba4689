"""Copies by an FTS3 that a site names."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import TOOL_PROTOCOLS, JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.movers.gridftp import classify_reply, proxy_environment
from pdm.workqueue.movers.mover import Access, BuiltRequest, SiteUrl, build_request
from pdm.workqueue.movers.tools import ERROR_PATTERNS
from pdm.workqueue.wire.agent_events import Fault
from pdm.workqueue.wire.agent_requests import TimeLimits
from pdm.workqueue.wire.options import Options


@frozen
class FtsMover:
    """Has an FTS3 transfer files by one of the protocols that gfal2 knows; the service proves them."""

    protocol: JobProtocol
    job_types: frozenset[JobType] = frozenset({JobType.COPY})
    helper: str = "pdm.workqueue.helpers.main_fts"
    #: It is delegated to the FTS3.
    needs_credential: CredentialKind | None = CredentialKind.PROXY
    prefers_credential: CredentialKind | None = None

    @property
    def relays_to(self) -> frozenset[JobProtocol]:
        return TOOL_PROTOCOLS - {self.protocol}

    def request_for(
        self, batch: Batch, urls: SiteUrl, options: Options, limits: TimeLimits, request_id: int
    ) -> BuiltRequest:
        return build_request(batch, urls, options, limits, request_id)

    def environment(self, access: Access) -> Mapping[str, str]:
        return proxy_environment(access)

    def classify(self, fault: Fault) -> AttemptFailure:
        # An FTS3 passes on what gfal2 says.
        return classify_reply(fault, ERROR_PATTERNS)

"""XRootD servers: third-party copies with the user's proxy delegated, streamed where they cannot or need not."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.movers.judging import judge
from pdm.workqueue.movers.mover import ALL_JOB_TYPES, Access, SiteUrl
from pdm.workqueue.movers.relayed import READINGS, RELAY, RELAYED, relay_environment
from pdm.workqueue.movers.requests import build_request
from pdm.workqueue.wire.agent_messages import Fault, Limits, Work
from pdm.workqueue.wire.options import Options


@frozen
class XrootMover:
    """The helper works with XRootD's client; large files are pulled by one server from the other."""

    job_types: frozenset[JobType] = ALL_JOB_TYPES
    helper: str = RELAY
    needs_credential: CredentialKind | None = CredentialKind.PROXY
    prefers_credential: CredentialKind | None = None
    relays_to: frozenset[JobProtocol] = RELAYED - {JobProtocol.XROOT}

    def request_for(self, batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int) -> Work:
        return build_request(batch, urls, options, limits, request_id)

    def environment(self, access: Access) -> Mapping[str, str]:
        return relay_environment(access)

    def judge(self, fault: Fault) -> AttemptFailure:
        return judge(fault, READINGS)

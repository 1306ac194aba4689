"""WebDAV servers: third-party copies between two of them, streamed where they cannot."""

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
class HttpsMover:
    """The helper has one server pull from the other, with a token that the other gives for the user's proxy."""

    job_types: frozenset[JobType] = ALL_JOB_TYPES
    helper: str = RELAY
    needs_credential: CredentialKind | None = CredentialKind.PROXY
    prefers_credential: CredentialKind | None = CredentialKind.TOKEN
    relays_to: frozenset[JobProtocol] = RELAYED - {JobProtocol.HTTPS}

    def request_for(self, batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int) -> Work:
        return build_request(batch, urls, options, limits, request_id)

    def environment(self, access: Access) -> Mapping[str, str]:
        return relay_environment(access)

    def judge(self, fault: Fault) -> AttemptFailure:
        return judge(fault, READINGS)

"""A mover of a package of its own."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.movers.mover import Access, BuiltRequest, SiteUrl, build_request, classify
from pdm.workqueue.wire.agent_events import Fault
from pdm.workqueue.wire.agent_requests import TimeLimits
from pdm.workqueue.wire.options import Options


@frozen
class EchoMover:
    """Lists, and does nothing else."""

    job_types: frozenset[JobType] = frozenset({JobType.LIST})
    helper: str = "echo_helper"
    needs_credential: CredentialKind | None = None
    prefers_credential: CredentialKind | None = None
    relays_to: frozenset[JobProtocol] = frozenset()

    def request_for(
        self, batch: Batch, urls: SiteUrl, options: Options, limits: TimeLimits, request_id: int
    ) -> BuiltRequest:
        return build_request(batch, urls, options, limits, request_id)

    def environment(self, access: Access) -> Mapping[str, str]:
        return {"ECHO_NAME": "hello"}

    def classify(self, fault: Fault) -> AttemptFailure:
        return classify(fault)

"""The field's own commands, ``globus-url-copy`` and ``gfal-*``, as the movers of the protocols that they know."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from pdm.workqueue.domain.credentials import CredentialKind, CredentialNeed
from pdm.workqueue.domain.enums import TOOL_PROTOCOLS, JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.movers.gridftp import ERROR_PATTERNS as GRIDFTP_ERROR_PATTERNS
from pdm.workqueue.movers.gridftp import classify_reply, proxy_environment
from pdm.workqueue.movers.mover import ALL_JOB_TYPES, Access, BuiltRequest, ErrorPattern, SiteUrl, build_request
from pdm.workqueue.wire.agent_events import Fault
from pdm.workqueue.wire.agent_requests import TimeLimits
from pdm.workqueue.wire.options import Options

#: What gfal2 2.21 and its plugins say, where their number says nothing; tests/movers/data has each as it was recorded.
#: The status codes of SRM are those of its specification.
ERROR_PATTERNS = (
    ErrorPattern.of(
        r"(?:certificate|proxy|credential)[^\n]*\bexpired|alert certificate expired",
        FailureCode.CREDENTIAL_EXPIRED,
        FailureScope.SERVICE,
    ),
    ErrorPattern.of(r"Could not open the user certificate", FailureCode.CREDENTIAL_MISSING, FailureScope.SERVICE),
    *GRIDFTP_ERROR_PATTERNS,
    ErrorPattern.of(r"alert unknown ca|self[- ]signed certificate", FailureCode.CERTIFICATE),
    ErrorPattern.of(
        r"HTTP 401|Auth failed|Login incorrect|SRM_AUTHENTICATION_FAILURE|alert (?:bad|unsupported) certificate",
        FailureCode.CREDENTIAL_REFUSED,
    ),
    ErrorPattern.of(r"HTTP 403|SRM_AUTHORIZATION_FAILURE", FailureCode.PERMISSION_DENIED),
    ErrorPattern.of(r"HTTP 404|SRM_INVALID_PATH", FailureCode.NOT_FOUND),
    ErrorPattern.of(r"HTTP 507|SRM_NO_(?:FREE|USER)_SPACE|SRM_EXCEED_ALLOCATION", FailureCode.NO_SPACE),
    ErrorPattern.of(r"SRM_DUPLICATION_ERROR", FailureCode.EXISTS),
    ErrorPattern.of(r"HTTP (?:429|503)|SRM_INTERNAL_ERROR|SRM_FILE_BUSY", FailureCode.BUSY),
    ErrorPattern.of(
        r"Could(?: not|n't) (?:connect|resolve)|\[FATAL\] (?:Connection error|Invalid address)|Network is unreachable",
        FailureCode.CONNECTION,
        unreachable=True,
    ),
    ErrorPattern.of(r"Connection (?:reset|timed out|closed)|Operation timed out|Socket error", FailureCode.CONNECTION),
)


@frozen
class ToolsMover:
    """Has the tools move one of the protocols that they know: a site's ``mover = tools``, or a job's option."""

    protocol: JobProtocol
    job_types: frozenset[JobType] = ALL_JOB_TYPES
    helper: str = "pdm.workqueue.helpers.main_tools"
    #: Of tokens each server has its own, and the tools would show the one of a source to the destination.
    needs_credential: CredentialKind | None = CredentialKind.PROXY
    prefers_credential: CredentialKind | None = None

    @property
    def relays_to(self) -> frozenset[JobProtocol]:
        return TOOL_PROTOCOLS - {self.protocol}

    @property
    def need(self) -> CredentialNeed:
        """What it needs at each site."""
        return CredentialNeed((CredentialKind.PROXY,))

    def request_for(
        self, batch: Batch, urls: SiteUrl, options: Options, limits: TimeLimits, request_id: int
    ) -> BuiltRequest:
        return build_request(batch, urls, options, limits, request_id)

    def environment(self, access: Access) -> Mapping[str, str]:
        return proxy_environment(access)

    def classify(self, fault: Fault) -> AttemptFailure:
        return classify_reply(fault, ERROR_PATTERNS)

"""Protocols that one helper, the relay, reaches all of: a copy may go from any to any other through the service."""

from __future__ import annotations

import json
from collections.abc import Mapping

from attrs import frozen

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import RELAYED, JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.domain.paths import encoded
from pdm.workqueue.movers.gridftp import ERROR_PATTERNS as GRIDFTP_ERROR_PATTERNS
from pdm.workqueue.movers.gridftp import classify_reply
from pdm.workqueue.movers.mover import (
    ALL_JOB_TYPES,
    Access,
    BuiltRequest,
    ErrorPattern,
    SiteUrl,
    build_request,
    classify,
)
from pdm.workqueue.wire.agent_events import Fault
from pdm.workqueue.wire.agent_requests import TimeLimits
from pdm.workqueue.wire.options import Options

#: What ssh(1) says where a login fails, as recorded from OpenSSH 9.2; and what a dead connection looks like.
ERROR_PATTERNS = (
    ErrorPattern.of(
        r"Permission denied \(|Too many authentication failures|Load key|no such identity",
        FailureCode.CREDENTIAL_REFUSED,
    ),
    ErrorPattern.of(
        r"the connection ended|Connection (?:refused|reset|closed|timed out)|Could not resolve hostname"
        r"|No route to host|Network is unreachable|Broken pipe",
        FailureCode.CONNECTION,
    ),
)


@frozen
class RelayedMover:
    """Has the relay move one of its protocols, perhaps to another one.

    Attributes:
        protocol: of the source.
        destination: of the destination, if it is another one.
    """

    protocol: JobProtocol
    destination: JobProtocol | None = None
    job_types: frozenset[JobType] = ALL_JOB_TYPES
    helper: str = "pdm.workqueue.helpers.main_relay"

    @property
    def needs_credential(self) -> CredentialKind | None:
        kinds = self.protocol.info.credentials
        return CredentialKind(kinds[-1]) if kinds else None

    @property
    def prefers_credential(self) -> CredentialKind | None:
        kinds = self.protocol.info.credentials
        return CredentialKind(kinds[0]) if len(kinds) > 1 else None

    @property
    def relays_to(self) -> frozenset[JobProtocol]:
        return RELAYED - {self.protocol}

    def request_for(
        self, batch: Batch, urls: SiteUrl, options: Options, limits: TimeLimits, request_id: int
    ) -> BuiltRequest:
        return build_request(batch, urls, options, limits, request_id)

    def environment(self, access: Access) -> Mapping[str, str]:
        # The same for each protocol, for one process may serve them all.
        values = {
            "X509_USER_PROXY": access.credential,
            "X509_CERT_DIR": access.trust_dir,
            "PDM_SSH_KEY": access.ssh_key,
            "PDM_SSH_KNOWN_HOSTS": access.ssh_known_hosts,
            "PDM_SSH_USER": access.ssh_user or None,
            "PDM_FILE_ROOTS": json.dumps([encoded(root) for root in access.roots]),
        }
        return {name: str(value) for name, value in values.items() if value is not None}

    def classify(self, fault: Fault) -> AttemptFailure:
        failed = self.protocol
        if fault.scope == FailureScope.DESTINATION and self.destination is not None:
            failed = self.destination
        if failed is JobProtocol.GRIDFTP:
            return classify_reply(fault, (*GRIDFTP_ERROR_PATTERNS, *ERROR_PATTERNS))
        return classify(fault, ERROR_PATTERNS)

"""GridFTP between two servers, with the user's grid proxy."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.movers.judging import Reading, judge
from pdm.workqueue.movers.mover import ALL_JOB_TYPES, Access, SiteUrl
from pdm.workqueue.movers.requests import build_request
from pdm.workqueue.wire.agent_messages import Fault, Limits, Work
from pdm.workqueue.wire.options import Options

#: What Globus servers and libraries say where they give no number; tests/movers/data has each as it was recorded.
#: The order matters: a reply about a certificate also says that the login failed.
READINGS = (
    Reading.of(
        r"Error with credential: The (?:proxy )?credential:.*\bexpired\b", FailureCode.CREDENTIAL_EXPIRED, Scope.SERVICE
    ),
    Reading.of(r"^530[ -].*(?:certificate|[Cc]redential).*has expired", FailureCode.CREDENTIAL_EXPIRED, Scope.SERVICE),
    Reading.of(
        r"Valid credentials could not be found|Error reading proxy credential",
        FailureCode.CREDENTIAL_MISSING,
        Scope.SERVICE,
    ),
    Reading.of(
        r"Untrusted self-signed certificate|Can't get the local trusted CA certificate|certificate verify failed"
        r"|Authorization denied: The name of the remote entity|certificate has been revoked",
        FailureCode.CERTIFICATE,
    ),
    Reading.of(
        r"Gridmap lookup failure|^530[ -]|Unable to set the [ug]id of the server process",
        FailureCode.CREDENTIAL_REFUSED,
    ),
    # Not what a server says of another server, or of its data connections: those lines begin with a reply's number.
    Reading.of(
        r"\A(?!.*^[1-5]\d\d[ -]).*(?:Unable to connect to|getaddrinfo failed|Connection refused|Connection timed out"
        r"|No route to host|Network is unreachable)",
        FailureCode.CONNECTION,
        unreachable=True,
    ),
    Reading.of(r"^421[ -]", FailureCode.CONNECTION, unreachable=True),
    Reading.of(
        r"Unable to connect to|getaddrinfo failed|Connection refused|Connection reset by peer|Broken pipe"
        r"|Connection timed out|No route to host|Network is unreachable|an end-of-file was reached|^421[ -]"
        r"|Error while searching for end of reply|not in the proper state|the operation was aborted",
        FailureCode.CONNECTION,
    ),
    Reading.of(r"^50[0-4][ -][^\n]*(?:[Uu]nrecognized|[Nn]ot implemented|[Uu]nknown command)", FailureCode.UNSUPPORTED),
)


@frozen
class GridFtpMover:
    """Third-party transfers: the bytes go from server to server, the helper only holds both by the hand."""

    job_types: frozenset[JobType] = ALL_JOB_TYPES
    helper: str = "pdm.workqueue.agents.helpers.gridftp"
    needs_credential: CredentialKind | None = CredentialKind.PROXY
    prefers_credential: CredentialKind | None = None
    relays_to: frozenset[JobProtocol] = frozenset()

    def request_for(self, batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int) -> Work:
        return build_request(batch, urls, options, limits, request_id)

    def environment(self, access: Access) -> Mapping[str, str]:
        values = {"X509_USER_PROXY": access.credential, "X509_CERT_DIR": access.trust_dir}
        return {name: str(path) for name, path in values.items() if path is not None}

    def judge(self, fault: Fault) -> AttemptFailure:
        return judge(fault, READINGS)

"""GridFTP between two servers, with the user's grid proxy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from attrs import frozen

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import RELAYED, JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch
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

#: What Globus servers and libraries say where they give no number; tests/movers/data has each as it was recorded.
#: The order matters: a reply about a certificate also says that the login failed.
ERROR_PATTERNS = (
    ErrorPattern.of(
        r"Error with credential: The (?:proxy )?credential:.*\bexpired\b",
        FailureCode.CREDENTIAL_EXPIRED,
        FailureScope.SERVICE,
    ),
    ErrorPattern.of(
        r"^530[ -].*(?:certificate|[Cc]redential).*has expired", FailureCode.CREDENTIAL_EXPIRED, FailureScope.SERVICE
    ),
    ErrorPattern.of(
        r"Valid credentials could not be found|Error reading proxy credential",
        FailureCode.CREDENTIAL_MISSING,
        FailureScope.SERVICE,
    ),
    ErrorPattern.of(
        r"Untrusted self-signed certificate|Can't get the local trusted CA certificate|certificate verify failed"
        r"|Authorization denied: The (?:name of the remote entity|expected name for the remote host)"
        r"|certificate has been revoked",
        FailureCode.CERTIFICATE,
    ),
    ErrorPattern.of(
        r"Gridmap lookup failure|^530[ -]|Unable to set the [ug]id of the server process",
        FailureCode.CREDENTIAL_REFUSED,
    ),
    # Not what a server says of another server, or of its data connections: those lines begin with a reply's number.
    ErrorPattern.of(
        r"\A(?!.*^[1-5]\d\d[ -]).*(?:Unable to connect to|getaddrinfo failed|Connection refused|Connection timed out"
        r"|No route to host|Network is unreachable)",
        FailureCode.CONNECTION,
        unreachable=True,
    ),
    ErrorPattern.of(r"^421[ -]", FailureCode.CONNECTION, unreachable=True),
    ErrorPattern.of(
        r"Unable to connect to|getaddrinfo failed|Connection refused|Connection reset by peer|Broken pipe"
        r"|Connection timed out|No route to host|Network is unreachable|an end-of-file was reached|^421[ -]"
        r"|Error while searching for end of reply|not in the proper state|the operation was aborted",
        FailureCode.CONNECTION,
    ),
    ErrorPattern.of(r"^53[46][ -][^\n]*Encryption is required", FailureCode.UNSUPPORTED),
    ErrorPattern.of(
        r"^50[0-4][ -][^\n]*(?:[Uu]nrecognized|[Nn]ot implemented|[Uu]nknown command)", FailureCode.UNSUPPORTED
    ),
)


@frozen
class GridFtpMover:
    """Third-party transfers: the bytes go from server to server; `RelayedMover` copies to other protocols."""

    job_types: frozenset[JobType] = ALL_JOB_TYPES
    helper: str = "pdm.workqueue.helpers.main_gridftp"
    needs_credential: CredentialKind | None = CredentialKind.PROXY
    prefers_credential: CredentialKind | None = None
    relays_to: frozenset[JobProtocol] = RELAYED - {JobProtocol.GRIDFTP}

    def request_for(
        self, batch: Batch, urls: SiteUrl, options: Options, limits: TimeLimits, request_id: int
    ) -> BuiltRequest:
        return build_request(batch, urls, options, limits, request_id)

    def environment(self, access: Access) -> Mapping[str, str]:
        return proxy_environment(access)

    def classify(self, fault: Fault) -> AttemptFailure:
        return classify_reply(fault, ERROR_PATTERNS)


def proxy_environment(access: Access) -> Mapping[str, str]:
    """Environment of a helper that logs in with the user's proxy."""
    values = {"X509_USER_PROXY": access.credential, "X509_CERT_DIR": access.trust_dir}
    return {name: str(path) for name, path in values.items() if path is not None}


def classify_reply(fault: Fault, patterns: Sequence[ErrorPattern]) -> AttemptFailure:
    """As `classify`, with the text of a Globus server or library as `plain_text`."""
    failure = classify(fault, patterns)
    return failure._replace(message=plain_text(failure.message))


#: What begins a line of a reply: its code, or twice the code, and the module of Globus that speaks.
_PREFIX = re.compile(r"^\d{3}[ -]+(?:\d{3}[ -]+)?|^\d{3}$")
_MODULE = re.compile(r"^(?:Login incorrect\. : )?(?:globus_\w+)(?: ?: ?|$)")
_STRUCTURED = re.compile(r"GridFTP-Error-String: ?([^\n]+)")
_SYSTEM = re.compile(r"System error in \w+: ([^\n]+)")
#: Lines that say only that something failed.
_EMPTY_WORDS = re.compile(
    r"^(?:the server responded with an error|End\.?|GSS failure:?|GSS Minor Status Error Chain:?|GSS Major Status.*"
    r"|Command failed\..*|Error with (?:gss context|GSI credential|gss credential handle)|SSL handshake problems"
    r"|Authentication Error|Could not verify credential|gss_init_sec_context failed|globus_\w+ failed\.?"
    r"|GlobusError: .*|GridFTP-\w+: .*|OpenSSL Error: .*|\S+ read callback failed\.?|callback failed\.?"
    r"|Attempt \d+|)$"
)
#: Lines that a message for people has at most.
_MOST_LINES = 3


def plain_text(text: str) -> str:
    """What a Globus server or library said, for people: one line without reply codes and names of modules.

    The attempt's log has the text as it was. A text of another kind comes back on one line.

    Args:
        text: an error of the client library, or a reply of several lines.
    """
    found = _STRUCTURED.search(text) or _SYSTEM.search(text)
    named = re.search(r"Unable to (?:open file|connect to) [^\n]+", text)
    if found is not None and re.match(r"globus_|\d{3}[ -]", text):
        said = found.group(1).strip()
        return f"{named.group(0).strip()}: {said}" if named is not None else said
    # Indented lines go on with the one before.
    lines = (_MODULE.sub("", _PREFIX.sub("", line)).strip() for line in re.sub(r"\n\s+", " ", text).splitlines())
    kept = list(dict.fromkeys(line for line in lines if _EMPTY_WORDS.match(line) is None))
    return "; ".join(line.rstrip(".;,") for line in kept[:_MOST_LINES]) or " ".join(text.split())

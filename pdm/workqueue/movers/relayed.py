"""Protocols that one helper reaches all of, so that a copy may go from any of them to any other through the service."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import FailureCode, Scope
from pdm.workqueue.domain.paths import encoded
from pdm.workqueue.movers.judging import Reading
from pdm.workqueue.movers.mover import Access

#: The helper, and what it reaches.
RELAY = "pdm.workqueue.agents.helpers.relay"
RELAYED = frozenset({JobProtocol.FILE, JobProtocol.SSH, JobProtocol.HTTPS, JobProtocol.XROOT})


def relay_environment(access: Access) -> Mapping[str, str]:
    """What the relay is told; the same for each of its protocols, for one process may serve them all."""
    values = {
        "X509_USER_PROXY": access.credential,
        "X509_CERT_DIR": access.trust_dir,
        "PDM_SSH_KEY": access.ssh_key,
        "PDM_SSH_KNOWN_HOSTS": access.ssh_known_hosts,
        "PDM_SSH_USER": access.ssh_user or None,
        "PDM_FILE_ROOTS": json.dumps([encoded(root) for root in access.roots]),
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _reading(pattern: str, code: FailureCode, scope: Scope | None = None) -> Reading:
    return Reading(re.compile(pattern, re.DOTALL | re.MULTILINE), code, scope)


#: What ssh(1) says where no session comes of it, as recorded from OpenSSH 9.2; and what a dead connection looks like.
READINGS = (
    _reading(
        r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|host key is known for",
        FailureCode.CERTIFICATE,
    ),
    _reading(
        r"Permission denied \(|Too many authentication failures|Load key|no such identity",
        FailureCode.CREDENTIAL_REFUSED,
    ),
    _reading(
        r"the connection ended|Connection (?:refused|reset|closed|timed out)|Could not resolve hostname"
        r"|No route to host|Network is unreachable|Broken pipe",
        FailureCode.CONNECTION,
    ),
)

"""The ssh(1) command line for one server, and the meaning of its error messages."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import host_and_port
from pdm.workqueue.helpers.credentials import credential_at
from pdm.workqueue.helpers.storage import StorageError, Timeouts

_LONGEST_CONNECT_S = 30.0
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*|[0-9A-Fa-f:.]+", re.ASCII)
#: Message of ssh(1), explanation, code. Recorded from OpenSSH 9.2; each was seen with a real server.
_EXPLANATIONS: tuple[tuple[re.Pattern[str], str, FailureCode], ...] = (
    (
        re.compile(r"(?:subsystem|exec) request failed|administratively prohibited"),
        "the server offers no SFTP to this account: ask the site to allow the subsystem sftp",
        FailureCode.UNSUPPORTED,
    ),
    (
        re.compile(r"no matching (?:host key type|key exchange method|cipher|MAC) found", re.IGNORECASE),
        "the server has no algorithm in common with ssh of the service: ask the site to update its SSH server",
        FailureCode.UNSUPPORTED,
    ),
    (
        re.compile(r"banner line contains invalid characters|banner exchange: .*invalid format"),
        "no SSH server answers at this address: check the port",
        FailureCode.UNSUPPORTED,
    ),
    (
        re.compile(r"REMOTE HOST IDENTIFICATION HAS CHANGED"),
        "the server has another host key than the file of known hosts has for it",
        FailureCode.HOST_KEY,
    ),
    (
        re.compile(r"host key is known for|Host key verification failed"),
        "the file of known hosts has no host key of this server",
        FailureCode.HOST_KEY,
    ),
)
#: The last line of a failed login.
_REFUSED = re.compile(r"Permission denied \([^\n]*\)")


def ssh_command(authority: str, timeouts: Timeouts) -> list[str]:
    """The command that starts the subsystem ``sftp`` of a server.

    Args:
        authority: its ``HOST:PORT``.
        timeouts: limits the time of the connection.

    Raises:
        StorageError: there is no key, or ``authority`` is no address.
    """
    host, port = host_and_port(authority)
    if not _HOST.fullmatch(host) or not (port.isdecimal() or not port):
        raise StorageError(f"{authority} is no HOST:PORT", code=FailureCode.UNSUPPORTED)
    known_hosts = os.environ.get("PDM_SSH_KNOWN_HOSTS")
    if not known_hosts:
        raise StorageError(
            "the service has no file of known hosts: set known_hosts in [ssh]", code=FailureCode.HOST_KEY
        )
    given = credential_at(JobProtocol.SSH.info.schemes, authority)
    key = os.environ.get("PDM_SSH_KEY") if given is None else given.file
    if not key:
        raise StorageError(
            "there is no SSH key to log in with", code=FailureCode.CREDENTIAL_MISSING, scope=FailureScope.SERVICE
        )
    options = {
        "BatchMode": "yes",
        **_ciphers(),
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": _quoted(known_hosts),
        "GlobalKnownHostsFile": "none",
        "UpdateHostKeys": "no",
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "IdentityFile": _quoted(key),
        "PreferredAuthentications": "publickey",
        "ControlPath": "none",
        "ClearAllForwardings": "yes",
        "ConnectTimeout": str(max(int(min(timeouts.stall_s, _LONGEST_CONNECT_S)), 1)),
        # Some errors before a login are printed only at this level, as is the server's banner.
        "LogLevel": "INFO",
    }
    command = ["ssh", "-F", "none", "-T", "-x", "-a"]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    if port:
        command += ["-p", port]
    if user := (given and given.account) or os.environ.get("PDM_SSH_USER"):
        command += ["-l", user]
    return [*command, "-s", "--", host, "sftp"]


@functools.cache
def _ciphers() -> Mapping[str, str]:
    """AES-GCM before the other ciphers of ssh(1), where the processor has instructions for it: half the work."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        # The names of the line on x86 and on ARM.
        if any(line.lower().startswith(("flags", "features")) and "aes" in line.split() for line in lines):
            return {"Ciphers": "^aes128-gcm@openssh.com"}
    return {}


def ssh_environment() -> Mapping[str, str]:
    """The environment of ssh(1): no variables of the daemon."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C"}


def explain(said: str) -> tuple[str, FailureCode | None]:
    """The output of ssh(1) with an explanation before it, and its code; None if it is not known."""
    for pattern, meaning, code in _EXPLANATIONS:
        if found := pattern.search(said):
            # For a host key the whole output, with its fingerprint; for others the line, because a banner may
            # precede it.
            return f"{meaning} ({said if code == 'HOST_KEY' else _line_at(said, found.start())})", code
    if found := _REFUSED.search(said):
        return _line_at(said, found.start()), None
    return said, None


def _line_at(text: str, position: int) -> str:
    end = text.find("\n", position)
    return text[text.rfind("\n", 0, position) + 1 : len(text) if end < 0 else end].strip()


def _quoted(path: str) -> str:
    """A path in an option of ssh(1), which splits at blanks and expands per cent signs."""
    return '"' + path.replace("%", "%%") + '"'

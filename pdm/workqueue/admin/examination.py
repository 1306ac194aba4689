"""``pdm admin check``: look at everything that a configuration names, and say what is wrong and how to mend it.

Beside a running daemon or before its start; nothing is changed. ``--check-config`` of the daemon is the same.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pdm.workqueue.admin.checks import CheckedInstance, CheckResult, Level, fault, find_problems, good, warning
from pdm.workqueue.admin.machine_checks import (
    account_name,
    check_database,
    check_directories,
    check_limits,
    check_ports,
    check_private,
)
from pdm.workqueue.agents.pool import AgentKind
from pdm.workqueue.assembly import EXPECTED_ERRORS, PREREQUISITES
from pdm.workqueue.certificates.myproxy import PROGRAM as MYPROXY_PROGRAM
from pdm.workqueue.certificates.myproxy import SEARCH_PATH as MYPROXY_SEARCH_PATH
from pdm.workqueue.certificates.pem import CertificateFilesError
from pdm.workqueue.certificates.trust import Trust, read_trust
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.formatting import display_duration
from pdm.workqueue.execution.maintenance import missing_software, unusable
from pdm.workqueue.instance_lock import running_daemon
from pdm.workqueue.policies import helper_command, server_tls
from pdm.workqueue.sites.registry import SiteRegistry

_PYTHON_KEY = "[agents] python"
_CERTIFICATE_NOTICE, _LIST_NOTICE = timedelta(days=14), timedelta(days=1)
_LITTLE_SPACE, _NO_SPACE, _FEW_INODES = 1024**3, 64 * 1024**2, 10_000
#: Descriptors that the daemon needs beside those of its connections: files, helpers with three pipes each, database.
_DESCRIPTORS, _DESCRIPTORS_OF_HELPER = 100, 6
#: Of a lease: clocks that differ by more make daemons take each other's work.
_CLOCK_SHARE = 0.1
#: File systems without locks or shared memory that SQLite could rely on.
_NETWORK_FILE_SYSTEMS = re.compile(r"nfs\d?|cifs|smb\w*|9p|fuse\.\w+|lustre|ceph|afs")


def examine(settings: Settings) -> list[CheckResult]:
    """Everything that was found, in the order of the configuration."""
    problems = find_problems(settings, database=True)
    found = [CheckResult(part="configuration", level=Level.ERROR, what=problem) for problem in problems]
    if not problems:
        found.append(good("configuration", f"{settings.source} is good"))
    instance = CheckedInstance(
        settings=settings,
        now=datetime.now(UTC),
        daemon=running_daemon(settings.state.folder),
        sites=_sites(settings),
    )
    # Without its interpreter, a helper cannot say what else is missing.
    has_python = not any(_PYTHON_KEY in problem for problem in problems)
    for check in CHECKS if has_python else [each for each in CHECKS if each is not _check_software]:
        try:
            found += check(instance)
        except EXPECTED_ERRORS as error:
            # `find_problems` has found what keeps the daemon from starting.
            text = " ".join(str(error).split())
            if not any(text in problem for problem in problems):
                found.append(CheckResult(part="configuration", level=Level.ERROR, what=text))
    return found


def _sites(settings: Settings) -> SiteRegistry | None:
    try:
        return SiteRegistry.read(settings.sites.folder)
    except EXPECTED_ERRORS:
        return None


def _check_daemon(instance: CheckedInstance) -> Iterator[CheckResult]:
    if instance.daemon is not None:
        yield good("daemon", f"it runs, pid {instance.daemon or 'unknown'}")
    else:
        yield good("daemon", "it does not run")
    state = instance.settings.state.folder
    if os.geteuid() == 0 and state.exists() and (owner := state.stat().st_uid) != 0:
        yield warning(
            "daemon",
            f"{state} belongs to the account {account_name(owner)}, and this check runs as root, which may do more",
            f"check as that account: runuser -u {account_name(owner)} -- pdm admin check {instance.settings.source}",
        )


def _check_host_certificate(instance: CheckedInstance) -> Iterator[CheckResult]:
    tls = instance.settings.tls
    identity = server_tls(instance.settings).identity
    left = identity.valid_until - instance.now
    what = f"{identity.subject} in {tls.certificate}, valid for {_span(left)}"
    if left < _CERTIFICATE_NOTICE:
        yield warning("host certificate", what, "get a new one from your authority")
    else:
        yield good("host certificate", what)
    names = identity.names
    if not names:
        yield fault(
            "host certificate", "it names no host (subjectAltName)", "get one that does: clients refuse it otherwise"
        )
    else:
        yield good("host certificate", f"for {', '.join(names[:20])}")
    host = instance.settings.server.host
    if names and host not in names and host not in {"0.0.0.0", "::"}:  # noqa: S104 - recognised, not listened on
        yield warning(
            "host certificate",
            f"[server] host {host} is not among its names",
            "let clients call the service by one of those names, or get a certificate for it",
        )
    yield from check_private("[tls] key", tls.key)


def _span(left: timedelta) -> str:
    seconds = left.total_seconds()
    return f"{int(seconds // 86400)} d" if seconds >= 2 * 86400 else display_duration(max(seconds, 0))


def _check_client_authorities(instance: CheckedInstance) -> Iterator[CheckResult]:
    tls = instance.settings.tls
    trust = read_trust(tls.trust, tls.crl, tls.signing_policy)
    yield from _authorities("[tls] trust", tls.trust, trust, instance)


def _check_storage_authorities(instance: CheckedInstance) -> Iterator[CheckResult]:
    path = instance.settings.credentials.trust_dir
    offered = set() if instance.sites is None else {each for site in instance.sites.all() for each in site.endpoints}
    if not offered & {JobProtocol.GRIDFTP, JobProtocol.HTTPS, JobProtocol.XROOT}:
        return
    try:
        trust = read_trust(path, "if-present")
    except CertificateFilesError as error:
        yield warning(
            "[credentials] trust_dir",
            str(error),
            "jobs at sites whose servers have certificates fail until it has some",
        )
        return
    yield from _authorities("[credentials] trust_dir", path, trust, instance)


def _authorities(part: str, path: Path, trust: Trust, instance: CheckedInstance) -> Iterator[CheckResult]:
    now = instance.now
    for problem in trust.problems:
        yield warning(part, problem, "correct or remove that file")
    ended = [subject for subject, end in trust.authority_ends() if end <= now]
    for subject in ended:
        yield warning(part, f"the authority {subject} has expired", "update the authorities (the package of your grid)")
    lists = {}
    for subject, issued, due in trust.list_times():
        lists[subject] = f"{_span(now - issued)} old"
        if due is not None and due <= now:
            yield fault(
                part,
                f"the revocation list of {subject} has expired {_span(now - due)} ago: its users are refused",
                "run fetch-crl, and see that it runs regularly",
            )
        elif due is not None and due <= now + _LIST_NOTICE:
            yield warning(
                part, f"the revocation list of {subject} expires in {_span(due - now)}", "see that fetch-crl runs"
            )
    yield good(part, f"{len(trust.authorities)} authorities, {len(lists)} revocation lists in {path}")
    for subject, age in lists.items():
        yield good(part, f"revocation list of {subject}: {age}")
    unlisted = trust.unlisted()
    if not unlisted or trust.policy == "off":
        return
    what = f"{len(unlisted)} authorities have no revocation list ({unlisted[0]}{', …' if len(unlisted) > 1 else ''})"
    if trust.policy == "require":
        yield fault(part, f"{what}: their users are refused", "run fetch-crl")
    elif lists or not path.is_relative_to(instance.settings.source.parent):
        yield warning(
            part, f"{what}: their revoked users are not noticed", "run fetch-crl, and see that it runs regularly"
        )
    else:
        yield good(part, what)


def _check_software(instance: CheckedInstance) -> Iterator[CheckResult]:
    if instance.sites is None:
        return
    settings, sites = instance.settings, list(instance.sites.all())
    found = missing_software(helper_command(settings, AgentKind(PREREQUISITES, "", {}), None))
    lacking = dict(unusable(sites, found))
    for what, why in lacking.items():
        yield warning(what, f"cannot be used: {why}", "until then jobs that need it are held")
    for protocol in sorted({protocol for site in sites for protocol in site.endpoints}):
        if protocol.name not in lacking:
            yield good(protocol.name, "its programs and libraries are there")
    if any(site.myproxy for site in sites) and shutil.which(MYPROXY_PROGRAM, path=MYPROXY_SEARCH_PATH) is None:
        yield warning(
            "MyProxy",
            f"there is no {MYPROXY_PROGRAM}, which 'pdm login' needs for sites with a MyProxy server",
            "install it (Debian: myproxy)",
        )
    if any(JobProtocol.SSH in site.endpoints for site in sites) and not settings.ssh.known_hosts.exists():
        yield warning(
            "[ssh] known_hosts",
            f"there is no {settings.ssh.known_hosts}: all SSH servers are refused",
            "write their host keys into it (ssh-keyscan, compared with what their operators publish)",
        )


#: All checks beside those of `find_problems`.
CHECKS: tuple[Callable[[CheckedInstance], Iterator[CheckResult]], ...] = (
    _check_daemon,
    _check_host_certificate,
    _check_client_authorities,
    _check_storage_authorities,
    check_directories,
    check_database,
    _check_software,
    check_ports,
    check_limits,
)

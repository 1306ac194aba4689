"""``pdm doctor``: what works between me, the service and its sites, and what to do about the rest."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import click
from attrs import frozen

from pdm.workqueue.cli.arguments import format_option
from pdm.workqueue.cli.display import display_width, terminal_width
from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.outcome import print_json
from pdm.workqueue.cli.session import error_text, exit_code_of, run
from pdm.workqueue.client.errors import WorkqueueClientError
from pdm.workqueue.client.inspection import ServerFacts
from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.formatting import display_duration, display_line, display_name
from pdm.workqueue.wire.credentials import CredentialView
from pdm.workqueue.wire.responses import WhoamiView
from pdm.workqueue.wire.sites import CheckView, SiteView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

#: What ends sooner needs something to be done: a certificate of service or user, a credential at a site.
_CERTIFICATE_NOTICE, _CREDENTIAL_NOTICE = timedelta(days=7), timedelta(hours=1)
#: Clocks may differ by this; certificates and proxies that were just issued are not valid yet for slower ones.
_MAX_CLOCK_OFFSET_S = 30
_COLUMNS = 80
#: From so many seconds on, only whole days are shown.
_WHOLE_DAYS_S, _DAY_S = 3 * 86400, 86400


@frozen
class Finding:
    """One line of the doctor.

    Attributes:
        part: what was looked at.
        what: what was found.
        advice: what to do, a sentence; empty if nothing needs to be done.
    """

    part: str
    what: str
    advice: str = ""


@click.command()
@click.option("--check", is_flag=True, help="Let the service also connect and log in to each site.")
@format_option
def doctor(check: bool, form: str) -> None:
    """Check the service, its certificate and mine, the clocks, and the state and my credential of each site.

    What needs to be done stands below each line. The exit status is 0 if nothing needs to be done, else 1; if the
    service cannot be called, as for all commands.
    """

    async def action(client: WorkqueueClient) -> int:
        findings: list[Finding] = []
        try:
            await _examine(client, findings, check=check)
            code: int = ExitCode.FAILED if any(finding.advice for finding in findings) else ExitCode.DONE
        except WorkqueueClientError as error:
            findings.append(Finding("server", error_text(error), error.advice))
            code = exit_code_of(error)
        if form == "json":
            print_json([{"part": each.part, "what": each.what, "advice": each.advice} for each in findings])
        else:
            click.echo("\n".join(finding_lines(findings)))
        return code

    run(action)


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """The findings, and below those that need it what to do; no line is longer than the terminal."""
    columns = terminal_width(sys.stdout) or _COLUMNS
    width = max(display_width(finding.part) for finding in findings)
    lines = []
    for finding in findings:
        head = finding.part + " " * (width - display_width(finding.part) + 2)
        blanks = " " * (width + 2)
        lines += textwrap.wrap(display_line(finding.what), columns, initial_indent=head, subsequent_indent=blanks)
        if finding.advice:
            lines += textwrap.wrap(
                display_line(finding.advice), columns, initial_indent=f"{blanks}-> ", subsequent_indent=f"{blanks}   "
            )
    return lines


async def _examine(client: WorkqueueClient, findings: list[Finding], *, check: bool) -> None:
    facts = await client.inspect_server()
    findings += _server_findings(facts, datetime.now(UTC))
    me = await client.whoami()
    findings.append(_identity_finding(me, datetime.now(UTC)))
    credentials = await client.credentials()
    for site in await client.sites():
        checks = await client.check_site(site.id) if check else ()
        findings.append(site_finding(site, credentials, checks, datetime.now(UTC)))


def _server_findings(facts: ServerFacts, now: datetime) -> Iterator[Finding]:
    left = _time_left(facts.certificate_valid_until, now)
    soon = facts.certificate_valid_until - now < _CERTIFICATE_NOTICE
    what = f"{facts.url}, version {facts.health.version}, certificate valid {left}"
    yield Finding("server", what, "Ask its operator to renew its certificate." if soon else "")
    if facts.health.status != "ok":
        parts = ", ".join(fault.part for fault in facts.health.faults)
        yield Finding("health", f"{facts.health.status}: {parts}", "Tell an operator.")
    if facts.clock_offset_s is None:
        return
    if abs(facts.clock_offset_s) <= _MAX_CLOCK_OFFSET_S:
        yield Finding("clock", "agrees with that of the server")
    else:
        ahead = "ahead of" if facts.clock_offset_s < 0 else "behind"
        yield Finding(
            "clock",
            f"{display_duration(abs(facts.clock_offset_s))} {ahead} that of the server",
            "Set the clock of this machine (NTP); if it is right, tell an operator.",
        )


def _identity_finding(me: WhoamiView, now: datetime) -> Finding:
    left = _time_left(me.certificate_valid_until, now)
    soon = me.certificate_valid_until - now < _CERTIFICATE_NOTICE
    # A proxy never lasts longer than some days.
    advice = "" if not soon or me.limited_proxy or "/CN=proxy" in me.subject else "Renew your certificate."
    return Finding("you", f"{me.subject} ({me.role}), certificate valid {left}", advice)


def _time_left(until: datetime, now: datetime) -> str:
    seconds = (until - now).total_seconds()
    if seconds <= 0:
        return "no more"
    return f"{int(seconds // _DAY_S)} d" if seconds >= _WHOLE_DAYS_S else display_duration(seconds)


def site_finding(
    site: SiteView, credentials: Sequence[CredentialView], checks: Sequence[CheckView], now: datetime
) -> Finding:
    """State of a site, the caller's credential for it, and the result of its check."""
    part = f"site {display_name(site.name)}"
    words, advice = [site.state if site.reason is None else f"{site.state}: {site.reason}"], ""
    kinds = {kind for protocol in site.protocols for kind in _kinds_of(protocol)}
    # One protocol without credentials is enough to reach a site.
    needs = bool(site.protocols) and all(_kinds_of(protocol) for protocol in site.protocols if protocol != "DUMMY")
    usable = [each for each in credentials if each.kind in kinds and each.site in (None, site.id)]
    best = max(usable, key=_end_of, default=None)
    if best is not None:
        kind = CredentialKind(best.kind).words
        if best.valid_until is None:
            words.append(kind)
        elif best.valid_until <= now:
            words.append(f"{kind} expired")
        else:
            words.append(f"{kind} valid {_time_left(best.valid_until, now)}")
    elif needs:
        words.append("no credential")
    if needs and (best is None or _end_of(best) - now < _CREDENTIAL_NOTICE):
        advice = _remedy(site, kinds)
    for each in checks:
        if not each.ok and each.failure is not None:
            words.append(f"{each.protocol}: {each.failure.code}: {each.failure.message}")
            advice = advice or each.failure.hint
    return Finding(part, ", ".join(words), advice)


def _kinds_of(protocol: str) -> tuple[str, ...]:
    """Kinds of credentials by which a protocol is used; empty also for a protocol of a newer service."""
    if protocol == JobProtocol.GRIDFTP.name:
        return (CredentialKind.PROXY.value,)
    member = JobProtocol.__members__.get(protocol)
    return () if member is None else member.info.credentials


def _end_of(credential: CredentialView) -> datetime:
    return credential.valid_until or datetime.max.replace(tzinfo=UTC)


def _remedy(site: SiteView, kinds: set[str]) -> str:
    name = display_name(site.name)
    if CredentialKind.PROXY in kinds:
        return f"Run 'pdm login {name}'." if site.myproxy is not None else "Run 'pdm delegate'."
    if CredentialKind.SSH_KEY in kinds:
        return f"Run 'pdm ssh-key {name}', and install the public key at the site."
    if CredentialKind.S3_KEY in kinds:
        return f"Run 'pdm s3-key {name}'."
    has_login = site.oidc is not None and site.oidc.client_id is not None
    return f"Run 'pdm login {name} --oidc'." if has_login else f"Run 'pdm token {name}'."

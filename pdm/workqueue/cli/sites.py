"""``pdm sites``, ``site`` and ``routes``; ``user`` and ``audit``, for operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from msgspec import UNSET

from pdm.workqueue.cli.activity import print_route_activity, print_site_activity
from pdm.workqueue.cli.arguments import MOVER_HELP, find_site, format_option
from pdm.workqueue.cli.display import stdout_table
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.oidc import has_oidc_options, oidc_body, oidc_options, print_oidc
from pdm.workqueue.cli.outcome import hint_of, print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.domain.enums import JobProtocol, JobType, MoverKind
from pdm.workqueue.domain.formatting import display_bytes, display_line, display_name, display_time, display_timestamp
from pdm.workqueue.wire.sites import AuditView, CheckView, RouteView, SiteView, UserView
from pdm.workqueue.WorkqueueClient import SiteChangeOptions, SiteOptions, WorkqueueClient

_Command = TypeVar("_Command", bound=Callable[..., Any])
_PROTOCOLS = [member.name.lower() for member in JobProtocol]


@click.command()
@click.option("--activity", is_flag=True, help="Show streams, elements and the last hour of each site instead.")
@format_option
def sites(activity: bool, form: str) -> None:
    """Show the sites and their protocols."""
    if activity:
        _show_site_activity(form)
    else:
        show_sites(form)


def _show_site_activity(form: str) -> None:
    async def action(client: WorkqueueClient) -> None:
        found = await client.site_activity()
        if form == "json":
            print_json(found)
        else:
            print_site_activity(found, {site.id: display_name(site.name) for site in await client.sites()})

    run(action)


def _site_state(site: SiteView) -> str:
    """Prefix of the description of a site that is paused or drained."""
    if site.state == "ok":
        return ""
    return f"[{site.state}: {site.reason}] " if site.state == "drained" else f"[{site.state}] "


def show_sites(form: str) -> None:
    """Run ``pdm sites``, or ``pdm site list``."""

    async def action(client: WorkqueueClient) -> None:
        found = await client.sites()
        if form == "json":
            print_json(found)
            return
        rows = [
            [
                str(site.id),
                display_name(site.name),
                ", ".join(name.lower() for name in site.protocols),
                display_name(site.default_folder),
                display_line(f"{_site_state(site)}{site.description}").strip(),
            ]
            for site in found
        ]
        header = ["ID", "NAME", "PROTOCOLS", "DIRECTORY", "DESCRIPTION"]
        click.echo(stdout_table(header, rows, right=[0], flexible=[3, 4]))

    run(action)


@click.group()
def site() -> None:
    """Add, show, check, change or remove a site. SITE is a name or a number."""


def _content_options(command: _Command) -> _Command:
    decorators = [
        *(
            click.option(f"--{name}", metavar="URL", multiple=True, help=f"Endpoint for {name.upper()}; repeatable.")
            for name in _PROTOCOLS
        ),
        click.option("--description", help="One line for people."),
        click.option("--folder", "default_folder", help="Directory to which paths are relative (default ~)."),
        click.option("--public/--private", "public", default=None, help="Visible to all users, or only to me."),
        click.option("--limit-in", type=click.IntRange(0, 1_000_000), help="Maximum streams into it; 0: the default."),
        click.option(
            "--limit-out", type=click.IntRange(0, 1_000_000), help="Maximum streams out of it; 0: the default."
        ),
        click.option(
            "--ca",
            type=click.Path(path_type=Path),
            help="PEM file of authorities that are trusted for this site only; '' removes them.",
        ),
        click.option("--myproxy", metavar="HOST:PORT", help="MyProxy server of the site; '' removes it."),
        click.option("--mover", type=click.Choice([kind.value for kind in MoverKind]), help=MOVER_HELP),
        click.option("--tape", metavar="URL", help="Its WLCG tape REST API, if HTTPS does not name it; '' removes it."),
        click.option("--fts", metavar="URL", help="FTS3 that carries out copies from and to it; '' removes it."),
        oidc_options,
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _endpoints(given: dict[str, Any]) -> dict[str, Sequence[str]]:
    return {name.upper(): list(given[name]) for name in _PROTOCOLS if given[name]}


def _site_options(given: dict[str, Any]) -> SiteOptions:
    content: SiteOptions = {}
    if given["description"] is not None:
        content["description"] = given["description"]
    if given["default_folder"] is not None:
        content["default_folder"] = given["default_folder"]
    if given["public"] is not None:
        content["public"] = given["public"]
    if given["limit_in"] is not None:
        content["limit_in"] = given["limit_in"] or None
    if given["limit_out"] is not None:
        content["limit_out"] = given["limit_out"] or None
    if given["ca"] is not None:
        content["authorities"] = _read_pem(given["ca"])
    if given["myproxy"] is not None:
        content["myproxy"] = given["myproxy"] or None
    if given["mover"] is not None:
        content["mover"] = given["mover"]
    if given["tape"] is not None:
        content["tape"] = given["tape"] or None
    if given["fts"] is not None:
        content["fts"] = given["fts"] or None
    return content


def _read_pem(path: Path) -> str:
    if path == Path():
        return ""
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--ca {path} cannot be read: {error}") from error


@site.command("add")
@click.argument("name")
@_content_options
@format_option
def add(name: str, form: str, **given: Any) -> None:
    """Create a site of mine.

    For example: pdm site add LAB --gridftp gsiftp://gridftp.lab.example.org:2811
    """
    content, endpoints = _site_options(given), _endpoints(given)
    if has_oidc_options(given):
        content["oidc"] = oidc_body(given, None)
    if not endpoints:
        raise click.UsageError(f"a site needs an endpoint: {', '.join(f'--{each}' for each in _PROTOCOLS)}")

    async def action(client: WorkqueueClient) -> None:
        _print_site(await client.add_site(name, endpoints, **content), form)

    run(action)


@site.command("change")
@click.argument("name", metavar="SITE")
@click.option("--name", "new_name", help="A new name.")
@_content_options
@format_option
def change(name: str, new_name: str | None, form: str, **given: Any) -> None:
    """Change the settings of a site; given endpoints replace all existing ones."""
    changes = cast(SiteChangeOptions, _site_options(given))
    if new_name is not None:
        changes["name"] = new_name
    if endpoints := _endpoints(given):
        changes["endpoints"] = endpoints

    async def action(client: WorkqueueClient) -> None:
        found = await find_site(client, name)
        if has_oidc_options(given):
            changes["oidc"] = oidc_body(given, found.oidc)
        _print_site(await client.change_site(found.id, **changes), form)

    run(action)


@site.command("list")
@format_option
def list_sites(form: str) -> None:
    """Show the sites and their protocols, as 'pdm sites' does."""
    show_sites(form)


@site.command("show")
@click.argument("name", metavar="SITE")
@format_option
def show(name: str, form: str) -> None:
    """Show the settings of a site, and its state."""

    async def action(client: WorkqueueClient) -> None:
        _print_site(await client.site((await find_site(client, name)).id), form)

    run(action)


@site.command("remove")
@click.argument("name", metavar="SITE")
def remove(name: str) -> None:
    """Remove a site of mine; not while unfinished jobs need it."""

    async def action(client: WorkqueueClient) -> None:
        found = await find_site(client, name)
        await client.remove_site(found.id)
        click.echo(f"site {display_name(found.name)} ({found.id}) removed")

    run(action)


@site.command("check")
@click.argument("name", metavar="SITE")
@format_option
def check(name: str, form: str) -> None:
    """Let the service check a site with my credentials: connection, login and listing at each endpoint."""

    async def action(client: WorkqueueClient) -> int:
        checks = await client.check_site((await find_site(client, name)).id)
        if form == "json":
            print_json(checks)
        else:
            for each in checks:
                _print_check(each)
        return _check_exit_code(checks)

    run(action)


def _check_exit_code(checks: Sequence[CheckView]) -> ExitCode:
    working = sum(1 for each in checks if each.ok)
    if working == len(checks):
        return ExitCode.DONE
    return ExitCode.PARTIAL if working else ExitCode.FAILED


def _print_check(found: CheckView) -> None:
    steps = (("reachable", found.reachable), ("login", found.login), ("listing", found.listing))
    words = ", ".join(f"{name} {'?' if good is None else 'yes' if good else 'NO'}" for name, good in steps)
    click.echo(f"{found.protocol.lower()} {found.url}: {words} ({found.seconds:.1f} s)")
    if found.failure is not None:
        click.echo(f"    {found.failure.scope} {found.failure.code}: {display_line(found.failure.message)}")
        click.echo(f"    {hint_of(found.failure.code, found.failure.hint, JobType.LIST.name)}")


@site.command("drain")
@click.argument("name", metavar="SITE")
@click.argument("message")
@format_option
def drain(name: str, message: str, form: str) -> None:
    """For operators: start nothing new at a site. Users see MESSAGE; their jobs wait."""

    async def action(client: WorkqueueClient) -> None:
        _print_site(await client.drain_site((await find_site(client, name)).id, message), form)

    run(action)


@site.command("resume")
@click.argument("name", metavar="SITE")
@format_option
def resume(name: str, form: str) -> None:
    """For operators: end the drain of a site."""

    async def action(client: WorkqueueClient) -> None:
        _print_site(await client.resume_site((await find_site(client, name)).id), form)

    run(action)


def _print_site(found: SiteView, form: str) -> None:
    if form == "json":
        print_json(found)
        return
    if not found.protocols:
        raise CommandError(ExitCode.FAILED, "the site has no endpoint")
    whose = "of the service" if found.owner is None else f"of user {found.owner}"
    click.echo(f"site {found.id}  {display_name(found.name)}, {'public' if found.public else 'private'}, {whose}")
    if found.description:
        click.echo(f"about     {display_line(found.description)}")
    click.echo(f"directory    {display_name(found.default_folder)}")
    for protocol in found.protocols:
        for url in (found.endpoints[protocol], *found.alternatives.get(protocol, ())):
            click.echo(f"endpoint  {protocol.lower()} {url}")
    for word, limit in (("go in", found.limit_in), ("come out", found.limit_out)):
        if limit is not None:
            click.echo(f"limit     {limit} streams may {word} at once")
    for subject in found.authorities:
        click.echo(f"trusts    {display_line(subject)}, for this site only")
    if found.myproxy is not None:
        click.echo(f"logon     at {found.myproxy}")
    if found.mover == MoverKind.TOOLS:
        click.echo("mover     tools: globus-url-copy and gfal carry out its jobs")
    if found.tape is not None:
        click.echo(f"tape      {found.tape}")
    if found.fts is not None:
        click.echo(f"copies    by the FTS3 at {found.fts}")
    if found.oidc is not None:
        print_oidc(found.oidc)
    click.echo(f"state     {found.state}{'' if found.reason is None else ': ' + display_line(found.reason)}")
    for each in () if found.health is UNSET else found.health:
        if each.state != "closed":
            when = "" if each.next_try is None else f", tried again at {display_timestamp(each.next_try)}"
            click.echo(f"away      {each.url}: {each.failures} failures{when}: {display_line(each.reason)}")


@click.command()
@click.option("--activity", is_flag=True, help="For operators: show what ended in the last 24 hours instead.")
@format_option
def routes(activity: bool, form: str) -> None:
    """Show streams between sites, and their limits.

    RUNNING is the number of concurrent streams, up to LIMIT; the limit is adjusted by the measured throughput, up to
    MOST. WHY is the reason for its latest change. Each node has its own.
    """

    async def action(client: WorkqueueClient) -> None:
        if activity:
            ended = await client.route_activity()
            if form == "json":
                print_json(ended)
            else:
                print_route_activity(ended, {site.id: display_name(site.name) for site in await client.sites()})
            return
        found = await client.routes()
        if form == "json":
            print_json(found)
            return
        names = {site.id: display_name(site.name) for site in await client.sites()}

        def name(number: int | None) -> str:
            return "-" if number is None else names.get(number, str(number))

        named = any(route.node is not None for route in found)
        rows = [
            [
                *([display_name(route.node or "-")] if named else []),
                name(route.source),
                name(route.destination),
                str(route.running),
                str(route.limit),
                str(route.most),
                _throughput(route),
                display_time(route.changed_at.timestamp()),
                display_line(route.reason),
            ]
            for route in found
        ]
        head = ["FROM", "TO", "RUNNING", "LIMIT", "MOST", "THROUGHPUT", "SINCE (UTC)", "WHY"]
        numbers, texts = ((place + named for place in places) for places in ((2, 3, 4, 5), (0, 1, 7)))
        click.echo(stdout_table([*(["NODE"] if named else []), *head], rows, right=[*numbers], flexible=[*texts]))

    run(action)


def _throughput(route: RouteView) -> str:
    if route.throughput is None:
        return "-"
    return (
        f"{display_bytes(route.throughput)}/s" if route.unit == "bytes/s" else f"{route.throughput:,.0f} {route.unit}"
    )


_PAGE_SIZE = 1000
_USER_NUMBER = click.IntRange(min=1, max=2**63 - 1)


@click.group()
def user() -> None:
    """For operators: list, ban and unban users."""


@user.command("list")
@format_option
def list_users(form: str) -> None:
    """Show all users."""

    async def action(client: WorkqueueClient) -> None:
        found: list[UserView] = []
        while page := await client.users(limit=_PAGE_SIZE, after=found[-1].id if found else None):
            found += page
        if form == "json":
            print_json(found)
        else:
            rows = [[str(one.id), one.role, display_line(one.subject), display_line(one.banned or "")] for one in found]
            click.echo(stdout_table(["ID", "ROLE", "SUBJECT", "BANNED"], rows, right=[0], flexible=[2, 3]))

    run(action)


@user.command("ban")
@click.argument("number", metavar="N", type=_USER_NUMBER)
@click.argument("message")
def ban(number: int, message: str) -> None:
    """Ban user N from submitting and starting jobs; the user sees MESSAGE."""

    async def action(client: WorkqueueClient) -> None:
        found = await client.ban(number, message)
        click.echo(f"user {found.id} {display_line(found.subject)} is banned")

    run(action)


@user.command("unban")
@click.argument("number", metavar="N", type=_USER_NUMBER)
def unban(number: int) -> None:
    """End the ban of user N."""

    async def action(client: WorkqueueClient) -> None:
        found = await client.unban(number)
        click.echo(f"user {found.id} {display_line(found.subject)} is not banned")

    run(action)


@click.command()
@format_option
def audit(form: str) -> None:
    """For operators: show the audit log of sites and users, the oldest entry first."""

    async def action(client: WorkqueueClient) -> None:
        found: list[AuditView] = []
        while page := await client.audit(limit=_PAGE_SIZE, after=found[-1].id if found else None):
            found += page
        if form == "json":
            print_json(found)
        else:
            for one in found:
                line = f"{display_timestamp(one.at)}  {one.subject}  {one.action} {one.target}  {one.details}"
                click.echo(display_line(line))

    run(action)

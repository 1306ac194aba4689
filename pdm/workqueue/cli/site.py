"""``pdm site``: add, list, show, check, change and remove sites; drain and resume them, for operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from msgspec import UNSET

from pdm.workqueue.cli.account import show_sites
from pdm.workqueue.cli.arguments import format_option
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.following import hint_of, print_json
from pdm.workqueue.cli.places import find_site
from pdm.workqueue.cli.session import run
from pdm.workqueue.cli.text import shown_line, shown_moment, shown_name
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.wire.responses import CheckView, SiteView
from pdm.workqueue.WorkqueueClient import SiteChanges, SiteOptions, WorkqueueClient

_Command = TypeVar("_Command", bound=Callable[..., Any])
_PROTOCOLS = [member.name.lower() for member in JobProtocol]


@click.group()
def site() -> None:
    """Add, show, check, change or remove a site. SITE is a name or a number."""


def _content_options(command: _Command) -> _Command:
    """What may be said about a site."""
    decorators = [
        *(
            click.option(f"--{name}", metavar="URL", multiple=True, help=f"Endpoint for {name.upper()}, repeatable.")
            for name in _PROTOCOLS
        ),
        click.option("--description", help="One line for people."),
        click.option("--folder", "default_folder", help="Where relative paths begin (~ without it)."),
        click.option("--public/--private", "public", default=None, help="Who sees and uses it: everybody, or only I."),
        click.option("--limit-in", type=click.IntRange(0, 1_000_000), help="Most streams into it; 0: as for all."),
        click.option("--limit-out", type=click.IntRange(0, 1_000_000), help="Most streams out of it; 0: as for all."),
        click.option(
            "--ca",
            type=click.Path(path_type=Path),
            help="PEM file of authorities that are trusted for this site only; '' takes them away.",
        ),
        click.option("--myproxy", metavar="HOST:PORT", help="Where its users log on; '' takes it away."),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _endpoints(given: dict[str, Any]) -> dict[str, Sequence[str]]:
    """Protocol → URLs."""
    return {name.upper(): list(given[name]) for name in _PROTOCOLS if given[name]}


def _content(given: dict[str, Any]) -> SiteOptions:
    """What the other options say about a site, in the words of the API."""
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
        content["authorities"] = _pem(given["ca"])
    if given["myproxy"] is not None:
        content["myproxy"] = given["myproxy"] or None
    return content


def _pem(path: Path) -> str:
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
    """Add a site of my own.

    For example: pdm site add LAB --gridftp gsiftp://gridftp.lab.example.org:2811
    """
    content, endpoints = _content(given), _endpoints(given)
    if not endpoints:
        raise click.UsageError(f"a site has at least one endpoint: {', '.join(f'--{each}' for each in _PROTOCOLS)}")

    async def action(client: WorkqueueClient) -> int:
        _print(await client.add_site(name, endpoints, **content), form)
        return ExitCode.DONE

    run(action)


@site.command("change")
@click.argument("name", metavar="SITE")
@click.option("--name", "new_name", help="A new name.")
@_content_options
@format_option
def change(name: str, new_name: str | None, form: str, **given: Any) -> None:
    """Change what is said about a site; endpoints that are given replace all there were."""
    changes = cast(SiteChanges, _content(given))
    if new_name is not None:
        changes["name"] = new_name
    if endpoints := _endpoints(given):
        changes["endpoints"] = endpoints

    async def action(client: WorkqueueClient) -> int:
        _print(await client.change_site((await find_site(client, name)).id, **changes), form)
        return ExitCode.DONE

    run(action)


@site.command("list")
@format_option
def list_(form: str) -> None:
    """Show the sites and what they offer, as 'pdm sites' does."""
    show_sites(form)


@site.command("show")
@click.argument("name", metavar="SITE")
@format_option
def show(name: str, form: str) -> None:
    """Show all about a site, and whether it can be reached."""

    async def action(client: WorkqueueClient) -> int:
        _print(await client.site((await find_site(client, name)).id), form)
        return ExitCode.DONE

    run(action)


@site.command("remove")
@click.argument("name", metavar="SITE")
def remove(name: str) -> None:
    """Remove a site of mine; not while jobs that have not ended need it."""

    async def action(client: WorkqueueClient) -> int:
        found = await find_site(client, name)
        await client.remove_site(found.id)
        click.echo(f"site {shown_name(found.name)} ({found.id}) removed")
        return ExitCode.DONE

    run(action)


@site.command("check")
@click.argument("name", metavar="SITE")
@format_option
def check(name: str, form: str) -> None:
    """Have the service connect to a site for me, and say what works at each endpoint."""

    async def action(client: WorkqueueClient) -> int:
        checks = await client.check_site((await find_site(client, name)).id)
        if form == "json":
            print_json(checks)
        else:
            for each in checks:
                _print_check(each)
        return _exit_code(checks)

    run(action)


def _exit_code(checks: Sequence[CheckView]) -> ExitCode:
    working = sum(1 for each in checks if each.ok)
    if working == len(checks):
        return ExitCode.DONE
    return ExitCode.PARTIAL if working else ExitCode.FAILED


def _print_check(found: CheckView) -> None:
    steps = (("reachable", found.reachable), ("login", found.login), ("listing", found.listing))
    words = ", ".join(f"{name} {'?' if good is None else 'yes' if good else 'NO'}" for name, good in steps)
    click.echo(f"{found.protocol.lower()} {found.url}: {words} ({found.seconds:.1f} s)")
    if found.failure is not None:
        click.echo(f"    {found.failure.scope} {found.failure.code}: {shown_line(found.failure.message)}")
        click.echo(f"    {hint_of(found.failure.code, found.failure.hint, JobType.LIST.name)}")


@site.command("drain")
@click.argument("name", metavar="SITE")
@click.argument("message")
@format_option
def drain(name: str, message: str, form: str) -> None:
    """For operators: let nothing new start at a site. Users see MESSAGE; their jobs wait."""

    async def action(client: WorkqueueClient) -> int:
        _print(await client.drain_site((await find_site(client, name)).id, message), form)
        return ExitCode.DONE

    run(action)


@site.command("resume")
@click.argument("name", metavar="SITE")
@format_option
def resume(name: str, form: str) -> None:
    """For operators: end the drain of a site."""

    async def action(client: WorkqueueClient) -> int:
        _print(await client.resume_site((await find_site(client, name)).id), form)
        return ExitCode.DONE

    run(action)


def _print(found: SiteView, form: str) -> None:
    if form == "json":
        print_json(found)
        return
    if not found.protocols:
        raise CommandError(ExitCode.FAILED, "the site has no endpoint")
    whose = "of the service" if found.owner is None else f"of user {found.owner}"
    click.echo(f"site {found.id}  {shown_name(found.name)}, {'public' if found.public else 'private'}, {whose}")
    if found.description:
        click.echo(f"about     {shown_line(found.description)}")
    click.echo(f"folder    {shown_name(found.default_folder)}")
    for protocol in found.protocols:
        for url in (found.endpoints[protocol], *found.alternatives.get(protocol, ())):
            click.echo(f"endpoint  {protocol.lower()} {url}")
    for word, limit in (("go in", found.limit_in), ("come out", found.limit_out)):
        if limit is not None:
            click.echo(f"limit     {limit} streams may {word} at once")
    for subject in found.authorities:
        click.echo(f"trusts    {shown_line(subject)}, for this site only")
    if found.myproxy is not None:
        click.echo(f"logon     at {found.myproxy}")
    click.echo(f"state     {found.state}{'' if found.reason is None else ': ' + shown_line(found.reason)}")
    for each in () if found.health is UNSET else found.health:
        if each.state != "closed":
            when = "" if each.next_try is None else f", tried again at {shown_moment(each.next_try)}"
            click.echo(f"away      {each.url}: {each.failures} failures{when}: {shown_line(each.reason)}")

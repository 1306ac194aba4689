"""Arguments and options that several commands share, and the look-up of the sites and users that they name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click
from attrs import frozen

from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.text import display_name
from pdm.workqueue.domain.enums import RELAYED, TOOL_PROTOCOLS, JobProtocol, MoverKind
from pdm.workqueue.domain.paths import text_from_bytes
from pdm.workqueue.wire.responses import SiteView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

_Command = TypeVar("_Command", bound=Callable[..., Any])

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)?")
_UNITS_S = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
#: Names of options that go by other words in ``extra_opts`` than Python's.
_OPTION_PARTS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


@frozen
class SitePath:
    """A path at a site, as typed; `site` is a name or a number in digits, `path` may be empty."""

    site: str
    path: str


class SitePathType(click.ParamType[SitePath]):
    """``SITE:path``."""

    name = "SITE:path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> SitePath:
        if isinstance(value, SitePath):
            return value
        site, colon, path = str(value).partition(":")
        if not colon or not site or "/" in site:
            self.fail(f"{value!r} is not of the form SITE:path (see 'pdm sites').", param, ctx)
        # The bytes that were typed, in the API's own spelling of what is not UTF-8.
        return SitePath(site, text_from_bytes(os.fsencode(path)))


class DurationType(click.ParamType[float]):
    """``90``, ``90s``, ``5m``, ``12h``, ``2d``; seconds come out."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = _DURATION.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a duration: 90s, 5m, 12h and 2d are.", param, ctx)
        return float(match[1]) * _UNITS_S[match[2]]


class TimestampType(click.ParamType[datetime]):
    """A moment (``2026-03-02``, ``2026-03-02T11:04``; UTC) or how long ago it was (``12h``)."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        text = str(value).strip()
        match = _DURATION.fullmatch(text)
        if match is not None and match[2] is not None:
            return datetime.now(UTC) - timedelta(seconds=float(match[1]) * _UNITS_S[match[2]])
        try:
            timestamp = datetime.fromisoformat(text)
        except ValueError:
            self.fail(f"{value!r} is neither a moment (2026-03-02T11:04) nor a time ago (12h).", param, ctx)
        return timestamp.astimezone(UTC) if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)


class ExtraOptionType(click.ParamType[tuple[str, Any]]):
    """``KEY=VALUE``; VALUE is JSON, or text where it is not; a dotted KEY goes into an object."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not _OPTION_PARTS.fullmatch(key):
            self.fail(f"{value!r} is not of the form KEY=VALUE.", param, ctx)
        try:
            return key, json.loads(text)
        except ValueError:
            return key, text


SITE_PATH = SitePathType()
DURATION = DurationType()
TIMESTAMP = TimestampType()
JOB_NUMBER = click.IntRange(min=1, max=2**63 - 1)


def merged_options(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object that dotted keys describe.

    Raises:
        click.UsageError: a key is given as a value and as an object.
    """
    options: dict[str, Any] = {}
    for key, value in pairs:
        *outer, last = key.split(".")
        inner = options
        for part in outer:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise click.UsageError(f"--option {key}: {part} already has a value.")
        inner[last] = value
    return options


def _chosen_format(ctx: click.Context, _param: click.Parameter, value: str | None) -> str:
    """The command's own -F, else that before the command (``pdm -F json jobs``), else text."""
    return value or ctx.find_root().params.get("form") or "text"


def format_option(command: _Command) -> _Command:
    """``-F text|json``."""
    return click.option(
        "-F",
        "--format",
        "form",
        type=click.Choice(["text", "json"]),
        callback=_chosen_format,
        help="What stdout gets: text for people (default), or JSON as the API gives it.",
    )(command)


def protocol_option(command: _Command) -> _Command:
    """``--protocol``."""
    return click.option(
        "--protocol",
        type=click.Choice([member.name.lower() for member in JobProtocol], case_sensitive=False),
        help="How to move (default: what the sites offer, GridFTP first).",
    )(command)


#: Of the option ``--mover``.
MOVER_HELP = "Who moves: the service's own clients (native), or globus-url-copy and gfal (tools)."


def mover_option(command: _Command) -> _Command:
    """``--mover``."""
    return click.option(
        "--mover",
        type=click.Choice([kind.value for kind in MoverKind]),
        help=f"{MOVER_HELP} Without it, as the sites say.",
    )(command)


def submit_options(command: _Command) -> _Command:
    """The options of all commands that submit a job."""
    decorators = [
        protocol_option,
        mover_option,
        click.option("--priority", type=click.IntRange(0, 9), help="0 is served first (default 5)."),
        click.option("--max-tries", type=click.IntRange(1, 10), help="Attempts for each element (default 2)."),
        click.option("--label", help="A word to find the job by."),
        click.option(
            "--option",
            "options",
            type=ExtraOptionType(),
            multiple=True,
            help="Further option of the job; VALUE is JSON, KEY may be nested (dummy.delay=1).",
        ),
        click.option(
            "--no-wait", is_flag=True, help="Print the number of the job as soon as it is registered, and return."
        ),
        click.option("--timeout", type=DURATION, help="Wait no longer than this (90s, 5m, 12h); the job goes on."),
        format_option,
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


#: Users that are asked for at a time.
_USERS_PAGE_SIZE = 1000


@frozen
class ResolvedSitePath:
    """A place at a site that exists."""

    site: SiteView
    path: str


async def resolve_paths(client: WorkqueueClient, *places: SitePath) -> list[ResolvedSitePath]:
    """Look up the sites of places; without a path, the place is the site's default folder.

    Raises:
        CommandError: there is no such site.
    """
    sites = await client.sites()
    found = []
    for place in places:
        site = _find_site(sites, place.site)
        found.append(ResolvedSitePath(site, place.path or site.default_folder or "/"))
    return found


async def find_site(client: WorkqueueClient, name: str) -> SiteView:
    """Look up a site by name or number.

    Raises:
        CommandError: there is none.
    """
    return _find_site(await client.sites(), name)


def _find_site(sites: Sequence[SiteView], name: str) -> SiteView:
    # A site may be named by digits: its name counts before another's number.
    for same in (lambda site: site.name == name, lambda site: str(site.id) == name):
        for site in sites:
            if same(site):
                return site
    known = ", ".join(sorted(f"{display_name(site.name)} ({site.id})" for site in sites)) or "none"
    raise CommandError(ExitCode.NOT_FOUND, f"no site {display_name(name)}", f"Known sites: {known}.")


async def user_number(client: WorkqueueClient, name: str) -> int:
    """The number of a user, by number, subject or common name; for operators.

    Raises:
        CommandError: there is no such user, or several have that common name.
    """
    if name.isascii() and name.isdecimal():
        return int(name)
    found = []
    after: int | None = None
    while page := await client.users(limit=_USERS_PAGE_SIZE, after=after):
        found += [each for each in page if name in (each.subject, common_name(each.subject))]
        after = page[-1].id
    if len(found) == 1:
        return found[0].id
    if found:
        numbers = ", ".join(f"{each.id} ({display_name(each.subject)})" for each in found)
        raise CommandError(
            ExitCode.USAGE, f"several users are called {display_name(name)}", f"Name a number: {numbers}."
        )
    raise CommandError(ExitCode.NOT_FOUND, f"no user {display_name(name)}", "See 'pdm user list'.")


def common_name(subject: str) -> str:
    """The last common name of a subject in slash form; the whole of it where it has none."""
    return display_name(subject.rpartition("/CN=")[2] or subject)


def protocol_for(sites: Sequence[SiteView], asked: str | None, mover: str | None = None) -> JobProtocol:
    """How to move: as asked, else GridFTP where all the sites offer it, else the first that they all offer.

    Where they have nothing in common, the first by which the service itself can carry the bytes from the source to the
    destination. Simulated work comes last: nobody should believe that it has moved a file.

    Args:
        sites: the source, then the destination where it is another one.
        asked: as typed, None to choose.
        mover: as typed, None for what the sites say.

    Raises:
        CommandError: no protocol leads from the one to the other.
    """
    if asked is not None:
        return JobProtocol.parse(asked)
    offered = [{protocol for protocol in JobProtocol if protocol.name in site.protocols} for site in sites]
    common = set.intersection(*offered)
    by_tools = MoverKind.TOOLS in ([site.mover for site in sites] if mover is None else [mover])
    reaching = TOOL_PROTOCOLS if by_tools else RELAYED
    relayed = offered[0] & reaching if offered[-1] & reaching else set()
    for choice in (common - {JobProtocol.DUMMY}, relayed, common):
        if choice:
            return min(choice)
    offers = "; ".join(f"{display_name(site.name)} offers {', '.join(site.protocols) or 'nothing'}" for site in sites)
    others = ", ".join(protocol.name for protocol in sorted(reaching))
    raise CommandError(
        ExitCode.USAGE,
        f"no protocol leads from the one site to the other: {offers}",
        f"Copies stay within one protocol, or go from one of {others} to another of these.",
    )

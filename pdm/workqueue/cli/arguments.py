"""Arguments and options shared by several commands, and the look-up of the sites and users that they name."""

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
from pdm.workqueue.client import settings as client_sites
from pdm.workqueue.client.errors import NoCommonProtocolError, UnknownSiteError
from pdm.workqueue.client.settings import choose_protocol
from pdm.workqueue.domain.enums import JobProtocol, MoverKind
from pdm.workqueue.domain.formatting import display_name
from pdm.workqueue.domain.paths import text_from_bytes
from pdm.workqueue.wire.requests import MOST_ACTIVE
from pdm.workqueue.wire.sites import SiteView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

_Command = TypeVar("_Command", bound=Callable[..., Any])

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)?")
_UNITS_S = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
#: Dotted keys of ``extra_opts``.
_OPTION_PARTS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


#: What to do instead of naming a file of this machine, or its standard input and output.
_NO_LOCAL_FILES = (
    "The service moves data between sites, and has no way to files of this machine: add its storage as a site"
    " ('pdm site add'), or bring the file to a site with a tool of that site (scp, curl, gfal-copy)."
)


@frozen
class SitePath:
    """A path at a site, as typed; `site` is a name or a number, `path` may be empty."""

    site: str
    path: str


class SitePathType(click.ParamType[SitePath]):
    """``SITE:path``; with `site_alone` also ``SITE``, which is ``SITE:``."""

    name = "SITE:path"

    def __init__(self, *, site_alone: bool = False) -> None:
        self._site_alone = site_alone

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> SitePath:
        if isinstance(value, SitePath):
            return value
        site, colon, path = str(value).partition(":")
        if not colon and site == "-":
            self.fail(f"{value!r} is no place of the form SITE:path. {_NO_LOCAL_FILES}", param, ctx)
        if not site or "/" in site or (not colon and not self._site_alone):
            advice = "see 'pdm sites'"
            if not colon and site and "/" not in site:
                advice = f"for the default directory of a site {site}, type {site}: with its colon; {advice}"
            local = f" {_NO_LOCAL_FILES}" if "/" in site else ""
            self.fail(f"{value!r} is not of the form SITE:path ({advice}).{local}", param, ctx)
        # The typed bytes, with the API's encoding of names that are not UTF-8.
        return SitePath(site, text_from_bytes(os.fsencode(path)))


class DurationType(click.ParamType[float]):
    """``90``, ``90s``, ``5m``, ``12h``, ``2d``; converts to seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = _DURATION.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a duration, such as 90s, 5m, 12h or 2d.", param, ctx)
        return float(match[1]) * _UNITS_S[match[2]]


class TimestampType(click.ParamType[datetime]):
    """A timestamp (``2026-03-02``, ``2026-03-02T11:04``; UTC) or a time before now (``12h``)."""

    name = "timestamp"
    direction, direction_words = -1, "before"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        text = str(value).strip()
        match = _DURATION.fullmatch(text)
        if match is not None and match[2] is not None:
            return datetime.now(UTC) + self.direction * timedelta(seconds=float(match[1]) * _UNITS_S[match[2]])
        try:
            timestamp = datetime.fromisoformat(text)
        except ValueError:
            text = f"{value!r} is neither a timestamp (2026-03-02T11:04) nor a time {self.direction_words} now (12h)."
            self.fail(text, param, ctx)
        return timestamp.astimezone(UTC) if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)


class EndType(TimestampType):
    """A timestamp (``2026-03-02``, ``2026-03-02T11:04``; UTC) or a time from now (``12h``)."""

    direction, direction_words = 1, "from"


class ExtraOptionType(click.ParamType[tuple[str, Any]]):
    """``KEY=VALUE``; VALUE is JSON, or else text; a dotted KEY addresses a member of an object."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not _OPTION_PARTS.fullmatch(key):
            self.fail(f"{value!r} is not of the form KEY=VALUE.", param, ctx)
        if not text.isascii() and text != text.encode(errors="replace").decode():
            self.fail(f"the value of {key} is not UTF-8.", param, ctx)
        try:
            return key, json.loads(text)
        except ValueError:
            return key, text


SITE_PATH = SitePathType()
#: For commands that read: ``SITE`` alone is its default directory.
SITE_OR_PATH = SitePathType(site_alone=True)
DURATION = DurationType()
TIMESTAMP = TimestampType()
END = EndType()
JOB_NUMBER = click.IntRange(min=1, max=2**63 - 1)


def merged_options(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Convert dotted keys to a nested object.

    Raises:
        click.UsageError: a key has a value and members.
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
    """The command's own -F, else the one before the command (``pdm -F json jobs``), else text."""
    return value or ctx.find_root().params.get("form") or "text"


def format_option(command: _Command) -> _Command:
    return click.option(
        "-F",
        "--format",
        "form",
        type=click.Choice(["text", "json"]),
        callback=_chosen_format,
        help="Format of stdout: text for people (default), or JSON as returned by the API.",
    )(command)


def protocol_option(command: _Command) -> _Command:
    return click.option(
        "--protocol",
        type=click.Choice([member.name.lower() for member in JobProtocol], case_sensitive=False),
        help="Transfer protocol (default: one that the sites offer, GridFTP first).",
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


def _utf8_only(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """The value, if JSON can hold it: bytes that are not UTF-8 are surrogates in arguments."""
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise click.BadParameter("it is not UTF-8.") from error
    return value


def submit_options(command: _Command) -> _Command:
    """Options of all commands that submit a job."""
    decorators = [
        protocol_option,
        mover_option,
        click.option("--priority", type=click.IntRange(0, 9), help="0 is served first (default 5)."),
        click.option("--max-tries", type=click.IntRange(1, 10), help="Attempts for each element (default 2)."),
        click.option("--label", callback=_utf8_only, help="A word by which to find the job."),
        click.option("--max-active", type=click.IntRange(1, MOST_ACTIVE), help="Run at most so many elements at once."),
        click.option(
            "--after",
            metavar="N",
            type=JOB_NUMBER,
            multiple=True,
            help="Begin when job N is DONE; cancelled if it fails. May be repeated.",
        ),
        click.option("--after-any", is_flag=True, help="With --after: begin however those jobs end."),
        click.option("--notify", metavar="WHAT,...", help="Mail me of this job: ended, failed, held."),
        click.option("--deadline", help="Cancel the job unless it has ended by then (12h, 2026-03-02T11:04Z)."),
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
        click.option("--timeout", type=DURATION, help="Maximum time to wait (90s, 5m, 12h); the job continues."),
        format_option,
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


#: Users in one page.
_USERS_PAGE_SIZE = 1000


@frozen
class ResolvedSitePath:
    """A path at an existing site."""

    site: SiteView
    path: str


async def resolve_paths(client: WorkqueueClient, *places: SitePath) -> list[ResolvedSitePath]:
    """Look up the sites of places; an empty path becomes the site's default directory.

    Raises:
        CommandError: a site does not exist.
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
        CommandError: it does not exist.
    """
    return _find_site(await client.sites(), name)


def _find_site(sites: Sequence[SiteView], name: str) -> SiteView:
    try:
        return client_sites.find_site(sites, name)
    except UnknownSiteError as error:
        raise CommandError(ExitCode.NOT_FOUND, error.what, error.advice) from error


async def user_number(client: WorkqueueClient, name: str) -> int:
    """Look up the number of a user by number, subject or common name; for operators.

    Raises:
        CommandError: the user does not exist, or several have that common name.
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
            ExitCode.USAGE, f"several users have the name {display_name(name)}", f"Use a number: {numbers}."
        )
    raise CommandError(ExitCode.NOT_FOUND, f"no user {display_name(name)}", "See 'pdm user list'.")


def common_name(subject: str) -> str:
    """The last common name of a subject in slash form; without one, the whole subject."""
    return display_name(subject.rpartition("/CN=")[2] or subject)


def protocol_for(sites: Sequence[SiteView], requested: str | None, mover: str | None = None) -> JobProtocol:
    """The requested protocol, else the one that `choose_protocol` chooses.

    Raises:
        CommandError: no protocol connects the sites.
    """
    if requested is not None:
        return JobProtocol.parse(requested)
    try:
        return choose_protocol(sites, mover)
    except NoCommonProtocolError as error:
        raise CommandError(ExitCode.USAGE, error.what, error.advice) from error

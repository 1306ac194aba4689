"""From what was typed to what the API wants: site numbers, paths, and the way to move."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from pdm.workqueue.cli.arguments import Place
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.text import shown_name
from pdm.workqueue.domain.enums import RELAYED, JobProtocol
from pdm.workqueue.wire.responses import SiteView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

#: Users that are asked for at a time.
_USERS_PAGE = 1000


@frozen
class Found:
    """A place at a site that exists."""

    site: SiteView
    path: str


async def find(client: WorkqueueClient, *places: Place) -> list[Found]:
    """Look up the sites of places; without a path, the place is the site's default folder.

    Raises:
        CommandError: there is no such site.
    """
    sites = await client.sites()
    found = []
    for place in places:
        site = _site(sites, place.site)
        found.append(Found(site, place.path or site.default_folder or "/"))
    return found


async def find_site(client: WorkqueueClient, name: str) -> SiteView:
    """Look up a site by name or number.

    Raises:
        CommandError: there is none.
    """
    return _site(await client.sites(), name)


def _site(sites: Sequence[SiteView], name: str) -> SiteView:
    # A site may be named by digits: its name counts before another's number.
    for same in (lambda site: site.name == name, lambda site: str(site.id) == name):
        for site in sites:
            if same(site):
                return site
    known = ", ".join(sorted(f"{shown_name(site.name)} ({site.id})" for site in sites)) or "none"
    raise CommandError(ExitCode.NOT_FOUND, f"no site {shown_name(name)}", f"Known sites: {known}.")


async def user_number(client: WorkqueueClient, name: str) -> int:
    """The number of a user, by number, subject or common name; for operators.

    Raises:
        CommandError: there is no such user, or several have that common name.
    """
    if name.isascii() and name.isdecimal():
        return int(name)
    found = []
    after: int | None = None
    while page := await client.users(limit=_USERS_PAGE, after=after):
        found += [each for each in page if name in (each.subject, common_name(each.subject))]
        after = page[-1].id
    if len(found) == 1:
        return found[0].id
    if found:
        numbers = ", ".join(f"{each.id} ({shown_name(each.subject)})" for each in found)
        raise CommandError(ExitCode.USAGE, f"several users are called {shown_name(name)}", f"Name a number: {numbers}.")
    raise CommandError(ExitCode.NOT_FOUND, f"no user {shown_name(name)}", "See 'pdm user list'.")


def common_name(subject: str) -> str:
    """The last common name of a subject in slash form; the whole of it where it has none."""
    return shown_name(subject.rpartition("/CN=")[2] or subject)


def protocol_for(sites: Sequence[SiteView], asked: str | None) -> JobProtocol:
    """How to move: as asked, else GridFTP where all the sites offer it, else the first that they all offer.

    Where they have nothing in common, the first by which the service itself can carry the bytes from the source to the
    destination. Simulated work comes last: nobody should believe that it has moved a file.

    Args:
        sites: the source, then the destination where it is another one.
        asked: as typed, None to choose.

    Raises:
        CommandError: no protocol leads from the one to the other.
    """
    if asked is not None:
        return JobProtocol.parse(asked)
    offered = [{protocol for protocol in JobProtocol if protocol.name in site.protocols} for site in sites]
    common = set.intersection(*offered)
    relayed = offered[0] & RELAYED if offered[-1] & RELAYED else set()
    for choice in (common - {JobProtocol.DUMMY}, relayed, common):
        if choice:
            return min(choice)
    offers = "; ".join(f"{shown_name(site.name)} offers {', '.join(site.protocols) or 'nothing'}" for site in sites)
    others = ", ".join(protocol.name for protocol in sorted(RELAYED))
    raise CommandError(
        ExitCode.USAGE,
        f"no protocol leads from the one site to the other: {offers}",
        f"Copies stay within one protocol, or go from one of {others} to another of these.",
    )

"""From what was typed to what the API wants: site numbers, paths, and the way to move."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from pdm.workqueue.cli.arguments import Place
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.text import shown_name
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.wire.responses import SiteView
from pdm.workqueue.WorkqueueClient import WorkqueueClient


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


def protocol_for(sites: Sequence[SiteView], asked: str | None) -> JobProtocol:
    """How to move: as asked, else GridFTP where all the sites offer it, else the first that they all offer.

    Simulated work comes last: nobody should believe that it has moved a file.

    Raises:
        CommandError: they have nothing in common.
    """
    if asked is not None:
        return JobProtocol.parse(asked)
    for protocol in sorted(JobProtocol, key=lambda each: each is JobProtocol.DUMMY):
        if all(protocol.name in site.protocols for site in sites):
            return protocol
    offers = "; ".join(f"{shown_name(site.name)} offers {', '.join(site.protocols) or 'nothing'}" for site in sites)
    raise CommandError(ExitCode.USAGE, f"the sites have no protocol in common: {offers}", "Choose other sites.")

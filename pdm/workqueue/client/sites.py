"""Choice of sites by name, and of the protocol by which they are reached."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from pdm.workqueue.client.errors import NoCommonProtocolError, UnknownSiteError
from pdm.workqueue.domain.enums import RELAYED, TOOL_PROTOCOLS, JobProtocol, MoverKind, relay_order
from pdm.workqueue.wire.sites import SiteView


def find_site(sites: Sequence[SiteView], name: str) -> SiteView:
    """The site with a name, or else with a number in digits; a name may consist of digits, and comes first.

    Raises:
        UnknownSiteError: there is none.
    """
    for same in (lambda site: site.name == name, lambda site: str(site.id) == name):
        for site in sites:
            if same(site):
                return site
    known = ", ".join(sorted(f"{site.name} ({site.id})" for site in sites)) or "none"
    near = did_you_mean(name, [site.name for site in sites])
    raise UnknownSiteError(f"no site {name}", f"{near}Known sites: {known}.")


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """``Did you mean cern? `` for a word that is like a known one, in any case; else empty."""
    by_lower = {word.lower(): word for word in known}
    near = difflib.get_close_matches(typed.lower(), by_lower, n=1)
    return f"Did you mean {by_lower[near[0]]}? " if near else ""


def choose_protocol(sites: Sequence[SiteView], mover: str | None = None) -> JobProtocol:
    """GridFTP if all sites offer it, else the first protocol that all offer.

    Without a common protocol, the first by `relay_order` from which the service can copy to the destination. DUMMY
    comes last, because it only simulates work. `sites` are the source and, if different, the destination; they choose a
    `mover` of None.

    Raises:
        NoCommonProtocolError: no protocol connects the sites.
    """
    offered = [{protocol for protocol in JobProtocol if protocol.name in site.protocols} for site in sites]
    common = set.intersection(*offered)
    by_tools = MoverKind.TOOLS in ([site.mover for site in sites] if mover is None else [mover])
    reaching = TOOL_PROTOCOLS if by_tools else RELAYED
    relayed = offered[0] & reaching if offered[-1] & reaching else set()
    if common - {JobProtocol.DUMMY}:
        return min(common - {JobProtocol.DUMMY})
    if relayed:
        return min(relayed, key=relay_order)
    if common:
        return JobProtocol.DUMMY
    offers = "; ".join(f"{site.name} offers {', '.join(site.protocols) or 'nothing'}" for site in sites)
    others = ", ".join(protocol.name for protocol in sorted(reaching))
    raise NoCommonProtocolError(
        f"the sites have no protocol in common: {offers}",
        f"Copies use one protocol, or go from one of {others} to another of these.",
    )

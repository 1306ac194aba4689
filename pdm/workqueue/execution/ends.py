"""The ends of routes: by which protocol the sites of a job are reached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.movers.mover import Access, need_of
from pdm.workqueue.movers.pairs import protocol_at
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.sites.site import Site

#: A site of a route, and the protocol by which it is reached.
End = tuple[Site, JobProtocol]


def reached_by(job: JobRecord, site: Site) -> JobProtocol | None:
    """The protocol that reaches a site of a job; None if the site does not offer it any more."""
    if site.id == job.src_siteid:
        return protocol_at(site.endpoints, job.protocol, frozenset())
    return reached_by_protocol(job.protocol, site)


def reached_by_protocol(asked: JobProtocol, destination: Site) -> JobProtocol | None:
    """The protocol that reaches the destination of jobs of a protocol; None if the site does not offer it."""
    mover = MOVERS.get(asked)
    return protocol_at(destination.endpoints, asked, frozenset() if mover is None else mover.relays_to)


def takers(access: Access) -> Mapping[CredentialKind, frozenset[JobProtocol]]:
    """The protocols of jobs that may wait for a credential of a kind, at either end."""
    needs = {protocol: need_of(mover, access) for protocol, mover in MOVERS.items()}
    kinds = {protocol: frozenset(() if need is None else need.kinds) for protocol, need in needs.items()}
    return {
        kind: frozenset(
            protocol
            for protocol, mover in MOVERS.items()
            if any(kind in kinds.get(each, ()) for each in (protocol, *mover.relays_to))
        )
        for kind in CredentialKind
    }


def kept_out(sites: SiteRegistry, paused: Iterable[tuple[int, JobProtocol]]) -> frozenset[tuple[int, JobProtocol]]:
    """Which jobs cannot reach which sites.

    Args:
        sites: all.
        paused: sites, and the protocols by which they cannot be reached.

    Returns:
        The same, and besides sites with the protocols of jobs that would reach them through the service.
    """
    found = set(paused)
    for number, protocol in list(found):
        site = sites.by_id(number)
        if site is not None:
            found.update(
                (number, asked)
                for asked, mover in MOVERS.items()
                if protocol_at(site.endpoints, asked, mover.relays_to) is protocol
            )
    return frozenset(found)

"""Sites as the API gives them out, with how they stand."""

from __future__ import annotations

from functools import lru_cache

from msgspec import UNSET

from pdm.workqueue.certificates.names import dn
from pdm.workqueue.certificates.site_trust import read_authorities
from pdm.workqueue.domain.breaker import Phase
from pdm.workqueue.domain.catalogue import Restricted
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.execution.checking import DoorCheck
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.views import failure_view, whole_seconds
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.wire.responses import CheckView, EndpointView, SiteView


def site_view(api: ApiContext, site: Site, *, with_health: bool = False) -> SiteView:
    """A site as the API gives it out; with the health of each endpoint where that is asked for."""
    now, catalogue = api.clock(), api.catalogue
    state, reason = "ok", None
    sentences = (catalogue.health.sentence(site, protocol, now) for protocol in sorted(site.endpoints))
    if away := [sentence for sentence in sentences if sentence is not None]:
        state, reason = "paused", "; ".join(away)
    drained = catalogue.restriction(Restricted.SITE, site.id)
    if drained is not None:
        state, reason = "drained", drained.message
    return SiteView(
        id=site.id,
        name=site.name,
        description=site.description,
        default_folder=site.default_folder,
        protocols=[protocol.name for protocol in sorted(site.endpoints)],
        endpoints={protocol.name: site.endpoints[protocol] for protocol in sorted(site.endpoints)},
        alternatives={protocol.name: list(urls) for protocol, urls in sorted(site.alternatives.items())},
        owner=site.owner_id,
        public=site.public,
        limit_in=site.limit_in,
        limit_out=site.limit_out,
        authorities=list(_subjects(site.authorities)),
        myproxy=site.myproxy,
        state=state,
        reason=reason,
        health=_health(api, site) if with_health else UNSET,
    )


def check_view(check: DoorCheck) -> CheckView:
    """What was found at an endpoint, as the API gives it out."""
    return CheckView(
        protocol=check.door.protocol.name,
        url=check.door.url,
        ok=check.failure is None,
        reachable=check.reachable,
        login=check.login,
        listing=check.listing,
        seconds=round(check.seconds, 3),
        failure=None if check.failure is None else failure_view(check.failure, JobType.LIST),
    )


def _health(api: ApiContext, site: Site) -> list[EndpointView]:
    return [
        EndpointView(
            protocol=door.protocol.name,
            url=door.url,
            state=health.phase.value,
            failures=health.failures,
            failing_since=whole_seconds(health.failing_since),
            next_try=whole_seconds(health.next_try) if health.phase is Phase.OPEN else None,
            reason=health.reason,
        )
        for door, health in api.catalogue.health.of_site(site, api.clock())
    ]


@lru_cache(maxsize=256)
def _subjects(pem: str) -> tuple[str, ...]:
    return tuple(dn(certificate.subject) for certificate in read_authorities(pem)) if pem else ()

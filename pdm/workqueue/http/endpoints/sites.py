"""The sites that the service knows."""

from __future__ import annotations

from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.problems import NotFoundError
from pdm.workqueue.http.views import site_view
from pdm.workqueue.wire.responses import SiteView


@endpoint("GET", "/sites", summary="All sites", result=list[SiteView])
async def list_sites(api: ApiContext, caller: Caller) -> list[SiteView]:
    """In the order of their numbers."""
    return [site_view(site) for site in api.sites.all()]


@endpoint("GET", "/sites/{site_id}", summary="One site", result=SiteView, errors=(NotFoundError,))
async def get_site(api: ApiContext, caller: Caller, site_id: int) -> SiteView:
    """The protocols that it offers, and where."""
    site = api.sites.by_id(site_id)
    if site is None:
        raise NotFoundError(f"there is no site {site_id}; GET /sites lists those there are")
    return site_view(site)

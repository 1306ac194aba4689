"""The routes between sites, and how much may run on each at once."""

from __future__ import annotations

from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.views import route_view
from pdm.workqueue.wire.responses import RouteView


@endpoint("GET", "/routes", summary="How much runs between which sites, and why no more", result=list[RouteView])
async def list_routes(api: ApiContext, caller: Caller) -> list[RouteView]:
    """All routes on which this daemon has run something since it was started, by their sites.

    Everybody may see those between sites that they may see: they tell of the sites, and nothing of anybody's jobs.
    """
    hidden = {site.id for site in api.sites.all() if not api.may_see(caller.user_id, caller.scope, site)}
    return [route_view(state) for state in api.routes() if hidden.isdisjoint(state.route)]

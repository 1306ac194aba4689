"""The views of operators: what runs and waits, routes over a day, users and their bans, the audit log."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import msgspec
from markupsafe import Markup
from msgspec import Meta

from pdm.workqueue.http.endpoints.activity import get_activity, get_queue
from pdm.workqueue.http.endpoints.nodes import drain_node, list_nodes, resume_node
from pdm.workqueue.http.endpoints.service import ban_user, list_routes, list_users, unban_user
from pdm.workqueue.http.endpoints.sites import require_operator
from pdm.workqueue.store import users
from pdm.workqueue.web.charts import WaterfallCell, WaterfallRow, waterfall
from pdm.workqueue.web.jobs import Number, site_label
from pdm.workqueue.web.pages import Page, Redirect, Visit, page
from pdm.workqueue.web.sites import MessageForm, converted_form
from pdm.workqueue.wire.activity import ActivityView, DrainRequest
from pdm.workqueue.wire.requests import LARGEST_ID
from pdm.workqueue.wire.sites import PageQuery

_MOST_ROUTES, _MOST_ERRORS = 30, 20
_PAGE_SIZE = 100


class UserListQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Users with larger numbers than ``after``."""

    after: Number = 0


class AuditListQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Entries with smaller numbers than ``before``."""

    before: Number = LARGEST_ID


class DrainForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a node is drained, and when it gives back what runs; never without a deadline."""

    message: Annotated[str, Meta(max_length=500)] = ""
    deadline: Annotated[str, Meta(max_length=40)] = ""

    def body(self) -> DrainRequest:
        return converted_form({"message": self.message, "deadline": self.deadline or None}, DrainRequest)


def _route_words(visit: Visit, source: int, destination: int | None) -> str:
    words = site_label(visit.api, visit, source).name
    return words if destination is None else f"{words} → {site_label(visit.api, visit, destination).name}"


def _picture(visit: Visit, found: ActivityView) -> Markup:
    width = timedelta(seconds=found.seconds)
    rows = [
        WaterfallRow(
            label=_route_words(visit, route.source, route.destination),
            cells=[
                WaterfallCell(at=found.since + place * width, done=done, failed=failed)
                for place, (done, failed) in enumerate(zip(route.done, route.failed, strict=True))
            ],
        )
        for route in found.routes[:_MOST_ROUTES]
    ]
    return waterfall(rows, key="day", title="Attempts that ended in the last 24 hours")


@page("GET", "/web/operators")
async def show_overview(visit: Visit) -> Page:
    """What runs and whose, what has waited longest and why, a day of each route, the most frequent failures."""
    require_operator(visit.caller)
    found: Any = await get_activity.handler(visit.api, visit.caller)
    context = {
        "nodes": await list_nodes.handler(visit.api, visit.caller),
        "queue": await get_queue.handler(visit.api, visit.caller),
        "picture": _picture(visit, found),
        "activity": found,
        "errors": found.errors[:_MOST_ERRORS],
        "more_routes": max(len(found.routes) - _MOST_ROUTES, 0),
        "faults": visit.api.faults(),
    }
    return Page(template="operators.html", context=context)


@page("GET", "/web/operators/queue")
async def show_queue(visit: Visit) -> Page:
    """Unfinished jobs by user and route."""
    require_operator(visit.caller)
    queue: Any = await get_queue.handler(visit.api, visit.caller)
    rows = [(share, _route_words(visit, share.source, share.destination)) for share in queue.shares]
    return Page(template="queue.html", context={"queue": queue, "rows": rows})


@page("GET", "/web/operators/routes")
async def show_routes(visit: Visit) -> Page:
    """Streams of each route, their limit, and the reason for it."""
    require_operator(visit.caller)
    found: Any = await list_routes.handler(visit.api, visit.caller)
    rows = [(route, _route_words(visit, route.source, route.destination)) for route in found]
    named = any(route.node is not None for route in found)
    return Page(template="routes.html", context={"rows": rows, "named": named})


@page("GET", "/web/operators/users", query=UserListQuery)
async def show_users(visit: Visit, query: UserListQuery) -> Page:
    """The users, each with its ban."""
    page_query = PageQuery(after=query.after, limit=_PAGE_SIZE)
    found: Any = await list_users.handler(visit.api, visit.caller, query=page_query)
    older = f"/web/operators/users?after={found[-1].id}" if len(found) == _PAGE_SIZE else None
    return Page(template="users.html", context={"users": found, "next": older})


@page("POST", "/web/operators/users/<number:user_id>/ban", form=MessageForm)
async def ban(visit: Visit, user_id: int, form: MessageForm) -> Redirect:
    """Ban a user."""
    await ban_user.handler(visit.api, visit.caller, user_id=user_id, body=form.body(), key=None)
    return Redirect("/web/operators/users", f"User {user_id} is banned: what runs finishes, nothing new starts.")


@page("POST", "/web/operators/users/<number:user_id>/unban")
async def unban(visit: Visit, user_id: int) -> Redirect:
    """End the ban of a user."""
    await unban_user.handler(visit.api, visit.caller, user_id=user_id, key=None)
    return Redirect("/web/operators/users", f"User {user_id} is not banned any more.")


@page("POST", "/web/operators/nodes/<word:node>/drain", form=DrainForm)
async def drain(visit: Visit, node: str, form: DrainForm) -> Redirect:
    """Drain a node."""
    body = form.body()
    await drain_node.handler(visit.api, visit.caller, node=node, body=body, key=None)
    return Redirect("/web/operators#nodes", f"Node {node} is drained: what runs finishes, nothing new starts.")


@page("POST", "/web/operators/nodes/<word:node>/resume")
async def resume(visit: Visit, node: str) -> Redirect:
    """End the drain of a node."""
    await resume_node.handler(visit.api, visit.caller, node=node, key=None)
    return Redirect("/web/operators#nodes", f"Node {node} is not drained any more.")


@page("GET", "/web/operators/audit", query=AuditListQuery)
async def show_audit(visit: Visit, query: AuditListQuery) -> Page:
    """The audit log, the newest entry first."""
    require_operator(visit.caller)
    found = await visit.api.database.read("page of the audit log", users.newest_audit, query.before, _PAGE_SIZE)
    older = f"/web/operators/audit?before={found[-1].id}" if len(found) == _PAGE_SIZE else None
    return Page(template="audit.html", context={"entries": found, "next": older})

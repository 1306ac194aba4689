"""Endpoints of the service as a whole: routes between sites, users, audit log, identity of the caller, health."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from pdm.workqueue import __version__
from pdm.workqueue.domain.sites import RestrictionKind
from pdm.workqueue.execution.credentials import PROXY
from pdm.workqueue.http.access import Caller, Role
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import Allow, endpoint
from pdm.workqueue.http.endpoints.delegations import delegation_id
from pdm.workqueue.http.endpoints.sites import checked_message, lift, require_operator, restrict
from pdm.workqueue.http.problems import ConflictError, InvalidInputError, NotFoundError
from pdm.workqueue.http.views import route_view, whole_seconds
from pdm.workqueue.store import credentials, users
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.store.users import UserRecord
from pdm.workqueue.wire.responses import FaultView, HealthView, WhoamiView
from pdm.workqueue.wire.sites import AuditView, Message, PageQuery, RouteView, UserView

#: Bytes of the routes of one node.
_ROUTES_BYTES = 512 * 1024


@endpoint("GET", "/routes", summary="Streams between sites, and their limits", result=list[RouteView])
async def list_routes(api: ApiContext, caller: Caller) -> list[RouteView]:
    """All routes that each node has used since its start, by their sites; those of this node first.

    Each user sees the routes between sites visible to the user; routes reveal nothing about jobs. Those of a node that
    does not answer are left out.
    """
    hidden = {site.id for site in api.sites.all() if not api.may_see(caller.user_id, caller.scope, site)}
    peers = api.cluster.peers
    own = next((node.name for node in await peers.nodes() if node.incarnation == peers.incarnation), None)
    found = [route_view(state, own) for state in api.routes()]
    # A name is what its own row says of it.
    answers, _ = await peers.ask_all(await peers.others(), "/peers/routes", list[RouteView], _ROUTES_BYTES)
    found += [msgspec.structs.replace(route, node=node.name) for node, routes in answers for route in routes]
    return [route for route in found if hidden.isdisjoint((route.source, route.destination))]


_PAGE_SIZE = 500


@endpoint("GET", "/users", summary="All users", query=PageQuery, result=list[UserView], errors=(InvalidInputError,))
async def list_users(api: ApiContext, caller: Caller, query: PageQuery) -> list[UserView]:
    """For operators; in order of their numbers."""
    require_operator(caller)
    page = await api.database.read("page of users", users.page, query.after or 0, query.limit or _PAGE_SIZE)
    return [_user_view(api, record) for record in page]


@endpoint(
    "POST",
    "/users/{user_id}/ban",
    summary="Ban a user",
    body=Message,
    result=UserView,
    errors=(InvalidInputError, NotFoundError, ConflictError),
)
async def ban_user(
    api: ApiContext, caller: Caller, user_id: int, body: Message, key: IdempotencyKey | None
) -> UserView:
    """For operators. Running elements finish, none are started; the user sees the message, and may read and cancel."""
    require_operator(caller)
    record = await _fetch_user(api, user_id)
    if record.role == Role.OPERATOR:
        raise ConflictError("an operator cannot be banned: remove the subject from [users] operators first")
    await restrict(api, caller, RestrictionKind.USER, user_id, checked_message(body.message))
    return _user_view(api, record)


@endpoint("POST", "/users/{user_id}/unban", summary="End the ban of a user", result=UserView, errors=(NotFoundError,))
async def unban_user(api: ApiContext, caller: Caller, user_id: int, key: IdempotencyKey | None) -> UserView:
    """For operators. It is no error if the user is not banned."""
    require_operator(caller)
    record = await _fetch_user(api, user_id)
    await lift(api, caller, RestrictionKind.USER, user_id)
    return _user_view(api, record)


@endpoint("GET", "/audit", summary="Audit log", query=PageQuery, result=list[AuditView], errors=(InvalidInputError,))
async def list_audit(api: ApiContext, caller: Caller, query: PageQuery) -> list[AuditView]:
    """For operators: changes of sites, drains of sites and nodes, bans of users; the oldest first."""
    require_operator(caller)
    page = await api.database.read(
        "page of the audit log", users.page_audit, query.after or 0, query.limit or _PAGE_SIZE
    )
    return [
        AuditView(
            id=record.id,
            at=record.at.replace(microsecond=0),
            subject=record.subject,
            action=record.action,
            target=record.target,
            details=record.details,
        )
        for record in page
    ]


async def _fetch_user(api: ApiContext, user_id: int) -> UserRecord:
    record = await api.database.read("find a user", users.fetch, user_id)
    if record is None:
        raise NotFoundError(f"there is no user {user_id}; GET /users lists all")
    return record


def _user_view(api: ApiContext, record: UserRecord) -> UserView:
    banned = api.site_directory.restriction(RestrictionKind.USER, record.id)
    return UserView(
        id=record.id,
        subject=record.subject,
        role=record.role,
        registered_at=record.registered_at.replace(microsecond=0),
        banned=None if banned is None else banned.message,
    )


@endpoint("GET", "/whoami", summary="Identity and role of the caller", result=WhoamiView)
async def whoami(api: ApiContext, caller: Caller) -> WhoamiView:
    """With the caller's delegation id, and the expiry of the certificate and of the delegated proxy."""
    record = await api.database.read("find a credential", credentials.find, caller.user_id, PROXY)
    return WhoamiView(
        user_id=caller.user_id,
        subject=caller.subject,
        role=caller.role.value,
        delegation_id=delegation_id(caller.subject),
        certificate_valid_until=caller.certificate_ends_at.replace(microsecond=0),
        limited_proxy=caller.limited,
        credential_valid_until=whole_seconds(None if record is None else record.valid_until),
    )


@endpoint("GET", "/openapi.json", summary="This API as an OpenAPI 3.1 document", result=dict[str, Any])
async def get_openapi(api: ApiContext, caller: Caller) -> dict[str, Any]:
    """Generated from the table of endpoints."""
    return _openapi()


@cache
def _openapi() -> dict[str, Any]:
    # Imported here because this module is a part of the table.
    from pdm.workqueue.http.endpoints import ENDPOINTS, ROOT
    from pdm.workqueue.http.openapi import openapi_document

    return openapi_document(ENDPOINTS, ROOT)


@endpoint("GET", "/health", summary="Health of the service", result=HealthView, allow=Allow.EVERYBODY)
async def health(api: ApiContext) -> HealthView:
    """For monitoring; needs no certificate. The status is 200 even while parts of the service fail; it names them."""
    faults = [FaultView(part=each.part.value, since=each.since.replace(microsecond=0)) for each in api.faults()]
    status = "ok" if not faults else "degraded" if api.may_claim() else "paused"
    return HealthView(status=status, version=__version__, faults=faults)

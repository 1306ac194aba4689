"""What operators do about users, and the log of such acts."""

from __future__ import annotations

from pdm.workqueue.domain.catalogue import Restricted
from pdm.workqueue.http.access import Caller, Role
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.endpoints.sites import lift, message_of, operators_only, restrict
from pdm.workqueue.http.problems import ConflictError, InvalidInputError, NotFoundError
from pdm.workqueue.store import audit, users
from pdm.workqueue.store.jobs import IdempotencyKey
from pdm.workqueue.store.users import UserRecord
from pdm.workqueue.wire.sites import AuditView, Message, PageQuery, UserView

_PAGE = 500


@endpoint("GET", "/users", summary="All users", query=PageQuery, result=list[UserView], errors=(InvalidInputError,))
async def list_users(api: ApiContext, caller: Caller, query: PageQuery) -> list[UserView]:
    """For operators; in the order of their numbers."""
    operators_only(caller)
    page = await api.database.read("page of users", users.page, query.after or 0, query.limit or _PAGE)
    return [_view(api, record) for record in page]


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
    """For operators. What runs ends, nothing more starts; the user sees the message, and may look and cancel."""
    operators_only(caller)
    record = await _user(api, user_id)
    if record.role == Role.OPERATOR:
        raise ConflictError("an operator cannot be banned: take the subject out of [users] operators first")
    await restrict(api, caller, Restricted.USER, user_id, message_of(body))
    return _view(api, record)


@endpoint("POST", "/users/{user_id}/unban", summary="End the ban of a user", result=UserView, errors=(NotFoundError,))
async def unban_user(api: ApiContext, caller: Caller, user_id: int, key: IdempotencyKey | None) -> UserView:
    """For operators. It is no error if the user is not banned."""
    operators_only(caller)
    record = await _user(api, user_id)
    await lift(api, caller, Restricted.USER, user_id)
    return _view(api, record)


@endpoint("GET", "/audit", summary="Who did what", query=PageQuery, result=list[AuditView], errors=(InvalidInputError,))
async def list_audit(api: ApiContext, caller: Caller, query: PageQuery) -> list[AuditView]:
    """For operators: sites that were made, changed, removed, drained and resumed, users banned; the oldest first."""
    operators_only(caller)
    page = await api.database.read("page of the audit log", audit.page, query.after or 0, query.limit or _PAGE)
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


async def _user(api: ApiContext, user_id: int) -> UserRecord:
    record = await api.database.read("find a user", users.fetch, user_id)
    if record is None:
        raise NotFoundError(f"there is no user {user_id}; GET /users lists those there are")
    return record


def _view(api: ApiContext, record: UserRecord) -> UserView:
    banned = api.catalogue.restriction(Restricted.USER, record.id)
    return UserView(
        id=record.id,
        subject=record.subject,
        role=record.role,
        registered_at=record.registered_at.replace(microsecond=0),
        banned=None if banned is None else banned.message,
    )

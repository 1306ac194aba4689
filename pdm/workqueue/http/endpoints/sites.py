"""The sites that the service knows: those of its files, and those that users make."""

from __future__ import annotations

from functools import partial
from typing import Any

from msgspec import UNSET
from twisted.logger import Logger

from pdm.workqueue.domain.catalogue import Actor, Restricted, SiteRecord
from pdm.workqueue.execution.checking import BusyError
from pdm.workqueue.http.access import Caller, Role
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.problems import ConflictError, ForbiddenError, InvalidInputError, NotFoundError
from pdm.workqueue.http.site_input import changed, site_from
from pdm.workqueue.http.site_views import check_view, site_view
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.store import restrictions, sites
from pdm.workqueue.store.jobs import IdempotencyKey
from pdm.workqueue.store.sites import NameTakenError, SiteInUseError, TooManySitesError
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.wire.responses import CheckView, SiteView
from pdm.workqueue.wire.sites import Message, SiteBody, SiteChanges

_log = Logger()


def audited(api: ApiContext, caller: Caller, action: str, target: str, details: str = "") -> None:
    """Say in the log what has just been written to the audit table, and have all parts take it up."""
    _log.info(
        "audit: {subject} {action} {target} {details}",
        subject=caller.subject,
        action=action,
        target=target,
        details=details,
    )
    start_background("take up a change", api.catalogue.refresh())


def actor(caller: Caller) -> Actor:
    """Who is noted for what a caller does."""
    return Actor(caller.user_id, caller.subject)


def operators_only(caller: Caller) -> None:
    """Raises `ForbiddenError` for who is none."""
    if caller.role is not Role.OPERATOR:
        raise ForbiddenError("only operators may do this")


def _seen(api: ApiContext, caller: Caller, site_id: int) -> Site:
    site = api.sites.by_id(site_id)
    if site is None or not api.may_see(caller.user_id, caller.scope, site):
        raise _no_site(site_id)
    return site


def _no_site(site_id: int) -> NotFoundError:
    return NotFoundError(f"there is no site {site_id}; GET /sites lists those there are")


def _own(api: ApiContext, caller: Caller, site_id: int) -> Site:
    """A site that the caller may change."""
    site = _seen(api, caller, site_id)
    if api.sites.is_of_file(site_id):
        raise ConflictError("that site is one of the service's files: its operator changes it there")
    if caller.role is not Role.OPERATOR and site.owner_id != caller.user_id:
        raise ForbiddenError("only its owner, or an operator, may change a site")
    return site


def _local(api: ApiContext, caller: Caller) -> bool:
    """Whether a site of the caller may lead to this machine and its link."""
    return caller.role is Role.OPERATOR or api.settings.sites.local_addresses


@endpoint("GET", "/sites", summary="All sites that the caller may use", result=list[SiteView])
async def list_sites(api: ApiContext, caller: Caller) -> list[SiteView]:
    """In the order of their numbers; operators see the private ones of all."""
    return [site_view(api, site) for site in api.sites.all() if api.may_see(caller.user_id, caller.scope, site)]


@endpoint("GET", "/sites/{site_id}", summary="One site", result=SiteView, errors=(NotFoundError,))
async def get_site(api: ApiContext, caller: Caller, site_id: int) -> SiteView:
    """The protocols that it offers, where, and whether it can be reached."""
    return site_view(api, _seen(api, caller, site_id), with_health=True)


@endpoint(
    "POST",
    "/sites",
    summary="Make a site",
    body=SiteBody,
    result=SiteView,
    status=201,
    errors=(InvalidInputError, ConflictError),
)
async def create_site(api: ApiContext, caller: Caller, body: SiteBody, key: IdempotencyKey | None) -> SiteView:
    """A site of one's own. The same request again gives the same site."""
    new = site_from(caller, body, local=_local(api, caller))
    if api.sites.has_file_name(new.name):
        raise _name_taken(new.name)

    def then(record: SiteRecord) -> None:
        audited(api, caller, "site.create", f"site {record.id}", new.name)

    try:
        record = await api.commit("make a site", sites.create, new, actor(caller), api.clock(), then=then)
    except NameTakenError:
        raise _name_taken(new.name) from None
    except TooManySitesError as error:
        raise ConflictError(str(error)) from None
    return await _fresh(api, record.id)


@endpoint(
    "PATCH",
    "/sites/{site_id}",
    summary="Change a site",
    body=SiteChanges,
    result=SiteView,
    errors=(InvalidInputError, NotFoundError, ConflictError),
)
async def change_site(api: ApiContext, caller: Caller, site_id: int, body: SiteChanges) -> SiteView:
    """By its owner, or an operator. Jobs that were accepted go on, with the new endpoints."""
    site = _own(api, caller, site_id)
    if body.name is not UNSET and api.sites.has_file_name(body.name):
        raise _name_taken(body.name)

    def then(record: SiteRecord | None) -> None:
        if record is not None:
            audited(api, caller, "site.change", f"site {site_id}", record.content.name)

    change = partial(changed, caller, body, local=_local(api, caller))
    try:
        record = await api.commit("change a site", sites.change, site_id, change, actor(caller), api.clock(), then=then)
    except NameTakenError:
        raise _name_taken(site.name if body.name is UNSET else body.name) from None
    if record is None:
        raise _no_site(site_id)
    return await _fresh(api, site_id)


@endpoint(
    "DELETE",
    "/sites/{site_id}",
    summary="Remove a site",
    result=None,
    status=204,
    errors=(NotFoundError, ConflictError),
)
async def delete_site(api: ApiContext, caller: Caller, site_id: int) -> None:
    """By its owner, or an operator; not while jobs that have not ended need it (409).

    Its number is never used again.
    """
    _own(api, caller, site_id)

    def then(removed: bool) -> None:
        if removed:
            audited(api, caller, "site.remove", f"site {site_id}")
            # Those for the site have gone with it.
            api.credentials_changed()

    try:
        removed = await api.commit("remove a site", sites.remove, site_id, actor(caller), api.clock(), then=then)
    except SiteInUseError as error:
        raise ConflictError(f"{error}: wait for them, or cancel them, then remove it") from None
    await api.catalogue.refresh()
    if not removed:
        raise _no_site(site_id)


@endpoint(
    "POST",
    "/sites/{site_id}/check",
    summary="Look at what a site can do",
    result=list[CheckView],
    errors=(NotFoundError, ConflictError),
)
async def check_site(api: ApiContext, caller: Caller, site_id: int, key: IdempotencyKey | None) -> list[CheckView]:
    """Connects to each endpoint with the caller's credential, and lists the default folder."""
    site = _seen(api, caller, site_id)
    if not site.is_open_to(caller.user_id):
        raise ForbiddenError("a private site is used by its owner only")
    try:
        return [check_view(check) for check in await api.check_site(caller.user_id, site)]
    except BusyError:
        raise ConflictError("you are having a site looked at already: wait for that") from None


@endpoint(
    "POST",
    "/sites/{site_id}/drain",
    summary="Let nothing new start at a site",
    body=Message,
    result=SiteView,
    errors=(InvalidInputError, NotFoundError),
)
async def drain_site(
    api: ApiContext, caller: Caller, site_id: int, body: Message, key: IdempotencyKey | None
) -> SiteView:
    """For operators. What runs ends, jobs are still accepted, and wait; users see the message."""
    operators_only(caller)
    _seen(api, caller, site_id)
    await restrict(api, caller, Restricted.SITE, site_id, message_of(body))
    return await _fresh(api, site_id)


@endpoint(
    "POST",
    "/sites/{site_id}/resume",
    summary="End the drain of a site",
    result=SiteView,
    errors=(NotFoundError,),
)
async def resume_site(api: ApiContext, caller: Caller, site_id: int, key: IdempotencyKey | None) -> SiteView:
    """For operators. It is no error if the site is not drained."""
    operators_only(caller)
    _seen(api, caller, site_id)
    await lift(api, caller, Restricted.SITE, site_id)
    return await _fresh(api, site_id)


async def restrict(api: ApiContext, caller: Caller, kind: Restricted, number: int, message: str) -> None:
    """Drain a site, or ban a user."""

    def then(_result: Any) -> None:
        audited(api, caller, f"{kind}.{'drain' if kind is Restricted.SITE else 'ban'}", f"{kind} {number}", message)

    await api.commit("restrict", restrictions.restrict, kind, number, message, actor(caller), api.clock(), then=then)
    await api.catalogue.refresh()


async def lift(api: ApiContext, caller: Caller, kind: Restricted, number: int) -> None:
    """End what `restrict` began."""

    def then(lifted: bool) -> None:
        if lifted:
            audited(api, caller, f"{kind}.{'resume' if kind is Restricted.SITE else 'unban'}", f"{kind} {number}")

    await api.commit("lift a restriction", restrictions.lift, kind, number, actor(caller), api.clock(), then=then)
    await api.catalogue.refresh()


def message_of(body: Message) -> str:
    """The line that users see.

    Raises:
        InvalidInputError: it is no printable line.
    """
    if not body.message.isprintable() or not body.message.strip():
        raise InvalidInputError("one line of printable characters is expected", "$.message")
    return body.message


async def _fresh(api: ApiContext, site_id: int) -> SiteView:
    """A site that was just changed."""
    await api.catalogue.refresh()
    site = api.sites.by_id(site_id)
    if site is None:
        # Somebody has removed it in this moment.
        raise _no_site(site_id)
    return site_view(api, site, with_health=True)


def _name_taken(name: str) -> ConflictError:
    return ConflictError(f"there is a site {name} already: choose another name", "$.name")

"""Endpoints of sites: list, create, change, remove, check and drain them; validation of their definitions."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from attrs import evolve
from msgspec import UNSET
from twisted.logger import Logger

from pdm.workqueue.certificates.files import read_authorities
from pdm.workqueue.certificates.pem import to_pem
from pdm.workqueue.domain.addresses import is_local_host
from pdm.workqueue.domain.enums import JobProtocol, MoverKind
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.domain.sites import Actor, NewSite, RestrictionKind, SiteRecord
from pdm.workqueue.execution.endpoint_checks import SiteCheckRunningError
from pdm.workqueue.http.access import Caller, Role
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.oidc_settings import checked_oidc, with_secret_of
from pdm.workqueue.http.problems import ConflictError, ForbiddenError, InvalidInputError, NotFoundError
from pdm.workqueue.http.views import check_view, site_view
from pdm.workqueue.sites.checks import (
    check_default_folder,
    check_description,
    check_endpoint,
    check_fts,
    check_host_and_port,
    check_name,
    check_tape,
)
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.store import sites
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.store.sites import NameTakenError, SiteInUseError, TooManySitesError
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.wire.sites import CheckView, Message, SiteBody, SiteChanges, SiteView


def site_from_body(caller: Caller, body: SiteBody, *, local: bool) -> NewSite:
    """Validate the definition of a new site of the caller; `local` allows addresses of this machine and its link.

    Raises:
        InvalidInputError: the definition is invalid; `pointer` names the key.
        ForbiddenError: it has a directory or an address of this machine, and the caller is not an operator.
    """
    return NewSite(
        owner_id=caller.user_id,
        public=body.public,
        name=_checked(check_name, body.name, "$.name"),
        description=_checked(check_description, body.description or "", "$.description"),
        default_folder=_checked(check_default_folder, body.default_folder or "~", "$.default_folder"),
        endpoints=_endpoints(caller, body.endpoints, local=local),
        limit_in=body.limit_in,
        limit_out=body.limit_out,
        authorities=_authorities(body.authorities or ""),
        myproxy=_myproxy(body.myproxy, local=local),
        mover=MoverKind(body.mover or MoverKind.NATIVE),
        tape=_tape(body.tape, local=local),
        fts=_fts(body.fts, local=local),
    )


def changed_site(caller: Caller, body: SiteChanges, content: NewSite, *, local: bool) -> NewSite:
    """Apply validated changes to the definition of a site; arguments and errors as of `site_from_body`."""
    if body.public is not UNSET:
        content = evolve(content, public=body.public)
    if body.name is not UNSET:
        content = evolve(content, name=_checked(check_name, body.name, "$.name"))
    if body.description is not UNSET:
        content = evolve(content, description=_checked(check_description, body.description, "$.description"))
    if body.default_folder is not UNSET:
        directory = _checked(check_default_folder, body.default_folder, "$.default_folder")
        content = evolve(content, default_folder=directory)
    if body.endpoints is not UNSET:
        content = evolve(content, endpoints=_endpoints(caller, body.endpoints, local=local))
    if body.limit_in is not UNSET:
        content = evolve(content, limit_in=body.limit_in)
    if body.limit_out is not UNSET:
        content = evolve(content, limit_out=body.limit_out)
    if body.authorities is not UNSET:
        content = evolve(content, authorities=_authorities(body.authorities))
    if body.myproxy is not UNSET:
        content = evolve(content, myproxy=_myproxy(body.myproxy, local=local))
    if body.mover is not UNSET:
        content = evolve(content, mover=MoverKind(body.mover))
    if body.tape is not UNSET:
        content = evolve(content, tape=_tape(body.tape, local=local))
    if body.fts is not UNSET:
        content = evolve(content, fts=_fts(body.fts, local=local))
    return content


def _checked(check: Callable[[str], str], text: str, pointer: str) -> str:
    try:
        return check(text)
    except ValueError as error:
        raise InvalidInputError(str(error), pointer) from error


def _myproxy(server: str | None, *, local: bool) -> str | None:
    if server is None:
        return None
    return _check_not_local(_checked(check_host_and_port, server, "$.myproxy"), "$.myproxy", local=local)


def _tape(url: str | None, *, local: bool) -> str | None:
    return None if url is None else _check_not_local(_checked(check_tape, url, "$.tape"), "$.tape", local=local)


def _fts(url: str | None, *, local: bool) -> str | None:
    if url is None:
        return None
    return _check_not_local(_checked(check_fts, url, "$.fts"), "$.fts", local=local)


def _check_not_local(address: str, pointer: str, *, local: bool) -> str:
    """Refuse an address (``HOST:PORT`` or a URL) of this machine or its link, unless `local` allows it."""
    authority = StorageUrl(address).authority or address
    if not local and _is_local(authority):
        # Server-side request forgery: users would reach services that trust local connections.
        raise ForbiddenError("only operators may use an address of the service's own machine or its link", pointer)
    return address


def _is_local(authority: str) -> bool:
    host = authority[1:].partition("]")[0] if authority.startswith("[") else authority.partition(":")[0]
    return is_local_host(host, socket.gethostname())


def _endpoints(
    caller: Caller, given: Mapping[str, str | list[str]], *, local: bool
) -> dict[JobProtocol, Sequence[str]]:
    found: dict[JobProtocol, Sequence[str]] = {}
    for word, urls in given.items():
        pointer = f"$.endpoints.{word}"
        try:
            protocol = JobProtocol.parse(word)
        except ValueError as error:
            raise InvalidInputError(str(error), pointer) from error
        if protocol in found:
            raise InvalidInputError("the protocol is given twice", pointer)
        if protocol is JobProtocol.FILE and caller.role is not Role.OPERATOR:
            # It would give access to the disk of this machine.
            raise ForbiddenError("only operators may create sites from directories of this machine", pointer)
        lines = [urls] if isinstance(urls, str) else urls
        checked = [_checked(partial(check_endpoint, protocol), line, pointer) for line in lines]
        if protocol is not JobProtocol.FILE:
            checked = [_check_not_local(url, pointer, local=local) for url in checked]
        if len(set(checked)) < len(checked):
            raise InvalidInputError("an endpoint is given twice", pointer)
        if protocol is JobProtocol.FILE and len(checked) > 1:
            raise InvalidInputError("expected one directory", pointer)
        found[protocol] = tuple(checked)
    return {protocol: found[protocol] for protocol in sorted(found)}


def _authorities(pem: str) -> str:
    if not pem:
        return ""
    try:
        return to_pem(*read_authorities(pem)).decode("ascii")
    except ValueError as error:
        raise InvalidInputError(str(error), "$.authorities") from error


_log = Logger()


def log_audit(api: ApiContext, caller: Caller, action: str, target: str, details: str = "") -> None:
    """Log a change that was just written to the audit table, and reload the site directory."""
    _log.info(
        "audit: {subject} {action} {target} {details}",
        subject=caller.subject,
        action=action,
        target=target,
        details=details,
    )
    start_background("reload the site directory", api.site_directory.refresh())


def actor(caller: Caller) -> Actor:
    """The author of a change, for the audit table."""
    return Actor(caller.user_id, caller.subject)


def require_operator(caller: Caller) -> None:
    if caller.role is not Role.OPERATOR:
        raise ForbiddenError("only operators may do this")


def _visible_site(api: ApiContext, caller: Caller, site_id: int) -> Site:
    site = api.sites.by_id(site_id)
    if site is None or not api.may_see(caller.user_id, caller.scope, site):
        raise _site_not_found(site_id)
    return site


def _site_not_found(site_id: int) -> NotFoundError:
    return NotFoundError(f"there is no site {site_id}; GET /sites lists all")


def _changeable_site(api: ApiContext, caller: Caller, site_id: int) -> Site:
    """A site that the caller may change."""
    site = _visible_site(api, caller, site_id)
    if api.sites.is_of_file(site_id):
        raise ConflictError(
            "this site is defined in the service's configuration: only its operator can change it there"
        )
    if caller.role is not Role.OPERATOR and site.owner_id != caller.user_id:
        raise ForbiddenError("only its owner or an operator may change a site")
    return site


def may_be_local(api: ApiContext, caller: Caller) -> bool:
    """Whether a site of the caller may have addresses of this machine and its link."""
    return caller.role is Role.OPERATOR or api.settings.sites.local_addresses


@endpoint("GET", "/sites", summary="All sites that the caller may use", result=list[SiteView])
async def list_sites(api: ApiContext, caller: Caller) -> list[SiteView]:
    """In order of their numbers; operators also see the private sites of all users."""
    return [site_view(api, site) for site in api.sites.listed() if api.may_see(caller.user_id, caller.scope, site)]


@endpoint("GET", "/sites/{site_id}", summary="One site", result=SiteView, errors=(NotFoundError,))
async def get_site(api: ApiContext, caller: Caller, site_id: int) -> SiteView:
    """The protocols that it offers, its endpoints, and their health."""
    return site_view(api, _visible_site(api, caller, site_id), with_health=True)


@endpoint(
    "POST",
    "/sites",
    summary="Create a site",
    body=SiteBody,
    result=SiteView,
    status=201,
    errors=(InvalidInputError, ConflictError),
)
async def create_site(api: ApiContext, caller: Caller, body: SiteBody, key: IdempotencyKey | None) -> SiteView:
    """The site belongs to the caller. A repeated request returns the same site."""
    oidc = None if body.oidc is None else checked_oidc(api, caller, body.oidc)
    new = evolve(site_from_body(caller, body, local=may_be_local(api, caller)), oidc=oidc)
    if api.sites.has_file_name(new.name):
        raise _name_taken(new.name)

    def then(record: SiteRecord) -> None:
        log_audit(api, caller, "site.create", f"site {record.id}", new.name)

    try:
        record = await api.commit("create a site", sites.create, new, actor(caller), api.clock(), then=then)
    except NameTakenError:
        raise _name_taken(new.name) from None
    except TooManySitesError as error:
        raise ConflictError(str(error)) from None
    return await _refreshed_view(api, record.id)


@endpoint(
    "PATCH",
    "/sites/{site_id}",
    summary="Change a site",
    body=SiteChanges,
    result=SiteView,
    errors=(InvalidInputError, NotFoundError, ConflictError),
)
async def change_site(api: ApiContext, caller: Caller, site_id: int, body: SiteChanges) -> SiteView:
    """By its owner or an operator. Accepted jobs continue with the new endpoints."""
    site = _changeable_site(api, caller, site_id)
    if body.name is not UNSET and api.sites.has_file_name(body.name):
        raise _name_taken(body.name)

    def then(record: SiteRecord | None) -> None:
        if record is not None:
            log_audit(api, caller, "site.change", f"site {site_id}", record.content.name)

    oidc = checked_oidc(api, caller, body.oidc) if body.oidc is not UNSET and body.oidc is not None else None

    def change(content: NewSite) -> NewSite:
        changed = changed_site(caller, body, content, local=may_be_local(api, caller))
        return changed if body.oidc is UNSET else evolve(changed, oidc=with_secret_of(content.oidc, oidc))

    try:
        record = await api.commit("change a site", sites.change, site_id, change, actor(caller), api.clock(), then=then)
    except NameTakenError:
        raise _name_taken(site.name if body.name is UNSET else body.name) from None
    if record is None:
        raise _site_not_found(site_id)
    return await _refreshed_view(api, site_id)


@endpoint(
    "DELETE",
    "/sites/{site_id}",
    summary="Remove a site",
    result=None,
    status=204,
    errors=(NotFoundError, ConflictError),
)
async def delete_site(api: ApiContext, caller: Caller, site_id: int) -> None:
    """By its owner or an operator; not while unfinished jobs need it (409). Its number is never used again."""
    _changeable_site(api, caller, site_id)

    def then(removed: bool) -> None:
        if removed:
            log_audit(api, caller, "site.remove", f"site {site_id}")
            # Credentials for the site were removed with it.
            api.credentials_changed()

    try:
        removed = await api.commit("remove a site", sites.remove, site_id, actor(caller), api.clock(), then=then)
    except SiteInUseError as error:
        raise ConflictError(f"{error}: wait for them or cancel them, then remove the site") from None
    await api.site_directory.refresh()
    if not removed:
        raise _site_not_found(site_id)


@endpoint(
    "POST",
    "/sites/{site_id}/check",
    summary="Check the endpoints of a site",
    result=list[CheckView],
    errors=(NotFoundError, ConflictError),
)
async def check_site(api: ApiContext, caller: Caller, site_id: int, key: IdempotencyKey | None) -> list[CheckView]:
    """Connects to each endpoint with the caller's credential, and lists the default directory."""
    site = _visible_site(api, caller, site_id)
    if not site.is_open_to(caller.user_id):
        raise ForbiddenError("only its owner may use a private site")
    try:
        return [check_view(check) for check in await api.check_site(caller.user_id, site)]
    except SiteCheckRunningError:
        raise ConflictError("a site check of yours is running already: wait until it ends") from None


@endpoint(
    "POST",
    "/sites/{site_id}/drain",
    summary="Drain a site: start nothing new there",
    body=Message,
    result=SiteView,
    errors=(InvalidInputError, NotFoundError),
)
async def drain_site(
    api: ApiContext, caller: Caller, site_id: int, body: Message, key: IdempotencyKey | None
) -> SiteView:
    """For operators. Running elements finish; jobs are accepted, but wait; users see the message."""
    require_operator(caller)
    _visible_site(api, caller, site_id)
    await restrict(api, caller, RestrictionKind.SITE, site_id, checked_message(body.message))
    return await _refreshed_view(api, site_id)


@endpoint(
    "POST",
    "/sites/{site_id}/resume",
    summary="End the drain of a site",
    result=SiteView,
    errors=(NotFoundError,),
)
async def resume_site(api: ApiContext, caller: Caller, site_id: int, key: IdempotencyKey | None) -> SiteView:
    """For operators. It is no error if the site is not drained."""
    require_operator(caller)
    _visible_site(api, caller, site_id)
    await lift(api, caller, RestrictionKind.SITE, site_id)
    return await _refreshed_view(api, site_id)


async def restrict(api: ApiContext, caller: Caller, kind: RestrictionKind, number: int, message: str) -> None:
    """Drain a site, or ban a user."""

    def then(_result: Any) -> None:
        log_audit(
            api, caller, f"{kind}.{'drain' if kind is RestrictionKind.SITE else 'ban'}", f"{kind} {number}", message
        )

    await api.commit("restrict", sites.restrict, kind, number, message, actor(caller), api.clock(), then=then)
    await api.site_directory.refresh()


async def lift(api: ApiContext, caller: Caller, kind: RestrictionKind, number: int) -> None:
    """End a drain or a ban."""

    def then(lifted: bool) -> None:
        if lifted:
            log_audit(
                api, caller, f"{kind}.{'resume' if kind is RestrictionKind.SITE else 'unban'}", f"{kind} {number}"
            )

    await api.commit("lift a restriction", sites.lift_restriction, kind, number, actor(caller), api.clock(), then=then)
    await api.site_directory.refresh()


def checked_message(message: str) -> str:
    """The message of a drain or a ban.

    Raises:
        InvalidInputError: it is empty, or not one printable line.
    """
    if not message.isprintable() or not message.strip():
        raise InvalidInputError("expected one line of printable characters", "$.message")
    return message


async def _refreshed_view(api: ApiContext, site_id: int) -> SiteView:
    await api.site_directory.refresh()
    site = api.sites.by_id(site_id)
    if site is None:
        # Removed by a concurrent request.
        raise _site_not_found(site_id)
    return site_view(api, site, with_health=True)


def _name_taken(name: str) -> ConflictError:
    return ConflictError(f"there is already a site {name}: choose another name", "$.name")

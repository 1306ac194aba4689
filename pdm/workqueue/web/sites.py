"""The sites: their health, what happens there, the caller's credential for them; add, change, check and remove them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, TypeVar

import msgspec
from attrs import frozen
from msgspec import Meta

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobProtocol, MoverKind
from pdm.workqueue.http.decoding import invalid_value
from pdm.workqueue.http.endpoints.activity import list_site_activity
from pdm.workqueue.http.endpoints.credentials import list_credentials
from pdm.workqueue.http.endpoints.sites import (
    change_site,
    check_site,
    create_site,
    delete_site,
    drain_site,
    get_site,
    list_sites,
    resume_site,
)
from pdm.workqueue.http.problems import ApiError, InvalidInputError
from pdm.workqueue.web.credentials import command_of
from pdm.workqueue.web.pages import Page, Redirect, Visit, page
from pdm.workqueue.wire.activity import SiteActivityView
from pdm.workqueue.wire.credentials import CredentialView
from pdm.workqueue.wire.sites import Message, SiteBody, SiteChanges, SiteView

_T = TypeVar("_T", bound=msgspec.Struct)


class SiteForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The definition of a site; each line of ``endpoints`` is a protocol and a URL."""

    name: str = ""
    endpoints: str = ""
    description: str = ""
    default_folder: str = "~"
    public: bool = False
    limit_in: int | None = None
    limit_out: int | None = None
    authorities: str = ""
    myproxy: str | None = None
    mover: str = MoverKind.NATIVE.value
    tape: str | None = None
    fts: str | None = None

    @classmethod
    def of(cls, site: SiteView) -> SiteForm:
        """What a site is now; its authorities stay unless others are given."""
        lines = [
            f"{protocol} {url}"
            for protocol, first in site.endpoints.items()
            for url in (first, *site.alternatives.get(protocol, ()))
        ]
        return cls(
            name=site.name,
            endpoints="\n".join(lines),
            description=site.description,
            default_folder=site.default_folder,
            public=site.public,
            limit_in=site.limit_in,
            limit_out=site.limit_out,
            myproxy=site.myproxy,
            mover=site.mover,
            tape=site.tape,
            fts=site.fts,
        )

    def fields(self) -> dict[str, Any]:
        """The fields of the body of the API.

        Raises:
            InvalidInputError: a line has no URL.
        """
        fields = msgspec.structs.asdict(self)
        endpoints: dict[str, list[str]] = {}
        for line in self.endpoints.splitlines():
            protocol, *urls = line.split()[:2] or [""]
            if protocol and not urls:
                raise InvalidInputError(f"expected a protocol and a URL in each line, not {line[:100]!r}", "endpoints")
            if protocol:
                endpoints.setdefault(protocol, []).extend(urls)
        fields["endpoints"] = endpoints
        if not self.authorities:
            del fields["authorities"]
        return fields


class MessageForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a site is drained, or a user banned."""

    message: Annotated[str, Meta(max_length=500)] = ""

    def body(self) -> Message:
        return converted_form({"message": self.message}, Message)


def converted_form(fields: dict[str, Any], type_: type[_T]) -> _T:
    """The body of a request from the fields of a form.

    Raises:
        InvalidInputError: a field is invalid.
    """
    try:
        return msgspec.convert(fields, type_)
    except msgspec.ValidationError as error:
        raise invalid_value(error, type_, "$") from error


@frozen
class ListedSite:
    """A site in the list.

    Attributes:
        is_usable: whether the caller has a credential for each of its protocols.
        credential: about that, in words.
        command: to run for it; empty if there is nothing to do.
    """

    site: SiteView
    activity: SiteActivityView | None
    is_usable: bool
    credential: str
    command: str


@page("GET", "/web/sites")
async def show_sites(visit: Visit) -> Page:
    """All sites that the caller may use."""
    found: Sequence[SiteView] = await list_sites.handler(visit.api, visit.caller)  # type: ignore[assignment]
    active: Any = await list_site_activity.handler(visit.api, visit.caller)
    credentials: Any = await list_credentials.handler(visit.api, visit.caller)
    by_site: dict[int, SiteActivityView] = {each.site: each for each in active}
    rows = [_row(visit, site, by_site.get(site.id), credentials) for site in found]
    return Page(template="sites.html", context={"rows": rows})


def _row(visit: Visit, site: SiteView, active: SiteActivityView | None, held: Sequence[CredentialView]) -> ListedSite:
    ends: list[datetime] = []
    needed = False
    for name in site.protocols:
        need = visit.api.credential_need(JobProtocol[name])
        if need is None:
            continue
        needed = True
        usable = [
            each
            for each in held
            if each.kind in need.kinds
            and each.site in (None, site.id)
            and (each.valid_until is None or each.valid_until > visit.api.clock())
        ]
        if not usable:
            kind = need.kinds[0]
            return ListedSite(site, active, False, f"missing for {name}", _command(kind, site))
        ends += [each.valid_until for each in usable[:1] if each.valid_until is not None]
    if not needed:
        return ListedSite(site, active, True, "none is needed", "")
    return ListedSite(site, active, True, f"valid until {min(ends):%Y-%m-%d %H:%M} UTC" if ends else "valid", "")


def _command(kind: CredentialKind, site: SiteView) -> str:
    # A delegated proxy is for all sites; only a site with a MyProxy server has logons.
    return command_of(kind, None if kind is CredentialKind.PROXY and site.myproxy is None else site.name)


@page("GET", "/web/sites/add")
async def show_new_site(visit: Visit) -> Page:
    """The form of a new site."""
    return _form_page(SiteForm())


def _form_page(form: SiteForm, site: SiteView | None = None, problem: ApiError | None = None) -> Page:
    context = {
        "form": form,
        "site": site,
        "protocols": [protocol.name for protocol in JobProtocol],
        "movers": [kind.value for kind in MoverKind],
    }
    return Page(
        template="site_form.html", context=context, problem=problem, status=200 if problem is None else problem.status
    )


@page("POST", "/web/sites/add", form=SiteForm)
async def add_site(visit: Visit, form: SiteForm) -> Page | Redirect:
    """Create a site of the caller."""
    try:
        body = converted_form(form.fields(), SiteBody)
        site: Any = await create_site.handler(visit.api, visit.caller, body=body, key=None)
    except ApiError as error:
        return _form_page(form, problem=error)
    return Redirect(f"/web/sites/{site.id}", f"Site {site.name} is added.")


@page("GET", "/web/sites/<number:site_id>")
async def show_site(visit: Visit, site_id: int) -> Page:
    """One site, with the health of its endpoints."""
    return await _site_page(visit, site_id)


async def _site_page(visit: Visit, site_id: int, checks: Sequence[Any] = ()) -> Page:
    site: Any = await get_site.handler(visit.api, visit.caller, site_id=site_id)
    is_operator = visit.caller.scope is None
    context = {
        "site": site,
        "checks": checks,
        "is_operator": is_operator,
        "may_change": site.owner is not None and (is_operator or site.owner == visit.caller.user_id),
    }
    return Page(template="site.html", context=context)


@page("GET", "/web/sites/<number:site_id>/change")
async def show_site_form(visit: Visit, site_id: int) -> Page:
    """The form that changes a site."""
    site: Any = await get_site.handler(visit.api, visit.caller, site_id=site_id)
    return _form_page(SiteForm.of(site), site)


@page("POST", "/web/sites/<number:site_id>/change", form=SiteForm)
async def change(visit: Visit, site_id: int, form: SiteForm) -> Page | Redirect:
    """Change a site; fields that are empty are removed from it."""
    site: Any = await get_site.handler(visit.api, visit.caller, site_id=site_id)
    try:
        body = converted_form(form.fields(), SiteChanges)
        await change_site.handler(visit.api, visit.caller, site_id=site_id, body=body)
    except ApiError as error:
        return _form_page(form, site, error)
    return Redirect(f"/web/sites/{site_id}", f"Site {form.name} is changed.")


@page("POST", "/web/sites/<number:site_id>/check")
async def check(visit: Visit, site_id: int) -> Page:
    """Check the endpoints with the caller's credential, and show what was found."""
    checks: Any = await check_site.handler(visit.api, visit.caller, site_id=site_id, key=None)
    return await _site_page(visit, site_id, checks)


@page("POST", "/web/sites/<number:site_id>/remove")
async def remove(visit: Visit, site_id: int) -> Redirect:
    """Remove a site."""
    await delete_site.handler(visit.api, visit.caller, site_id=site_id)
    return Redirect("/web/sites", f"Site {site_id} is removed.")


@page("POST", "/web/sites/<number:site_id>/drain", form=MessageForm)
async def drain(visit: Visit, site_id: int, form: MessageForm) -> Redirect:
    """Start nothing new at a site."""
    await drain_site.handler(visit.api, visit.caller, site_id=site_id, body=form.body(), key=None)
    return Redirect(f"/web/sites/{site_id}", "The site is drained: what runs finishes, nothing new starts.")


@page("POST", "/web/sites/<number:site_id>/resume")
async def resume(visit: Visit, site_id: int) -> Redirect:
    """End the drain of a site."""
    await resume_site.handler(visit.api, visit.caller, site_id=site_id, key=None)
    return Redirect(f"/web/sites/{site_id}", "The site is used again.")

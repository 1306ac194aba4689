"""The caller's credentials, the commands that renew them, and the page for browsers without a valid certificate."""

from __future__ import annotations

import shlex
from typing import Any

from attrs import field, frozen

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.http.endpoints.credentials import delete_credential, list_credentials
from pdm.workqueue.http.endpoints.logins import list_logins
from pdm.workqueue.http.endpoints.service import whoami
from pdm.workqueue.http.problems import NotAuthenticatedError
from pdm.workqueue.http.request import ApiRequest, write_response
from pdm.workqueue.web.jobs import site_label
from pdm.workqueue.web.pages import HTML, Page, Redirect, Visit, page, set_page_headers
from pdm.workqueue.web.rendering import Renderer
from pdm.workqueue.wire.credentials import CredentialView, LoginView

#: The secret of a credential never passes through a browser: it is made by the command.
_COMMANDS = {
    CredentialKind.PROXY: "pdm delegate",
    CredentialKind.SSH_KEY: "pdm ssh-key",
    CredentialKind.TOKEN: "pdm token",
    CredentialKind.S3_KEY: "pdm s3-key",
}


def command_of(kind: str, site: str | None) -> str:
    """The command that stores a credential of a kind for a site, or with None for all."""
    known = CredentialKind(kind)
    if site is None:
        return _COMMANDS[known]
    return f"{'pdm login' if known is CredentialKind.PROXY else _COMMANDS[known]} {shlex.quote(site)}"


@frozen
class ListedCredential:
    """A credential in the list; ``site`` is a name, None for every site."""

    credential: CredentialView
    site: str | None
    is_valid: bool
    command: str


@frozen
class ListedLogin:
    """A login in the list; ``site`` is a name, ``command`` logs in again."""

    login: LoginView
    site: str
    command: str


@page("GET", "/web/credentials")
async def show_credentials(visit: Visit) -> Page:
    """What the service holds for the caller."""
    me: Any = await whoami.handler(visit.api, visit.caller)
    found: Any = await list_credentials.handler(visit.api, visit.caller)
    now, rows = visit.api.clock(), []
    for each in found:
        site = None if each.site is None else site_label(visit.api, visit, each.site).name
        is_valid = each.valid_until is None or each.valid_until > now
        rows.append(ListedCredential(each, site, is_valid, command_of(each.kind, site)))
    has_proxy = any(row.credential.kind == CredentialKind.PROXY and row.is_valid for row in rows)
    found_logins: Any = await list_logins.handler(visit.api, visit.caller)
    logins = [
        ListedLogin(each, name, f"pdm login {shlex.quote(name)} --oidc")
        for each in found_logins
        for name in [site_label(visit.api, visit, each.site).name]
    ]
    context = {"me": me, "rows": rows, "logins": logins, "has_proxy": has_proxy}
    return Page(template="credentials.html", context=context)


@page("POST", "/web/credentials/<number:credential_id>/remove")
async def remove_credential(visit: Visit, credential_id: int) -> Redirect:
    """Remove a credential from the service."""
    await delete_credential.handler(visit.api, visit.caller, credential_id=credential_id)
    return Redirect("/web/credentials", f"Credential {credential_id} is removed; jobs that need it wait for another.")


_TEMPLATE = "getting_in.html"
#: Rendered pages that are kept, by the text of the problem; anybody may ask for the page, so it must cost little.
_MAX_KEPT = 100


@frozen(eq=False)
class AccessPage:
    """Writes the page; the same for every address."""

    _renderer: Renderer = field(factory=Renderer)
    _pages: dict[str, bytes] = field(factory=dict)

    def write(self, request: ApiRequest, error: NotAuthenticatedError) -> None:
        """Answer a request with status 401."""
        page = self._pages.get(error.detail)
        if page is None:
            context = {"caller": None, "message": "", "problem": None, "now": None, "path": "", "detail": error.detail}
            page = self._renderer.render(_TEMPLATE, context).encode("utf-8", "replace")
            if len(self._pages) >= _MAX_KEPT:
                self._pages.clear()
            self._pages[error.detail] = page
        set_page_headers(request)
        write_response(request, error.status, page, HTML)

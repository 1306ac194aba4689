"""Endpoints of logins at the token issuers of sites (OpenID Connect): begin, continue, show and end them."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from pdm.workqueue.execution.issuers import IssuerUnavailableError
from pdm.workqueue.execution.login_secrets import PendingCode
from pdm.workqueue.execution.oidc_logins import LoginRefusedError
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.endpoints.credentials import usable_site
from pdm.workqueue.http.problems import ConflictError, InvalidInputError, NotFoundError, SiteFailedError
from pdm.workqueue.http.views import whole_seconds
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.store import oidc_logins
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.store.oidc_logins import LoginRecord
from pdm.workqueue.wire.credentials import LoginView
from pdm.workqueue.wire.requests import NewRefreshToken

_T = TypeVar("_T")


@endpoint("GET", "/logins", summary="Logins of the caller at token issuers", result=list[LoginView])
async def list_logins(api: ApiContext, caller: Caller) -> list[LoginView]:
    """In order of the numbers of their sites."""
    found = await api.database.read("list logins", oidc_logins.of_user, caller.user_id)
    return [_view(api, login) for login in found]


@endpoint(
    "GET",
    "/sites/{site_id}/login",
    summary="The login of the caller at the token issuer of a site",
    result=LoginView | None,
    errors=(NotFoundError,),
)
async def get_login(api: ApiContext, caller: Caller, site_id: int) -> LoginView | None:
    """``null`` if there is none."""
    site = usable_site(api, caller, site_id, None)
    login = await api.database.read("find a login", oidc_logins.fetch, caller.user_id, site.id)
    return None if login is None else _view(api, login)


@endpoint(
    "POST",
    "/sites/{site_id}/login",
    summary="Begin a login at the token issuer of a site",
    result=LoginView,
    status=201,
    errors=(NotFoundError, ConflictError, SiteFailedError),
)
async def begin_login(api: ApiContext, caller: Caller, site_id: int, key: IdempotencyKey | None) -> LoginView:
    """The answer has a URL and a code, by which the caller approves it in a browser (RFC 8628).

    Then ask with ``PUT`` until the state is not ``waiting`` any more. A code that waits is given out again.
    """
    site = usable_site(api, caller, site_id, None)
    progress = await _asked(site, api.logins.begin(caller.user_id, site))
    return _view(api, progress.login, progress.code)


@endpoint(
    "PUT",
    "/sites/{site_id}/login",
    summary="Continue a login: ask the issuer whether it is approved",
    result=LoginView,
    errors=(NotFoundError, ConflictError, SiteFailedError),
)
async def continue_login(api: ApiContext, caller: Caller, site_id: int) -> LoginView:
    """The issuer is asked once in each ``interval`` only. With the approval, jobs that are held for a token resume."""
    site = usable_site(api, caller, site_id, None)
    progress = await _asked(site, api.logins.proceed(caller.user_id, site))
    if progress is None:
        raise ConflictError("no login has begun: POST begins one")
    return _view(api, progress.login, progress.code)


@endpoint(
    "PUT",
    "/sites/{site_id}/login/refresh-token",
    summary="Log in at the token issuer of a site by a refresh token",
    body=NewRefreshToken,
    result=LoginView,
    errors=(InvalidInputError, NotFoundError, ConflictError, SiteFailedError),
)
async def put_refresh_token(api: ApiContext, caller: Caller, site_id: int, body: NewRefreshToken) -> LoginView:
    """The token must be of the site's client; the issuer may end it for all others that use it. Held jobs resume."""
    site = usable_site(api, caller, site_id, None)
    return _view(api, await _asked(site, api.logins.adopt(caller.user_id, site, body.refresh_token)))


@endpoint(
    "DELETE",
    "/sites/{site_id}/login",
    summary="Log out: remove and revoke the tokens of a login",
    result=None,
    status=204,
    errors=(NotFoundError,),
)
async def end_login(api: ApiContext, caller: Caller, site_id: int) -> None:
    """Elements that use the token are terminated. It is no error if there is no login."""
    site = usable_site(api, caller, site_id, None)
    if await api.logins.log_out(caller.user_id, site.id):
        api.credentials_changed()


async def _asked(site: Site, asking: Awaitable[_T]) -> _T:
    try:
        return await asking
    except IssuerUnavailableError as error:
        issuer = "" if site.oidc is None else site.oidc.issuer
        raise SiteFailedError(f"the token issuer {issuer} of site {site.name}: {error}; try again later") from error
    except LoginRefusedError as error:
        raise ConflictError(str(error)) from error


def _view(api: ApiContext, login: LoginRecord, code: PendingCode | None = None) -> LoginView:
    now = api.clock()
    if code is None:
        site = api.sites.by_id(login.site_id)
        code = None if site is None else api.logins.secrets.pending_code(login, site.oidc, now)
    return LoginView(
        site=login.site_id,
        issuer=login.issuer,
        state=login.state(now).value,
        subject=login.subject or None,
        logged_in_at=whole_seconds(login.logged_in_at),
        refreshed_at=whole_seconds(login.refreshed_at),
        valid_until=whole_seconds(login.valid_until),
        next_renewal=whole_seconds(login.due_at),
        failure=login.error,
        user_code=None if code is None else code.user_code,
        verification_uri=None if code is None else code.verification_uri,
        verification_uri_complete=None if code is None else code.verification_uri_complete,
        code_valid_until=None if code is None else whole_seconds(code.expires_at),
        interval=None if code is None else code.interval_s,
    )

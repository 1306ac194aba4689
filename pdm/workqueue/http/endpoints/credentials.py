"""What users give the service to act for them: listed without secrets, taken, removed; and logon at sites."""

from __future__ import annotations

import re

from pdm.workqueue.certificates.myproxy import (
    LogonUnderWayError,
    MyProxyError,
    NoSuchUserError,
    RefusedError,
    WrongPasswordError,
)
from pdm.workqueue.certificates.ssh_keys import SshKey, SshKeyError, make_key, read_key
from pdm.workqueue.certificates.tokens import TokenError, describe
from pdm.workqueue.domain.credentials import ALL_SITES, LEAST_LEFT, CredentialKind
from pdm.workqueue.execution.credentials import context_of
from pdm.workqueue.http import lookups
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.credentials import forget, keep, proxy_details
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.problems import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    SiteFailedError,
    TooManyAttemptsError,
)
from pdm.workqueue.http.views import credential_view
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.store import credentials
from pdm.workqueue.store.credentials import NewCredential as StoredCredential
from pdm.workqueue.store.jobs import IdempotencyKey
from pdm.workqueue.wire.requests import LARGEST_ID, NewCredential, SiteLogon
from pdm.workqueue.wire.responses import CredentialView

_DEFAULT_LIFETIME_S = 12 * 3600
_COMMON_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@endpoint("GET", "/credentials", summary="What the service holds of the caller", result=list[CredentialView])
async def list_credentials(api: ApiContext, caller: Caller) -> list[CredentialView]:
    """Delegated proxies, those of logons, SSH keys and tokens; never what is secret of them."""
    found = await api.database.read("list credentials", credentials.of_user, caller.user_id)
    return [credential_view(record) for record in found]


@endpoint(
    "POST",
    "/credentials",
    summary="Give the service a key or a token, or have it make a key",
    body=NewCredential,
    result=CredentialView,
    status=201,
    errors=(InvalidInputError,),
)
async def add_credential(
    api: ApiContext, caller: Caller, body: NewCredential, key: IdempotencyKey | None
) -> CredentialView:
    """It takes the place of the caller's earlier one of that kind for that site.

    An ``ssh-key`` without ``secret`` is made by the service: install the ``public_key`` of the answer at the site.
    Asked again, the same key comes; delete it to have a new one made. Jobs that are held for want of it go on.
    """
    site_id = ALL_SITES if body.site is None else _site(api, caller, int(body.site), "$.site").id
    if body.label is not None and not body.label.isprintable():
        raise InvalidInputError("a label is one line of printable characters", "$.label")
    if body.kind == CredentialKind.SSH_KEY.value:
        return await _add_key(api, caller, body, site_id)
    return await _add_token(api, caller, body, site_id)


async def _add_key(api: ApiContext, caller: Caller, body: NewCredential, site_id: int) -> CredentialView:
    comment = "pdm-workqueue:" + _COMMON_NAME.sub("-", caller.subject.rpartition("=")[2])[:60]
    try:
        made: SshKey = (
            await api.in_thread(make_key, comment)
            if body.secret is None
            else await api.in_thread(read_key, body.secret.encode("utf-8", "surrogatepass"), comment)
        )
    except SshKeyError as error:
        raise InvalidInputError(str(error), "$.secret") from error
    kind = CredentialKind.SSH_KEY
    new = StoredCredential(
        kind=kind,
        subject=made.fingerprint,
        valid_until=None,
        secret=api.vault.seal(made.private, context_of(caller.user_id, kind, site_id)),
        site_id=site_id,
        label=body.label,
        details={"public_key": made.public_line, "account": body.account, "made_here": body.secret is None},
    )
    take = lookups.take_made_key if body.secret is None else lookups.take_credential
    return credential_view(await keep(api, caller, new, take))


async def _add_token(api: ApiContext, caller: Caller, body: NewCredential, site_id: int) -> CredentialView:
    if body.account is not None:
        raise InvalidInputError("a token has no account: leave it out", "$.account")
    if body.secret is None:
        raise InvalidInputError("the key 'secret' is missing: the token", "$.secret")
    try:
        described = describe(body.secret)
    except TokenError as error:
        raise InvalidInputError(str(error), "$.secret") from error
    if described.valid_until is not None and described.valid_until <= api.clock() + LEAST_LEFT:
        raise InvalidInputError(f"the token expired at {described.valid_until:%Y-%m-%dT%H:%M:%SZ}", "$.secret")
    kind = CredentialKind.TOKEN
    new = StoredCredential(
        kind=kind,
        subject=described.subject,
        valid_until=described.valid_until,
        secret=api.vault.seal(body.secret.encode("ascii"), context_of(caller.user_id, kind, site_id)),
        site_id=site_id,
        label=body.label,
    )
    return credential_view(await keep(api, caller, new))


@endpoint(
    "DELETE",
    "/credentials/{credential_id}",
    summary="Forget a credential",
    result=None,
    status=204,
    errors=(NotFoundError,),
)
async def delete_credential(api: ApiContext, caller: Caller, credential_id: int) -> None:
    """What runs with it is ended; without another one that fits, it is held."""
    if not await forget(api, credentials.remove_number, caller.user_id, credential_id):
        raise NotFoundError("there is no such credential of yours; GET /credentials lists those there are")


@endpoint(
    "GET",
    "/sites/{site_id}/session",
    summary="The proxy of the caller's logon at a site",
    result=CredentialView | None,
    errors=(NotFoundError,),
)
async def get_session(api: ApiContext, caller: Caller, site_id: int) -> CredentialView | None:
    """``null`` where there is none."""
    site = _site(api, caller, site_id, None)
    record = await api.database.read(
        "find a credential", credentials.find, caller.user_id, CredentialKind.PROXY, site.id
    )
    return None if record is None else credential_view(record)


@endpoint(
    "POST",
    "/sites/{site_id}/session",
    summary="Log on at the MyProxy server of a site",
    body=SiteLogon,
    result=CredentialView,
    status=201,
    errors=(InvalidInputError, NotFoundError, ConflictError, SiteFailedError, TooManyAttemptsError),
)
async def log_on(
    api: ApiContext, caller: Caller, site_id: int, body: SiteLogon, key: IdempotencyKey | None
) -> CredentialView:
    """The service fetches a proxy, for this site only; the password is used once and kept nowhere.

    Jobs that are held for want of a credential there go on.
    """
    site = _site(api, caller, site_id, None)
    if site.myproxy is None:
        raise ConflictError(f"site {site.name} has no MyProxy server: delegate a proxy instead")
    if wait_s := api.logons.wait_s(caller.user_id, api.clock()):
        raise TooManyAttemptsError(wait_s)
    lifetime_s = _DEFAULT_LIFETIME_S if body.lifetime is None else body.lifetime
    try:
        proxy = await api.myproxy.fetch_for(
            caller.user_id, site.myproxy, body.username, body.password, lifetime_s, site.authorities
        )
    except LogonUnderWayError as error:
        raise ConflictError(str(error)) from None
    except WrongPasswordError as error:
        api.logons.failed(caller.user_id, api.clock())
        raise InvalidInputError(str(error), "$.password") from error
    except NoSuchUserError as error:
        api.logons.failed(caller.user_id, api.clock())
        raise InvalidInputError(str(error), "$.username") from error
    except MyProxyError as error:
        if isinstance(error, RefusedError):
            api.logons.failed(caller.user_id, api.clock())
        raise SiteFailedError(f"{error} ({site.name}: {site.myproxy})") from error
    if proxy.valid_until <= api.clock() + LEAST_LEFT:
        raise SiteFailedError(f"the MyProxy server of {site.name} gave a proxy that has expired")
    kind = CredentialKind.PROXY
    new = StoredCredential(
        kind=kind,
        subject=proxy.subject,
        valid_until=proxy.valid_until,
        secret=api.vault.seal(proxy.bundle_pem, context_of(caller.user_id, kind, site.id)),
        site_id=site.id,
        details=proxy_details(proxy.voms),
    )
    return credential_view(await keep(api, caller, new))


@endpoint(
    "DELETE",
    "/sites/{site_id}/session",
    summary="Log off at a site",
    result=None,
    status=204,
    errors=(NotFoundError,),
)
async def log_off(api: ApiContext, caller: Caller, site_id: int) -> None:
    """The proxy of the logon is forgotten, and what runs with it ended. It is no error if there is none."""
    site = _site(api, caller, site_id, None)
    await forget(api, credentials.remove, caller.user_id, CredentialKind.PROXY, site.id)


def _site(api: ApiContext, caller: Caller, number: int, pointer: str | None) -> Site:
    site = api.sites.by_id(number) if number <= LARGEST_ID else None
    if site is None or not site.is_open_to(caller.user_id):
        words = f"there is no site {number}; GET /sites lists those there are"
        raise NotFoundError(words) if pointer is None else InvalidInputError(words, pointer)
    return site

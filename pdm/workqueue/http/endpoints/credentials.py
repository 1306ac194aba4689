"""Endpoints of credentials: SSH keys, tokens, S3 keys and MyProxy logons. Secrets are encrypted, and never returned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, timedelta
from typing import Any

from twisted.logger import Logger

from pdm.workqueue.certificates.myproxy import (
    LogonRefusedError,
    LogonUnderWayError,
    MyProxyError,
    NoSuchUserError,
    WrongPasswordError,
)
from pdm.workqueue.certificates.pem import SshKey, SshKeyError, make_ssh_key, read_ssh_key
from pdm.workqueue.certificates.proxies import VomsAttributes
from pdm.workqueue.certificates.tokens import TokenError, describe_token
from pdm.workqueue.domain.credentials import ALL_SITES, MIN_VALIDITY, CredentialKind
from pdm.workqueue.execution.credentials import vault_context
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import LOGON_WINDOW, MAX_LOGON_FAILURES, Caller
from pdm.workqueue.http.context import ApiContext
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
from pdm.workqueue.store import credentials, logons, oidc_logins
from pdm.workqueue.store.credentials import CredentialRecord, EncryptedCredential
from pdm.workqueue.store.held_elements import Resumed
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.wire.credentials import CredentialView
from pdm.workqueue.wire.requests import LARGEST_ID, NewCredential, SiteLogon

_log = Logger()

#: A transaction of `pdm.workqueue.http.transactions` that stores a credential.
PutTransaction = Callable[..., tuple[CredentialRecord, Resumed]]


async def store_credential(
    api: ApiContext, caller: Caller, new: EncryptedCredential, transaction: PutTransaction = transactions.put_credential
) -> CredentialRecord:
    """Store a credential, then resume the jobs that were HELD for it."""
    protocols = api.protocols_with(new.kind)

    async def resume_held(record: CredentialRecord, resumed: Resumed) -> None:
        count = resumed.count + await api.resume(caller.user_id, new.site_id, protocols, resumed.after)
        _log.info(
            "{kind} of {owner} stored, {resumed} held elements resumed",
            kind=record.kind.words,
            owner=record.subject,
            site=record.site_id or None,
            resumed=count,
        )

    def after_commit(stored: tuple[CredentialRecord, Resumed]) -> None:
        start_background("resume held elements", resume_held(*stored))
        api.credentials_changed()
        api.wake()

    record, _ = await api.commit(
        "store a credential", transaction, caller.user_id, new, protocols, api.clock(), then=after_commit
    )
    return record


async def remove_credential(api: ApiContext, function: Callable[..., Any], *args: Any) -> Any:
    """Remove a credential by a transaction, then terminate the attempts that use it."""

    def after_commit(_result: Any) -> None:
        api.credentials_changed()

    return await api.commit("remove a credential", function, *args, then=after_commit)


def proxy_details(voms: Sequence[VomsAttributes]) -> dict[str, Any]:
    """The details that are stored with a proxy."""
    return {"voms": [{"vo": each.vo, "fqans": list(each.fqans)} for each in voms]} if voms else {}


_UNITS_S = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def display_duration(lifetime: timedelta) -> str:
    """A duration in the syntax of the command line, in the largest unit that divides it: ``30d``, ``12h``, ``90s``."""
    seconds = int(lifetime.total_seconds())
    unit, length = next((unit, length) for unit, length in _UNITS_S if seconds % length == 0)
    return f"{seconds // length}{unit}"


_DEFAULT_LIFETIME_S = 12 * 3600
_COMMON_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_S3_SECRET = re.compile(r"[\x21-\x7e]{1,256}")
_S3_SESSION_TOKEN = re.compile(r"[\x21-\x7e]+")


@endpoint("GET", "/credentials", summary="Stored credentials of the caller", result=list[CredentialView])
async def list_credentials(api: ApiContext, caller: Caller) -> list[CredentialView]:
    """Delegated proxies, proxies of logons, SSH keys, tokens and S3 keys, without their secrets."""
    found = await api.database.read("list credentials", credentials.of_user, caller.user_id)
    return [credential_view(record) for record in found]


@endpoint(
    "POST",
    "/credentials",
    summary="Store an SSH key, a token or an S3 key, or generate an SSH key",
    body=NewCredential,
    result=CredentialView,
    status=201,
    errors=(InvalidInputError, ConflictError),
)
async def add_credential(
    api: ApiContext, caller: Caller, body: NewCredential, key: IdempotencyKey | None
) -> CredentialView:
    """It replaces the caller's credential of the same kind for the same site.

    An ``ssh-key`` without ``secret`` is generated by the service: install the ``public_key`` of the response at the
    site. Repeated calls return the same key; delete it to generate a new one. Jobs that are held for it resume.
    """
    site_id = ALL_SITES if body.site is None else usable_site(api, caller, int(body.site), "$.site").id
    for name in ("session_token", "valid_until"):
        if getattr(body, name) is not None and body.kind != CredentialKind.S3_KEY.value:
            raise InvalidInputError(f"only an S3 key has a {name}: leave it out", f"$.{name}")
    if body.label is not None and not body.label.isprintable():
        raise InvalidInputError("a label is one line of printable characters", "$.label")
    if body.kind == CredentialKind.SSH_KEY.value:
        return await _add_key(api, caller, body, site_id)
    if body.kind == CredentialKind.S3_KEY.value:
        return await _add_s3_key(api, caller, body, site_id)
    return await _add_token(api, caller, body, site_id)


async def _add_key(api: ApiContext, caller: Caller, body: NewCredential, site_id: int) -> CredentialView:
    comment = "pdm-workqueue:" + _COMMON_NAME.sub("-", caller.subject.rpartition("=")[2])[:60]
    try:
        made: SshKey = (
            await api.in_thread(make_ssh_key, comment)
            if body.secret is None
            else await api.in_thread(read_ssh_key, body.secret.encode("utf-8", "surrogatepass"), comment)
        )
    except SshKeyError as error:
        raise InvalidInputError(str(error), "$.secret") from error
    kind = CredentialKind.SSH_KEY
    new = EncryptedCredential(
        kind=kind,
        subject=made.fingerprint,
        valid_until=None,
        secret=api.vault.seal(made.private, vault_context(caller.user_id, kind, site_id)),
        site_id=site_id,
        label=body.label,
        details={"public_key": made.public_line, "account": body.account, "made_here": body.secret is None},
    )
    transaction = transactions.put_generated_key if body.secret is None else transactions.put_credential
    return credential_view(await store_credential(api, caller, new, transaction))


async def _add_s3_key(api: ApiContext, caller: Caller, body: NewCredential, site_id: int) -> CredentialView:
    if body.account is not None:
        raise InvalidInputError("an S3 key has no account: leave it out", "$.account")
    if body.access_key is None:
        raise InvalidInputError("the key 'access_key' is missing: it must be the id of the access key", "$.access_key")
    if body.secret is None:
        raise InvalidInputError("the key 'secret' is missing: it must be the secret key", "$.secret")
    if not _S3_SECRET.fullmatch(body.secret):
        raise InvalidInputError("a secret key of S3 is one word of at most 256 plain characters", "$.secret")
    if body.session_token is not None and not _S3_SESSION_TOKEN.fullmatch(body.session_token):
        raise InvalidInputError("a session token of S3 is one word of plain characters", "$.session_token")
    if body.valid_until is not None:
        if body.valid_until.tzinfo is None:
            raise InvalidInputError("the end has no time zone: add Z, or its offset", "$.valid_until")
        if body.valid_until <= api.clock() + MIN_VALIDITY:
            raise InvalidInputError(f"the keys expired at {body.valid_until:%Y-%m-%dT%H:%M:%S%z}", "$.valid_until")
    kind = CredentialKind.S3_KEY
    keys = {"access_key": body.access_key, "secret_key": body.secret, "session_token": body.session_token}
    new = EncryptedCredential(
        kind=kind,
        subject=body.access_key,
        valid_until=body.valid_until and body.valid_until.astimezone(UTC),
        secret=api.vault.seal(json.dumps(keys).encode("ascii"), vault_context(caller.user_id, kind, site_id)),
        site_id=site_id,
        label=body.label,
    )
    return credential_view(await store_credential(api, caller, new))


async def _add_token(api: ApiContext, caller: Caller, body: NewCredential, site_id: int) -> CredentialView:
    if body.account is not None:
        raise InvalidInputError("a token has no account: leave it out", "$.account")
    if body.secret is None:
        raise InvalidInputError("the key 'secret' is missing: it must be the token", "$.secret")
    try:
        described = describe_token(body.secret)
    except TokenError as error:
        raise InvalidInputError(str(error), "$.secret") from error
    if described.valid_until is not None and described.valid_until <= api.clock() + MIN_VALIDITY:
        raise InvalidInputError(f"the token expired at {described.valid_until:%Y-%m-%dT%H:%M:%SZ}", "$.secret")
    kind = CredentialKind.TOKEN
    known = await api.database.read("find a credential", credentials.find, caller.user_id, kind, site_id)
    if known is not None and known.is_renewed:
        raise ConflictError("a login at the site's token issuer gives the token: log out first (pdm logout --oidc)")
    new = EncryptedCredential(
        kind=kind,
        subject=described.subject,
        valid_until=described.valid_until,
        secret=api.vault.seal(body.secret.encode("ascii"), vault_context(caller.user_id, kind, site_id)),
        site_id=site_id,
        label=body.label,
    )
    return credential_view(await store_credential(api, caller, new))


@endpoint(
    "DELETE",
    "/credentials/{credential_id}",
    summary="Remove a credential",
    result=None,
    status=204,
    errors=(NotFoundError,),
)
async def delete_credential(api: ApiContext, caller: Caller, credential_id: int) -> None:
    """Elements that use it are terminated, and held unless another credential fits. A login ends with its token."""
    if not await remove_credential(api, oidc_logins.remove_credential, caller.user_id, credential_id):
        raise NotFoundError(f"you have no credential {credential_id}; GET /credentials lists yours")


@endpoint(
    "GET",
    "/sites/{site_id}/session",
    summary="The proxy of the caller's logon at a site",
    result=CredentialView | None,
    errors=(NotFoundError,),
)
async def get_session(api: ApiContext, caller: Caller, site_id: int) -> CredentialView | None:
    """``null`` if there is none."""
    site = usable_site(api, caller, site_id, None)
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
    """The service fetches a proxy for this site only; the password is used once and not stored.

    Jobs that are held for a credential at this site resume.
    """
    site = usable_site(api, caller, site_id, None)
    if site.myproxy is None:
        raise ConflictError(f"site {site.name} has no MyProxy server: delegate a proxy instead")
    permit = await api.database.run(
        "begin a logon", logons.begin_logon, caller.user_id, api.clock(), most=MAX_LOGON_FAILURES, window=LOGON_WINDOW
    )
    if permit.number is None:
        raise TooManyAttemptsError(permit.wait_s)
    lifetime_s = _DEFAULT_LIFETIME_S if body.lifetime is None else body.lifetime
    is_refused = False
    try:
        proxy = await api.myproxy.fetch_for(
            caller.user_id, site.myproxy, body.username, body.password, lifetime_s, site.authorities
        )
    except LogonUnderWayError as error:
        raise ConflictError(str(error)) from None
    except WrongPasswordError as error:
        is_refused = True
        raise InvalidInputError(str(error), "$.password") from error
    except NoSuchUserError as error:
        is_refused = True
        raise InvalidInputError(str(error), "$.username") from error
    except MyProxyError as error:
        is_refused = isinstance(error, LogonRefusedError)
        raise SiteFailedError(f"{error} ({site.name}: {site.myproxy})") from error
    finally:
        if not is_refused:
            await api.database.run("end a logon", logons.forget_failure, permit.number)
    if proxy.valid_until <= api.clock() + MIN_VALIDITY:
        raise SiteFailedError(f"the MyProxy server of {site.name} returned an expired proxy")
    kind = CredentialKind.PROXY
    new = EncryptedCredential(
        kind=kind,
        subject=proxy.subject,
        valid_until=proxy.valid_until,
        secret=api.vault.seal(proxy.bundle_pem, vault_context(caller.user_id, kind, site.id)),
        site_id=site.id,
        details=proxy_details(proxy.voms),
    )
    return credential_view(await store_credential(api, caller, new))


@endpoint(
    "DELETE",
    "/sites/{site_id}/session",
    summary="Log off at a site",
    result=None,
    status=204,
    errors=(NotFoundError,),
)
async def log_off(api: ApiContext, caller: Caller, site_id: int) -> None:
    """Removes the proxy of the logon and terminates elements that use it. It is no error if there is none."""
    site = usable_site(api, caller, site_id, None)
    await remove_credential(api, credentials.remove, caller.user_id, CredentialKind.PROXY, site.id)


def usable_site(api: ApiContext, caller: Caller, number: int, pointer: str | None) -> Site:
    """A site that the caller may use; ``pointer``: of the number in the body."""
    site = api.sites.by_id(number) if number <= LARGEST_ID else None
    if site is None or not site.is_open_to(caller.user_id):
        words = f"there is no site {number}; GET /sites lists all"
        raise NotFoundError(words) if pointer is None else InvalidInputError(words, pointer)
    return site

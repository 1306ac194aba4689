"""Endpoints of delegation, as in FTS: the service keeps the private key, and the client signs a certificate request."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

from pdm.workqueue.certificates.delegation import DelegationError, accept_proxy, new_request
from pdm.workqueue.certificates.vault import VaultError
from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.execution.credentials import PROXY, pending_context, vault_context
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import PlainText, endpoint
from pdm.workqueue.http.endpoints.credentials import (
    display_duration,
    proxy_details,
    remove_credential,
    store_credential,
)
from pdm.workqueue.http.problems import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
)
from pdm.workqueue.store import credentials
from pdm.workqueue.store.credentials import CredentialRecord, EncryptedCredential, PendingDelegation
from pdm.workqueue.wire.credentials import DelegationView

#: Tolerated difference between the clocks of client and service.
_CLOCK_SKEW = timedelta(minutes=5)


def delegation_id(subject: str) -> str:
    """The id of a caller's delegation: 16 hexadecimal digits, derived from the subject."""
    return hashlib.sha1(subject.encode(), usedforsecurity=False).hexdigest()[:16]


def _check_own(caller: Caller, name: str) -> None:
    if name != delegation_id(caller.subject):
        raise NotFoundError("you have no such delegation; GET /whoami has your delegation id")


def _delegation_view(record: CredentialRecord) -> DelegationView:
    # A proxy always has an expiry.
    end = record.valid_until or datetime.max.replace(tzinfo=UTC)
    return DelegationView(termination_time=end.replace(microsecond=0), subject=record.subject)


@endpoint(
    "GET",
    "/delegation/{delegation_id}",
    summary="The delegated proxy of the caller",
    result=DelegationView | None,
    errors=(NotFoundError,),
)
async def get_delegation(api: ApiContext, caller: Caller, delegation_id: str) -> DelegationView | None:
    """``null`` if there is none."""
    _check_own(caller, delegation_id)
    record = await api.database.read("find a credential", credentials.find, caller.user_id, PROXY)
    return None if record is None else _delegation_view(record)


@endpoint(
    "GET",
    "/delegation/{delegation_id}/request",
    summary="The certificate request to sign",
    result=str,
    errors=(NotFoundError,),
)
async def get_delegation_request(api: ApiContext, caller: Caller, delegation_id: str) -> PlainText:
    """PEM of a PKCS#10 request; the private key stays in the service. The same request is returned until it is used."""
    _check_own(caller, delegation_id)
    pending = await api.database.read("find a pending delegation", credentials.find_pending, caller.user_id)
    if pending is None:
        key_pem, csr_pem = await api.in_thread(new_request, caller.subject, api.settings.credentials.key_bits)
        sealed = api.vault.seal(key_pem, pending_context(caller.user_id))
        fresh = PendingDelegation(delegation_id, caller.user_id, sealed, csr_pem.decode("ascii"), api.clock())
        pending = await api.database.run("store a pending delegation", transactions.begin_delegation, fresh)
    return PlainText(pending.csr_pem)


@endpoint(
    "PUT",
    "/delegation/{delegation_id}/credential",
    summary="Store the signed proxy",
    body=bytes,
    result=DelegationView,
    status=201,
    errors=(InvalidInputError, NotFoundError, ConflictError),
)
async def put_delegation_credential(api: ApiContext, caller: Caller, delegation_id: str, body: bytes) -> DelegationView:
    """The body is the PEM of the proxy, followed by its issuer's certificate and the rest of the chain.

    Jobs that are held for a credential resume.
    """
    _check_own(caller, delegation_id)
    pending = await api.database.read("find a pending delegation", credentials.find_pending, caller.user_id)
    if pending is None:
        raise ConflictError("no certificate request is pending: get a request first, then sign it")
    try:
        key_pem = api.vault.unseal(pending.key, pending_context(caller.user_id))
    except VaultError as error:
        await api.database.run("drop a pending delegation", credentials.drop_pending, caller.user_id)
        raise ConflictError("the key of the request can no longer be decrypted: get a new one and sign it") from error
    now = api.clock()
    try:
        proxy = await api.in_thread(accept_proxy, key_pem, body, caller.subject, api.trust(), now)
    except DelegationError as error:
        raise InvalidInputError(str(error), "$") from error
    longest = timedelta(seconds=api.settings.credentials.longest_lifetime_s)
    if proxy.valid_until > now + longest + _CLOCK_SKEW:
        bound = display_duration(longest)
        raise InvalidInputError(
            f"the proxy is valid until {proxy.valid_until:%Y-%m-%dT%H:%M:%SZ}, but this service accepts at most"
            f" {bound}: sign a shorter one (pdm delegate --lifetime {bound})",
            "$",
        )
    new = EncryptedCredential(
        kind=CredentialKind.PROXY,
        subject=proxy.subject,
        valid_until=proxy.valid_until,
        secret=api.vault.seal(proxy.bundle_pem, vault_context(caller.user_id)),
        details=proxy_details(proxy.voms),
    )
    return _delegation_view(await store_credential(api, caller, new, transactions.put_delegation))


@endpoint(
    "DELETE",
    "/delegation/{delegation_id}",
    summary="Remove the delegated proxy",
    result=None,
    status=204,
    errors=(NotFoundError,),
)
async def delete_delegation(api: ApiContext, caller: Caller, delegation_id: str) -> None:
    """Elements that use it are terminated, and held until there is another. It is no error if there is none."""
    _check_own(caller, delegation_id)
    await remove_credential(api, transactions.remove_delegation, caller.user_id)

"""Delegation of a proxy, as FTS does it: the service keeps the key, the client signs."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

from pdm.workqueue.certificates.delegation import DelegationError, accept, new_request
from pdm.workqueue.certificates.vault import VaultError
from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.execution.credentials import PROXY, context_of
from pdm.workqueue.http import lookups
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.credentials import forget, keep, proxy_details
from pdm.workqueue.http.endpoint import Text, endpoint
from pdm.workqueue.http.problems import ConflictError, InvalidInputError, NotFoundError
from pdm.workqueue.store import credentials
from pdm.workqueue.store.credentials import CredentialRecord, NewCredential, PendingDelegation
from pdm.workqueue.wire.responses import DelegationView

_UNITS_S = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
#: Clocks of who signs and who accepts a proxy differ.
_SKEW = timedelta(minutes=5)


def shown_duration(lifetime: timedelta) -> str:
    """A duration as the command line takes it, in the largest unit that leaves no rest: ``30d``, ``12h``, ``90s``."""
    seconds = int(lifetime.total_seconds())
    unit, length = next((unit, length) for unit, length in _UNITS_S if seconds % length == 0)
    return f"{seconds // length}{unit}"


def delegation_id(subject: str) -> str:
    """The name of a caller's delegation: 16 hexadecimal digits, the same in every service of this kind."""
    return hashlib.sha1(subject.encode(), usedforsecurity=False).hexdigest()[:16]


def _check_own(caller: Caller, name: str) -> None:
    if name != delegation_id(caller.subject):
        raise NotFoundError("there is no such delegation of yours; GET /whoami tells the id of yours")


def _pending_context(user_id: int) -> str:
    return f"pending delegation of user {user_id}"


def _view(record: CredentialRecord) -> DelegationView:
    # A proxy always ends.
    end = record.valid_until or datetime.max.replace(tzinfo=UTC)
    return DelegationView(termination_time=end.replace(microsecond=0), subject=record.subject)


@endpoint(
    "GET",
    "/delegation/{delegation_id}",
    summary="What is delegated",
    result=DelegationView | None,
    errors=(NotFoundError,),
)
async def get_delegation(api: ApiContext, caller: Caller, delegation_id: str) -> DelegationView | None:
    """``null`` where nothing is."""
    _check_own(caller, delegation_id)
    record = await api.database.read("find a credential", credentials.find, caller.user_id, PROXY)
    return None if record is None else _view(record)


@endpoint(
    "GET",
    "/delegation/{delegation_id}/request",
    summary="A certificate request to be signed",
    result=str,
    errors=(NotFoundError,),
)
async def get_delegation_request(api: ApiContext, caller: Caller, delegation_id: str) -> Text:
    """PEM of a PKCS#10 request; the key stays here. Asked again, the same request comes until it is answered."""
    _check_own(caller, delegation_id)
    pending = await api.database.read("find a pending delegation", credentials.find_pending, caller.user_id)
    if pending is None:
        key_pem, csr_pem = await api.in_thread(new_request, caller.subject, api.settings.credentials.key_bits)
        sealed = api.vault.seal(key_pem, _pending_context(caller.user_id))
        fresh = PendingDelegation(delegation_id, caller.user_id, sealed, csr_pem.decode("ascii"), api.clock())
        pending = await api.database.run("begin a delegation", lookups.keep_pending, fresh)
    return Text(pending.csr_pem)


@endpoint(
    "PUT",
    "/delegation/{delegation_id}/credential",
    summary="The signed proxy",
    body=bytes,
    result=DelegationView,
    status=201,
    errors=(InvalidInputError, NotFoundError, ConflictError),
)
async def put_delegation_credential(api: ApiContext, caller: Caller, delegation_id: str, body: bytes) -> DelegationView:
    """PEM of the proxy, followed by the certificate that signed it and those behind that.

    Jobs that are held for want of a credential go on.
    """
    _check_own(caller, delegation_id)
    pending = await api.database.read("find a pending delegation", credentials.find_pending, caller.user_id)
    if pending is None:
        raise ConflictError("no delegation was begun: get the request first, and sign that")
    try:
        key_pem = api.vault.unseal(pending.key, _pending_context(caller.user_id))
    except VaultError as error:
        await api.database.run("drop a pending delegation", credentials.drop_pending, caller.user_id)
        raise ConflictError("the key of the request cannot be read any more: get a new one, and sign that") from error
    now = api.clock()
    try:
        proxy = await api.in_thread(accept, key_pem, body, caller.subject, api.trust(), now)
    except DelegationError as error:
        raise InvalidInputError(str(error), "$") from error
    longest = timedelta(seconds=api.settings.credentials.longest_lifetime_s)
    if proxy.valid_until > now + longest + _SKEW:
        bound = shown_duration(longest)
        raise InvalidInputError(
            f"the proxy is valid until {proxy.valid_until:%Y-%m-%dT%H:%M:%SZ}, and this service accepts {bound} at"
            f" most: sign one for less (pdm delegate --lifetime {bound})",
            "$",
        )
    new = NewCredential(
        kind=CredentialKind.PROXY,
        subject=proxy.subject,
        valid_until=proxy.valid_until,
        secret=api.vault.seal(proxy.bundle_pem, context_of(caller.user_id)),
        details=proxy_details(proxy.voms),
    )
    return _view(await keep(api, caller, new, lookups.take_delegation))


@endpoint(
    "DELETE",
    "/delegation/{delegation_id}",
    summary="Forget what was delegated",
    result=None,
    status=204,
    errors=(NotFoundError,),
)
async def delete_delegation(api: ApiContext, caller: Caller, delegation_id: str) -> None:
    """What runs with it is ended, and held until there is another one. It is no error if there is nothing."""
    _check_own(caller, delegation_id)
    await forget(api, lookups.forget_credential, caller.user_id)

"""A credential comes in: sealed, stored, and what was held for want of it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.logger import Logger

from pdm.workqueue.certificates.voms import VomsAttributes
from pdm.workqueue.http import lookups
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.store.claims import Resumed
from pdm.workqueue.store.credentials import CredentialRecord, NewCredential
from pdm.workqueue.telemetry.background import start_background

_log = Logger()

#: One of the transactions of `pdm.workqueue.http.lookups` that take a credential.
Take = Callable[..., tuple[CredentialRecord, Resumed]]


async def keep(
    api: ApiContext, caller: Caller, new: NewCredential, take: Take = lookups.take_credential
) -> CredentialRecord:
    """Store a credential whose secret is sealed, and let go on what was held for want of it."""
    protocols = api.protocols_with(new.kind)

    async def go_on(record: CredentialRecord, resumed: Resumed) -> None:
        count = resumed.count + await api.resume(caller.user_id, new.site_id, protocols, resumed.after)
        _log.info(
            "a {kind} of {owner} was stored, {resumed} held elements go on",
            kind=record.kind.words,
            owner=record.subject,
            site=record.site_id or None,
            resumed=count,
        )

    def tell(taken: tuple[CredentialRecord, Resumed]) -> None:
        start_background("let go on what was held", go_on(*taken))
        api.credentials_changed()
        api.wake()

    record, _ = await api.commit(
        "take a credential",
        take,
        caller.user_id,
        new,
        protocols,
        api.clock(),
        then=tell,
    )
    return record


async def forget(api: ApiContext, function: Callable[..., Any], *args: Any) -> Any:
    """Remove a credential, and have what works with it ended.

    Args:
        api: what is known.
        function: the transaction that removes it.
        args: of the function.

    Returns:
        What the function does.
    """

    def tell(_result: Any) -> None:
        api.credentials_changed()

    return await api.commit("forget a credential", function, *args, then=tell)


def proxy_details(voms: Sequence[VomsAttributes]) -> dict[str, Any]:
    """What is shown of a proxy besides."""
    return {"voms": [{"vo": each.vo, "fqans": list(each.fqans)} for each in voms]} if voms else {}

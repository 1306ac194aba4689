"""The service about itself and about who calls."""

from __future__ import annotations

from functools import cache
from typing import Any

from pdm.workqueue import __version__
from pdm.workqueue.execution.credentials import PROXY
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import Allow, endpoint
from pdm.workqueue.http.endpoints.delegation import delegation_id
from pdm.workqueue.http.views import whole_seconds
from pdm.workqueue.store import credentials
from pdm.workqueue.wire.responses import FaultView, HealthView, WhoamiView


@endpoint("GET", "/whoami", summary="Who the service takes the caller for", result=WhoamiView)
async def whoami(api: ApiContext, caller: Caller) -> WhoamiView:
    """With the id of the caller's delegation, and how long certificate and delegated credential are valid."""
    record = await api.database.read("find a credential", credentials.find, caller.user_id, PROXY)
    return WhoamiView(
        user_id=caller.user_id,
        subject=caller.subject,
        role=caller.role.value,
        delegation_id=delegation_id(caller.subject),
        certificate_valid_until=caller.certificate_ends_at.replace(microsecond=0),
        limited_proxy=caller.limited,
        credential_valid_until=whole_seconds(None if record is None else record.valid_until),
    )


@endpoint("GET", "/openapi.json", summary="This API in the words of OpenAPI 3.1", result=dict[str, Any])
async def get_openapi(api: ApiContext, caller: Caller) -> dict[str, Any]:
    """Made from the table that serves it."""
    return _openapi()


@cache
def _openapi() -> dict[str, Any]:
    # Not at the top: this module is a part of the table.
    from pdm.workqueue.http.endpoints import ENDPOINTS, ROOT
    from pdm.workqueue.http.openapi import document

    return document(ENDPOINTS, ROOT)


@endpoint("GET", "/health", summary="That the service answers", result=HealthView, allow=Allow.EVERYBODY)
async def health(api: ApiContext) -> HealthView:
    """For monitors; needs no certificate. It answers 200 also while parts do not work, with what they are."""
    faults = [FaultView(part=each.part.value, since=each.since.replace(microsecond=0)) for each in api.faults()]
    status = "ok" if not faults else "degraded" if api.may_claim() else "paused"
    return HealthView(status=status, version=__version__, faults=faults)

"""What the door is, who calls it, and the delegation of proxies, which is the one of the service's own API."""

from __future__ import annotations

from typing import Any

from pdm.workqueue import __version__
from pdm.workqueue.certificates.pem import to_pem
from pdm.workqueue.certificates.tls_server import verified_chain
from pdm.workqueue.domain.fts import BASE_ID, vo_id
from pdm.workqueue.execution.credentials import PROXY
from pdm.workqueue.http.access import Role
from pdm.workqueue.http.endpoint import PlainText
from pdm.workqueue.http.endpoints.delegations import (
    delegation_id,
    delete_delegation,
    get_delegation_request,
    put_delegation_credential,
)
from pdm.workqueue.http.fts.calls import FtsAnswer, FtsCall
from pdm.workqueue.http.fts.views import fts_time
from pdm.workqueue.http.problems import ConflictError, ForbiddenError, InvalidInputError, NotFoundError
from pdm.workqueue.store import credentials

#: The version of FTS3 whose REST API this is: clients compare it.
_API_VERSION = {"major": 3, "minor": 14, "patch": 0}
_LINKS: dict[str, Any] = {
    "curies": [{"name": "fts", "href": "https://gitlab.cern.ch/fts/fts3"}],
    "fts:whoami": {"href": "/whoami", "title": "Check user certificate"},
    "fts:joblist": {
        "href": "/jobs{?vo_name,user_dn,dlg_id,state_in}",
        "title": "List of active jobs",
        "templated": True,
    },
    "fts:job": {
        "href": "/jobs/{id}",
        "title": "Job information",
        "templated": True,
        "hints": {"allow": ["GET", "DELETE"]},
    },
    "fts:jobsubmit": {"href": "/jobs", "hints": {"allow": ["POST"]}},
}


async def show_door(call: FtsCall) -> FtsAnswer:
    """Versions and addresses."""
    return FtsAnswer(
        {
            "delegation": {"major": 1, "minor": 0, "patch": 0},
            "api": _API_VERSION,
            "core": _API_VERSION,
            "schema": {"major": 8, "minor": 0, "patch": 0, "message": f"pdm-workqueue {__version__}"},
            "_links": _LINKS,
        }
    )


async def whoami(call: FtsCall) -> FtsAnswer:
    """The caller, its VOs, and what ids of its jobs are derived from."""
    user, is_operator = call.user, call.caller.role is Role.OPERATOR
    roles = [fqan.partition("/Role=")[2].partition("/")[0] for fqan in user.fqans if "/Role=" in fqan]
    level = "all" if is_operator else "private"
    return FtsAnswer(
        {
            "user_dn": call.caller.subject,
            "dn": [call.caller.subject],
            "base_id": str(BASE_ID),
            "voms_cred": list(user.fqans),
            "vos": list(user.vos),
            "vos_id": [vo_id(vo) for vo in user.vos],
            "roles": [role for role in roles if role.upper() != "NULL"],
            "level": {"transfer": level, "deleg": level, "datamanagement": level}
            | ({"config": "all"} if is_operator else {}),
            "delegation_id": delegation_id(call.caller.subject),
            "method": "certificate",
            "is_root": is_operator,
        }
    )


async def show_certificate(call: FtsCall) -> FtsAnswer:
    """The verified chain of the caller's certificate, without the root."""
    chain = verified_chain(call.transport)
    return FtsAnswer(to_pem(*(chain[:-1] or chain)), media_type="application/x-pem-file")


def _check_own(call: FtsCall) -> str:
    name = call.values["delegation_id"]
    if name != delegation_id(call.caller.subject):
        raise ForbiddenError("The requested ID and the credentials ID do not match")
    return name


async def show_delegation(call: FtsCall) -> FtsAnswer:
    """When the delegated proxy expires; null without one."""
    _check_own(call)
    record = await call.api.database.read("find a credential", credentials.find, call.caller.user_id, PROXY)
    if record is None:
        return FtsAnswer(None)
    fqans = [fqan for each in record.details.get("voms", ()) for fqan in each.get("fqans", ())]
    return FtsAnswer({"termination_time": fts_time(record.valid_until), "voms_attrs": fqans or [""]})


async def show_request(call: FtsCall) -> FtsAnswer:
    """The certificate request to sign."""
    name = _check_own(call)
    request = await get_delegation_request.handler(call.api, call.caller, name)
    text = request.text if isinstance(request, PlainText) else ""
    return FtsAnswer(text.encode("ascii"), media_type="text/plain", headers={"X-Delegation-ID": name})


async def put_credential(call: FtsCall) -> FtsAnswer:
    """Store the signed proxy."""
    name = _check_own(call)
    try:
        await put_delegation_credential.handler(call.api, call.caller, name, call.body)
    except ConflictError as error:
        raise InvalidInputError(f"No credential cache found: {error.detail}") from error
    except InvalidInputError as error:
        raise InvalidInputError(f"Could not process the proxy: {error.detail}") from error
    return FtsAnswer(b"", 201)


async def remove_delegation(call: FtsCall) -> FtsAnswer:
    """Remove the delegated proxy."""
    name = _check_own(call)
    if await call.api.database.read("find a credential", credentials.find, call.caller.user_id, PROXY) is None:
        raise NotFoundError("Delegated credentials not found")
    await delete_delegation.handler(call.api, call.caller, name)
    return FtsAnswer(b"", 204)

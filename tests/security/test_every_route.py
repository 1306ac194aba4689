"""Each route of the table is either everybody's, one's own, of a site, or for operators; a new one has to be sorted in.

Those of jobs, delegations and credentials are looked at in ``tests/http/test_foreign_access.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted

from pdm.workqueue.http.endpoint import Allow, Endpoint
from pdm.workqueue.http.endpoints import ENDPOINTS
from tests.http.service import Answer, Service
from tests.http.test_foreign_access import PRIVATE

_BODIES: dict[str, dict[str, Any]] = {
    "change_site": {"description": "mine now"},
    "drain_site": {"message": "closed"},
    "log_on": {"username": "someone", "password": "a password"},
    "ban_user": {"message": "out"},
    "drain_node": {"message": "closed"},
    "put_refresh_token": {"refresh_token": "a refresh token"},
}
_FOR_OPERATORS = {"drain_site", "resume_site", "list_users", "ban_user", "unban_user", "list_audit"}
_FOR_OPERATORS |= {"get_activity", "get_queue", "list_nodes", "drain_node", "resume_node"}
#: Looked at in ``tests/http/test_peers.py``.
_FOR_NODES = {each.name for each in ENDPOINTS if each.allow is Allow.NODES}
#: They take or tell what is the caller's own, or what everybody may know; sites in bodies have tests of their own.
_WITHOUT_AN_OWNER = {
    "list_jobs", "submit_job", "submit_list", "submit_copy", "submit_remove", "submit_rename", "submit_mkdir",
    "list_sites", "list_site_activity", "create_site", "list_routes", "list_credentials", "add_credential", "whoami",
    "get_openapi", "health", "list_events", "list_schedules", "create_schedule",
    "list_logins", "list_webhooks", "create_webhook", "get_mail", "set_mail", "confirm_mail", "delete_mail",
}  # fmt: skip
_OF_SITES = [each for each in ENDPOINTS if "site_id" in each.parameters]


async def _call(service: Service, user: str, endpoint: Endpoint, **values: int) -> Answer:
    body = _BODIES[endpoint.name] if endpoint.body else None
    return await service.call(user, endpoint.method, endpoint.path.format(**values), body)


async def _made(service: Service, user: str, name: str, *, public: bool) -> int:
    site = {
        "name": name,
        "public": public,
        "endpoints": {"gridftp": "gsiftp://far.example.org"},
        "myproxy": "far.example.org:7512",
    }
    answer = await service.call(user, "POST", "/sites", site)
    assert answer.status == 201, answer.body
    return int(answer.json["id"])


def test_every_route_is_looked_at() -> None:
    looked_at = [each.name for each in (*PRIVATE, *_OF_SITES)] + sorted(_WITHOUT_AN_OWNER | _FOR_NODES)
    looked_at += sorted(_FOR_OPERATORS - {each.name for each in _OF_SITES})
    assert sorted(looked_at) == sorted(each.name for each in ENDPOINTS)


@pytest_twisted.ensureDeferred
async def test_a_private_site_is_as_one_that_is_not_there(service: Service) -> None:
    site_id = await _made(service, "site owner", "hidden", public=False)
    before = (await service.call("site owner", "GET", f"/sites/{site_id}")).json
    for endpoint in _OF_SITES:
        answer = await _call(service, "site stranger", endpoint, site_id=site_id)
        missing = await _call(service, "site stranger", endpoint, site_id=999_999)
        assert (answer.status, answer.problem) == (missing.status, missing.problem), endpoint.name
        assert answer.status == (403 if endpoint.name in _FOR_OPERATORS else 404), (endpoint.name, answer.body)
        assert answer.json["detail"].replace(str(site_id), "N") == missing.json["detail"].replace("999999", "N")
    assert (await service.call("site owner", "GET", f"/sites/{site_id}")).json == before
    audit = (await service.call("operator", "GET", "/audit")).json
    subject = service.certificates.of("site stranger").dn
    assert not [line for line in audit if line["subject"] == subject]


@pytest_twisted.ensureDeferred
async def test_a_public_site_is_used_by_all_and_changed_by_its_owner(service: Service) -> None:
    site_id = await _made(service, "site owner", "open", public=True)
    before = (await service.call("site owner", "GET", f"/sites/{site_id}")).json
    for endpoint in _OF_SITES:
        if endpoint.name in ("log_on", "begin_login", "continue_login", "put_refresh_token"):
            # They would connect; tests/grid/test_credentials.py covers the owner of a logon.
            continue
        answer = await _call(service, "site stranger", endpoint, site_id=site_id)
        forbidden = endpoint.name in _FOR_OPERATORS | {"change_site", "delete_site"}
        assert (answer.status == 403) == forbidden, (endpoint.name, answer.body)
        assert answer.status in (200, 204, 403), (endpoint.name, answer.body)
    assert (await service.call("site owner", "GET", f"/sites/{site_id}")).json == before


@pytest.mark.parametrize("name", sorted(_FOR_OPERATORS))
@pytest_twisted.ensureDeferred
async def test_operators_routes_are_closed_to_all_others(service: Service, name: str) -> None:
    (endpoint,) = (each for each in ENDPOINTS if each.name == name)
    user_id = (await service.call("site owner", "GET", "/whoami")).json["user_id"]
    for number in (user_id, 999_999):
        answer = await _call(service, "site stranger", endpoint, user_id=number, site_id=1, node=number)
        assert (answer.status, answer.problem) == (403, "forbidden"), answer.body

"""Resources of other users do not exist, on every route; operators see and control everything."""

from __future__ import annotations

from typing import Any

import pytest_twisted

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.http.endpoint import Allow, Endpoint
from pdm.workqueue.http.endpoints import ENDPOINTS
from tests.http.service import Answer, Service

#: Routes that name something which belongs to one user.
_OWNED = {"job_id", "delegation_id", "credential_id", "schedule_id", "webhook_id"}
PRIVATE = [each for each in ENDPOINTS if _OWNED & set(each.parameters) and each.allow is Allow.USERS]


_MISSING = {
    "job_id": 999_999,
    "delegation_id": "f" * 16,
    "credential_id": 999_999,
    "schedule_id": 999_999,
    "webhook_id": 999_999,
}


async def _call(service: Service, user: str, endpoint: Endpoint, values: dict[str, Any]) -> Answer:
    body = b"{}" if endpoint.body else None
    if endpoint.name == "change_schedule":
        body = b'{"paused": true}'
    elif endpoint.name == "hold_job":
        body = b'{"message": "the site moves"}'
    return await service.call(user, endpoint.method, endpoint.path.format(**values), raw=body)


async def _values(service: Service, owner: str) -> dict[str, Any]:
    """Something of the owner for every parameter: a job that has failed, so that it has outputs and can be retried."""
    job_id = await service.copied(owner, "file", status=JobStatus.FAILED)
    me = (await service.call(owner, "GET", "/whoami")).json
    token = (await service.call(owner, "POST", "/credentials", {"kind": "token", "secret": "abc"})).json
    job = {"type": "LIST", "src_siteid": 1, "src_filepath": "data", "protocol": "DUMMY"}
    schedule = (await service.call(owner, "POST", "/schedules", {"recurrence": "0 3 1 1 *", "job": job})).json
    hook = {"url": "https://receiver.invalid/", "kinds": ["held"]}
    webhook = (await service.call(owner, "POST", "/webhooks", hook)).json
    ids = {"delegation_id": me["delegation_id"], "credential_id": token["id"], "schedule_id": schedule["id"]}
    return {"job_id": job_id, "element_id": 1, "attempt": 1, "webhook_id": webhook["id"], **ids}


def test_the_table_has_what_it_should() -> None:
    assert len(PRIVATE) == 30


@pytest_twisted.ensureDeferred
async def test_another_users_things_are_404_everywhere(service: Service) -> None:
    values = await _values(service, "owner")
    before = await service.job(values["job_id"])
    for endpoint in PRIVATE:
        answer = await _call(service, "stranger", endpoint, values)
        assert answer.status == 404, (endpoint.name, answer.body)
        missing = await _call(service, "stranger", endpoint, values | _MISSING)
        assert answer.problem == missing.problem, f"{endpoint.name} tells that there is something"
        words = answer.json["detail"].replace(str(values["job_id"]), "N")
        assert words == missing.json["detail"].replace("999999", "N")
    assert await service.job(values["job_id"]) == before
    assert (await service.call("stranger", "GET", "/jobs")).json == []


@pytest_twisted.ensureDeferred
async def test_ones_own_things_are_there(service: Service) -> None:
    """Else the test above would prove nothing."""
    values = await _values(service, "owning")
    for endpoint in PRIVATE:
        answer = await _call(service, "owning", endpoint, values)
        # The PUT finds the delegation, and that its body is no proxy.
        assert answer.status in ((400,) if endpoint.method == "PUT" else (200, 204)), (endpoint.name, answer.body)


@pytest_twisted.ensureDeferred
async def test_an_operator_sees_and_steers_the_jobs_of_all(service: Service) -> None:
    values = await _values(service, "overseen")
    for endpoint in PRIVATE:
        if {"job_id", "schedule_id"} & set(endpoint.parameters):
            answer = await _call(service, "operator", endpoint, values)
            assert answer.status in (200, 204), (endpoint.name, answer.body)
        else:
            assert (await _call(service, "operator", endpoint, values)).status == 404


@pytest_twisted.ensureDeferred
async def test_lists_are_ones_own_unless_an_operator_asks_for_more(service: Service) -> None:
    job = await service.submit("list owner")
    owner = job["user_id"]
    assert (await service.call("operator", "GET", "/jobs")).json == []
    everybody = (await service.call("operator", "GET", "/jobs?user=all")).json
    assert job["id"] in [each["id"] for each in everybody]
    assert [each["id"] for each in (await service.call("operator", "GET", f"/jobs?user={owner}")).json] == [job["id"]]
    for user in ("all", "1" if owner != 1 else "2"):
        answer = await service.call("list owner", "GET", f"/jobs?user={user}")
        assert (answer.status, answer.problem) == (403, "forbidden ?user")
    del job["progress"]
    job["owner"] = service.certificates.of("list owner").dn
    assert (await service.call("list owner", "GET", f"/jobs?user={owner}")).json == [job]
    assert (await service.call("operator", "GET", "/jobs?user=x")).problem == "invalid-input ?user"

"""Schedules over REST: what can be asked, and what their runs submit, with a clock that tests move."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.task import deferLater

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.execution.preparing import NotPossibleError
from pdm.workqueue.http.access import AccessList
from pdm.workqueue.store import claiming
from pdm.workqueue.store.claim_limits import ClaimLimits
from tests.http.service import Service, reactor

_JOB = {"type": "LIST", "src_siteid": 1, "src_filepath": "data", "protocol": "DUMMY", "label": "nightly"}
_LARGE = {**_JOB, "type": "COPY", "dst_siteid": 2, "dst_filepath": "b"}
_LARGE["extra_opts"] = {"filters": [{"exclude": "x" * 4000}] * 5}


async def added(service: Service, user: str, recurrence: str = "every 1h", **job: Any) -> dict[str, Any]:
    answer = await service.call(user, "POST", "/schedules", {"recurrence": recurrence, "job": {**_JOB, **job}})
    assert answer.status == 201, answer.body
    return answer.json


async def passed(service: Service, user: str, number: int, hours: float, runs: int) -> list[dict[str, Any]]:
    """Move the clock, and wait for a number of runs; returns these, the newest first."""
    service.skip[0] += timedelta(hours=hours)
    service.assembly.timed.scheduler.timer.wake()
    found: list[dict[str, Any]] = []
    for _ in range(200):
        found = (await service.call(user, "GET", f"/schedules/{number}")).json["runs"]
        if len(found) >= runs:
            break
        await deferLater(reactor, 0.02)
    assert len(found) == runs, found
    return found


@pytest_twisted.ensureDeferred
async def test_a_run_is_a_job_of_the_owner(own_service: Service) -> None:
    created = await added(own_service, "planner", max_tries=3)
    assert (created["recurrence"], created["timezone"], created["paused"]) == ("every 1h", "UTC", False)
    assert created["last_run"] is None
    assert created["job"] == {**_JOB, "max_tries": 3}
    (run,) = await passed(own_service, "planner", created["id"], 1.01, 1)
    assert (run["outcome"], run["status"], run["message"]) == ("SUBMITTED", "SUBMITTED", None)
    assert run["due_at"] == created["next_due"]
    job = (await own_service.call("planner", "GET", f"/jobs/{run['job']}")).json
    assert (job["schedule"], job["label"], job["max_tries"]) == (created["id"], "nightly", 3)
    (seen,) = (await own_service.call("planner", "GET", "/schedules")).json
    assert seen["last_run"] == run
    assert seen["next_due"] > created["next_due"]


@pytest_twisted.ensureDeferred
async def test_of_missed_times_one_is_made_up_for(own_service: Service) -> None:
    created = await added(own_service, "absent")
    (run,) = await passed(own_service, "absent", created["id"], 30, 1)
    assert run["due_at"] == created["next_due"] < run["made_at"]
    seen = (await own_service.call("absent", "GET", f"/schedules/{created['id']}")).json
    assert seen["next_due"] > run["made_at"]
    assert len((await own_service.call("absent", "GET", "/jobs")).json) == 1


@pytest_twisted.ensureDeferred
async def test_a_run_that_has_not_ended_is_not_doubled(own_service: Service) -> None:
    number = (await added(own_service, "slow"))["id"]
    (first,) = await passed(own_service, "slow", number, 1.01, 1)
    second, _ = await passed(own_service, "slow", number, 1, 2)
    assert (second["outcome"], second["job"]) == ("SKIPPED", None)
    assert second["message"] == f"overlap: job {first['job']} of an earlier run has not ended"
    (token,) = await own_service.claim(first["job"])
    await own_service.settle(token)
    third, _, _ = await passed(own_service, "slow", number, 1, 3)
    assert third["outcome"] == "SUBMITTED"


@pytest_twisted.ensureDeferred
async def test_an_expired_credential_holds_the_run_and_the_schedule_says_so(own_service: Service) -> None:
    await own_service.give_credential("expired", timedelta(minutes=30))
    number = (await added(own_service, "expired", protocol="GRIDFTP"))["id"]
    (run,) = await passed(own_service, "expired", number, 1.01, 1)
    assert run["outcome"] == "SUBMITTED"
    limits = ClaimLimits(elements=1, batches=1, batch_elements=1, batch_bytes=1)
    (batch,) = await own_service.database.run("claim", claiming.claim, "worker", limits, own_service.now())
    with pytest.raises(NotPossibleError) as refused:
        await own_service.assembly.executor.preparation.prepare(batch)
    token = batch.token(batch.elements[0])
    await own_service.settle(token, JobStatus.HELD, refused.value.failure, counts=False)
    seen = (await own_service.call("expired", "GET", f"/schedules/{number}")).json
    assert seen["last_run"]["status"] == "HELD"
    assert seen["hold"]["code"] == "CREDENTIAL_EXPIRED"
    second, _ = await passed(own_service, "expired", number, 1, 2)
    assert second["outcome"] == "SKIPPED"
    again = (await own_service.call("expired", "GET", f"/schedules/{number}")).json
    assert again["hold"] == seen["hold"]


@pytest_twisted.ensureDeferred
async def test_a_drained_site_and_a_banned_user_are_noted_and_the_schedule_stays(own_service: Service) -> None:
    number = (await added(own_service, "barred"))["id"]
    drained = await own_service.call("operator", "POST", "/sites/1/drain", {"message": "new disks"})
    assert drained.status == 200, drained.body
    (run,) = await passed(own_service, "barred", number, 1.01, 1)
    assert (run["outcome"], run["message"]) == ("FAILED", "site 1 is drained: new disks")
    assert (await own_service.call("operator", "POST", "/sites/1/resume")).status == 200
    user_id = (await own_service.call("barred", "GET", "/whoami")).json["user_id"]
    assert (await own_service.call("operator", "POST", f"/users/{user_id}/ban", {"message": "too much"})).status == 200
    run, *_ = await passed(own_service, "barred", number, 1, 2)
    assert (run["outcome"], run["message"]) == ("FAILED", "an operator has banned its user: too much")
    assert (await own_service.call("operator", "POST", f"/users/{user_id}/unban")).status == 200
    run, *_ = await passed(own_service, "barred", number, 1, 3)
    assert run["outcome"] == "SUBMITTED"


@pytest_twisted.ensureDeferred
async def test_a_removed_site_is_noted(own_service: Service) -> None:
    site = {"name": "gone", "endpoints": {"DUMMY": "dummy://gone"}}
    site_id = (await own_service.call("mover", "POST", "/sites", site)).json["id"]
    number = (await added(own_service, "mover", src_siteid=site_id))["id"]
    assert (await own_service.call("mover", "DELETE", f"/sites/{site_id}")).status == 204
    (run,) = await passed(own_service, "mover", number, 1.01, 1)
    assert run["outcome"] == "FAILED"
    assert f"there is no site {site_id}" in run["message"]


@pytest_twisted.ensureDeferred
async def test_a_schedule_is_paused_resumed_and_removed(own_service: Service) -> None:
    number = (await added(own_service, "pausing", "0 * * * *"))["id"]
    path = f"/schedules/{number}"
    paused = (await own_service.call("pausing", "PATCH", path, {"paused": True})).json
    assert (paused["paused"], paused["next_due"]) == (True, None)
    await passed(own_service, "pausing", number, 5, 0)
    resumed = (await own_service.call("pausing", "PATCH", path, {"paused": False})).json
    assert resumed["next_due"] > f"{own_service.now():%Y-%m-%dT%H:%M:%SZ}"
    (run,) = await passed(own_service, "pausing", number, 1, 1)
    assert (await own_service.call("pausing", "DELETE", path)).status == 204
    assert (await own_service.call("pausing", "GET", path)).problem == "not-found"
    assert (await own_service.call("pausing", "GET", f"/jobs/{run['job']}")).json["schedule"] == number


@pytest_twisted.ensureDeferred
async def test_a_user_who_is_taken_off_the_list_has_no_more_runs(own_service: Service) -> None:
    number = (await added(own_service, "leaver"))["id"]
    admitted = own_service.assembly.users
    own_service.assembly.users = AccessList(open_to_all=False, roles={})
    (run,) = await passed(own_service, "leaver", number, 1.01, 1)
    assert (run["outcome"], run["job"]) == ("FAILED", None)
    assert re.search("^/.*leaver is not a user of this service any more$", run["message"])
    own_service.assembly.users = admitted
    run, *_ = await passed(own_service, "leaver", number, 1, 2)
    assert run["outcome"] == "SUBMITTED"


@pytest_twisted.ensureDeferred
async def test_a_schedule_is_edited(own_service: Service) -> None:
    service, user = own_service, "editor"
    created = await added(service, user, "every 6h")
    path = f"/schedules/{created['id']}"

    edited = (await service.call(user, "PATCH", path, {"job": {**_JOB, "label": "weekly"}})).json
    assert (edited["job"]["label"], edited["next_due"]) == ("weekly", created["next_due"])
    edited = (await service.call(user, "PATCH", path, {"recurrence": "every 1h"})).json
    assert (edited["recurrence"], edited["job"]["label"]) == ("every 1h", "weekly")
    (run,) = await passed(service, user, created["id"], 1.01, 1)
    assert (await service.call(user, "GET", f"/jobs/{run['job']}")).json["label"] == "weekly"

    edited = (await service.call(user, "PATCH", path, {"paused": True, "recurrence": "0 3 * * *"})).json
    assert edited["next_due"] is None
    edited = (await service.call(user, "PATCH", path, {"timezone": "Europe/Paris", "paused": False})).json
    assert (edited["recurrence"], edited["timezone"]) == ("0 3 * * *", "Europe/Paris")
    assert edited["next_due"] is not None

    for changes, pointer in (
        ({}, "$"),
        ({"recurrence": "every 5s"}, "$.recurrence"),
        ({"recurrence": "0 0 30 2 *"}, "$.recurrence"),
        ({"timezone": "Mars/Base"}, "$.timezone"),
        ({"job": {**_JOB, "src_siteid": 999}}, "$.job.src_siteid"),
        ({"job": _LARGE}, "$.job"),
        ({"job": {**_JOB, "after": [1]}}, "$.job.after"),
    ):
        answer = await service.call(user, "PATCH", path, changes)
        assert (answer.status, answer.json["pointer"]) == (400, pointer), answer.body
    assert (await service.call(user, "GET", path)).json["job"] == edited["job"]
    # An operator acts for nobody else.
    assert (await service.call("operator", "PATCH", path, {"job": _JOB})).status == 403
    assert (await service.call("operator", "PATCH", path, {"paused": True})).status == 200


@pytest_twisted.ensureDeferred
async def test_a_deadline_counts_from_each_run(own_service: Service) -> None:
    number = (await added(own_service, "hurried", "every 2h", extra_opts={"deadline": "30m"}))["id"]
    (run,) = await passed(own_service, "hurried", number, 2.01, 1)
    job = await own_service.job(run["job"])
    assert job.deadline is not None
    assert abs(job.deadline - job.timestamp - timedelta(minutes=30)) < timedelta(seconds=1)


@pytest_twisted.ensureDeferred
async def test_a_repeated_request_creates_one_schedule(service: Service) -> None:
    body = {"recurrence": "every 1h", "job": _JOB}
    answers = [await service.call("twice", "POST", "/schedules", body, Idempotency_Key="once") for _ in range(2)]
    assert answers[0].json == answers[1].json
    other = await service.call("twice", "POST", "/schedules", {**body, "timezone": "UTC"}, Idempotency_Key="once")
    assert other.problem == "idempotency-key-used Idempotency-Key"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"recurrence": "every 10s"}, "invalid-input $.recurrence"),
        ({"recurrence": ""}, "invalid-input $.recurrence"),
        ({"recurrence": "0 0 31 2 *"}, "invalid-input $.recurrence"),
        ({"recurrence": 5}, "invalid-input $.recurrence"),
        ({"timezone": "Mars/Olympus"}, "invalid-input $.timezone"),
        ({"colour": "red"}, "invalid-input $.colour"),
        ({"job": {}}, "invalid-input $.job.type"),
        ({"job": {**_JOB, "src_siteid": 99}}, "invalid-input $.job.src_siteid"),
        ({"job": {**_JOB, "extra_opts": {"depht": 1}}}, "invalid-input $.job.extra_opts.depht"),
        ({"job": {**_JOB, "after": [1]}}, "invalid-input $.job.after"),
        ({"job": {**_JOB, "src_filepath": "x/" * 10_000}}, "invalid-input $.job.src_filepath"),
        ({"job": _LARGE}, "invalid-input $.job"),
        (
            {"job": {**_JOB, "extra_opts": {"deadline": "2000-01-01T00:00:00Z"}}},
            "invalid-input $.job.extra_opts.deadline",
        ),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_cannot_be_scheduled_is_refused(service: Service, change: dict[str, Any], problem: str) -> None:
    body = {"recurrence": "every 1h", "job": _JOB, **change}
    answer = await service.call("wrong", "POST", "/schedules", body)
    assert (answer.status, answer.problem) == (400, problem), answer.body
    assert (await service.call("wrong", "GET", "/schedules")).json == []

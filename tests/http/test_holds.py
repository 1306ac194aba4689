"""Holding, resuming and changing a job over HTTP: who may, what is answered, and what follows."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.task import deferLater

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import NewElement
from tests.http.service import Service, reactor

_MISSING = AttemptFailure(FailureScope.SOURCE, FailureCode.NOT_FOUND, "no such file")


async def _copies(service: Service, user: str, count: int) -> tuple[int, list[Any]]:
    """A COPY job whose listing is done, and the tokens of its elements, which run."""
    number = (await service.submit(user, "/copy"))["id"]
    (listing,) = await service.claim(number)
    await service.extend(listing, *(NewElement(JobType.COPY, f"data/{n}", f"copy/{n}", size=1) for n in range(count)))
    await service.settle(listing)
    return number, await service.claim(number)


async def _why(service: Service, user: str, number: int) -> dict[str, Any]:
    reasons = (await service.call(user, "GET", f"/jobs/{number}/why")).json["reasons"]
    return {each["code"]: each for each in reasons}


@pytest_twisted.ensureDeferred
async def test_a_hold_says_who_why_and_until_when(service: Service) -> None:
    number, (first, second) = await _copies(service, "holder", 2)
    body = {"message": "disk is full", "until": "12h"}
    held = (await service.call("holder", "POST", f"/jobs/{number}/hold", body)).json
    hold = held["hold"]
    assert (held["status"], held["num_running"]) == ("RUNNING", 2)
    assert (hold["code"], hold["by"], hold["message"]) == ("ON_HOLD", "owner", "disk is full")
    assert hold["who"] == "/DC=org/DC=test/CN=holder"
    assert hold["reason"] == f"its owner holds it, since {hold['since']} and until {hold['until']}: disk is full"
    assert (await service.call("holder", "GET", f"/jobs/{number}/status")).json["waiting"] == [hold["reason"]]
    why = await _why(service, "holder", number)
    assert why["HELD"]["reason"] == f"{hold['reason']}; 2 elements still run"
    assert {"LIMIT", "QUEUE"}.isdisjoint(why)
    await service.settle(first)
    await service.settle(second, JobStatus.SUBMITTED, _MISSING)
    (listed,) = (await service.call("holder", "GET", "/jobs?status=HELD")).json
    assert (listed["id"], listed["hold"]) == (number, {**hold, "count": 1})
    assert await service.claim(number) == []
    resumed = (await service.call("holder", "POST", f"/jobs/{number}/resume")).json
    assert (resumed["status"], "hold" in resumed) == ("RUNNING", False)
    assert len(await service.claim(number)) == 1
    kinds = "kinds=held,resumed"
    told = (await service.call("holder", "GET", f"/jobs/{number}/events?{kinds}")).json
    assert [(each["kind"], each["data"]["by"], each["data"]["count"]) for each in told] == [
        ("held", "owner", 0),
        ("resumed", "owner", 1),
    ]
    assert (told[0]["data"]["who"], told[0]["data"]["until"]) == (hold["who"], hold["until"])
    audit = (await service.call("operator", "GET", "/audit")).json
    assert [each["action"] for each in audit if each["target"] == f"job {number}"] == ["job.hold", "job.resume"]


@pytest_twisted.ensureDeferred
async def test_the_hold_of_an_operator_stays_until_an_operator_ends_it(service: Service) -> None:
    number = (await service.submit("watched"))["id"]
    bodies: list[dict[str, str]] = [{}, {"message": " "}]
    for body in bodies:
        answer = await service.call("operator", "POST", f"/jobs/{number}/hold", body)
        assert (answer.status, answer.problem) == (400, "invalid-input $.message")
    held = (await service.call("operator", "POST", f"/jobs/{number}/hold", {"message": "the site asks"})).json
    assert (held["status"], held["hold"]["by"]) == ("HELD", "operator")
    seen = (await service.call("watched", "GET", f"/jobs/{number}")).json
    assert "(/DC=org/DC=test/CN=operator) holds it" in seen["hold"]["reason"]
    for act, given in (("hold", {}), ("resume", None)):
        answer = await service.call("watched", "POST", f"/jobs/{number}/{act}", given)
        assert (answer.status, answer.problem) == (403, "forbidden")
        assert "the site asks" in answer.json["detail"]
    resumed = (await service.call("operator", "POST", f"/jobs/{number}/resume")).json
    assert resumed["status"] == "SUBMITTED"
    await service.call("operator", "POST", f"/jobs/{number}/hold", {"message": "again"})
    assert (await service.call("watched", "DELETE", f"/jobs/{number}")).json["status"] == "CANCELLED"


@pytest_twisted.ensureDeferred
async def test_what_has_ended_is_returned_as_it_is(service: Service) -> None:
    number = await service.copied("ended", "a")
    for method, path, body in (
        ("POST", "/hold", {}),
        ("POST", "/resume", None),
        ("PATCH", "", {"priority": 1, "max_active": 3}),
    ):
        answer = await service.call("ended", method, f"/jobs/{number}{path}", body)
        assert (answer.status, answer.json["status"], answer.json["priority"]) == (200, "DONE", 5)
        assert {"hold", "max_active"}.isdisjoint(answer.json)
        assert (await service.call("stranger", method, f"/jobs/{number}{path}", body)).status == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "problem"),
    [
        ("POST", "/hold", {"until": "yesterday"}, "invalid-input $.until"),
        ("POST", "/hold", {"until": "2001-01-01T00:00:00Z"}, "invalid-input $.until"),
        ("POST", "/hold", {"message": "two\nlines"}, "invalid-input $.message"),
        ("POST", "/hold", {"message": "x" * 501}, "invalid-input $.message"),
        ("POST", "/hold", {"reason": "x"}, "invalid-input $.reason"),
        ("PATCH", "", {"priority": 10}, "invalid-input $.priority"),
        ("PATCH", "", {"priority": None}, "invalid-input $.priority"),
        ("PATCH", "", {"max_active": 0}, "invalid-input $.max_active"),
        ("PATCH", "", {"label": "other"}, "invalid-input $.label"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_cannot_be_asked(service: Service, method: str, path: str, body: Any, problem: str) -> None:
    job = await service.submit("mistaken")
    answer = await service.call("mistaken", method, f"/jobs/{job['id']}{path}", body)
    assert (answer.status, answer.problem) == (400, problem)
    assert (await service.job(job["id"])).status is JobStatus.SUBMITTED


@pytest_twisted.ensureDeferred
async def test_a_hold_ends_by_itself(service: Service) -> None:
    number = (await service.submit("patient"))["id"]
    await service.call("patient", "POST", f"/jobs/{number}/hold", {"until": "90s"})
    before = service.skip[0]
    service.skip[0] += timedelta(seconds=91)
    try:
        service.assembly.timed.hold_ends.timer.wake()
        for _ in range(500):
            job = (await service.call("patient", "GET", f"/jobs/{number}")).json
            if job["status"] != "HELD":
                break
            await deferLater(reactor, 0.01)
    finally:
        service.skip[0] = before
    assert (job["status"], "hold" in job) == ("SUBMITTED", False)
    (event,) = (await service.call("patient", "GET", f"/jobs/{number}/events?kinds=resumed")).json
    assert event["data"]["by"] == "service"


@pytest_twisted.ensureDeferred
async def test_a_limit_is_given_at_submission(service: Service) -> None:
    job = await service.submit("limiting", "/copy", max_active=1)
    assert job["max_active"] == 1
    number = job["id"]
    (listing,) = await service.claim(number)
    await service.extend(listing, *(NewElement(JobType.COPY, f"data/{n}", f"copy/{n}", size=1) for n in range(3)))
    await service.settle(listing)
    for _ in range(3):
        (token,) = await service.claim(number)
        assert await service.claim(number) == []
        await service.settle(token)
    assert (await service.call("limiting", "GET", f"/jobs/{number}")).json["status"] == "DONE"
    assert "max_active" not in await service.submit("limiting", "/copy")


@pytest_twisted.ensureDeferred
async def test_priority_and_limit_are_changed(service: Service) -> None:
    number, tokens = await _copies(service, "changing", 3)
    changed = (await service.call("changing", "PATCH", f"/jobs/{number}", {"priority": 1, "max_active": 2})).json
    assert (changed["priority"], changed["max_active"]) == (1, 2)
    await service.settle(tokens[0], JobStatus.SUBMITTED, _MISSING)
    assert await service.claim(number) == []
    why = await _why(service, "changing", number)
    assert why["LIMIT"]["reason"] == "at most 2 of its elements may run at once"
    changed = (await service.call("changing", "PATCH", f"/jobs/{number}", {"max_active": None})).json
    assert (changed["priority"], "max_active" in changed) == (1, False)
    assert len(await service.claim(number)) == 1

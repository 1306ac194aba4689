"""Jobs that begin after others, and jobs with a deadline: what can be asked, and what the answers say."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.task import deferLater

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.store.job_changes import CHANGED_AT_ONCE
from tests.http.service import Service, reactor


async def until(service: Service, user: str, job_id: int, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """A job once it is as expected: others are told in a transaction that follows."""
    for _ in range(200):
        job = (await service.call(user, "GET", f"/jobs/{job_id}")).json
        if is_so(job):
            break
        await deferLater(reactor, 0.02)
    return job


async def end(service: Service, job_id: int, status: JobStatus = JobStatus.DONE) -> None:
    (token,) = await service.claim(job_id)
    await service.settle(token, status)


@pytest_twisted.ensureDeferred
async def test_a_job_says_for_which_it_waits_and_begins_after_them(service: Service) -> None:
    first, second = [(await service.submit("chained"))["id"] for _ in range(2)]
    job = await service.submit("chained", after=[first, second, first])
    assert (job["after"], job["after_any"]) == ([first, second], False)
    assert job["waiting"] == [f"it begins when jobs {first} and {second} are DONE"]
    assert await service.claim(job["id"]) == []
    for number in (first, second):
        # The claim above has taken these along.
        assert (await service.job(number)).status is JobStatus.RUNNING


@pytest_twisted.ensureDeferred
async def test_a_chain_goes_on_by_itself(service: Service) -> None:
    first = (await service.submit("chain"))["id"]
    second = await service.submit("chain", "/mkdir", after=[first])
    third = await service.submit("chain", after=[second["id"]], after_any=True)
    words = f"it begins when job {first} is DONE; that job is SUBMITTED now"
    assert second["waiting"] == [words]
    assert (await service.call("chain", "GET", f"/jobs/{second['id']}/status")).json["waiting"] == [words]
    assert third["waiting"] == [f"it begins when job {second['id']} has ended; that job is SUBMITTED now"]
    await end(service, first)
    seen = await until(service, "chain", second["id"], lambda job: words not in job.get("waiting", ()))
    assert seen["status"] == "SUBMITTED"
    await end(service, second["id"], JobStatus.FAILED)
    await until(service, "chain", third["id"], lambda job: "waiting" not in job)
    await end(service, third["id"])


@pytest_twisted.ensureDeferred
async def test_what_follows_a_failure_is_cancelled_with_the_reason_and_can_be_retried(service: Service) -> None:
    first = (await service.submit("failing"))["id"]
    second = (await service.submit("failing", after=[first]))["id"]
    third = (await service.submit("failing", after=[second]))["id"]
    await end(service, first, JobStatus.FAILED)
    seen = await until(service, "failing", third, lambda job: job["status"] == "CANCELLED")
    assert seen["cancel_reason"]["code"] == "PREDECESSOR"
    assert f"job {second}, after which it was to begin, ended CANCELLED" in seen["cancel_reason"]["message"]
    assert "waiting" not in seen
    # Before the first is retried, the second cannot begin.
    answer = (await service.call("failing", "POST", f"/jobs/{second}/retry")).json
    assert (answer["status"], answer["retried"]) == ("CANCELLED", 1)
    for number in (first, second, third):
        answer = (await service.call("failing", "POST", f"/jobs/{number}/retry")).json
        assert (answer["status"] == "CANCELLED", "cancel_reason" in answer) == (False, False)
    for number in (first, second, third):
        await until(service, "failing", number, lambda job: not job.get("waiting", [""])[0].startswith("it begins"))
        await end(service, number)


@pytest_twisted.ensureDeferred
async def test_a_waiting_job_is_cancelled_at_once(service: Service) -> None:
    first = (await service.submit("impatient"))["id"]
    second = (await service.submit("impatient", after=[first]))["id"]
    answer = (await service.call("impatient", "DELETE", f"/jobs/{second}")).json
    assert (answer["status"], "cancel_reason" in answer) == ("CANCELLED", False)


@pytest_twisted.ensureDeferred
async def test_a_repeated_request_makes_one_job_that_waits(service: Service) -> None:
    first = (await service.submit("repeating"))["id"]
    body = {"src_siteid": 1, "src_filepath": "data", "protocol": "DUMMY", "after": [first]}
    answers = [await service.call("repeating", "POST", "/list", body, Idempotency_Key="once") for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 200]
    assert answers[0].json["id"] == answers[1].json["id"]
    other = await service.call("repeating", "POST", "/list", {**body, "after_any": True}, Idempotency_Key="once")
    assert other.problem == "idempotency-key-used Idempotency-Key"


@pytest.mark.parametrize(
    ("after", "problem"),
    [
        ({"after": [999_999]}, "invalid-input $.after[0]"),
        ({"after": [0]}, "invalid-input $.after[0]"),
        ({"after": [2**63]}, "invalid-input $.after[0]"),
        ({"after": "1"}, "invalid-input $.after"),
        ({"after": [1] * 101}, "invalid-input $.after"),
        ({"after_any": True}, "invalid-input $.after_any"),
        ({"after": []}, "invalid-input $.after"),
        ({"extra_opts": {"deadline": "12"}}, "invalid-input $.extra_opts.deadline"),
        ({"extra_opts": {"deadline": "0s"}}, "invalid-input $.extra_opts.deadline"),
        ({"extra_opts": {"deadline": "999999999w"}}, "invalid-input $.extra_opts.deadline"),
        ({"extra_opts": {"deadline": "2100-01-01T00:00:00"}}, "invalid-input $.extra_opts.deadline"),
        ({"extra_opts": {"deadline": "0001-01-01T00:00:00+23:59"}}, "invalid-input $.extra_opts.deadline"),
        ({"extra_opts": {"deadline": 12}}, "invalid-input $.extra_opts.deadline"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_cannot_be_waited_for(service: Service, after: dict[str, Any], problem: str) -> None:
    body = {"src_siteid": 1, "src_filepath": "data", "protocol": "DUMMY", **after}
    answer = await service.call("mistaken", "POST", "/list", body)
    assert (answer.status, answer.problem) == (400, problem)
    assert (await service.call("mistaken", "GET", "/jobs")).json == []


@pytest_twisted.ensureDeferred
async def test_another_users_job_is_none(service: Service) -> None:
    foreign, own = (await service.submit("owner of it"))["id"], (await service.submit("curious"))["id"]
    body = {"src_siteid": 1, "src_filepath": "data", "protocol": "DUMMY", "after": [own, foreign]}
    answer = await service.call("curious", "POST", "/list", body)
    assert (answer.status, answer.problem) == (400, "invalid-input $.after[1]")
    assert answer.json["detail"].startswith(f"there is no job {foreign}")


async def _overdue(service: Service, user: str, job_id: int) -> dict[str, Any]:
    service.assembly.timed.deadlines.timer.wake()
    return await until(service, user, job_id, lambda job: job["status"] == "CANCELLED")


@pytest.mark.parametrize("by_time", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_job_that_has_not_ended_at_its_deadline_is_cancelled(own_service: Service, by_time: bool) -> None:
    deadline = own_service.now() + timedelta(hours=12)
    text = deadline.astimezone().isoformat() if by_time else "12h"
    job = await own_service.submit("late", extra_opts={"deadline": text})
    assert job["extra_opts"] == {"deadline": text}
    assert job["deadline"][:16] == f"{deadline:%Y-%m-%dT%H:%M}"
    own_service.skip[0] = timedelta(hours=11, minutes=59)
    own_service.assembly.timed.deadlines.timer.wake()
    await deferLater(reactor, 0.1)
    assert (await own_service.job(job["id"])).status is JobStatus.SUBMITTED
    own_service.skip[0] = timedelta(hours=12, seconds=1)
    seen = await _overdue(own_service, "late", job["id"])
    assert seen["cancel_reason"]["code"] == "DEADLINE"
    assert seen["cancel_reason"]["message"] == f"its deadline, {job['deadline']}, is over"
    retried = (await own_service.call("late", "POST", f"/jobs/{job['id']}/retry")).json
    assert (retried["status"], "deadline" in retried, "cancel_reason" in retried) == ("SUBMITTED", False, False)


@pytest_twisted.ensureDeferred
async def test_a_large_job_that_follows_a_failure_is_cancelled_to_its_end(service: Service) -> None:
    """Its cancellation takes more than one transaction."""
    first = (await service.submit("large"))["id"]
    items = [{"src": f"/a/{number}", "dst": f"/b/{number}"} for number in range(CHANGED_AT_ONCE + 1)]
    body = {"src_siteid": 1, "dst_siteid": 2, "protocol": "DUMMY", "extra_opts": {"items": items}, "after": [first]}
    second = (await service.call("large", "POST", "/copy", body)).json["id"]
    await end(service, first, JobStatus.FAILED)
    seen = await until(service, "large", second, lambda job: job["status"] == "CANCELLED")
    assert seen["status"] == "CANCELLED"
    assert seen["cancel_reason"]["code"] == "PREDECESSOR"


@pytest_twisted.ensureDeferred
async def test_a_deadline_is_kept_to_the_second(own_service: Service) -> None:
    job = await own_service.submit("punctual", extra_opts={"deadline": "1s"})
    after = await own_service.submit("punctual", after=[job["id"]])
    seen = await until(own_service, "punctual", after["id"], lambda job: job["status"] == "CANCELLED")
    first = await own_service.job(job["id"])
    assert first.finished_at is not None and first.deadline is not None
    assert timedelta() <= first.finished_at - first.deadline < timedelta(seconds=1)
    assert seen["cancel_reason"]["code"] == "PREDECESSOR"

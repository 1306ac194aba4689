"""Why a job waits, whose it is, and the newest jobs first, as the API gives it out."""

from __future__ import annotations

from datetime import timedelta

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import NewElement
from tests.http.service import Answer, Service, certificates, service

__all__ = ["certificates", "service"]

_AWAY = AttemptFailure(FailureScope.SOURCE, FailureCode.CONNECTION, "no answer\nat all")


@pytest_twisted.ensureDeferred
async def test_a_queued_job_has_its_place_and_the_jobs_ahead(service: Service) -> None:
    fresh = await service.submit("queued", "/mkdir", priority=3)
    at_once = (await service.call("queued", "GET", f"/jobs/{fresh['id']}")).json
    assert {"queue", "waiting"}.isdisjoint(at_once), "a job that has just come is about to begin"
    later = [(await service.submit("queued", "/mkdir"))["id"] for _ in range(7)]
    urgent = (await service.submit("queued", "/rename", priority=0))["id"]
    listing = (await service.submit("queued", "/copy"))["id"]
    await service.submit("another", "/mkdir")
    service.skip[0] += timedelta(seconds=2)

    last = (await service.call("queued", "GET", f"/jobs/{later[-1]}")).json
    behind = [urgent, fresh["id"], *later[:-1]]
    assert last["queue"] == {"place": 9, "behind": behind[:5], "other_users": 1, "listing": False}
    assert last["waiting"] == [
        f"in the queue for work it is number 9 of its user, behind jobs {', '.join(map(str, behind[:5]))} and 3 more;"
        " another user has jobs waiting, and users take turns"
    ]
    assert (await service.call("queued", "GET", f"/jobs/{later[-1]}/status")).json["waiting"] == last["waiting"]
    second = (await service.call("queued", "GET", f"/jobs/{fresh['id']}")).json
    assert second["queue"]["behind"] == [urgent]
    assert f"number 2 of its user, behind job {urgent};" in second["waiting"][0]
    copy = (await service.call("queued", "GET", f"/jobs/{listing}")).json
    assert copy["queue"] == {"place": 1, "behind": [], "other_users": 0, "listing": True}
    assert copy["waiting"] == ["in the queue for listings it is the next of its user"]
    assert "queue" not in (await service.call("queued", "GET", f"/jobs?after={later[-1] - 1}")).json[0]

    await service.claim(fresh["id"])
    running = (await service.call("queued", "GET", f"/jobs/{later[-1]}")).json
    assert running["status"] == "RUNNING"
    assert {"queue", "waiting", "next_try"}.isdisjoint(running)


@pytest_twisted.ensureDeferred
async def test_full_limits_stand_before_the_place(service: Service) -> None:
    job = await service.submit("limited", "/mkdir")
    service.skip[0] += timedelta(seconds=2)
    before = service.context.full
    service.context.full = lambda job, listing: [f"all are busy: {job.id} {listing}"]
    try:
        waiting = (await service.call("limited", "GET", f"/jobs/{job['id']}")).json["waiting"]
    finally:
        service.context.full = before
    assert waiting[0] == f"all are busy: {job['id']} False"
    assert len(waiting) == 2


@pytest_twisted.ensureDeferred
async def test_a_job_that_waits_for_a_retry_has_reason_and_time(service: Service) -> None:
    job = await service.submit("retrying", "/copy", max_tries=3)
    (listing,) = await service.claim(job["id"])
    due = (service.now() + timedelta(minutes=5)).replace(microsecond=0)
    await service.settle(listing, JobStatus.SUBMITTED, _AWAY, not_before=due)
    service.skip[0] += timedelta(seconds=2)
    expected = {
        "element": 0,
        "at": f"{due:%Y-%m-%dT%H:%M:%SZ}",
        "attempt": 2,
        "max_tries": 3,
        "error": {
            "scope": "source",
            "code": "CONNECTION",
            "retryable": True,
            "message": "no answer\nat all",
            "hint": "The server could not be reached: check that the site is up.",
        },
    }
    seen = (await service.call("retrying", "GET", f"/jobs/{job['id']}")).json
    assert seen["next_try"] == expected
    assert "queue" not in seen
    assert seen["waiting"] == [
        f"element 0 is tried again at {due:%Y-%m-%dT%H:%M:%SZ} (try 2 of 3), after CONNECTION: no answer at all"
    ]

    service.skip[0] += timedelta(minutes=6)
    assert (await service.call("retrying", "GET", f"/jobs/{job['id']}")).json["queue"]["listing"]
    (listing,) = await service.claim(job["id"])
    files = [NewElement(JobType.COPY, f"data/{name}", f"copy/{name}", size=1) for name in "ab"]
    await service.extend(listing, *files)
    await service.settle(listing)
    first, second = await service.claim(job["id"])
    await service.settle(first)
    # One that did not count: what is next is still the first try.
    due += timedelta(minutes=10)
    await service.settle(second, JobStatus.SUBMITTED, _AWAY, not_before=due, counts=False)
    seen = (await service.call("retrying", "GET", f"/jobs/{job['id']}")).json
    assert seen["next_try"] == {**expected, "element": 2, "at": f"{due:%Y-%m-%dT%H:%M:%SZ}", "attempt": 1}


@pytest_twisted.ensureDeferred
async def test_the_newest_jobs_come_first_where_that_is_asked_for(service: Service) -> None:
    numbers = [(await service.submit("newest"))["id"] for _ in range(5)]

    async def listed(query: str) -> list[int]:
        return [job["id"] for job in (await service.call("newest", "GET", f"/jobs{query}")).json]

    assert await listed("") == numbers
    assert await listed("?order=newest") == numbers[::-1]
    assert await listed("?order=newest&limit=2") == numbers[:2:-1]
    assert await listed(f"?order=newest&limit=2&before={numbers[3]}") == [numbers[2], numbers[1]]
    assert await listed(f"?before={numbers[2]}") == numbers[:2]
    refused = await service.call("newest", "GET", "/jobs?order=random")
    assert (refused.status, refused.json["pointer"]) == (400, "?order")


@pytest_twisted.ensureDeferred
async def test_a_job_that_is_waited_for_comes_when_its_status_changes(service: Service) -> None:
    number = (await service.submit("patient", "/mkdir"))["id"]

    def waited(path: str = "") -> Deferred[Answer]:
        return Deferred.fromCoroutine(service.call("patient", "GET", f"/jobs/{number}{path}?wait=50"))

    answers = [waited(), waited("/status")]
    # Both are at the service when it answers this one, and nothing has happened.
    unchanged = await service.call("patient", "GET", f"/jobs/{number}?wait=0.3")
    assert unchanged.json["status"] == "SUBMITTED"
    assert not any(answer.called for answer in answers)
    (token,) = await service.claim(number)
    assert [(await answer).json["status"] for answer in answers] == ["RUNNING", "RUNNING"]
    answers = [waited(), waited("/status")]
    await service.call("patient", "GET", f"/jobs/{number}?wait=0.3")
    await service.settle(token)
    assert [(await answer).json["status"] for answer in answers] == ["DONE", "DONE"]
    # What has ended does not change any more.
    assert (await waited()).json["status"] == "DONE"


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("seconds", ["61", "-1", "soon", "nan"])
async def test_no_wait_is_longer_than_a_minute(service: Service, seconds: str) -> None:
    number = (await service.submit("hasty", "/mkdir"))["id"]
    refused = await service.call("hasty", "GET", f"/jobs/{number}?wait={seconds}")
    assert (refused.status, refused.json["pointer"]) == (400, "?wait")


@pytest_twisted.ensureDeferred
async def test_jobs_of_other_users_are_not_found(service: Service) -> None:
    number = (await service.submit("patient", "/mkdir"))["id"]
    await service.submit("hasty", "/mkdir")
    assert (await service.call("hasty", "GET", f"/jobs/{number}?wait=50")).status == 404


@pytest_twisted.ensureDeferred
async def test_operators_see_whose_jobs_there_are(service: Service) -> None:
    await service.submit("neighbour")
    job = await service.submit("owner")
    subject = service.certificates.of("owner").dn
    assert "owner" not in (await service.call("owner", "GET", f"/jobs/{job['id']}")).json
    assert (await service.call("operator", "GET", f"/jobs/{job['id']}")).json["owner"] == subject
    everybody = (await service.call("operator", "GET", "/jobs?user=all&order=newest")).json
    assert subject in [each["owner"] for each in everybody if each["id"] == job["id"]]
    assert len({each["owner"] for each in everybody}) > 1
    own = (await service.call("owner", "GET", "/jobs")).json
    assert "owner" not in own[0]
    for query in ("user=all", f"user={await service.user_id('operator')}"):
        refused = await service.call("owner", "GET", f"/jobs?{query}")
        assert (refused.status, refused.json["pointer"]) == (403, "?user")


@pytest_twisted.ensureDeferred
async def test_all_reasons_why_a_job_does_not_move(service: Service) -> None:
    job = (await service.submit("stuck", "/mkdir"))["id"]
    site = (await service.call("stuck", "GET", f"/jobs/{job}")).json["src_siteid"]
    await service.call("operator", "POST", f"/sites/{site}/drain", {"message": "new disks"})
    before, service.context.full = service.context.full, lambda job, listing: ["all are busy"]
    try:
        found = (await service.call("stuck", "GET", f"/jobs/{job}/why")).json
        element = (await service.call("operator", "GET", f"/jobs/{job}/why?element=0")).json
    finally:
        service.context.full = before
        await service.call("operator", "POST", f"/sites/{site}/resume")
    assert (found["job"], found["element"], found["status"]) == (job, None, "SUBMITTED")
    # The drain does not hide the limit, nor the place in the queue.
    reasons = [(each["code"], each["reason"]) for each in found["reasons"]]
    assert any(code == "WAITS" and "is drained: new disks" in reason for code, reason in reasons)
    assert ("QUEUE", "all are busy") in reasons
    assert any("it is the next of its user" in reason for _, reason in reasons)
    assert element["element"] == 0
    assert any("is drained: new disks" in each["reason"] for each in element["reasons"])

    await service.claim(job)
    running = (await service.call("operator", "GET", f"/jobs/{job}/why?element=0")).json
    assert (running["status"], running["reasons"][0]["code"]) == ("RUNNING", "RUNNING")
    assert "1 element runs on node " in running["reasons"][0]["reason"]
    # Users are not told of nodes.
    mine = (await service.call("stuck", "GET", f"/jobs/{job}/why")).json["reasons"]
    assert mine[0]["reason"].startswith("1 element runs, the oldest was claimed ")


@pytest_twisted.ensureDeferred
async def test_why_is_asked_of_jobs_that_one_sees(service: Service) -> None:
    number = await service.copied("ended", "a", "b", status=JobStatus.FAILED)
    (reason,) = (await service.call("ended", "GET", f"/jobs/{number}/why")).json["reasons"]
    assert reason["code"] == "ENDED" and "2 elements have failed" in reason["reason"]
    (reason,) = (await service.call("ended", "GET", f"/jobs/{number}/why?element=1")).json["reasons"]
    assert reason == {"code": "ENDED", "reason": "it has ended: FAILED", "hint": ""}
    assert (await service.call("operator", "GET", f"/jobs/{number}/why")).status == 200
    assert (await service.call("stranger", "GET", f"/jobs/{number}/why")).status == 404
    assert (await service.call("ended", "GET", f"/jobs/{number}/why?element=99")).status == 404
    assert (await service.call("ended", "GET", f"/jobs/{number}/why?element=-1")).status == 400

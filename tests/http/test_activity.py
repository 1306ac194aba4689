"""Rates, activity and the queue: what users see of their own, and operators of all."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest_twisted

from pdm.workqueue.domain.enums import JobStatus
from tests.http.service import Service


@pytest_twisted.ensureDeferred
async def test_the_rate_of_a_job(service: Service) -> None:
    number = await service.copied("rater", "a", "b")
    rate = (await service.call("rater", "GET", f"/jobs/{number}/rate")).json
    assert (sum(rate["files"]), sum(rate["failed"]), rate["sampled"]) == (2, 0, False)
    assert len(rate["files"]) == len(rate["bytes"]) == len(rate["failed"]) == 60
    assert datetime.fromisoformat(rate["since"]) <= service.now()
    waiting = (await service.submit("rater"))["id"]
    assert (await service.call("rater", "GET", f"/jobs/{waiting}/rate")).json["since"] is None


@pytest_twisted.ensureDeferred
async def test_what_operators_see_of_all_routes(service: Service) -> None:
    number = await service.copied("mover", "a", "b", "c", status=JobStatus.FAILED)
    service.context.activity.clear()
    job = await service.job(number)
    found = (await service.call("operator", "GET", "/routes/activity")).json
    assert len(found["routes"][0]["done"]) == 96
    assert found["seconds"] == timedelta(minutes=15).total_seconds()
    ends = (job.src_siteid, job.dst_siteid)
    (route,) = [each for each in found["routes"] if (each["source"], each["destination"]) == ends]
    assert sum(route["failed"]) >= 3
    assert sum(error["count"] for error in found["errors"]) >= 3
    assert all({"scope", "code", "hint"} <= error.keys() for error in found["errors"])


@pytest_twisted.ensureDeferred
async def test_who_waits_and_why(service: Service) -> None:
    await service.submit("waiting user")
    service.context.activity.clear()
    found = (await service.call("operator", "GET", "/queue")).json
    subject = service.certificates.of("waiting user").dn
    (share,) = [each for each in found["shares"] if each["subject"] == subject]
    assert (share["jobs"], share["waiting"], share["running"], share["held"]) == (1, 1, 0, 0)
    assert found["complete"]
    assert found["oldest"]
    numbers = [each["job"] for each in found["oldest"]]
    assert numbers == sorted(numbers)


@pytest_twisted.ensureDeferred
async def test_activity_of_sites_is_of_those_that_one_sees(service: Service) -> None:
    body = {"name": "unseen", "endpoints": {"gridftp": "gsiftp://far.example.org"}, "limit_in": 3}
    private = (await service.call("hermit", "POST", "/sites", body)).json["id"]
    await service.submit("hermit")
    service.context.activity.clear()
    seen = {each["site"]: each for each in (await service.call("hermit", "GET", "/sites/activity")).json}
    assert seen[private]["limit_in"] == 3
    assert seen[private]["limit_out"] == service.context.settings.queue.site_limit_out
    assert seen[1]["queued"] >= 1
    others = {each["site"] for each in (await service.call("stranger", "GET", "/sites/activity")).json}
    assert private not in others
    assert 1 in others


@pytest_twisted.ensureDeferred
async def test_daemons_are_listed(service: Service) -> None:
    nodes = (await service.call("operator", "GET", "/nodes")).json
    assert nodes
    for node in nodes:
        assert {"name", "worker", "address", "version", "since", "lease_until", "running", "drain", "sick"} < set(node)

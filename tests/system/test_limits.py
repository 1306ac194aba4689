"""A daemon keeps its limits, paces its routes, and lets no listing wait: shown by attempts' logs and the API."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+)Z", re.MULTILINE)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., TestService]]:
    made: list[TestService] = []

    def service(**settings: dict[str, str]) -> TestService:
        service = TestService(tmp_path / "instance")
        made.append(service)
        service.init(**settings)
        return service

    yield service
    for one in made:
        if one.process is not None:
            one.kill()


def copies(service: TestService, user: str, files: int, sites: tuple[int, int] = (1, 2), **dummy: Any) -> int:
    job = service.submit(
        user, "copy", src_siteid=sites[0], src_filepath="/s", dst_siteid=sites[1], dst_filepath="/d", protocol="DUMMY",
        extra_opts={"dummy": {"files": files, **dummy}},
    )  # fmt: skip
    return int(job["id"])


def route(service: TestService, source: int = 1, destination: int | None = 2) -> dict[str, Any]:
    status, routes = service.call("admin", "GET", "/routes")
    assert status == 200
    for found in routes:
        if (found["source"], found["destination"]) == (source, destination):
            assert found["least"] <= found["limit"] <= found["most"]
            assert found["reason"]
            whole: dict[str, Any] = found
            return whole
    return {}


def until(service: TestService, what: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, service.tail()
        time.sleep(0.1)
    return found


def spans(service: TestService, job_id: int) -> list[tuple[datetime, datetime]]:
    """When each copy of a job began and ended, as its log says."""
    found = []
    for output in service.call("admin", "GET", f"/jobs/{job_id}/output")[1]:
        if output["type"] == "COPY":
            stamps = [datetime.fromisoformat(text).replace(tzinfo=UTC) for text in _STAMP.findall(output["log"])]
            found.append((stamps[0], stamps[-1]))
    return found


def most_at_once(spans: list[tuple[datetime, datetime]]) -> int:
    # An end counts before a beginning at the same moment: agents begin nothing before they have ended what was before.
    moments = sorted([(began, 1) for began, _ in spans] + [(ended, -1) for _, ended in spans])
    most = now = 0
    for _, step in moments:
        now += step
        most = max(most, now)
    return most


@pytest.mark.full
def test_a_user_a_job_and_a_site_never_have_more_than_their_limits(make: Callable[..., TestService]) -> None:
    service = make(
        agents={"max_agents": "4"},
        queue={"job_limit": "1", "user_limit": "3", "route_start": "4", "route_window": "1h", "batch_elements": "4"},
    )
    with (service.directory / "sites.d" / "sites.conf").open("a") as file:
        file.write("\n[NARROW]\nid = 9\ndummy = dummy://narrow\nlimit_in = 2\n")
    with service.running():
        jobs = [copies(service, "admin", 12, delay=0.1) for _ in range(3)]
        jobs += [copies(service, "admin", 12, (1, 9), delay=0.1) for _ in range(3)]
        for job in jobs:
            assert service.wait_for("admin", job)["status"] == "DONE", service.tail()
        by_job = [spans(service, job) for job in jobs]
        assert [len(found) for found in by_job] == [12] * 6
        assert [most_at_once(found) for found in by_job] == [1] * 6
        assert most_at_once([*chain(*by_job[3:])]) <= 2
        assert 1 < most_at_once([*chain(*by_job)]) <= 3
        narrow = route(service, 1, 9)
        assert (narrow["most"], narrow["running"]) == (2, 0)


@pytest.mark.full
def test_a_route_that_fails_is_halved_and_comes_back(make: Callable[..., TestService]) -> None:
    service = make(
        agents={"max_agents": "4"},
        queue={
            "route_start": "4",
            "route_window": "300ms",
            "batch_elements": "8",
            "first_pause": "50ms",
            "longest_pause": "50ms",
        },
    )
    with service.running():
        bad = copies(service, "admin", 100, delay=0.01, fail="CONNECTION")
        assert service.wait_for("admin", bad)["status"] == "FAILED"
        fallen = route(service)
        assert fallen["limit"] < 4
        assert "attempts failed" in fallen["reason"], fallen
        log = service.log_path.read_text()
        assert re.search(r"route 1 -> 2: 4 streams become 2: \d+ of \d+ attempts failed", log), service.tail()
        # Files that are not there are no reason to go slower.
        service.wait_for("admin", copies(service, "admin", 40, (2, 1), delay=0.01, fail="NOT_FOUND"))
        assert route(service, 2, 1)["limit"] == 4
        good = copies(service, "admin", 20_000, delay=0.02)
        risen = until(service, lambda: (found := route(service))["limit"] > fallen["limit"] and found)
        assert risen["changed_at"] >= fallen["changed_at"]
        assert risen["throughput"] > 0 and risen["unit"] == "elements/s"
        shown = service.pdm("admin", "routes").stdout
        assert "THROUGHPUT" in shown and "elements/s" in shown
        service.call("admin", "DELETE", f"/jobs/{good}")
        assert service.wait_for("admin", good)["status"] == "CANCELLED"


@pytest.mark.full
def test_a_listing_waits_for_no_copy_of_another_user(make: Callable[..., TestService]) -> None:
    service = make(agents={"max_agents": "1"}, queue={"batch_elements": "4"})
    done = service._pdm(["admin", "user", str(service.directory), "bob"], service.environment("admin"))
    assert done.returncode == 0, done.stderr
    with service.running():
        large = copies(service, "admin", 10_000, delay=0.5)
        until(service, lambda: service.call("admin", "GET", f"/jobs/{large}")[1]["num_elements"] == 10_001)
        listing = service.submit(
            "bob", "list", src_siteid=1, src_filepath="/", protocol="DUMMY", extra_opts={"dummy": {"files": 3}}
        )
        assert service.wait_for("bob", int(listing["id"]))["status"] == "DONE"
        waiting = service.call("admin", "GET", f"/jobs/{large}")[1]
        assert waiting["num_submitted"] > 9000
        # And a copy of bob comes with the next batch, not after ten thousand others.
        mine = copies(service, "bob", 1)
        assert service.wait_for("bob", mine)["status"] == "DONE"
        left = service.call("admin", "GET", f"/jobs/{large}")[1]
        assert left["num_submitted"] > 9000
        service.call("admin", "DELETE", f"/jobs/{large}")


def test_spans_are_counted_right() -> None:
    moments = [datetime(2026, 3, 1, 12, second, tzinfo=UTC) for second in range(6)]
    one_after_the_other = list(pairwise(moments))
    assert most_at_once(one_after_the_other) == 1
    assert most_at_once([*one_after_the_other, (moments[1], moments[4])]) == 2

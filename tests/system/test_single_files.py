"""Copies of one file, which a daemon without other work begins in the transactions that register and list them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService

KILLS = 5


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TestService]:
    service = TestService(tmp_path / "instance")
    service.init(queue={"poll_interval": "1m", "first_pause": "50ms"})
    service.start()
    yield service
    if service.process is not None:
        service.kill()


def copy(service: TestService, name: str) -> int:
    job = service.submit(
        "admin", "copy", src_siteid=1, src_filepath="/file", dst_siteid=2, dst_filepath=f"/{name}", protocol="FILE"
    )
    # A job is registered before anything of it begins.
    assert (job["status"], job["num_submitted"], job["num_running"]) == ("SUBMITTED", 1, 0)
    return int(job["id"])


def elements(service: TestService, job_id: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.call("admin", "GET", f"/jobs/{job_id}/elements")[1]
    return found


@pytest.mark.full
def test_none_is_lost_and_none_done_twice_when_the_daemon_is_killed_at_any_moment(service: TestService) -> None:
    storage = service.directory / "storage"
    (storage / "a" / "file").write_bytes(b"content")
    jobs = [copy(service, "first")]
    service.wait_for("admin", jobs[0])
    for number in range(KILLS):
        jobs.append(copy(service, f"copy{number}"))
        # From before the claim's answer to after the last verdict.
        time.sleep(random.uniform(0, 0.04))
        service.kill()
        service.start()
    for job in jobs:
        ended = service.wait_for("admin", job)
        assert (ended["status"], ended["num_elements"], ended["num_done"]) == ("DONE", 2, 2), ended
        assert [one["type"] for one in elements(service, job)] == ["LIST", "COPY"]
    copies = ["first", *(f"copy{number}" for number in range(KILLS))]
    assert sorted(path.name for path in (storage / "b").iterdir()) == sorted(copies)
    assert {path.read_bytes() for path in (storage / "b").iterdir()} == {b"content"}


@pytest.mark.full
def test_one_that_hangs_is_cancelled_and_its_agent_is_no_other_ones_burden(service: TestService) -> None:
    fields = {"src_siteid": 1, "src_filepath": "/f", "dst_siteid": 2, "dst_filepath": "/g", "protocol": "DUMMY"}
    for number in range(3):
        job = service.submit("admin", "copy", **fields, extra_opts={"dummy": {"delay": 60}})
        service.wait_for("admin", job["id"], until=["RUNNING"])
        deadline = time.monotonic() + 20
        while number and len(elements(service, job["id"])) < 2:
            # The first time, the cancellation meets the listing or what follows from it, as it comes.
            assert time.monotonic() < deadline, service.tail()
            time.sleep(0.01)
        assert service.call("admin", "DELETE", f"/jobs/{job['id']}")[0] == 200
        ended = service.wait_for("admin", job["id"])
        assert (ended["status"], ended["num_running"]) == ("CANCELLED", 0)
        done = service.submit("admin", "copy", **fields)
        # Nothing waits for the timer of the claims, which is a minute here.
        assert service.wait_for("admin", done["id"])["status"] == "DONE"

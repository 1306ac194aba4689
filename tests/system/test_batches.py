"""Jobs that share a batch: each keeps its own attempts, cancellation and verdict."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService
from pdm.workqueue.execution.batch_verdicts import Ending
from tests.support.attempt_logs import moved_elements
from tests.support.cluster import until

JOBS = 6


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TestService]:
    """With one agent, so that jobs which come while it is busy are handed to it together."""
    service = TestService(tmp_path / "instance")
    service.init(agents={"max_agents": "1"}, queue={"first_pause": "50ms", "longest_pause": "50ms"})
    service.start()
    yield service
    if service.process is not None:
        service.kill()


def submit(service: TestService, **dummy: Any) -> int:
    job = service.submit(
        "admin", "mkdir", src_siteid=1, src_filepath="/new", protocol="DUMMY", extra_opts={"dummy": dummy}
    )
    return int(job["id"])


def status(service: TestService, job_id: int) -> str:
    return str(service.call("admin", "GET", f"/jobs/{job_id}")[1]["status"])


def attempts(service: TestService, job_id: int) -> int:
    return int(service.call("admin", "GET", f"/jobs/{job_id}/elements/0")[1]["attempts"])


def cancel(service: TestService, job_id: int) -> None:
    assert service.call("admin", "DELETE", f"/jobs/{job_id}")[0] == 200
    service.wait_for("admin", job_id, until=["CANCELLED"])


def log(service: TestService, job_id: int, attempt: int) -> str:
    return str(service.call("admin", "GET", f"/jobs/{job_id}/elements/0/output/{attempt}")[1]["log"])


def helpers(service: TestService) -> list[int]:
    assert service.process is not None
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == service.process.pid and b"helpers.main_dummy" in (directory / "cmdline").read_bytes():
                found.append(int(directory.name))
        except OSError:
            continue
    return found


@pytest.mark.full
def test_one_of_several_jobs_in_a_batch_is_cancelled_and_the_helper_of_the_others_dies(service: TestService) -> None:
    jobs = [submit(service, hang=True) for _ in range(JOBS)]
    # The first has the agent, the second waits for it; the others become one batch once there is room for it.
    service.wait_for("admin", jobs[0], until=["RUNNING"])
    cancel(service, jobs[0])
    for job in jobs[1:]:
        service.wait_for("admin", job, until=["RUNNING"])
    cancel(service, jobs[1])
    # One that has not begun, then the one that hangs.
    cancel(service, jobs[4])
    cancel(service, jobs[2])
    left = [jobs[3], jobs[5]]
    assert [(status(service, job), attempts(service, job)) for job in left] == [("RUNNING", 1)] * 2
    (pid,) = helpers(service)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(attempts(service, job) < 2 or status(service, job) != "RUNNING" for job in left):
        assert time.monotonic() < deadline, service.tail()
        time.sleep(0.05)
    for job in left:
        assert "code=CRASHED" in log(service, job, 1)
        cancel(service, job)
    for job in (jobs[0], jobs[1], jobs[2], jobs[4]):
        assert attempts(service, job) == 1
        assert "outcome=CANCELLED" in log(service, job, 1)
    assert service.stop() == 0


def test_a_job_that_waits_for_a_busy_helper_is_cancelled_at_once(service: TestService) -> None:
    first, second = (submit(service, hang=True) for _ in range(2))
    for job in (first, second):
        service.wait_for("admin", job, until=["RUNNING"])
    cancel(service, second)
    assert (status(service, first), attempts(service, second)) == ("RUNNING", 1)
    assert "outcome=CANCELLED" in log(service, second, 1)
    # The next one takes its place.
    third = submit(service)
    service.wait_for("admin", third, until=["RUNNING"])
    cancel(service, first)
    assert service.wait_for("admin", third)["status"] == "DONE"


@pytest.mark.full
def test_a_daemon_that_is_killed_in_the_middle_of_shared_batches_loses_nothing(service: TestService) -> None:
    jobs = [submit(service, delay=0.1) for _ in range(4 * JOBS)]
    service.wait_for("admin", jobs[JOBS], until=["DONE"])
    service.kill()
    service.start()
    for job in jobs:
        ended = service.wait_for("admin", job)
        assert (ended["status"], ended["num_done"]) == ("DONE", 1)
        last = attempts(service, job)
        assert last <= 2
        assert "outcome=DONE" in log(service, job, last)


def test_a_large_job_is_cancelled_while_it_is_listed_and_run(service: TestService) -> None:
    job = service.submit(
        "admin",
        "copy",
        src_siteid=1,
        src_filepath="/t",
        dst_siteid=2,
        dst_filepath="/c",
        protocol="DUMMY",
        extra_opts={"dummy": {"files": 12_000, "delay": 0.05}},
    )
    deadline = time.monotonic() + 60
    while (view := service.call("admin", "GET", f"/jobs/{job['id']}")[1])["num_elements"] < 7000:
        assert time.monotonic() < deadline, (view, service.tail())
        time.sleep(0.05)
    answered, view = service.call("admin", "DELETE", f"/jobs/{job['id']}")
    assert (answered, view["cancel_requested"]) == (200, True)
    ended = service.wait_for("admin", job["id"], timeout_s=60)
    assert ended["status"] == "CANCELLED"
    assert ended["num_cancelled"] + ended["num_done"] == ended["num_elements"]


def test_a_hold_gives_back_what_a_running_batch_has_not_begun(service: TestService) -> None:
    """A batch that would run for a minute: the element that runs ends by itself, the others go back."""
    dummy = {"dummy": {"files": 60, "delay": 1}}
    places = {"src_siteid": 1, "src_filepath": "/d", "dst_siteid": 2, "dst_filepath": "/e", "protocol": "DUMMY"}
    job = int(service.submit("admin", "copy", **places, extra_opts=dummy)["id"])

    def seen() -> dict[str, Any]:
        found: dict[str, Any] = service.call("admin", "GET", f"/jobs/{job}")[1]
        return found

    # The first result of its batch: the second one runs by then.
    until("it runs", lambda: seen()["num_done"] >= 2)
    held = service.call("admin", "POST", f"/jobs/{job}/hold", {"message": "stop", "until": "12h"})[1]
    assert held["num_running"] > 1, "no batch runs"
    ended = service.wait_for("admin", job, until=["HELD"], timeout_s=20)
    assert (ended["hold"]["message"], ended["num_running"], ended["num_failed"]) == ("stop", 0, 0)
    assert ended["num_done"] + ended["num_submitted"] == 61
    # One may have ended meanwhile, and one ran.
    assert held["num_done"] < ended["num_done"] < 30
    elements = [service.call("admin", "GET", f"/jobs/{job}/elements/{number}")[1] for number in range(61)]
    assert {each["attempts"] for each in elements if each["status"] == "DONE"} == {1}
    returned = next(each for each in elements if each["status"] == "SUBMITTED" and each["attempts"])
    output = service.call("admin", "GET", f"/jobs/{job}/elements/{returned['id']}/output/1")[1]["log"]
    assert output.rstrip().endswith(str(Ending.HELD))
    assert service.call("admin", "POST", f"/jobs/{job}/resume")[0] == 200
    until("it runs", lambda: seen()["num_done"] > ended["num_done"])
    assert service.call("admin", "DELETE", f"/jobs/{job}")[0] == 200
    service.wait_for("admin", job, until=["CANCELLED"])


def test_idle_helpers_get_what_a_slow_batch_has_not_begun(tmp_path: Path) -> None:
    """Elements of unknown duration are one batch; but its helper gives back what keeps idle ones waiting."""
    service = TestService(tmp_path / "instance")
    service.init(agents={"max_agents": "4"}, queue={"route_start": "4"})
    places = {"src_siteid": 1, "src_filepath": "/s", "dst_siteid": 2, "dst_filepath": "/d", "protocol": "DUMMY"}
    with service.running():
        dummy = {"dummy": {"files": 12, "delay": 600, "size": 1000}}
        job = int(service.submit("admin", "copy", **places, extra_opts=dummy)["id"])

        until("four files move", lambda: len(moved_elements(service.directory / "var/logs")) == 4, 30.0)
        elements = [service.call("admin", "GET", f"/jobs/{job}/elements/{number}")[1] for number in range(1, 13)]
        # The first one goes on; one that was given back has moved nothing, and it is no try.
        assert (elements[0]["attempts"], elements[0]["status"]) == (1, "RUNNING")
        returned = next(each for each in elements if each["attempts"] > 1)
        output = service.call("admin", "GET", f"/jobs/{job}/elements/{returned['id']}/output/1")[1]["log"]
        assert output.rstrip().endswith(str(Ending.GIVEN_BACK))
        cancel(service, job)

"""Commands of what the service does now: queue, activity, rates, reasons, the live overview."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pdm.testgrid.service import TestService
from tests.support.commands import pdm, run_on_terminal

PDM = [sys.executable, "-m", "pdm.workqueue.cli"]


@pytest.fixture(scope="module")
def waiting(service: TestService) -> Iterator[int]:
    """A job that waits for a drained site, after one that has ended."""
    pdm(service, "cp", "local-a:/t", "local-a:/c", "--protocol", "dummy", "--option", "dummy.files=5")
    pdm(service, "site", "drain", "local-b", "new disks")
    yield int(pdm(service, "mkdir", "local-b:/later", "--no-wait").stdout)
    pdm(service, "site", "resume", "local-b")


def test_the_queue_and_why_a_job_waits(service: TestService, waiting: int) -> None:
    shown = pdm(service, "queue").stdout
    assert "admin" in shown and "local-b" in shown
    assert f"job {waiting} of admin waits for" in shown and "is drained: new disks" in shown
    assert json.loads(pdm(service, "queue", "-F", "json").stdout)["complete"]
    why = pdm(service, "admin", "why", str(waiting)).stdout
    assert why.startswith(f"job {waiting} is SUBMITTED\nWAITS: site local-b (2) is drained: new disks\n")
    element = pdm(service, "admin", "why", f"{waiting}.0").stdout
    assert element.startswith(f"element 0 of job {waiting} is SUBMITTED\n")
    found = json.loads(pdm(service, "admin", "why", str(waiting), "-F", "json").stdout)
    assert found["job"] == waiting and found["reasons"][0]["code"] == "WAITS"
    assert "ENDED: it has ended: DONE" in pdm(service, "admin", "why", "1").stdout
    failed = int(pdm(service, "rm", "local-a:/nothing", "--no-wait").stdout)
    service.wait_for("admin", failed)
    assert "it has failed: NOT_FOUND" in pdm(service, "admin", "why", f"{failed}.0").stdout
    pdm(service, "admin", "why", "999999", code=3)
    for wrong in ("x", "1.x", "0", "1.-1"):
        pdm(service, "admin", "why", wrong, code=2)


def test_activity_and_rates(service: TestService, waiting: int) -> None:
    routes = pdm(service, "routes", "--activity").stdout
    assert "DONE 24H" in routes and "local-a" in routes
    assert json.loads(pdm(service, "routes", "--activity", "-F", "json").stdout)["seconds"] == 900
    sites = pdm(service, "sites", "--activity").stdout.splitlines()
    assert sites[0].startswith("SITE") and sites[1].startswith("local-a")
    assert len(json.loads(pdm(service, "sites", "--activity", "-F", "json").stdout)) == 2
    rate = pdm(service, "status", "1", "--rate").stdout.splitlines()
    assert rate[0] == "job 1" and "files" in rate[1]
    assert json.loads(pdm(service, "status", "1", "--rate", "-F", "json").stdout)["sampled"] is False
    assert "nothing has ended yet" in pdm(service, "status", str(waiting), "--rate").stdout


def test_the_overview_is_printed_once_or_drawn_anew(service: TestService, waiting: int) -> None:
    once = pdm(service, "admin", "top").stdout
    assert "1 of 1 nodes alive" in once and "NODE" in once and f"job {waiting} of admin waits" in once
    assert "\x1b" not in once
    seen = json.loads(pdm(service, "admin", "top", "--once", "-F", "json").stdout)
    assert seen["health"]["status"] == "ok" and len(seen["nodes"]) == 1 and seen["queue"]["oldest"]
    code, shown = run_on_terminal([*PDM, "admin", "top", "--once"], service.environment("admin"), columns=60)
    assert code == 0 and max(map(len, shown.splitlines())) <= 60
    # Without --once it goes on until it is interrupted.
    process = subprocess.Popen(
        [*PDM, "admin", "top", "-F", "json", "--interval", "0.2s"],
        env=service.environment("admin"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        pictures = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert pictures[0]["at"] < pictures[1]["at"]

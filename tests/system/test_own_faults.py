"""Faults of the service's own machine: they cost no attempt, ``/health`` reports them, and work resumes afterwards."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService, set_keys
from tests.support.instances import health, until

_QUICK = {"first_pause": "50ms", "longest_pause": "200ms", "poll_interval": "500ms"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TestService]:
    service = TestService(tmp_path / "instance")
    service.init(queue=_QUICK)
    yield service
    if service.process is not None:
        service.kill()


def listing(service: TestService, protocol: str = "DUMMY", site: int = 1) -> int:
    job = service.submit("admin", "list", src_siteid=site, src_filepath="/t", protocol=protocol, max_tries=1)
    return int(job["id"])


def element(service: TestService, job: int, number: int = 0) -> Any:
    return service.call("admin", "GET", f"/jobs/{job}/elements/{number}")[1]


def fill(path: Path) -> None:
    """Write a file until its file system is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def soft_limit(service: TestService, descriptors: int) -> None:
    assert service.process is not None
    _, hard = resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, (descriptors, hard))


@pytest.mark.full
def test_without_descriptors_nothing_is_claimed_and_no_try_is_spent(service: TestService) -> None:
    with service.running():
        assert health(service) == ("ok", [])
        assert service.process is not None
        before, _ = resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE)
        # Enough for a connection and a log, too few for the pipes of a helper.
        soft_limit(service, len([*Path(f"/proc/{service.process.pid}/fd").iterdir()]) + 6)
        jobs = [listing(service) for _ in range(8)]
        until(service, lambda: health(service) == ("paused", ["helpers"]))
        time.sleep(1.5)
        states = [element(service, job) for job in jobs]
        assert {each["status"] for each in states} == {"SUBMITTED"}
        # It was begun for some before the fault was known, and for none since.
        assert max(each["attempts"] for each in states) <= 1
        soft_limit(service, before)
        for job in jobs:
            assert service.wait_for("admin", job)["status"] == "DONE"
        assert health(service) == ("ok", [])


@pytest.mark.full
def test_a_helper_that_cannot_be_found_holds_jobs_until_it_is_there(service: TestService, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    set_keys(service.directory / "workqueue.conf", {"agents": {"python": str(python), "idle": "100ms"}})
    with service.running():
        assert service.wait_for("admin", listing(service))["status"] == "DONE"
        python.rename(tmp_path / "gone")
        # The helper that has lived until now is ended for want of work.
        time.sleep(2)
        job = listing(service)
        service.wait_for("admin", job, until=["HELD"])
        found = element(service, job)
        assert (found["error"]["code"], found["error"]["scope"]) == ("DEPENDENCY_MISSING", "service")
        assert str(tmp_path) not in found["error"]["message"]
        assert health(service) == ("ok", [])
        (tmp_path / "gone").rename(python)
        # It is looked for three times a minute.
        assert service.wait_for("admin", job, timeout_s=60)["status"] == "DONE"


@as_root
def test_full_log_directories_are_reported_and_work_continues(service: TestService) -> None:
    logs = service.directory / "full"
    logs.mkdir()
    set_keys(service.directory / "workqueue.conf", {"logs": {"folder": str(logs)}})
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", logs], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with service.running():
            filler = logs / "filler"
            fill(filler)
            assert service.wait_for("admin", listing(service))["status"] == "DONE"
            until(service, lambda: health(service) == ("degraded", ["attempt logs"]))
            filler.unlink()
            until(service, lambda: health(service) == ("ok", []))
    finally:
        subprocess.run(["umount", "--lazy", logs], check=True)

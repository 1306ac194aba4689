"""A listener that resumes loses no event by the death of the daemon, and gets none twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService, set_keys

_PDM = [sys.executable, "-m", "pdm.workqueue.cli"]
_JOBS = 10


def _events(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def _submit(service: TestService) -> None:
    for _ in range(_JOBS):
        done = service.pdm("admin", "mkdir", "-p", "1:/events", "--no-wait")
        assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_a_killed_daemon_loses_no_event(tmp_path: Path) -> None:
    service = TestService(tmp_path / "instance")
    service.init()
    with service.running():
        # The listener looks for the next daemon where the first one was.
        set_keys(service.directory / "workqueue.conf", {"server": {"port": (service.url or "").rpartition(":")[2]}})
        _submit(service)
        with (tmp_path / "seen").open("wb") as seen:
            listener = subprocess.Popen(
                [*_PDM, "-F", "json", "events", "-f", "-n", "1000"], env=service.environment("admin"), stdout=seen
            )
        try:
            for _ in range(2):
                _submit(service)
                service.kill()
                service.start()
            _submit(service)
            assert service.pdm("admin", "wait", *map(str, range(1, 4 * _JOBS + 1))).returncode == 0
            stored = _events(service.pdm("admin", "-F", "json", "events", "-n", "1000").stdout)
            last = json.dumps(stored[-1]["id"])
            while f'"id":{last},' not in (tmp_path / "seen").read_text():
                assert listener.poll() is None
                try:
                    listener.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            listener.terminate()
            listener.wait(20)
    ended = {event["job"] for event in stored if event["data"].get("status") == "DONE"}
    assert len(ended) == 4 * _JOBS
    assert _events((tmp_path / "seen").read_text()) == stored

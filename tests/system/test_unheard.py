"""Helpers that are killed: what they had not begun is not taken for done."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService

_JOBS = 60


def _kill_helpers(service: TestService, over: threading.Event) -> None:
    assert service.process is not None
    while not over.wait(0.05):
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == service.process.pid and b"helpers.main_relay" in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
            except (OSError, ValueError):
                continue


@pytest.mark.full
def test_renames_of_nothing_and_directories_that_are_there_are_never_done(tmp_path: Path) -> None:
    service = TestService(tmp_path / "instance")
    service.init(queue={"first_pause": "20ms", "longest_pause": "50ms"})
    directory = service.directory / "storage" / "a"
    for number in range(_JOBS):
        (directory / f"others{number}").write_text("somebody else's")
        (directory / f"directory{number}").mkdir()
    with service.running():
        over = threading.Event()
        killer = threading.Thread(target=_kill_helpers, args=(service, over))
        killer.start()
        try:
            jobs = []
            for number in range(_JOBS):
                fields = {"src_siteid": 1, "protocol": "FILE", "max_tries": 10}
                renamed = service.submit(
                    "admin", "rename", src_filepath=f"none{number}", dst_filepath=f"others{number}", **fields
                )
                made = service.submit("admin", "mkdir", src_filepath=f"directory{number}", **fields)
                jobs += [renamed["id"], made["id"]]
        finally:
            over.set()
            killer.join()
        ended = [service.wait_for("admin", job) for job in jobs]
        assert {job["status"] for job in ended} == {"FAILED"}
        attempts = [service.call("admin", "GET", f"/jobs/{job}/elements/0")[1]["attempts"] for job in jobs]
        assert max(attempts) > 1, "no helper was killed at work"

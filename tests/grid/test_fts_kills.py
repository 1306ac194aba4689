"""One daemon hands its copies over to another that answers as an FTS3, and both are killed again and again.

``PDM_FTS_KILLS`` has the number of kills, 2 by default, with 500 files for each; ``PDM_FTS_SEED`` chooses the moments.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService
from tests.support.fts_pair import FtsPair, make_fts_pair
from tests.support.instances import until

KILLS = int(os.environ.get("PDM_FTS_KILLS", "2"))
FILES = 500 * KILLS
QUEUE = {"first_pause": "100ms", "longest_pause": "1s", "lease": "3s"}


@pytest.fixture
def pair(grid: TestGrid, tmp_path: Path) -> FtsPair:
    return make_fts_pair(grid, tmp_path, QUEUE, fts={"files": "50", "poll": "500ms"})


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def progress(service: TestService, job: int) -> dict[str, Any]:
    found: dict[str, Any] = service.call("alice", "GET", f"/jobs/{job}")[1]
    return found


@pytest.mark.full
@pytest.mark.timeout(120 + 30 * KILLS)
def test_kills_of_both_daemons_lose_and_double_nothing(pair: FtsPair, grid_directories: Any) -> None:
    fts, worker = pair
    source: Path = grid_directories.a / "tree"
    source.mkdir()
    for number in range(FILES):
        (source / f"file{number}").write_bytes(os.urandom(1000))
    grid_directories.give()
    copy = grid_directories.b / "copy"
    with fts.running(), worker.running():
        worker.delegate("alice")
        job = worker.submit(
            "alice", "copy", src_siteid=1, src_filepath=str(source), dst_siteid=2, dst_filepath=str(copy)
        )["id"]
        moments = random.Random(int(os.environ.get("PDM_FTS_SEED", "14")))
        for number in range(KILLS):
            # By how far the job is, so that a fast machine has as many; the first one meets it while it is planned.
            done = 0.8 * FILES * number / KILLS
            until(worker, lambda done=done: progress(worker, job)["num_done"] >= done, 120)  # type: ignore[misc]
            time.sleep(moments.uniform(0.0, 1.0))
            assert progress(worker, job)["status"] not in ("DONE", "FAILED"), f"over after {number} kills"
            victim = (worker, fts)[number % 2]
            victim.kill()
            time.sleep(moments.uniform(0.0, 0.5))
            victim.start()
        ended = worker.wait_for("alice", job, timeout_s=60 + 20 * KILLS)
        assert (ended["status"], ended["num_failed"]) == ("DONE", 0), worker.tail()
        assert contents(copy) == contents(source)
        _, jobs = fts.call("alice", "GET", "/jobs?limit=500")
        assert sum(each["num_elements"] for each in jobs) == FILES
        assert sum(each["num_done"] for each in jobs) == FILES
        assert not list(copy.parent.rglob("*.part"))

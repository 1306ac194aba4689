"""One daemon hands its copies over to another that answers as an FTS3, and both are killed again and again.

``PDM_FTS_KILLS`` has the number of kills, 2 by default.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService

KILLS = int(os.environ.get("PDM_FTS_KILLS", "2"))
FILES = 40 * KILLS
QUEUE = {"first_pause": "100ms", "longest_pause": "1s", "lease": "3s"}


@pytest.fixture
def fts(grid: TestGrid, tmp_path: Path) -> TestService:
    """A daemon with a port for clients of FTS3, that all users of the grid may use."""
    service = TestService(tmp_path / "fts", grid.description(), grid.directory)
    host = grid.credentials.host
    service.init(
        queue=QUEUE,
        fts={"host": "localhost", "port": str(reserve_port())},
        tls={"certificate": str(host.certificate), "key": str(host.key)},
    )
    authority = next(Path(grid.credentials.trust).glob("*.0"))
    # By which the test knows it.
    shutil.copyfile(authority, service.directory / "certificates" / "ca.crt")
    return service


@pytest.fixture
def worker(grid: TestGrid, fts: TestService, tmp_path: Path) -> TestService:
    """A daemon whose site B names that one as its FTS3."""
    service = TestService(tmp_path / "worker", grid.description(), grid.directory)
    service.init(queue=QUEUE, fts={"files": "50", "poll": "500ms"})
    port = next(
        line.partition("=")[2].strip()
        for line in (fts.directory / "workqueue.conf").read_text().partition("[fts]")[2].splitlines()
        if line.startswith("port")
    )
    (file,) = (service.directory / "sites.d").glob("*.conf")
    file.write_text(file.read_text().replace("[B]", f"[B]\nfts = https://localhost:{port}"))
    return service


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.full
@pytest.mark.timeout(120 + 30 * KILLS)
def test_kills_of_both_daemons_lose_and_double_nothing(
    fts: TestService, worker: TestService, grid_directories: Any
) -> None:
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
        moments = random.Random(14)
        kills = 0
        for number in range(KILLS):
            time.sleep(moments.uniform(0.1, 3.0))
            if worker.call("alice", "GET", f"/jobs/{job}")[1]["status"] in ("DONE", "FAILED"):
                break
            victim = (worker, fts)[number % 2]
            victim.kill()
            time.sleep(moments.uniform(0.0, 0.5))
            victim.start()
            kills += 1
        ended = worker.wait_for("alice", job, timeout_s=60 + 20 * KILLS)
        assert (ended["status"], ended["num_failed"]) == ("DONE", 0), worker.tail()
        assert contents(copy) == contents(source)
        _, jobs = fts.call("alice", "GET", "/jobs?limit=500")
        assert sum(each["num_elements"] for each in jobs) == FILES
        assert sum(each["num_done"] for each in jobs) == FILES
    assert kills == KILLS, f"the job was over after {kills} kills"

"""A site that is down, as three daemons on one PostgreSQL see it: all leave it alone, and go back to it together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from tests.support.cluster import cluster_of, until

pytestmark = [pytest.mark.full, pytest.mark.postgresql]


def test_all_nodes_pause_a_site_and_resume_together(grid: TestGrid, grid_directories: Any, tmp_path: Path) -> None:
    """Pauses of an hour: what one node finds out is all that the others can act upon."""
    tree = grid_directories.a / "tree"
    tree.mkdir()
    for number in range(20):
        (tree / f"file{number}").write_bytes(b"x" * 1000)
    grid_directories.give()
    server = grid.sites["B"].server
    places = {"src_siteid": 1, "src_filepath": str(tree), "dst_siteid": 2}
    with cluster_of(
        3,
        tmp_path,
        grid=grid.description(),
        grid_directory=grid.directory,
        queue={"first_pause": "1h", "longest_pause": "1h"},
        agents={"max_agents": "2"},
    ) as cluster:
        first, second, _ = cluster.nodes
        first.delegate("alice")
        server.stop()
        first.submit("alice", "copy", **places, dst_filepath=str(grid_directories.b / "one"))
        until(
            "all have paused it",
            lambda: all(" is paused until " in node.log_path.read_text() for node in cluster.nodes),
            60,
        )
        job = second.submit("alice", "copy", **places, dst_filepath=str(grid_directories.b / "two"))["id"]
        for node in cluster.nodes:
            waiting = node.call("alice", "GET", f"/jobs/{job}")[1]["waiting"]
            assert any("cannot be reached since" in reason for reason in waiting), waiting
        assert cluster.query("SELECT sum(attempts) AS n FROM job_elements WHERE job_id = :job", job=job)[0].n == 0
        server.start()
        # By a user of the first node; nobody asks the others.
        done = first.pdm("alice", "site", "check", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        until(
            "all reach it again",
            lambda: all(" can be reached again" in node.log_path.read_text() for node in cluster.nodes),
            60,
        )
        ended = second.wait_for("alice", job, timeout_s=60)
        assert (ended["num_done"], ended["num_failed"]) == (ended["num_elements"], 0)
        assert (
            cluster.query("SELECT max(attempts - lost) AS n FROM job_elements WHERE job_id = :job", job=job)[0].n == 1
        )

"""Nodes that have nothing to do get their part of what a busy one has begun; a drained one keeps nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdm.testgrid.service import TestService
from tests.support.attempt_logs import moved_elements
from tests.support.cluster import Cluster, cluster_of, until

pytestmark = [pytest.mark.full, pytest.mark.postgresql]

_PLACES = {"src_siteid": 1, "src_filepath": "/s", "dst_siteid": 2, "dst_filepath": "/d", "protocol": "DUMMY"}


def _moved(node: TestService) -> set[tuple[int, int]]:
    """The attempts that a node has moved, even if only in part."""
    return moved_elements(node.directory / "var" / "logs")


def _claimed_by(cluster: Cluster, job: int, node: str) -> int:
    """Elements that a node has claimed and that have not ended."""
    (row,) = cluster.query(
        "SELECT count(*) AS number FROM job_elements JOIN workers ON workers.id = worker_id"
        " WHERE job_id = :job AND status = 'RUNNING' AND node = :node",
        job=job, node=node,
    )  # fmt: skip
    return int(row.number)


def test_nodes_that_come_later_get_their_part_of_a_slow_job(tmp_path: Path) -> None:
    """Each file takes ten minutes: what the first node has claimed would keep it busy for hours."""
    with cluster_of(3, tmp_path, start=False, agents={"max_agents": "2"}, queue={"poll_interval": "60s"}) as cluster:
        first, second, _ = cluster.nodes
        first.start()
        options = {"dummy": {"files": 40, "size": 1000, "delay": 600}}
        job = first.submit("admin", "copy", **_PLACES, extra_opts=options)["id"]
        until("the first node works", lambda: _moved(first))
        cluster.start()
        seconds = until("all nodes have work", lambda: len(cluster.running_on(job)) == 3, 30)
        print(f"all have work after {seconds:.1f} s")  # noqa: T201 - a figure
        until("all nodes move files", lambda: all(map(_moved, cluster.nodes)), 30)
        # Some were given back, which is no try; and none is claimed twice.
        (counted,) = cluster.query(
            "SELECT max(attempts - lost) AS tries, sum(lost) AS returned FROM job_elements WHERE job_id = :job", job=job
        )
        assert counted.tries == 1
        assert counted.returned > 0
        # A node that is drained keeps what its helpers move.
        assert first.pdm("admin", "admin", "node", "drain", "node2", "new disk").returncode == 0
        until("it keeps what it moves", lambda: _claimed_by(cluster, job, "node2") <= 2, 30)
        assert _claimed_by(cluster, job, "node2") > 0
        assert second.call("admin", "DELETE", f"/jobs/{job}")[0] == 200
        first.wait_for("admin", job, until=["CANCELLED"])

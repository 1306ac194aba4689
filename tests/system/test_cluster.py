"""Several daemons on one PostgreSQL: what is asked of one is done by another at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cluster import Cluster, cluster_of

pytestmark = pytest.mark.full

FILES = {"src_siteid": 1, "src_filepath": "/t", "dst_siteid": 2, "dst_filepath": "/c", "protocol": "DUMMY"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two daemons that would poll only after a minute; each runs two helpers."""
    with cluster_of(
        2,
        tmp_path_factory.mktemp("cluster"),
        queue={"poll_interval": "60s", "lease": "15s"},
        agents={"max_agents": "2"},
    ) as cluster:
        yield cluster


def test_nodes_register(cluster: Cluster) -> None:
    rows = cluster.query("SELECT node, address, version, seen_at >= started_at AS seen FROM workers ORDER BY node")
    assert [(row.node, row.seen) for row in rows] == [("node1", True), ("node2", True)]
    assert all(row.address.startswith("https://localhost:") and row.version for row in rows)

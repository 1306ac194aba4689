"""A node whose way to the database is slow claims nothing, says so, and works again once it is fast."""

from __future__ import annotations

import http.client
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService, set_keys
from tests.support.cluster import Cluster, cluster_of, until
from tests.support.postgresql_proxy import postgresql_proxy

pytestmark = [pytest.mark.full, pytest.mark.postgresql]

_PLACES = {"src_siteid": 1, "src_filepath": "/s", "dst_siteid": 2, "dst_filepath": "/d", "protocol": "DUMMY"}
_PART = "connections to the database"


def _state(cluster: Cluster, name: str) -> dict[str, Any]:
    """A node as another one shows it."""
    status, nodes = cluster.nodes[0].call("admin", "GET", "/nodes")
    assert status == 200
    found: dict[str, Any] = next(node for node in nodes if node["name"] == name)
    return found


def _readiness(port: int) -> tuple[int, list[str]]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        return response.status, json.loads(response.read())["reasons"]


def _submit(node: TestService, files: int) -> int:
    options = {"dummy": {"files": files, "size": 1000, "delay": 0.2}}
    return int(node.submit("admin", "copy", **_PLACES, extra_opts=options)["id"])


def test_a_node_with_a_slow_connection_claims_nothing_until_it_is_fast_again(tmp_path: Path) -> None:
    with cluster_of(3, tmp_path, start=False, agents={"max_agents": "2"}) as cluster:
        first, _, slow = cluster.nodes
        port = reserve_port()
        with postgresql_proxy(cluster.postgresql.url) as proxy:
            url = proxy.url.replace("postgresql+psycopg://", "postgresql://")
            set_keys(slow.directory / "workqueue.conf", {"database": {"url": url}, "admin": {"port": str(port)}})
            cluster.start()
            job = _submit(first, 2000)
            until("all run it", lambda: cluster.running_on(job) == {"node1", "node2", "node3"})
            assert _readiness(port) == (200, [])
            proxy.delay_s = 0.4
            seconds = until("it is known to be sick", lambda: _state(cluster, "node3")["sick"], 60)
            print(f"sick after {seconds:.1f} s")  # noqa: T201 - a figure
            assert _PART in _state(cluster, "node3")["sick"]
            status, reasons = _readiness(port)
            assert status == 503
            assert any(reason.startswith(f"{_PART}: a round trip takes 0.4") for reason in reasons), reasons
            # What it has ends, or goes back; and the others do the rest.
            until("it runs nothing", lambda: "node3" not in cluster.running_on(job), 60)
            (since,) = cluster.query("SELECT clock_timestamp() AS now")
            (before,) = cluster.query("SELECT num_done AS done FROM jobs WHERE id = :job", job=job)
            until(
                "the others go on",
                lambda: cluster.query(
                    "SELECT 1 FROM jobs WHERE id = :job AND num_done > :n", job=job, n=before.done + 50
                ),
            )
            assert not cluster.query(
                "SELECT 1 FROM job_elements JOIN workers ON workers.id = worker_id"
                " WHERE node = 'node3' AND claimed_at > :since",
                since=since.now,
            )
            assert _state(cluster, "node1")["sick"] is None and _state(cluster, "node2")["sick"] is None
            proxy.delay_s = 0.0
            seconds = until("it runs some of it again", lambda: "node3" in cluster.running_on(job), 60)
            print(f"at work again after {seconds:.1f} s")  # noqa: T201 - a figure
            until("it is known to be healthy", lambda: _state(cluster, "node3")["sick"] is None)
            until("it is ready", lambda: _readiness(port) == (200, []))
            assert first.call("admin", "DELETE", f"/jobs/{job}")[0] == 200
            first.wait_for("admin", job, until=["CANCELLED"])


def test_a_database_that_is_slow_for_all_nodes_stops_none(tmp_path: Path) -> None:
    with cluster_of(2, tmp_path, start=False, agents={"max_agents": "2"}) as cluster:
        first, second = cluster.nodes
        with postgresql_proxy(cluster.postgresql.url) as proxy:
            url = proxy.url.replace("postgresql+psycopg://", "postgresql://")
            for node in cluster.nodes:
                set_keys(node.directory / "workqueue.conf", {"database": {"url": url}})
            cluster.start()
            proxy.delay_s = 0.3
            until(
                "both know it",
                lambda: len(cluster.query("SELECT 1 FROM workers WHERE (report->>'slow')::boolean")) == 2,
            )
            job = _submit(second, 8)
            assert first.wait_for("admin", job, timeout_s=120)["num_done"] == 9

"""Several daemons on one PostgreSQL: what is asked of one is done by another at once."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator

import pytest

from tests.support.cluster import Cluster, cluster_of, until

pytestmark = pytest.mark.full

PLACE = {"src_siteid": 1, "src_filepath": "/d", "protocol": "DUMMY"}
LEASE_S = 15
#: On a machine that runs other tests, nothing is as fast.
SLACK = float(os.environ.get("PDM_TEST_SLACK", "5"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two daemons that would poll only after a minute; each runs two helpers."""
    with cluster_of(
        2,
        tmp_path_factory.mktemp("cluster"),
        queue={"poll_interval": "60s", "lease": f"{LEASE_S}s"},
        agents={"max_agents": "2"},
    ) as cluster:
        yield cluster


def test_nodes_register(cluster: Cluster) -> None:
    rows = cluster.query("SELECT node, address, version, seen_at >= started_at AS seen FROM workers ORDER BY node")
    assert [(row.node, row.seen) for row in rows] == [("node1", True), ("node2", True)]
    assert all(row.address.startswith("https://localhost:") and row.version for row in rows)


def begin(cluster: Cluster, node: int, seconds: float = 600.0) -> tuple[int, str, float]:
    """Submit work of one element to a node.

    Returns:
        The job, the node that runs it, and after how many seconds from the answer.
    """
    job = cluster.nodes[node].submit("admin", "mkdir", **PLACE, extra_opts={"dummy": {"delay": seconds}})["id"]
    began = time.monotonic()
    until("it runs", lambda: cluster.running_on(job))
    (name,) = cluster.running_on(job)
    return job, name, time.monotonic() - began


@pytest.fixture
def begun_elsewhere(cluster: Cluster) -> Iterator[tuple[int, float]]:
    """A job that was submitted to the first node, which is occupied, and is run by the second; and after how long."""
    jobs: list[int] = []
    try:
        names: list[str] = []
        # While both are idle, either may be first.
        while "node1" not in names or names[-1] != "node2":
            job, name, seconds = begin(cluster, 0)
            jobs.append(job)
            names.append(name)
            assert len(jobs) < 10, "the first node leaves nothing"
        assert len(jobs) > 1, "the first node was not occupied"
        yield job, seconds
    finally:
        for number in jobs:
            cluster.nodes[0].call("admin", "DELETE", f"/jobs/{number}")
        for number in jobs:
            cluster.nodes[0].wait_for("admin", number)


def test_work_that_one_leaves_is_begun_by_another_at_once(begun_elsewhere: tuple[int, float]) -> None:
    _, seconds = begun_elsewhere
    print(f"begun elsewhere after {1000 * seconds:.0f} ms")  # noqa: T201 - a figure
    assert seconds < 0.1 * SLACK


def test_a_cancellation_ends_what_another_runs(cluster: Cluster, begun_elsewhere: tuple[int, float]) -> None:
    job, _ = begun_elsewhere
    began = time.monotonic()
    status, _ = cluster.nodes[0].call("admin", "DELETE", f"/jobs/{job}")
    assert status == 200
    ended = cluster.nodes[0].wait_for("admin", job)
    seconds = time.monotonic() - began
    print(f"cancelled elsewhere after {1000 * seconds:.0f} ms")  # noqa: T201 - a figure
    assert ended["status"] == "CANCELLED"
    assert seconds < 1.0 * SLACK


def test_a_job_that_is_held_at_one_is_begun_by_none(cluster: Cluster) -> None:
    """The batches of each node would run for half a minute: what a helper has not begun goes back to the queue."""
    first, second = cluster.nodes
    dummy = {"dummy": {"files": 400, "delay": 0.5}}
    job = first.submit("admin", "copy", **PLACE, dst_siteid=2, dst_filepath="/e", extra_opts=dummy)["id"]
    until("both run it", lambda: cluster.running_on(job) == {"node1", "node2"})
    assert second.call("admin", "POST", f"/jobs/{job}/hold", {"message": "disk is full"})[0] == 200
    claims = "SELECT sum(attempts) AS number FROM job_elements WHERE job_id = :job"
    (held,) = cluster.query(claims, job=job)
    seconds = until("nothing runs", lambda: not cluster.running_on(job), 15.0)
    print(f"nothing runs {1000 * seconds:.0f} ms after the hold")  # noqa: T201 - a figure
    seen = first.wait_for("admin", job, until=["HELD"])
    assert seen["hold"]["message"] == "disk is full"
    assert (seen["num_running"], seen["num_failed"]) == (0, 0)
    assert seen["num_submitted"] + seen["num_done"] == seen["num_elements"] == 401
    (later,) = cluster.query(claims, job=job)
    assert later.number == held.number, "elements were claimed after the hold"
    # It goes on at another node than the one that has held it; at the end each has run once.
    before = seen["num_done"]
    assert first.call("admin", "POST", f"/jobs/{job}/resume")[0] == 200
    until("it goes on", lambda: first.call("admin", "GET", f"/jobs/{job}")[1]["num_done"] > before)
    assert second.call("admin", "POST", f"/jobs/{job}/hold", {})[0] == 200
    until("nothing runs", lambda: not cluster.running_on(job), 15.0)
    (counted,) = cluster.query(
        "SELECT sum(CASE WHEN status = 'DONE' THEN 1 ELSE 0 END) AS done,"
        " sum(CASE WHEN status = 'SUBMITTED' THEN 1 ELSE 0 END) AS submitted,"
        " max(attempts - lost) AS most, min(attempts - lost) AS least FROM job_elements WHERE job_id = :job",
        job=job,
    )
    seen = second.wait_for("admin", job, until=["HELD"])
    assert (seen["num_done"], seen["num_submitted"]) == (counted.done, counted.submitted)
    assert (counted.most, counted.least) == (1, 0), "no element runs twice, and what was given back is no attempt"
    assert first.call("admin", "DELETE", f"/jobs/{job}")[1]["status"] == "CANCELLED"


def test_a_wait_at_one_ends_with_the_change_by_another(cluster: Cluster) -> None:
    """Twenty jobs, one after the other: a look at it every half second would take longer."""
    first, second = cluster.nodes
    began = time.monotonic()
    for _ in range(20):
        job = second.submit("admin", "mkdir", **PLACE)["id"]
        status, seen = first.call("admin", "GET", f"/jobs/{job}?wait=30")
        while seen["status"] not in ("DONE", "FAILED"):
            status, seen = first.call("admin", "GET", f"/jobs/{job}?wait=30")
        assert (status, seen["status"]) == (200, "DONE")
    seconds = (time.monotonic() - began) / 20
    print(f"a job is submitted at one and seen DONE at another after {1000 * seconds:.0f} ms")  # noqa: T201 - a figure
    assert seconds < 0.3 * SLACK


def test_a_change_of_a_site_is_seen_by_another(cluster: Cluster) -> None:
    first, second = cluster.nodes
    site = {"name": "new", "endpoints": {"DUMMY": ["dummy://new"]}}
    began = time.monotonic()
    status, made = first.call("admin", "POST", "/sites", site)
    assert status == 201, made
    until("it is seen", lambda: "new" in str(second.call("admin", "GET", "/sites")[1]), 5.0)
    seconds = time.monotonic() - began
    print(f"a site is seen elsewhere after {1000 * seconds:.0f} ms")  # noqa: T201 - a figure
    assert seconds < 0.2 * SLACK


def test_a_killed_daemon_is_replaced_within_its_lease_and_five_seconds(
    cluster: Cluster, begun_elsewhere: tuple[int, float]
) -> None:
    job, _ = begun_elsewhere
    cluster.nodes[1].kill()
    # As long as the first node is occupied, nothing could be begun.
    for number in [
        row.id for row in cluster.query("SELECT id FROM jobs WHERE status = 'RUNNING' AND id <> :job", job=job)
    ]:
        cluster.nodes[0].call("admin", "DELETE", f"/jobs/{number}")
    seconds = until("it is taken over", lambda: cluster.running_on(job) == {"node1"}, 30.0)
    print(f"taken over after {seconds:.1f} s")  # noqa: T201 - a figure
    assert seconds < LEASE_S + 5
    cluster.start()


def test_what_a_killed_daemon_has_counted_apart_is_added_up_by_another(cluster: Cluster) -> None:
    """It has stored that the element is DONE, and is killed before it adds that to the counters of the job."""
    job, name, _ = begin(cluster, 0)
    cluster.query(
        "WITH ended AS (UPDATE job_elements SET status = 'DONE', worker_id = NULL WHERE job_id = :job RETURNING job_id)"
        " INSERT INTO job_counts (job_id, done, bytes_total, bytes_done, already_there, bytes_already_there)"
        " SELECT job_id, 1, 0, 0, 0, 0 FROM ended RETURNING job_id",
        job=job,
    )
    (gone,) = (node for node in cluster.nodes if node.directory.name == name)
    (other,) = (node for node in cluster.nodes if node is not gone)
    gone.kill()
    ended = other.wait_for("admin", job, timeout_s=60)
    assert (ended["status"], ended["num_done"], ended["num_running"]) == ("DONE", 1, 0)
    assert len(re.findall(rf"job {job} of user \S+ ended DONE", other.log_path.read_text())) == 1
    cluster.start()

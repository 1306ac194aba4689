"""Limits hold over several daemons on one PostgreSQL; and no daemon keeps work that others could begin."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.support.cluster import Cluster, cluster_of, signal_all, until

pytestmark = pytest.mark.full

_LEASE_S = 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three daemons with two helpers each; two streams may go into a site."""
    with cluster_of(
        3,
        tmp_path_factory.mktemp("shares"),
        queue={"lease": f"{_LEASE_S}s", "site_limit_in": "2", "route_start": "2", "poll_interval": "1s"},
        agents={"max_agents": "2"},
    ) as cluster:
        yield cluster


def submit(cluster: Cluster, files: int, delay: float, *, into: int = 2) -> int:
    job = cluster.nodes[0].submit(
        "admin", "copy", src_siteid=1, src_filepath="/s", dst_siteid=into, dst_filepath="/d", protocol="DUMMY",
        extra_opts={"dummy": {"files": files, "delay": delay}},
    )  # fmt: skip
    return int(job["id"])


def is_done(cluster: Cluster, job: int) -> bool:
    (row,) = cluster.query("SELECT status FROM jobs WHERE id = :job", job=job)
    return bool(row.status == "DONE")


def done_elements(cluster: Cluster, job: int) -> list[Any]:
    return cluster.query(
        "SELECT started_at, elapsed_s, worker_id FROM job_elements"
        " WHERE job_id = :job AND status = 'DONE' AND type = 'COPY' ORDER BY started_at",
        job=job,
    )


def most_at_once(rows: list[Any]) -> int:
    """How many elements ran at once at most."""
    moments: list[tuple[datetime, int]] = []
    for row in rows:
        # The result of an element is seen before the next one begins, the two within a millisecond.
        moments += [(row.started_at, 1), (row.started_at + timedelta(seconds=row.elapsed_s, milliseconds=-2), -1)]
    most = now = 0
    for _, step in sorted(moments):
        now += step
        most = max(most, now)
    return most


def has_share(cluster: Cluster) -> bool:
    rows = cluster.query("SELECT report FROM workers WHERE lease_until > clock_timestamp()")
    return len(rows) == 3 and all(row.report and row.report["parts"] == 3 for row in rows)


def test_a_limit_holds_while_daemons_are_killed_and_suspended(cluster: Cluster) -> None:
    until("all three count each other", lambda: has_share(cluster), 30)
    job = submit(cluster, 500, 0.1)
    until("two daemons run it", lambda: len(done_elements(cluster, job)) > 20)
    victim, sleeper = cluster.nodes[1], cluster.nodes[2]
    victim.kill()
    time.sleep(1)
    signal_all(sleeper, signal.SIGSTOP)
    time.sleep(_LEASE_S + 3)
    signal_all(sleeper, signal.SIGCONT)
    cluster.start()
    until("all three count each other again", lambda: has_share(cluster), 30)
    until("it is done", lambda: is_done(cluster, job), 120)
    rows = done_elements(cluster, job)
    assert len(rows) == 500
    assert most_at_once(rows) == 2
    # All the time but for the leases that had to end.
    seconds = (rows[-1].started_at - rows[0].started_at).total_seconds()
    assert seconds < 500 * 0.1 / 2 + 3 * _LEASE_S + 5


def test_what_one_daemon_cannot_use_is_used_by_others(cluster: Cluster) -> None:
    until("all three count each other", lambda: has_share(cluster), 30)
    for node in cluster.nodes[1:]:
        signal_all(node, signal.SIGSTOP)
    time.sleep(_LEASE_S + 3)
    # Alone, the first one gets both streams.
    job = submit(cluster, 40, 0.1)
    until("it is done", lambda: is_done(cluster, job), 60)
    rows = done_elements(cluster, job)
    assert most_at_once(rows) == 2
    assert len({row.worker_id for row in rows}) == 1
    for node in cluster.nodes[1:]:
        signal_all(node, signal.SIGCONT)
    until("all three count each other again", lambda: has_share(cluster), 30)


def test_idle_daemons_get_what_another_has_claimed_ahead(cluster: Cluster) -> None:
    until("all three count each other", lambda: has_share(cluster), 30)
    # Batches of one element each, for their options differ: a daemon claims as many ahead as it can run.
    jobs = [
        int(
            cluster.nodes[0].submit(
                "admin", "mkdir", src_siteid=1 + number % 2, src_filepath=f"/{number}", protocol="DUMMY",
                extra_opts={"dummy": {"delay": 6 + number / 100}},
            )["id"]
        )
        for number in range(6)
    ]  # fmt: skip
    began = time.monotonic()
    until("all are done", lambda: all(is_done(cluster, job) for job in jobs), 60)
    # Two streams into each site: four at once, whoever has claimed them.
    assert time.monotonic() - began < 6 * 2 + 6

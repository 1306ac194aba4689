"""A large copy on the real grid by three daemons: each is killed, one is suspended, and PostgreSQL fails."""

from __future__ import annotations

import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService
from tests.support.attempt_logs import attempt_lines, job_logs
from tests.support.cluster import Cluster, cluster_of, signal_all, until

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]

FILES = 20_000
#: The default.
LEASE_S = 15
ROUNDS = 3


@pytest.fixture
def tree(grid: TestGrid) -> Iterator[tuple[Path, Path]]:
    """A tree of small files at the first site, and where its copy goes at the second."""
    source, copy = grid.sites["A"].root / "cluster", grid.sites["B"].root / "cluster"
    for number in range(FILES):
        directory = source / f"directory{number // 500}"
        if number % 500 == 0:
            directory.mkdir(parents=True)
        (directory / f"file{number}").write_bytes(b"%d" % number)
    grid.give(source)
    yield source, copy
    for path in (source, copy):
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def cluster(grid: TestGrid, tmp_path: Path) -> Iterator[Cluster]:
    with cluster_of(
        3,
        tmp_path,
        grid=grid.description(),
        grid_directory=grid.directory,
        durable=True,
        queue={"first_pause": "100ms", "longest_pause": "1s", "batch_elements": "100"},
        agents={"max_agents": "2"},
    ) as cluster:
        yield cluster


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_large_copy_survives_the_death_of_each_daemon_and_of_postgresql(
    cluster: Cluster, tree: tuple[Path, Path]
) -> None:
    source, copy = tree
    first = cluster.nodes[0]
    first.delegate("alice")
    copies: dict[int, Path] = {}

    def submit() -> None:
        to = copy / str(len(copies))
        job = first.submit("alice", "copy", src_siteid=1, src_filepath=str(source), dst_siteid=2, dst_filepath=str(to))
        copies[job["id"]] = to

    def done() -> int:
        """Copied files of the latest job."""
        (row,) = cluster.query("SELECT num_done FROM jobs WHERE id = :job", job=max(copies))
        return int(row.num_done)

    submit()
    until("copies are done", lambda: done() > 100)
    for round_ in range(ROUNDS):
        for node in cluster.nodes:
            if done() > FILES * 3 // 4:
                # On a fast machine, too, each fault meets a copy that runs.
                submit()
                until("copies are done", lambda: done() > 0)
            node.kill()
            node.start()
        if round_ == 0:
            suspended, suspended_at = cluster.nodes[1], datetime.now(UTC)
            signal_all(suspended, signal.SIGSTOP)
            time.sleep(LEASE_S + 2)
            signal_all(suspended, signal.SIGCONT)
            continued_at = datetime.now(UTC)
        else:
            # Restarted, and in the last round killed: it recovers from its log.
            cluster.postgresql.stop(signal.SIGINT if round_ == 1 else signal.SIGKILL)
            time.sleep(1)
            cluster.postgresql.start()
    print(f"{done()} files of copy {len(copies)} were done when the last fault was over")  # noqa: T201 - a figure
    files = content(source)
    assert len(files) == FILES
    for number, to in copies.items():
        ended = first.wait_for("alice", number, timeout_s=150)
        assert ended["status"] == "DONE", ended
        assert content(to) == files
        assert (ended["num_done"], ended["num_failed"], ended["num_running"]) == (ended["num_elements"], 0, 0)
        assert ended["bytes_done"] == sum(map(len, files.values()))
    assert "was taken away" in suspended.log_path.read_text()
    assert attempts_that_overlap(cluster, suspended, suspended_at, continued_at + timedelta(seconds=LATE_S)) == []


#: Seconds after its continuation in which a node writes what it had heard before, and gives up its attempts.
LATE_S = 3


def attempts_that_overlap(cluster: Cluster, suspended: TestService, since: datetime, until: datetime) -> list[str]:
    """Attempts at an element, of any node, that began before an earlier one had said its last word.

    Not those whose last word a node wrote between two times because it was suspended: what had ended before is written
    late, too. That its helpers do nothing afterwards is tested in ``tests/helpers/test_lease.py``.
    """
    spans: dict[tuple[str, int], list[tuple[int, datetime, datetime]]] = defaultdict(list)
    for node in cluster.nodes:
        for log in job_logs(node.directory / "var" / "logs"):
            for (element, attempt), lines in attempt_lines(log).items():
                first, last = (datetime.fromisoformat(line.partition(" ")[0]) for line in (lines[0], lines[-1]))
                if node is not suspended or not since < last < until:
                    spans[log.parent.name, element].append((attempt, first, last))
    assert sum(map(len, spans.values())) >= FILES
    return [
        f"{job} {element}: attempt {earlier} until {last}, attempt {later} from {first}"
        for (job, element), of_element in spans.items()
        for (earlier, _, last), (later, first, _) in pairwise(sorted(of_element))
        if first < last
    ]

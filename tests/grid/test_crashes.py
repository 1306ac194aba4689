"""kill -9 at the worst moments: nothing lost, nothing twice, nothing left."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService
from tests.support.attempt_logs import attempt_lines, job_logs

MIB = 1024 * 1024


@pytest.fixture
def service(grid: TestGrid, tmp_path: Path) -> Iterator[TestService]:
    service = TestService(tmp_path / "instance", grid.description(), grid.directory)
    service.init(queue={"first_pause": "100ms", "longest_pause": "300ms", "batch_elements": "40"})
    with service.running():
        service.delegate("alice")
        yield service


def agents_of(service: TestService) -> set[int]:
    """Pids of the helper processes of a running daemon."""
    assert service.process is not None
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == service.process.pid:
            found.add(int(path.parent.name))
    return found


def lives(pid: int) -> bool:
    """Whether a process runs; one that is dead and only not yet reaped by init does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def times(lines: Sequence[str]) -> tuple[datetime, datetime]:
    """First and last moment of an attempt's log."""
    first, last = (datetime.fromisoformat(line.partition(" ")[0]) for line in (lines[0], lines[-1]))
    return first, last


def until(what: str, condition: Any, timeout_s: float = 20.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"waited {timeout_s} s in vain: {what}"
        time.sleep(0.01)


def test_a_daemon_killed_in_the_middle_of_a_copy_loses_and_doubles_nothing(
    service: TestService, grid_directories: Any
) -> None:
    tree = grid_directories.a / "tree"
    for number in range(300):
        directory = tree / f"directory {number % 10}"
        directory.mkdir(parents=True, exist_ok=True)
        # Large enough that the copy is still under way when the first few have been seen.
        (directory / f"file{number}").write_bytes(os.urandom(2000 + number) + bytes(MIB))
    grid_directories.give()
    copy = grid_directories.b / "copy"
    job = service.submit("alice", "copy", src_siteid=1, src_filepath=str(tree), dst_siteid=2, dst_filepath=str(copy))
    until("some files have arrived", lambda: len(list(copy.rglob("file*"))) > 10)
    assert service.process is not None
    agents = agents_of(service)
    assert agents
    service.kill()
    assert len(list(copy.rglob("file*"))) < 300, "the job was over before the daemon was killed"

    with service.running():
        # No helper of the dead daemon lives beside the new one.
        assert not [pid for pid in agents if lives(pid)]
        ended = service.wait_for("alice", job["id"])
        assert ended["status"] == "DONE", ended
        assert ended["num_done"] == ended["num_elements"] == 301

    def contents(directory: Path) -> dict[str, bytes]:
        return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    assert contents(copy) == contents(tree)
    (log,) = job_logs(service.directory / "var" / "logs")
    # Lines of the last moments before the daemon was killed had not come to the disk.
    attempts: dict[int, list[tuple[datetime, datetime]]] = {}
    for (element, _), lines in sorted(attempt_lines(log).items()):
        attempts.setdefault(element, []).append(times(lines))
    assert len(attempts) == 301
    for element, spans in attempts.items():
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert end <= start, f"element {element}: attempts overlap"
    repeated = [element for element, attempt in attempt_lines(log) if attempt > 1]
    assert repeated, "no element was under way when the daemon was killed"


@pytest.mark.full
def test_a_killed_helper_is_noticed_within_a_second_and_its_elements_are_tried_again(
    service: TestService, grid_directories: Any, record_property: Any
) -> None:
    large = grid_directories.a / "large"
    with large.open("wb") as file:
        file.truncate(1024 * MIB)
    grid_directories.give()
    job = service.submit(
        "alice", "copy", src_siteid=1, src_filepath=str(large), dst_siteid=2, dst_filepath=f"{grid_directories.b}/copy"
    )
    until("bytes arrive", lambda: any(path.stat().st_size for path in grid_directories.b.glob(".pdm-*")))
    for pid in agents_of(service):
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    path = f"/jobs/{job['id']}/elements/1"
    until("the crash is seen", lambda: service.call("alice", "GET", path)[1].get("error"), 5)
    noticed = time.monotonic() - killed
    error = service.call("alice", "GET", path)[1]["error"]
    assert (error["code"], error["scope"], error["retryable"]) == ("CRASHED", "service", True)
    record_property("seconds until the death of the helper was noticed", round(noticed, 2))
    assert service.wait_for("alice", job["id"], timeout_s=60)["status"] == "DONE"
    assert (grid_directories.b / "copy").stat().st_size == 1024 * MIB
    assert not list(grid_directories.b.glob(".pdm-*"))


def test_a_cancelled_transfer_is_dead_within_a_second_and_leaves_nothing(
    service: TestService, grid: TestGrid, grid_directories: Any, record_property: Any
) -> None:
    large = grid_directories.a / "large"
    with large.open("wb") as file:
        file.truncate(4 * 1024 * MIB)
    grid_directories.give()
    job = service.submit(
        "alice", "copy", src_siteid=1, src_filepath=str(large), dst_siteid=2, dst_filepath=f"{grid_directories.b}/copy"
    )
    until("bytes arrive", lambda: any(path.stat().st_size for path in grid_directories.b.glob(".pdm-*")))
    status, answer = service.call("alice", "DELETE", f"/jobs/{job['id']}")
    assert status == 200, answer
    asked = time.monotonic()
    until("the partial file is gone", lambda: not list(grid_directories.b.iterdir()), 10)
    record_property("seconds until the partial file was gone", round(time.monotonic() - asked, 2))
    ended = service.wait_for("alice", job["id"], timeout_s=10)
    assert ended["status"] == "CANCELLED"
    assert ended["num_cancelled"] == 1
    # Nothing writes it anew.
    time.sleep(0.5)
    assert list(grid_directories.b.iterdir()) == []


@pytest.mark.full
def test_a_helper_that_does_not_obey_is_killed_and_its_file_removed(
    service: TestService, grid: TestGrid, grid_directories: Any
) -> None:
    large = grid_directories.a / "large"
    with large.open("wb") as file:
        file.truncate(4 * 1024 * MIB)
    grid_directories.give()
    job = service.submit(
        "alice", "copy", src_siteid=1, src_filepath=str(large), dst_siteid=2, dst_filepath=f"{grid_directories.b}/copy"
    )
    until("bytes arrive", lambda: any(path.stat().st_size for path in grid_directories.b.glob(".pdm-*")))
    agents = agents_of(service)
    for pid in agents:
        os.kill(pid, signal.SIGSTOP)
    service.call("alice", "DELETE", f"/jobs/{job['id']}")
    until("the helpers are gone", lambda: not agents & agents_of(service), 2)
    assert service.wait_for("alice", job["id"])["status"] == "CANCELLED"
    until("the partial file is gone", lambda: not list(grid_directories.b.iterdir()))

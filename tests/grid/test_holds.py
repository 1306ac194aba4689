"""Jobs on hold while real servers work for them: what runs ends, the rest goes back, a resume copies it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService
from tests.support.fts_pair import name_fts
from tests.support.fts_server import FakeFts, fake_fts
from tests.support.instances import until

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def fts(grid: TestGrid) -> Iterator[FakeFts]:
    with fake_fts(grid) as running:
        yield running


@pytest.fixture(scope="module")
def service(grid: TestGrid, fts: FakeFts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    """A daemon whose site B names an FTS3, which a job uses unless it names another mover."""
    service = TestService(tmp_path_factory.mktemp("holds") / "instance", grid.description(), grid.directory)
    service.init(fts={"poll": "300ms", "files": "20"})
    name_fts(service, fts.url)
    with service.running():
        service.delegate("alice")
        yield service


class Copying:
    """A copy of a tree, and what is seen of it."""

    def __init__(self, service: TestService, directories: Any, files: int, **fields: Any) -> None:
        self.service = service
        self.source, self.copy = directories.a / "tree", directories.b / "copy"
        for number in range(files):
            path = self.source / f"d{number % 7}" / f"file{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"content {number} ".encode() * 50)
        directories.give()
        places = {"src_siteid": 1, "src_filepath": str(self.source), "dst_siteid": 2, "dst_filepath": str(self.copy)}
        self.number = int(service.submit("alice", "copy", **places, **fields)["id"])

    def seen(self) -> dict[str, Any]:
        found: dict[str, Any] = self.service.call("alice", "GET", f"/jobs/{self.number}")[1]
        return found

    def hold(self) -> dict[str, Any]:
        status, held = self.service.call("alice", "POST", f"/jobs/{self.number}/hold", {"message": "stop"})
        assert (status, held["num_submitted"] > 0) == (200, True), held
        return dict(held)

    def require_still(self) -> dict[str, Any]:
        """Once what ran has ended, nothing more begins, though another job of the same route runs to its end."""
        held = self.service.wait_for("alice", self.number, until=["HELD"])
        assert (held["num_running"], held["num_failed"], held["hold"]["message"]) == (0, 0, "stop")
        assert 0 < held["num_submitted"] < held["num_elements"]
        assert held["num_done"] + held["num_submitted"] == held["num_elements"]
        places = {"src_siteid": 1, "src_filepath": str(next(self.source.rglob("file*"))), "dst_siteid": 2}
        other = self.service.submit(
            "alice", "copy", **places, dst_filepath=f"{self.copy}-other", extra_opts={"mover": "native"}
        )
        assert self.service.wait_for("alice", other["id"])["status"] == "DONE"
        again = self.seen()
        assert {name: again[name] for name in held if name.startswith("num_")} == {
            name: held[name] for name in held if name.startswith("num_")
        }
        files = [path for path in self.copy.rglob("*") if path.is_file()]
        assert {str(path) for path in files} == self.done()
        return held

    def done(self) -> set[str]:
        """Destinations of the copies that are done."""
        found: set[str] = set()
        after, page = 0, [{"id": 0}]
        while page:
            query = f"status=DONE&type=COPY&limit=1000&after={after}"
            page = self.service.call("alice", "GET", f"/jobs/{self.number}/elements?{query}")[1]
            found |= {each["dst_filepath"] for each in page}
            after = page[-1]["id"] if page else after
        return found

    def resume(self) -> None:
        """The rest is copied; no element has failed or was copied twice."""
        assert self.service.call("alice", "POST", f"/jobs/{self.number}/resume")[0] == 200
        job = self.service.wait_for("alice", self.number, timeout_s=200)
        assert (job["status"], job["num_failed"], job["num_done"]) == ("DONE", 0, job["num_elements"])
        assert contents(self.copy) == contents(self.source)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_pipelined_copy(service: TestService, grid_directories: Any) -> None:
    job = Copying(service, grid_directories, 4000, extra_opts={"mover": "native"})
    until(service, lambda: job.seen()["num_done"] > 100)
    held = job.hold()
    assert held["num_running"] > 0
    still = job.require_still()
    assert still["num_done"] < 3500
    job.resume()


def test_a_copy_by_the_tools(service: TestService, grid_directories: Any) -> None:
    job = Copying(service, grid_directories, 600, extra_opts={"mover": "tools"})
    until(service, lambda: job.seen()["num_done"] > 20)
    assert job.hold()["num_running"] > 0
    job.require_still()
    job.resume()


def test_a_copy_that_an_fts_makes(service: TestService, fts: FakeFts, grid_directories: Any) -> None:
    fts.paused.set()
    before = len(fts.submitted)
    job = Copying(service, grid_directories, 600)
    until(service, lambda: len(fts.submitted) - before >= 20)
    job.hold()
    fts.paused.clear()
    held = job.require_still()
    handed_over = len(fts.submitted) - before
    assert held["num_done"] >= 20
    job.resume()
    # What it had been given before, it was not given again.
    assert len(set(fts.submitted[before:])) == len(fts.submitted) - before > handed_over

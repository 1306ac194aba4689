"""Copies that are handed over to an FTS3 that a site names, and the door, by a real daemon and real GridFTP servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService
from tests.support.attempt_logs import job_logs
from tests.support.fts_door import ask_door
from tests.support.fts_pair import name_fts
from tests.support.fts_server import FakeFts, fake_fts
from tests.support.instances import until


@pytest.fixture(scope="module")
def fts(grid: TestGrid) -> Iterator[FakeFts]:
    with fake_fts(grid) as running:
        yield running


@pytest.fixture(scope="module")
def service(grid: TestGrid, fts: FakeFts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    service = TestService(tmp_path_factory.mktemp("fts") / "instance", grid.description(), grid.directory)
    service.init(
        queue={"first_pause": "100ms", "longest_pause": "300ms", "stall": "6s"},
        fts={"poll": "300ms", "files": "20", "host": "localhost", "port": str(reserve_port())},
    )
    name_fts(service, fts.url)
    with service.running():
        service.delegate("alice")
        yield service


@pytest.fixture(autouse=True)
def sound(fts: FakeFts) -> None:
    """Each test begins with an FTS3 that works."""
    fts.faults.clear()
    fts.reasons.clear()
    fts.refused = "\0"
    fts.paused.clear()


Copy = Callable[..., dict[str, Any]]


@pytest.fixture
def tree(grid_directories: Any) -> Callable[[int], Path]:
    """Makes a directory with some files at A."""

    def make(count: int) -> Path:
        path: Path = grid_directories.a / "tree"
        path.mkdir()
        for number in range(count):
            (path / f"file{number}").write_bytes(f"content {number} ".encode() * 100)
        (path / "empty").mkdir()
        grid_directories.give()
        return path

    return make


@pytest.fixture
def submit(service: TestService, grid_directories: Any) -> Copy:
    """Copies a path at A to ``copy`` at B."""

    def copy(path: Path, **fields: object) -> dict[str, Any]:
        where = {"src_siteid": 1, "src_filepath": str(path), "dst_siteid": 2}
        return service.submit("alice", "copy", **where, dst_filepath=f"{grid_directories.b}/copy", **fields)

    return copy


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def log_of(service: TestService) -> str:
    """The log of the newest job."""
    logs = job_logs(service.directory / "var" / "logs")
    return max(logs, key=lambda path: path.stat().st_mtime).read_text()


def test_files_are_handed_over_in_bulk_and_proven_afterwards(
    service: TestService, fts: FakeFts, submit: Copy, tree: Any, grid_directories: Any
) -> None:
    path = tree(30)
    before = len(fts.submitted)
    job = service.wait_for("alice", submit(path)["id"])
    assert job["status"] == "DONE", log_of(service)
    assert contents(grid_directories.b / "copy") == contents(path)
    assert (grid_directories.b / "copy" / "empty").is_dir()
    assert len(fts.submitted) - before == 30
    log = log_of(service)
    assert "handed over to https://localhost" in log
    assert ": FINISHED" in log
    assert "ADLER32:" in log
    # Every user's proxy is delegated once.
    assert fts.proxies
    assert fts.proxies[0].count(b"BEGIN CERTIFICATE") >= 2


@pytest.mark.full
def test_only_the_copies_of_files_are_handed_over_and_an_option_keeps_them_here(
    service: TestService, fts: FakeFts, submit: Copy, tree: Any, grid_directories: Any
) -> None:
    path = tree(3)
    before = len(fts.submitted)
    job = service.wait_for("alice", submit(path, extra_opts={"mover": "native"})["id"])
    assert job["status"] == "DONE"
    assert len(fts.submitted) == before
    # The other way round: the destination names none, and the source does.
    back = service.submit(
        "alice",
        "copy",
        src_siteid=2,
        src_filepath=f"{grid_directories.b}/copy",
        dst_siteid=1,
        dst_filepath=f"{grid_directories.a}/back",
    )
    assert service.wait_for("alice", back["id"])["status"] == "DONE"
    assert len(fts.submitted) == before + 3
    assert contents(grid_directories.a / "back") == contents(path)


def test_errors_of_an_fts_are_failures_of_their_side_and_one_refused_file_concerns_no_other(
    service: TestService, fts: FakeFts, submit: Copy, tree: Any, grid_directories: Any
) -> None:
    fts.reasons = {
        "file1": "SOURCE [2] No such file or directory",
        "file2": "DESTINATION [13] Permission denied",
        "file3": "TRANSFER [5] checksum do not match",
        "file4": "AGENT [1] the process was killed",
    }
    fts.refused = "file7"
    path = tree(10)
    job = service.wait_for("alice", submit(path, max_tries=2)["id"])
    assert (job["status"], job["num_done"], job["num_failed"]) == ("FAILED", 7, 5)
    assert sorted(contents(grid_directories.b / "copy")) == ["file0", "file5", "file6", "file8", "file9"]
    _, found = service.call("alice", "GET", f"/jobs/{job['id']}/elements?status=FAILED")
    said = {each["src_filepath"][-5:]: each["error"] for each in found}
    assert {name: (error["scope"], error["code"]) for name, error in said.items()} == {
        "file1": ("source", "NOT_FOUND"),
        "file2": ("destination", "PERMISSION_DENIED"),
        "file3": ("transfer", "CHECKSUM_MISMATCH"),
        "file4": ("transfer", "PERMISSION_DENIED"),
        "file7": ("service", "UNSUPPORTED"),
    }
    assert "FAILED: SOURCE [2] No such file or directory" in log_of(service)
    assert not list(grid_directories.b.rglob("*.part"))


def test_an_fts_that_lies_leaves_nothing_at_the_final_name(
    service: TestService, fts: FakeFts, submit: Copy, tree: Any, grid_directories: Any
) -> None:
    fts.faults = {"lie"}
    job = service.wait_for("alice", submit(tree(2), max_tries=1)["id"])
    assert (job["status"], job["num_failed"]) == ("FAILED", 2)
    assert "says FINISHED, but nothing has arrived" in log_of(service)
    assert not contents(grid_directories.b / "copy")


@pytest.mark.parametrize(
    "fault", ["error", pytest.param("garbage", marks=pytest.mark.full), pytest.param("hang", marks=pytest.mark.full)]
)
def test_elements_wait_for_an_fts_that_does_not_work_and_the_job_says_so(
    service: TestService, fts: FakeFts, submit: Copy, tree: Any, grid_directories: Any, fault: str
) -> None:
    fts.faults = {fault}
    path = tree(5)
    number = submit(path, max_tries=1)["id"]

    def said() -> bool:
        _, job = service.call("alice", "GET", f"/jobs/{number}")
        return any(f"the FTS3 at {fts.url} does not work since" in each for each in job.get("waiting", ()))

    until(service, said, 60)
    fts.faults = set()
    job = service.wait_for("alice", number)
    assert (job["status"], job["num_failed"]) == ("DONE", 0), log_of(service)
    assert "not counted: the FTS3 does not answer" in log_of(service)
    assert contents(grid_directories.b / "copy") == contents(path)


@pytest.mark.full
def test_a_job_whose_submission_was_not_answered_is_continued(
    service: TestService, fts: FakeFts, submit: Copy, tree: Any, grid_directories: Any
) -> None:
    before = len(fts.submitted)
    fts.faults = {"drop", "odd"}
    path = tree(5)
    job = service.wait_for("alice", submit(path)["id"])
    assert job["status"] == "DONE", log_of(service)
    assert len(fts.submitted) - before == 5
    assert "exists at the FTS3 already" in log_of(service)
    assert contents(grid_directories.b / "copy") == contents(path)


@pytest.mark.full
def test_an_fts_that_forgets_its_jobs_or_has_ids_of_its_own_fails_the_elements(
    service: TestService, fts: FakeFts, submit: Copy, tree: Any, grid_directories: Any
) -> None:
    fts.faults = {"forget"}
    path = tree(2)
    job = service.wait_for("alice", submit(path, max_tries=1)["id"])
    assert (job["status"], job["num_failed"]) == ("FAILED", 2)
    assert "does not know this file of job" in log_of(service)
    fts.faults = {"ids"}
    job = service.wait_for("alice", submit(path, max_tries=1)["id"])
    assert (job["status"], job["num_failed"]) == ("FAILED", 2)
    assert "has given a job the id" in log_of(service)
    assert not [name for name in contents(grid_directories.b / "copy") if not name.endswith(".part")]


@pytest.mark.full
def test_states_that_go_round_in_circles_are_no_progress(
    fts: FakeFts, grid: TestGrid, tree: Any, grid_directories: Any, tmp_path: Path
) -> None:
    service = TestService(tmp_path / "instance", grid.description(), grid.directory)
    service.init(fts={"poll": "100ms", "patience": "2s"})
    name_fts(service, fts.url)
    fts.paused.set()
    fts.faults = {"restless"}
    with service.running():
        service.delegate("alice")
        where = {"src_siteid": 1, "src_filepath": str(tree(2)), "dst_siteid": 2}
        where["dst_filepath"] = f"{grid_directories.b}/copy"
        job = service.wait_for("alice", service.submit("alice", "copy", **where, max_tries=1)["id"], timeout_s=120.0)
    assert (job["status"], job["num_failed"]) == ("FAILED", 2)
    log = log_of(service)
    assert "has not changed for 2 s" in log
    assert log.count(": READY") < 60


def test_a_cancelled_job_is_cancelled_at_the_fts(
    service: TestService, fts: FakeFts, submit: Copy, tree: Any, grid_directories: Any
) -> None:
    fts.paused.set()
    before = len(fts.submitted)
    number = submit(tree(5))["id"]
    until(service, lambda: len(fts.submitted) - before == 5)
    service.call("alice", "DELETE", f"/jobs/{number}")
    assert service.wait_for("alice", number)["status"] == "CANCELLED"
    (files,) = (files for files in fts.jobs.values() if str(grid_directories.a) in files[0]["source_surl"])
    until(service, lambda: {file["file_state"] for file in files} == {"CANCELED"})


@pytest.mark.full
def test_a_killed_daemon_continues_with_the_jobs_that_it_has_handed_over(
    service: TestService, fts: FakeFts, submit: Copy, tree: Any, grid_directories: Any
) -> None:
    fts.paused.set()
    before = len(fts.submitted)
    path = tree(20)
    number = submit(path)["id"]
    until(service, lambda: len(fts.submitted) - before == 20)
    service.kill()
    fts.paused.clear()
    service.start()
    job = service.wait_for("alice", number)
    assert job["status"] == "DONE", log_of(service)
    assert len(fts.submitted) - before == 20
    assert "continues with job" in log_of(service)
    assert contents(grid_directories.b / "copy") == contents(path)
    assert not list(grid_directories.b.rglob("*.part"))


def test_one_of_two_files_that_run_is_cancelled_by_the_door_and_at_the_fts(
    service: TestService, fts: FakeFts, grid: TestGrid, tree: Any, grid_directories: Any
) -> None:
    path = tree(2)
    ends = [
        (grid.sites["A"].url(path / name), grid.sites["B"].url(grid_directories.b / name))
        for name in ("file0", "file1")
    ]
    fts.paused.set()
    before = len(fts.submitted)
    files = [{"sources": [source], "destinations": [destination]} for source, destination in ends]
    status, answer = ask_door(service, "alice", "POST", "/jobs", {"files": files})
    assert status == 200, answer
    job = answer["job_id"]
    until(service, lambda: len(fts.submitted) - before == 2)

    def states() -> list[str]:
        return [file["file_state"] for file in ask_door(service, "alice", "GET", f"/jobs/{job}/files")[1]]

    assert states() == ["ACTIVE", "ACTIVE"]
    _, brief = ask_door(service, "alice", "GET", f"/jobs/{job}?files=file_id,dest_surl")
    assert [set(file) for file in brief["files"]] == [{"file_id", "dest_surl"}] * 2
    assert brief["files"][0]["dest_surl"] == ends[0][1]
    number = brief["files"][0]["file_id"]
    assert ask_door(service, "alice", "DELETE", f"/jobs/{job}/files/{number}") == (200, "CANCELED")
    assert states() == ["CANCELED", "ACTIVE"]
    at_fts = {file["source_surl"]: file["file_state"] for files in fts.jobs.values() for file in files}
    assert at_fts[ends[0][0]] == "CANCELED"
    fts.paused.clear()
    until(service, lambda: states() == ["CANCELED", "FINISHED"])
    assert sorted(contents(grid_directories.b)) == ["file1"]


def test_the_door_removes_empty_directories_only(service: TestService, grid: TestGrid, grid_directories: Any) -> None:
    directory = grid_directories.b / "directory"
    directory.mkdir()
    (directory / "file").write_bytes(b"x")
    grid_directories.give()

    def rmdir(path: Path) -> tuple[int, Any]:
        return ask_door(service, "alice", "POST", "/dm/rmdir", {"surl": grid.sites["B"].url(path)})

    status, error = rmdir(directory)
    assert (status, "NOT_EMPTY" in error["message"]) == (400, True), error
    status, error = rmdir(directory / "file")
    assert (status, "NOT_A_DIRECTORY" in error["message"]) == (400, True), error
    assert (directory / "file").exists()
    (directory / "file").unlink()
    assert rmdir(directory) == (200, 0)
    assert not directory.exists()

"""Copies that are handed over to an FTS3 which a site names, by a real daemon between real GridFTP servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService
from tests.support.attempt_logs import job_logs
from tests.support.fts_server import FakeFts, fake_fts
from tests.support.instances import until


def name_fts(service: TestService, url: str) -> None:
    """Let site B name an FTS3."""
    (file,) = (service.directory / "sites.d").glob("*.conf")
    text = file.read_text()
    assert "[B]" in text
    file.write_text(text.replace("[B]", f"[B]\nfts = {url}"))


@pytest.fixture(scope="module")
def fts(grid: TestGrid) -> Iterator[FakeFts]:
    with fake_fts(grid) as running:
        yield running


@pytest.fixture(scope="module")
def service(grid: TestGrid, fts: FakeFts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    service = TestService(tmp_path_factory.mktemp("fts") / "instance", grid.description(), grid.directory)
    service.init(
        queue={"first_pause": "100ms", "longest_pause": "300ms", "stall": "3s"}, fts={"poll": "300ms", "files": "100"}
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
    path = tree(120)
    before = len(fts.submitted)
    job = service.wait_for("alice", submit(path)["id"])
    assert job["status"] == "DONE", log_of(service)
    assert contents(grid_directories.b / "copy") == contents(path)
    assert (grid_directories.b / "copy" / "empty").is_dir()
    assert len(fts.submitted) - before == 120
    log = log_of(service)
    assert "handed over to https://localhost" in log
    assert ": FINISHED" in log
    assert "ADLER32:" in log
    # Every user's proxy is delegated once.
    assert fts.proxies
    assert fts.proxies[0].count(b"BEGIN CERTIFICATE") >= 2

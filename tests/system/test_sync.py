"""Copies that are compared with their destination, mirrored, planned only, and moved: between FILE sites."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService
from pdm.workqueue.cli.exit_codes import ExitCode
from tests.helpers.driver import put, tree

_numbers = itertools.count(1)
#: Seconds since 1970 of the files in these trees.
OLD, NEW = 1_000_000_000, 1_100_000_000


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    service = TestService(tmp_path_factory.mktemp("sync") / "instance")
    service.init(queue={"first_pause": "100ms", "longest_pause": "300ms"})
    with service.running():
        yield service
    assert "Traceback" not in service.log_path.read_text()


class Trees:
    """A source and a destination of a test.

    Attributes:
        name: of both, below their sites.
    """

    def __init__(self, service: TestService) -> None:
        self.service = service
        self.name = f"tree{next(_numbers)}"
        self.source = service.directory / "storage" / "a" / self.name
        self.destination = service.directory / "storage" / "b" / self.name

    def submit(self, **options: Any) -> dict[str, Any]:
        return self.service.submit(
            "admin",
            "copy",
            src_siteid=1,
            src_filepath=self.name,
            dst_siteid=2,
            dst_filepath=self.name,
            protocol="FILE",
            extra_opts=options,
        )

    def copy(self, **options: Any) -> dict[str, Any]:
        return self.service.wait_for("admin", self.submit(**options)["id"])

    def elements(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.service.call("admin", "GET", f"/jobs/{job['id']}/elements")[1][1:]
        return found

    def planned(self, job: dict[str, Any]) -> dict[str, str]:
        """What was planned, by path at the site."""
        below = f"{self.name}/"
        return {
            one.get("dst_filepath", one["src_filepath"]).partition(below)[2]: one["planned"]
            for one in self.elements(job)
        }


@pytest.fixture
def trees(service: TestService) -> Trees:
    return Trees(service)


def file(path: Path, content: bytes, mtime: int = OLD) -> None:
    put(path, content)
    os.utime(path, (mtime, mtime))


def compared(trees: Trees) -> None:
    """Files that are new, the same, and different in content, size or time; and an extra one."""
    for directory in (trees.source, trees.destination):
        file(directory / "d" / "same", b"same")
        (directory / "empty").mkdir()
    file(trees.source / "d" / "new", b"new")
    file(trees.source / "content", b"one")
    file(trees.destination / "content", b"two")
    file(trees.source / "size", b"longer")
    file(trees.destination / "size", b"short")
    file(trees.source / "time", b"time", NEW)
    file(trees.destination / "time", b"TIME", OLD)
    file(trees.destination / "extra" / "x", b"x")


@pytest.mark.parametrize(
    ("level", "same", "moved"),
    [
        ("exists", {"content", "size", "time", "d/same"}, {"d/new"}),
        ("size", {"content", "time", "d/same"}, {"d/new", "size"}),
        ("mtime", {"content", "d/same"}, {"d/new", "size", "time"}),
        ("checksum", set(), {"d/new", "content", "size", "time"}),
    ],
)
def test_levels(trees: Trees, level: str, same: set[str], moved: set[str]) -> None:
    compared(trees)
    before = tree(trees.destination)
    job = trees.copy(sync=level)
    assert job["status"] == "DONE", trees.elements(job)
    planned = trees.planned(job)
    assert {path for path, action in planned.items() if action == "SAME"} - {"empty"} == same
    assert planned["d/new"] == "COPY"
    source = tree(trees.source)
    expected = {path: source[path] if path in moved else content for path, content in before.items()}
    assert tree(trees.destination) == {**expected, "d/new": b"new"}
    # With checksums, what is the same turns out when it is compared.
    there = same | ({"d/same"} if level == "checksum" else set())
    assert job["already_there"] == len(there)
    assert job["bytes_done"] == job["bytes_total"] == sum(map(len, source.values()))
    by_path = {one["src_filepath"].partition(f"{trees.name}/")[2]: one for one in trees.elements(job)}
    assert {path for path, one in by_path.items() if not one["attempts"]} == same | {"empty"}
    again = trees.copy(sync=level)
    assert (again["status"], again["already_there"]) == ("DONE", len(source))


def test_a_dry_run_does_nothing(trees: Trees) -> None:
    compared(trees)
    before = tree(trees.destination)
    job = trees.copy(sync="size", dry_run=True, delete_extra=True)
    assert job["status"] == "DONE", trees.elements(job)
    assert tree(trees.destination) == before
    assert trees.planned(job) == {
        "content": "SAME",
        "d/new": "COPY",
        "d/same": "SAME",
        "empty": "SAME",
        "size": "OVERWRITE",
        "time": "SAME",
        "extra": "DELETE",
        "extra/x": "DELETE",
    }
    assert {one["attempts"] for one in trees.elements(job)} == {0}
    assert (job["bytes_total"], job["bytes_done"], job["already_there"]) == (20, 11, 3)
    assert job["plan"] == {
        "actions": {
            "COPY": {"files": 1, "directories": 0, "bytes": 3},
            "OVERWRITE": {"files": 1, "directories": 0, "bytes": 6},
            "SAME": {"files": 3, "directories": 1, "bytes": 11},
            "DELETE": {"files": 1, "directories": 1, "bytes": 1},
        },
        "filtered": 0,
        "skipped": {},
    }


@pytest.mark.full
def test_a_dry_run_is_estimated(trees: Trees) -> None:
    file(trees.source / "a", b"x" * 1000)
    file(trees.source / "b", b"x" * 3000)
    assert trees.copy()["already_there"] == 0
    file(trees.source / "a", b"y" * 2000)
    (trees.source / "d").mkdir()
    job = trees.copy(sync="size", dry_run=True)
    estimate = job["estimate"]
    assert (estimate["files"], estimate["bytes"], estimate["credential_until"]) == (2, 2000, None)
    assert estimate["based_on_jobs"] >= 1
    by_bytes, by_files = 2000 / estimate["bytes_per_second"], 2 / estimate["files_per_second"]
    assert estimate["seconds"] == pytest.approx(max(by_bytes, by_files))
    found = os.statvfs(trees.destination)
    assert abs(estimate["free_bytes"] - found.f_bavail * found.f_frsize) < 4 << 30
    log = trees.service.call("admin", "GET", f"/jobs/{job['id']}/elements/0/output")[1]["log"]
    assert f"the destination has {estimate['free_bytes']} bytes free" in log
    assert "warnings" not in job


def test_extra_files_are_removed_last(trees: Trees) -> None:
    compared(trees)
    refused = trees.copy(sync="checksum", delete_extra=True, max_delete=1)
    assert refused["status"] == "FAILED"
    listing = trees.service.call("admin", "GET", f"/jobs/{refused['id']}/elements/0")[1]
    assert listing["error"]["code"] == "TOO_MANY_DELETIONS"
    assert (trees.destination / "extra" / "x").exists()
    assert (trees.destination / "content").read_bytes() == b"one", "what is planned is copied all the same"
    job = trees.copy(sync="checksum", delete_extra=True, max_delete=2)
    assert job["status"] == "DONE", trees.elements(job)
    assert tree(trees.destination) == tree(trees.source)
    assert not (trees.destination / "extra").exists()
    assert job["plan"]["actions"]["DELETE"] == {"files": 1, "directories": 1, "bytes": 1}
    (listed,) = trees.service.call("admin", "GET", f"/jobs/{job['id']}/elements/0")[1]["listing"]
    assert sorted(listed[trees.name]) == ["content", "d", "empty", "size", "time"]


def test_what_filters_leave_out_is_neither_copied_nor_removed(trees: Trees) -> None:
    compared(trees)
    file(trees.source / "d" / "a.tmp", b"left out")
    file(trees.destination / "b.tmp", b"kept")
    job = trees.copy(sync="size", delete_extra=True, filters=[{"exclude": "*.tmp"}])
    assert job["status"] == "DONE", trees.elements(job)
    assert sorted(tree(trees.destination)) == ["b.tmp", "content", "d/new", "d/same", "size", "time"]
    assert (job["skipped"], job["plan"]["filtered"]) == (0, 1)
    notes = trees.service.call("admin", "GET", f"/jobs/{job['id']}/skipped")[1]
    assert [(note["code"], note["count"]) for note in notes] == [("FILTERED", 1)]


@pytest.mark.full
def test_nothing_is_removed_after_a_failed_copy(service: TestService) -> None:
    options = {
        "sync": "checksum",
        "delete_extra": True,
        "dummy": {"files": 3, "there": 5, "size": 7, "fail": "PERMISSION_DENIED"},
    }
    job = service.submit(
        "admin",
        "copy",
        src_siteid=1,
        src_filepath="/a",
        dst_siteid=2,
        dst_filepath="/b",
        protocol="DUMMY",
        extra_opts=options,
    )
    assert service.wait_for("admin", job["id"])["status"] == "FAILED"
    elements = service.call("admin", "GET", f"/jobs/{job['id']}/elements")[1][1:]
    found = Counter((element["planned"], element["status"]) for element in elements)
    assert found == {("OVERWRITE", "FAILED"): 3, ("DELETE", "CANCELLED"): 2}


def test_a_move_empties_the_source(trees: Trees) -> None:
    for number in range(20):
        file(trees.source / f"d{number % 3}" / f"f{number}", bytes([number]) * number)
    (trees.source / "empty").mkdir(parents=True)
    expected = tree(trees.source)
    job = trees.copy(move=True)
    assert job["status"] == "DONE", trees.elements(job)
    assert tree(trees.destination) == expected
    assert (trees.destination / "empty").is_dir()
    assert not trees.source.exists()
    assert Counter(element["planned"] for element in trees.elements(job)) == {"COPY": 21, "MOVED": 25}
    assert job["plan"]["actions"]["MOVED"] == {"files": 20, "directories": 5, "bytes": sum(range(20))}


def test_a_move_into_the_source_by_a_link_removes_nothing(service: TestService, trees: Trees) -> None:
    file(trees.source / "d" / "only", b"copy")
    alias = f"{trees.name}-alias"
    (trees.source.parent / alias).symlink_to(trees.name)
    place = {"src_siteid": 1, "src_filepath": trees.name, "dst_siteid": 1, "dst_filepath": alias, "protocol": "FILE"}
    submitted = service.submit("admin", "copy", **place, extra_opts={"move": True, "sync": "checksum"})
    job = service.wait_for("admin", submitted["id"])
    listing = service.call("admin", "GET", f"/jobs/{job['id']}/elements/0")[1]
    assert (job["status"], listing.get("error", {}).get("code")) == ("FAILED", "SAME_PLACE"), listing
    assert tree(trees.source) == {"d/only": b"copy"}


@pytest.fixture(scope="module")
def door(service: TestService) -> int:
    """Another site, whose directory is that of site 1 by another name."""
    root = service.directory / "storage" / "door"
    root.symlink_to("a")
    added = service.pdm("admin", "site", "add", "DOOR", "--file", f"file://{root}", "--public")
    assert added.returncode == 0, added.stderr
    return next(int(one["id"]) for one in service.call("admin", "GET", "/sites")[1] if one["name"] == "DOOR")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sync": "checksum"},
        {"overwrite": "always", "verify": "size"},
        pytest.param({"overwrite": "different", "verify": "size"}, marks=pytest.mark.full),
        pytest.param({"sync": "mtime", "verify": "size"}, marks=pytest.mark.full),
    ],
)
def test_a_move_through_two_doors_to_one_directory_keeps_the_only_copy(
    service: TestService, trees: Trees, door: int, options: dict[str, Any]
) -> None:
    file(trees.source / "d" / "only", b"copy")
    place = {"src_filepath": trees.name, "dst_filepath": trees.name, "protocol": "FILE"}
    move = {"move": True, **options}
    submitted = service.submit("admin", "copy", src_siteid=1, dst_siteid=door, **place, extra_opts=move)
    job = service.wait_for("admin", submitted["id"])
    assert job["status"] == "DONE", trees.elements(job)
    assert tree(trees.source) == {"d/only": b"copy"}
    waited = service.pdm("admin", "wait", str(job["id"]))
    assert waited.returncode == ExitCode.PARTIAL
    assert "kept" in waited.stderr
    receipt = service.pdm("admin", "receipt", str(job["id"])).stdout
    (kept,) = [line for line in map(json.loads, receipt.splitlines()) if "source_kept" in line]
    assert kept["source"].endswith("/d/only")
    assert kept["source_kept"].startswith("the source is kept: the destination had this file before")


def test_a_move_leaves_what_is_not_proven(trees: Trees) -> None:
    compared(trees)
    (trees.source / "pipe").parent.mkdir(exist_ok=True)
    os.mkfifo(trees.source / "pipe")
    job = trees.copy(move=True, sync="size")
    assert job["status"] == "DONE", trees.elements(job)
    # Not compared byte by byte, so they stay.
    assert sorted(tree(trees.source)) == ["content", "d/same", "time"]
    assert (trees.source / "pipe").exists() and not (trees.source / "empty").exists()
    assert job["skipped"] == 4
    assert job["skipped_by_code"] == {"KEPT": 3, "SPECIAL_FILE": 1}


@pytest.mark.parametrize(
    ("kills", "files"), [(3, 900), pytest.param(20, 8000, marks=[pytest.mark.full, pytest.mark.timeout(600)])]
)
def test_kills_lose_nothing_and_remove_nothing_else(service: TestService, kills: int, files: int) -> None:
    """A mirror and a move, while the daemon is killed again and again."""
    mirror, move = Trees(service), Trees(service)
    for number in range(files):
        name, content = f"d{number % 7}/f{number}", b"%d" % number
        file(mirror.source / name, content)
        file(move.source / name, content)
        if number % 3 == 0:
            file(mirror.destination / name, content)
        elif number % 3 == 1:
            file(mirror.destination / name, b"old" * number)
        if number % 10 == 0:
            file(mirror.destination / f"extra{number % 5}" / f"x{number}", b"extra")
    expected = tree(mirror.source)
    jobs = [mirror.submit(sync="size", delete_extra=True, max_delete=files), move.submit(move=True)]
    chance = random.Random(kills)
    late: Path | None = None
    for _ in range(kills):
        time.sleep(chance.uniform(0.05, 0.5))
        if late is None and service.call("admin", "GET", f"/jobs/{jobs[0]['id']}/elements/0")[1]["status"] == "DONE":
            # After the plan was made: it must stay.
            late = put(mirror.destination / "d0" / "late", b"late")
        service.kill()
        for name, content in expected.items():
            at_source, at_destination = move.source / name, move.destination / name
            assert at_source.exists() or at_destination.read_bytes() == content
        service.start()
    ended = [service.wait_for("admin", job["id"], timeout_s=240) for job in jobs]
    assert [job["status"] for job in ended] == ["DONE", "DONE"], ended
    assert tree(move.destination) == expected
    assert not move.source.exists()
    assert tree(mirror.destination) == expected | ({} if late is None else {"d0/late": b"late"})
    assert tree(mirror.source) == expected
    plan = ended[0]["plan"]["actions"]
    assert plan["DELETE"]["files"] == files // 10
    assert sum(plan[action]["files"] for action in ("COPY", "OVERWRITE", "SAME")) == files
    assert ended[1]["plan"]["actions"]["MOVED"]["files"] == files

"""All five job types and the faults of a real grid, through the daemon: code, scope, hint and log of each."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService, set_keys
from tests.support.everyday_session import SessionEnd, everyday_session, failed_steps

ODD_NAMES = (
    "two words",
    "100%",
    "per%41cent",
    "hash#",
    "quo\"te'",
    "new\nline",
    "tab\t",
    "-dash",
    "naïve",
    "[x]?*",
    "n" * 255,
)


@pytest.fixture(scope="module")
def service(grid: TestGrid, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    """One daemon on the grid for all tests here, with alice's proxy delegated and short pauses between tries."""
    service = TestService(tmp_path_factory.mktemp("jobs") / "instance", grid.description(), grid.directory)
    service.init(
        queue={"first_pause": "100ms", "longest_pause": "300ms", "stall": "5s", "total": "20s"},
        # What cannot be reached fails here, rather than to wait for it.
        sites={"patience": "0"},
    )
    with service.running():
        service.delegate("alice")
        yield service
    assert "Traceback" not in service.log_path.read_text()


def sums(directory: Path) -> dict[str, str]:
    return {
        os.fsdecode(bytes(path.relative_to(directory))): "directory"
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
    }


def fail(service: TestService, job: dict[str, Any], element: int = 0) -> dict[str, Any]:
    """The error of the element that made a job fail, after its log has been compared with it."""
    ended = service.wait_for("alice", job["id"])
    assert ended["status"] == "FAILED", ended
    _, found = service.call("alice", "GET", f"/jobs/{job['id']}/elements/{element}")
    error: dict[str, Any] = found["error"]
    _, output = service.call("alice", "GET", f"/jobs/{job['id']}/elements/{element}/output")
    lines = output["log"].splitlines()
    assert f"code={error['code']}" in output["log"]
    assert "host=" in lines[0] and f"element={element}" in lines[0]
    assert "outcome=FAILED" in lines[-1] and "rc=1" in lines[-1]
    assert error["hint"].endswith(".")
    return error


def test_a_tree_is_copied_with_every_name(service: TestService, grid_directories: Any) -> None:
    tree = grid_directories.a / "tree"
    (tree / "empty" / "too").mkdir(parents=True)
    for name in ODD_NAMES:
        (tree / name).write_text(name)
    (tree / "sub").mkdir()
    (tree / "sub" / "nothing").write_bytes(b"")
    (tree / os.fsdecode(b"latin\xe9")).write_text("raw")
    os.symlink(tree / "naïve", tree / "link inside")
    os.symlink("/etc/hostname", tree / "link outside")
    os.symlink(tree, tree / "loop")
    grid_directories.give()

    job = service.submit(
        "alice",
        "copy",
        src_siteid=1,
        src_filepath=str(tree),
        dst_siteid=2,
        dst_filepath=str(grid_directories.b / "copy"),
    )
    assert job["status"] == "SUBMITTED"
    ended = service.wait_for("alice", job["id"])

    assert ended["status"] == "DONE", service.call("alice", "GET", f"/jobs/{job['id']}/elements")
    expected = {
        name: value
        for name, value in sums(tree).items()
        if name not in ("link outside", "loop") and not name.startswith("loop/")
    }
    assert sums(grid_directories.b / "copy") == expected
    assert ended["num_elements"] == ended["num_done"] == len(ODD_NAMES) + 5
    assert ended["skipped"] == 2
    assert not list(grid_directories.b.rglob(".pdm-*"))


@pytest.mark.full
def test_twelve_everyday_commands(service: TestService, grid_directories: Any) -> None:
    remote = SessionEnd(1, "gridftp", str(grid_directories.a))
    local = SessionEnd(2, "gridftp", str(grid_directories.b))
    steps = everyday_session(service, "alice", remote, local, grid_directories.b, give=grid_directories.give)
    assert failed_steps(steps) == []
    assert len(steps) == 12


@pytest.mark.parametrize("mover", ["native", pytest.param("tools", marks=pytest.mark.full)])
def test_a_mirror_and_a_move(service: TestService, grid_directories: Any, mover: str) -> None:
    source, destination = grid_directories.a / "tree", grid_directories.b / "tree"
    for directory in (source, destination):
        (directory / "sub").mkdir(parents=True)
        (directory / "sub" / "same").write_bytes(b"same")
        os.utime(directory / "sub" / "same", (1_000_000_000, 1_000_000_000))
    (source / "two words").write_bytes(b"longer")
    (destination / "two words").write_bytes(b"short")
    (destination / "extra").mkdir()
    (destination / "extra" / "x").write_bytes(b"x")
    grid_directories.give()
    grid_directories.give(grid_directories.b)
    expected = sums(source)

    def copied(path: Path, to: Path, **options: Any) -> dict[str, Any]:
        place = {"src_siteid": 1, "src_filepath": str(path), "dst_siteid": 2, "dst_filepath": str(to)}
        job = service.submit("alice", "copy", **place, extra_opts={**options, "mover": mover})
        ended = service.wait_for("alice", job["id"], timeout_s=120.0)
        assert ended["status"] == "DONE", service.call("alice", "GET", f"/jobs/{job['id']}/elements")
        return ended

    ended = copied(source, destination, sync="mtime", delete_extra=True)
    assert sums(destination) == expected
    assert ended["plan"]["actions"] == {
        "OVERWRITE": {"files": 1, "directories": 0, "bytes": 6},
        "SAME": {"files": 1, "directories": 0, "bytes": 4},
        "DELETE": {"files": 1, "directories": 1, "bytes": 1},
    }
    moved = copied(source, grid_directories.b / "moved", move=True)
    assert sums(grid_directories.b / "moved") == expected
    assert not source.exists()
    assert moved["plan"]["actions"]["MOVED"]["files"] == 2


def test_with_preserved_times_a_second_sync_finds_all_files_there(service: TestService, grid_directories: Any) -> None:
    for number in range(4):
        path = grid_directories.a / "tree" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * number)
        os.utime(path, (1_000_000_000, 1_000_000_000 + number))
    grid_directories.give()
    options = {"sync": "mtime", "preserve": ["mtime"], "checksum": "MD5"}
    for there in (0, 4):
        source, to = str(grid_directories.a / "tree"), str(grid_directories.b / "tree")
        place = {"src_siteid": 1, "src_filepath": source, "dst_siteid": 2, "dst_filepath": to}
        job = service.submit("alice", "copy", **place, extra_opts=options)
        ended = service.wait_for("alice", job["id"])
        assert (ended["status"], ended["already_there"]) == ("DONE", there)


def test_a_link_that_is_the_source_itself_is_followed_and_what_has_no_content_fails(
    service: TestService, grid_directories: Any
) -> None:
    real = grid_directories.a / "real"
    real.mkdir()
    (real / "file").write_bytes(b"content")
    os.symlink(real / "file", real / "link inside")
    os.symlink(real / "file", grid_directories.a / "to file")
    os.symlink(real, grid_directories.a / "to directory")
    os.symlink("/nowhere/at/all", grid_directories.a / "dangling")
    os.symlink("loop", grid_directories.a / "loop")
    os.mkfifo(grid_directories.a / "fifo")
    os.symlink(grid_directories.a / "fifo", grid_directories.a / "to fifo")
    grid_directories.give()

    def copied(name: str) -> dict[str, Any]:
        place = {"src_siteid": 1, "src_filepath": str(grid_directories.a / name), "dst_siteid": 2}
        return service.submit("alice", "copy", **place, dst_filepath=str(grid_directories.b / name))

    jobs = {name: copied(name) for name in ("to file", "to directory", "dangling", "loop", "fifo", "to fifo")}
    for name in ("to file", "to directory"):
        ended = service.wait_for("alice", jobs[name]["id"])
        assert (ended["status"], ended["skipped"]) == ("DONE", 0), name
    assert (grid_directories.b / "to file").read_bytes() == b"content"
    assert sorted(path.name for path in (grid_directories.b / "to directory").iterdir()) == ["file", "link inside"]
    expected = {"dangling": "NOT_FOUND", "loop": "NOT_FOUND", "fifo": "SPECIAL_FILE", "to fifo": "SPECIAL_FILE"}
    for name, code in expected.items():
        error = fail(service, jobs[name])
        assert (error["code"], error["scope"]) == (code, "source")
    assert sorted(path.name for path in grid_directories.b.iterdir()) == ["to directory", "to file"]


def test_all_that_is_left_out_is_counted_and_named(service: TestService, grid_directories: Any) -> None:
    tree = grid_directories.a / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_bytes(b"content")
    os.symlink("/nowhere/at/all", tree / "sub" / "dangling")
    os.symlink("loop", tree / "sub" / "loop")
    os.symlink("/etc/hostname", tree / "outside")
    os.symlink(tree, tree / "directory")
    os.mkfifo(tree / "fifo")
    (tree / "shut").mkdir()
    grid_directories.give()
    (tree / "shut").chmod(0)
    job = service.submit(
        "alice",
        "copy",
        src_siteid=1,
        src_filepath=str(tree),
        dst_siteid=2,
        dst_filepath=str(grid_directories.b / "copy"),
    )
    ended = service.wait_for("alice", job["id"])
    (tree / "shut").chmod(0o755)
    assert sums(grid_directories.b / "copy").keys() == {"sub", "sub/file"}
    _, skipped = service.call("alice", "GET", f"/jobs/{job['id']}/skipped")
    # The server counts links that lead nowhere, and does not name them.
    expected = {
        "fifo": ("SPECIAL_FILE", 1),
        "directory": ("LINK_TO_DIRECTORY", 1),
        "outside": ("LINK_OUTSIDE", 1),
        "sub": ("UNNAMED", 2),
        "shut": ("PERMISSION_DENIED", 1),
    }
    assert {each["path"].removeprefix(f"{tree}/"): (each["code"], each["count"]) for each in skipped} == expected
    assert (ended["status"], ended["skipped"]) == ("FAILED", 6)
    assert ended["skipped_by_code"] == dict(sorted(expected.values()))


def test_a_file_goes_to_a_name_or_into_a_directory(service: TestService, grid_directories: Any) -> None:
    file = grid_directories.a / "one file"
    file.write_bytes(os.urandom(3_000_000))
    grid_directories.give()
    for destination, place in (
        (f"{grid_directories.b}/other", "other"),
        (f"{grid_directories.b}/new directory/", "new directory/one file"),
    ):
        job = service.submit(
            "alice", "copy", src_siteid=1, src_filepath=str(file), dst_siteid=2, dst_filepath=destination
        )
        ended = service.wait_for("alice", job["id"])
        assert ended["status"] == "DONE"
        assert ended["bytes_done"] == ended["bytes_total"] == 3_000_000
        assert (grid_directories.b / place).read_bytes() == file.read_bytes()


def test_a_listing_has_names_types_sizes_and_times(service: TestService, grid_directories: Any) -> None:
    (grid_directories.a / "sub").mkdir()
    (grid_directories.a / "sub" / "new\nline").write_bytes(b"12345")
    os.utime(grid_directories.a / "sub" / "new\nline", (1_000_000_000, 1_000_000_000))
    grid_directories.give()
    job = service.submit("alice", "list", src_siteid=1, src_filepath=str(grid_directories.a))
    assert service.wait_for("alice", job["id"])["status"] == "DONE"
    _, output = service.call("alice", "GET", f"/jobs/{job['id']}/output")
    (listed,) = output
    root = str(grid_directories.a)
    assert listed["listing"] == {root: ["sub"], f"{root}/sub": ["new\nline"]}
    (entry,) = listed["entries"][f"{root}/sub"]
    assert (entry["type"], entry["size"], entry["mtime"]) == ("file", 5, 1_000_000_000)


def test_a_tree_is_removed_and_nothing_beside_it(service: TestService, grid_directories: Any) -> None:
    tree = grid_directories.a / "tree"
    for path in ("a/b/c", "a/d", "e"):
        (tree / path).mkdir(parents=True)
        for name in ODD_NAMES[:4]:
            (tree / path / name).write_text("x")
    keep = grid_directories.a / "tree2"
    keep.write_text("stays")
    os.symlink(keep, tree / "link")
    grid_directories.give()
    job = service.submit("alice", "remove", src_siteid=1, src_filepath=str(tree))
    assert service.wait_for("alice", job["id"])["status"] == "DONE"
    assert not tree.exists()
    assert keep.read_text() == "stays"


@pytest.mark.parametrize("name", ["link", "li\nnk"])
def test_the_removal_of_a_link_leaves_what_it_leads_to(service: TestService, grid_directories: Any, name: str) -> None:
    precious = grid_directories.a / "precious"
    precious.mkdir()
    (precious / "file").write_text("stays")
    (grid_directories.a / name).symlink_to(precious)
    grid_directories.give()
    job = service.submit("alice", "remove", src_siteid=1, src_filepath=f"{grid_directories.a}/{name}")
    service.wait_for("alice", job["id"])
    assert (precious / "file").read_text() == "stays"
    assert [path.name for path in grid_directories.a.iterdir()] == ["precious"]


def test_rename_and_mkdir(service: TestService, grid_directories: Any) -> None:
    (grid_directories.a / "old\nname").write_text("x")
    grid_directories.give()
    job = service.submit(
        "alice",
        "rename",
        src_siteid=1,
        src_filepath=f"{grid_directories.a}/old\nname",
        dst_filepath=f"{grid_directories.a}/new %",
    )
    assert service.wait_for("alice", job["id"])["status"] == "DONE"
    assert [path.name for path in grid_directories.a.iterdir()] == ["new %"]
    job = service.submit(
        "alice", "mkdir", src_siteid=1, src_filepath=f"{grid_directories.a}/x/y z", extra_opts={"parents": True}
    )
    assert service.wait_for("alice", job["id"])["status"] == "DONE"
    assert (grid_directories.a / "x" / "y z").is_dir()


def test_rename_does_not_overwrite(service: TestService, grid_directories: Any) -> None:
    for name in ("one", "two"):
        (grid_directories.a / name).write_text(name)
    grid_directories.give()
    job = service.submit(
        "alice",
        "rename",
        src_siteid=1,
        src_filepath=f"{grid_directories.a}/one",
        dst_filepath=f"{grid_directories.a}/two",
    )
    error = fail(service, job)
    assert (error["code"], error["scope"], error["retryable"]) == ("EXISTS", "destination", False)
    assert (grid_directories.a / "two").read_text() == "two"


@pytest.mark.parametrize("type_", ["copy", "list", "remove", "rename"])
def test_a_source_that_is_not_there(service: TestService, grid_directories: Any, type_: str) -> None:
    fields: dict[str, Any] = {"src_siteid": 1, "src_filepath": f"{grid_directories.a}/missing"}
    if type_ in ("copy", "rename"):
        fields["dst_filepath"] = f"{grid_directories.b if type_ == 'copy' else grid_directories.a}/x"
    if type_ == "copy":
        fields["dst_siteid"] = 2
    error = fail(service, service.submit("alice", type_, **fields))
    assert (error["code"], error["scope"], error["retryable"]) == ("NOT_FOUND", "source", False)
    assert not list(grid_directories.b.iterdir())


@pytest.mark.parametrize(
    ("overwrite", "there", "status", "after"),
    [
        ("never", "same", "DONE", "same"),
        ("never", "else", "FAILED", "else"),
        ("always", "else", "DONE", "same"),
        ("different", "else", "DONE", "same"),
        ("different", "same", "DONE", "same"),
    ],
)
def test_a_destination_that_is_there(
    service: TestService, grid_directories: Any, overwrite: str, there: str, status: str, after: str
) -> None:
    contents = {"same": b"same", "else": b"else"}
    (grid_directories.a / "f").write_bytes(contents["same"])
    (grid_directories.b / "f").write_bytes(contents[there])
    grid_directories.give()
    grid_directories.give(grid_directories.b)
    inode = (grid_directories.b / "f").stat().st_ino
    job = service.submit(
        "alice",
        "copy",
        src_siteid=1,
        src_filepath=f"{grid_directories.a}/f",
        dst_siteid=2,
        dst_filepath=f"{grid_directories.b}/f",
        extra_opts={"overwrite": overwrite},
    )
    if status == "FAILED":
        error = fail(service, job, 1)
        assert (error["code"], error["scope"], error["retryable"]) == ("EXISTS", "destination", False)
    else:
        assert service.wait_for("alice", job["id"])["status"] == "DONE"
    assert (grid_directories.b / "f").read_bytes() == contents[after]
    if there == "same" and overwrite != "always":
        assert (grid_directories.b / "f").stat().st_ino == inode
        _, output = service.call("alice", "GET", f"/jobs/{job['id']}/elements/1/output")
        assert "already there" in output["log"]


@pytest.mark.skipif(os.geteuid() != 0, reason="permissions are real only where the servers can change the account")
def test_permission_denied_at_either_side(service: TestService, grid_directories: Any) -> None:
    secret = grid_directories.a / "secret"
    secret.write_text("x")
    (grid_directories.a / "open").write_text("x")
    grid_directories.give()
    secret.chmod(0)
    os.chown(secret, 0, 0)
    locked = grid_directories.b / "locked"
    locked.mkdir(mode=0o555)
    for source, destination, scope in (
        (secret, grid_directories.b / "x", "source"),
        (grid_directories.a / "open", locked / "x", "destination"),
    ):
        job = service.submit(
            "alice", "copy", src_siteid=1, src_filepath=str(source), dst_siteid=2, dst_filepath=str(destination)
        )
        error = fail(service, job, 1)
        assert (error["code"], error["scope"], error["retryable"]) == ("PERMISSION_DENIED", scope, False)
    assert not list(grid_directories.b.rglob("*x*"))


@pytest.mark.full
def test_an_unreachable_port(service: TestService, grid: TestGrid, grid_directories: Any) -> None:
    grid.sites["B"].server.stop()
    (grid_directories.a / "f").write_text("x")
    grid_directories.give()
    job = service.submit(
        "alice",
        "copy",
        src_siteid=1,
        src_filepath=f"{grid_directories.a}/f",
        dst_siteid=2,
        dst_filepath=f"{grid_directories.b}/f",
    )
    error = fail(service, job, 1)
    assert (error["code"], error["scope"], error["retryable"]) == ("CONNECTION", "destination", True)
    _, element = service.call("alice", "GET", f"/jobs/{job['id']}/elements/1")
    # A connection kept from an earlier test breaks first, which does not count: the server is found to be away.
    assert element["max_tries"] == 2
    assert element["attempts"] in (2, 3), service.tail(60)


def test_a_server_killed_in_mid_transfer_is_tried_again(
    service: TestService, grid: TestGrid, grid_directories: Any
) -> None:
    large = grid_directories.a / "large"
    with large.open("wb") as file:
        file.truncate(6 * 1024**3)
    grid_directories.give()
    job = service.submit(
        "alice",
        "copy",
        src_siteid=1,
        src_filepath=str(large),
        dst_siteid=2,
        dst_filepath=f"{grid_directories.b}/large",
        max_tries=1,
        extra_opts={"verify": "size"},
    )
    try:
        give_up_at = time.monotonic() + 20
        while not any(path.stat().st_size for path in grid_directories.b.glob(".pdm-*")):
            assert time.monotonic() < give_up_at, service.tail()
            time.sleep(0.02)
        assert grid.sites["B"].server.kill_sessions()
        error = fail(service, job, 1)
        assert error["code"] == "CONNECTION"
        assert error["scope"] in ("destination", "transfer")
        assert error["retryable"] is True
        assert not list(grid_directories.b.iterdir())
    finally:
        large.unlink()


@pytest.mark.full
def test_an_untrusted_authority(grid: TestGrid, grid_directories: Any, tmp_path: Path) -> None:
    service = TestService(tmp_path / "instance", grid.description(), grid.directory)
    empty = tmp_path / "nobody"
    empty.mkdir()
    service.init(queue={"first_pause": "100ms", "longest_pause": "100ms"})
    with service.running():
        service.delegate("alice")
    set_keys(service.directory / "workqueue.conf", {"credentials": {"trust_dir": str(empty)}})
    with service.running():
        error = fail(service, service.submit("alice", "list", src_siteid=1, src_filepath=str(grid_directories.a)))
        assert (error["code"], error["retryable"]) == ("CERTIFICATE", False)


def test_without_a_credential_a_job_is_refused(service: TestService, grid_directories: Any) -> None:
    status, problem = service.call("bob", "POST", "/list", {"src_siteid": 1, "src_filepath": "/"})
    assert status == 409
    assert "pdm delegate" in problem["detail"]


def _bare(grid: TestGrid, *arguments: str) -> None:
    subprocess.run(["globus-url-copy", *arguments], env={**os.environ, **grid.environment()}, check=True)


@pytest.mark.full
def test_the_queue_gives_what_the_bare_tool_gives(service: TestService, grid: TestGrid, grid_directories: Any) -> None:
    file = grid_directories.a / "f"
    file.write_bytes(os.urandom(100_000))
    grid_directories.give()
    _bare(grid, grid.sites["A"].url(file), grid.sites["B"].url(grid_directories.b / "bare"))
    job = service.submit(
        "alice", "copy", src_siteid=1, src_filepath=str(file), dst_siteid=2, dst_filepath=f"{grid_directories.b}/queued"
    )
    assert service.wait_for("alice", job["id"])["status"] == "DONE"
    bare, queued = (grid_directories.b / name for name in ("bare", "queued"))
    assert bare.read_bytes() == queued.read_bytes()
    assert (bare.stat().st_uid, bare.stat().st_mode) == (queued.stat().st_uid, queued.stat().st_mode)

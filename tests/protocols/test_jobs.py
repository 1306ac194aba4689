"""Jobs through the daemon, and copies between each two protocols."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from tests.helpers.driver import tree
from tests.protocols.places import Places, endpoint_of, owner
from tests.support.loopback import service_of, ssh_settings
from tests.support.s3_server import ACCESS_KEY, SmallS3Server
from tests.support.sync_cases import CASES, SyncCase, expected, read_tree, run_rclone, write_tree
from tests.support.variants import usual

#: Sites by protocol and letter.
PROTOCOLS = ("ssh", "https", "file", "xroot", "gridftp")
#: Links at GridFTP servers have tests of their own in tests/grid.
_WITHOUT_GRIDFTP = PROTOCOLS[:-1]
SITES = {
    (protocol, letter): 2 * n + m for n, protocol in enumerate(PROTOCOLS) for m, letter in enumerate("AB", start=1)
}
#: Objects of both sites are in one bucket, under their paths.
S3_SITES = {"A": 21, "B": 22}
ONLY_DUMMY = 99
_S3_SECRET = "not+a/real=key"
#: Pairs of unlike protocols, in which each is once the source and once the destination.
_PAIRS = (("ssh", "https"), ("https", "xroot"), ("xroot", "gridftp"), ("gridftp", "file"), ("file", "ssh"))
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def bucket(storages: TestStorages) -> Iterator[SmallS3Server]:
    assert storages.credentials is not None
    host = storages.credentials.host
    with SmallS3Server(host.certificate, host.key, _S3_SECRET) as running:
        yield running


@pytest.fixture(scope="module")
def service(
    storages: TestStorages, bucket: SmallS3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestService]:
    sections = [
        f"[{protocol}-{letter}]\nid = {number}\n{protocol} = {endpoint_of(storages, protocol, letter)}\n"
        for (protocol, letter), number in SITES.items()
    ]
    sections += [f"[s3-{name}]\nid = {number}\ns3 = {bucket.endpoint}\n" for name, number in S3_SITES.items()]
    sections.append(f"[nothing]\nid = {ONLY_DUMMY}\ndummy = dummy://x/\n")
    service = service_of(
        storages,
        tmp_path_factory.mktemp("jobs") / "instance",
        "\n".join(sections),
        queue={"first_pause": "100ms", "longest_pause": "300ms", "stall": "30s", "total": "60s"},
        ssh=ssh_settings(storages.environment()),
    )
    with service.running():
        service.delegate("alice")
        yield service
    assert "Traceback" not in service.log_path.read_text()


def run(service: TestService, type_: str, protocol: str, letter: str, path: Path, **more: Any) -> dict[str, Any]:
    submitted = service.submit(
        "alice", type_, src_siteid=SITES[protocol, letter], src_filepath=str(path), protocol=protocol, **more
    )
    return service.wait_for("alice", submitted["id"], timeout_s=150.0)


@pytest.mark.parametrize(
    "protocol", ["ssh", *(pytest.param(name, marks=pytest.mark.full) for name in ("https", "xroot"))]
)
def test_all_five_job_types(protocol: str, service: TestService, places: Places) -> None:
    source = places.a / "tree"
    for number in range(30):
        places.put(source / f"dir {number % 3}" / f"näme {number}", bytes([number]) * number)
    (source / "empty").mkdir()
    places.storages.give(places.a)

    listed = run(service, "list", protocol, "A", source)
    assert (listed["status"], listed["num_elements"]) == ("DONE", 1)
    copied = run(
        service, "copy", protocol, "A", source, dst_siteid=SITES[protocol, "B"], dst_filepath=str(places.b / "new")
    )
    assert copied["status"] == "DONE", service.call("alice", "GET", f"/jobs/{copied['id']}/errors")
    assert tree(places.b / "new") == tree(source)
    assert (places.b / "new" / "empty").is_dir()
    moved = run(service, "rename", protocol, "B", places.b / "new", dst_filepath=str(places.b / "newer"))
    assert moved["status"] == "DONE" and (places.b / "newer").is_dir()
    removed = run(service, "remove", protocol, "B", places.b / "newer", extra_opts={"recursive": True})
    assert removed["status"] == "DONE", service.call("alice", "GET", f"/jobs/{removed['id']}/errors")
    assert list(places.b.iterdir()) == []
    made = run(service, "mkdir", protocol, "B", places.b / "made")
    assert made["status"] == "DONE" and (places.b / "made").is_dir()


@pytest.mark.parametrize(
    ("protocol", "other"),
    [
        pair if pair in _PAIRS else pytest.param(*pair, marks=pytest.mark.full)
        for pair in itertools.product(PROTOCOLS, repeat=2)
    ],
)
def test_a_tree_is_copied_from_each_protocol_to_each(
    protocol: str, other: str, service: TestService, places: Places
) -> None:
    source = places.put_tree()
    copied = run(
        service, "copy", protocol, "A", source, dst_siteid=SITES[other, "B"], dst_filepath=str(places.b / "new")
    )
    assert copied["status"] == "DONE", service.call("alice", "GET", f"/jobs/{copied['id']}/errors")
    assert tree(places.b / "new") == tree(source)
    assert (places.b / "new" / "d 2").is_dir()
    assert places.left() == []


@pytest.mark.full
@pytest.mark.parametrize(
    "pair",
    [("s3", "s3"), *itertools.product(["s3"], PROTOCOLS), *itertools.product(PROTOCOLS, ["s3"])],
    ids=" to ".join,
)
def test_a_tree_is_copied_from_and_to_object_storage(
    pair: tuple[str, str], service: TestService, bucket: SmallS3Server, places: Places
) -> None:
    contents = {f"d 1/n\u00e4me; {number}&%41": bytes([number]) * 300_000 * number for number in range(5)}
    key = {"kind": "s3-key", "access_key": ACCESS_KEY, "secret": _S3_SECRET}
    for site in S3_SITES.values():
        assert service.call("alice", "POST", "/credentials", {**key, "site": site})[0] in (200, 201)
    bucket.reset()
    source, destination = places.a / "tree", places.b / "new"
    for name, content in contents.items():
        if pair[0] == "s3":
            bucket.put(str(source / name).lstrip("/"), content)
        else:
            places.put(source / name, content)
    places.storages.give(places.a)
    sites = {**SITES, **{("s3", at): number for at, number in S3_SITES.items()}}
    submitted = service.submit(
        "alice",
        "copy",
        src_siteid=sites[pair[0], "A"],
        src_filepath=str(source),
        protocol=pair[0],
        dst_siteid=sites[pair[1], "B"],
        dst_filepath=str(destination),
    )
    copied = service.wait_for("alice", submitted["id"], timeout_s=150.0)
    assert copied["status"] == "DONE", service.call("alice", "GET", f"/jobs/{copied['id']}/errors")
    arrived = {
        str(Path("/", name.decode()).relative_to(destination)): content
        for name, (content, _) in bucket.objects.items()
        # Those that end in a slash stand for directories.
        if name.startswith(bytes(destination).lstrip(b"/")) and not name.endswith(b"/")
    }
    assert (arrived if pair[1] == "s3" else tree(destination)) == contents


def test_a_users_own_key_is_used_in_place_of_the_services(
    service: TestService, storages: TestStorages, places: Places
) -> None:
    source, server = places.put(places.a / "file", b"content"), storages.sftp["A"]
    status, made = service.call(
        "alice", "POST", "/credentials", {"kind": "ssh-key", "site": SITES["ssh", "A"], "account": server.user}
    )
    assert status == 201
    services = server.authorized.read_text()
    server.authorized.write_text(made["public_key"] + "\n")
    try:
        copied = run(
            service, "copy", "ssh", "A", source, dst_siteid=SITES["https", "B"], dst_filepath=str(places.b / "new")
        )
        assert copied["status"] == "DONE", service.call("alice", "GET", f"/jobs/{copied['id']}/errors")
        assert (places.b / "new").read_bytes() == b"content"
    finally:
        server.authorized.write_text(services)
        service.call("alice", "DELETE", f"/credentials/{made['id']}")


#: Those that show links as links; XRootD shows them as what they lead to.
SHOWS_LINKS = ("file", "ssh")


def _copy(service: TestService, protocol: str, source: Path, destination: Path) -> dict[str, Any]:
    return run(service, "copy", protocol, "A", source, dst_siteid=SITES[protocol, "B"], dst_filepath=str(destination))


def _error(service: TestService, job: dict[str, Any], element: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = service.call("alice", "GET", f"/jobs/{job['id']}/elements/{element}")[1]["error"]
    return found


@pytest.mark.parametrize("protocol", usual(_WITHOUT_GRIDFTP, ["ssh", "file"]))
def test_a_link_that_is_the_source_itself_is_followed(protocol: str, service: TestService, places: Places) -> None:
    inside = places.put(places.a / "real" / "inside", b"content")
    (inside.parent / "link inside").symlink_to("inside")
    inside.chmod(0o755)
    (places.a / "to file").symlink_to(inside)
    (places.a / "to dir").symlink_to("real")
    places.storages.give(places.a)
    copied = _copy(service, protocol, places.a / "to file", places.b / "file")
    assert (copied["status"], copied["skipped"]) == ("DONE", 0)
    assert (places.b / "file").read_bytes() == b"content"
    copied = _copy(service, protocol, places.a / "to dir", places.b / "dir")
    assert (copied["status"], copied["skipped"], copied["num_done"]) == ("DONE", 0, 3)
    assert tree(places.b / "dir") == {"inside": b"content", "link inside": b"content"}


@pytest.mark.parametrize("protocol", usual(_WITHOUT_GRIDFTP, ["ssh", "file"]))
def test_a_source_without_content_fails_and_leaves_nothing(protocol: str, service: TestService, places: Places) -> None:
    (places.a / "dangling").symlink_to("/nowhere/at/all")
    (places.a / "loop").symlink_to("loop")
    os.mkfifo(places.a / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(places.a / "socket"))
        places.storages.give(places.a)
        expected = {"dangling": "NOT_FOUND", "loop": "NOT_FOUND", "fifo": "SPECIAL_FILE", "socket": "SPECIAL_FILE"}
        if protocol == "https":
            # XRootD shows these as empty files, and is found not to give their bytes: of a pipe, after a long wait.
            expected = {"dangling": "NOT_FOUND", "loop": "NOT_FOUND", "socket": "SERVER_ERROR"}
        for name, code in expected.items():
            copied = _copy(service, protocol, places.a / name, places.b / "new" / "er")
            assert (copied["status"], copied["bytes_done"]) == ("FAILED", 0), name
            error = _error(service, copied, copied["num_elements"] - 1)
            assert (error["code"], error["scope"]) == (code, "source"), error
            assert not (places.b / "new" / "er").exists()


@pytest.mark.parametrize("protocol", usual(_WITHOUT_GRIDFTP, ["ssh", "file"]))
def test_all_that_is_left_out_is_counted_and_named(protocol: str, service: TestService, places: Places) -> None:
    source = places.a / "tree"
    for name in ("a", "z", "deep/er"):
        places.put(source / name, name.encode()).chmod(0o755)
    os.mkfifo(source / "deep" / "fifo")
    if protocol != "https":
        # By HTTPS an XRootD server hides all that comes after a link that leads nowhere.
        (source / "dangling").symlink_to("/nowhere/at/all")
        (source / "loop").symlink_to("loop")
    if protocol in SHOWS_LINKS:
        (source / "outside").symlink_to(places.put(places.a / "outside"))
        (source / "dir").symlink_to(places.a)
    expected = {
        "deep/fifo": ("other", "SPECIAL_FILE"),
        "dangling": ("link", "DANGLING_LINK"),
        "loop": ("link", "DANGLING_LINK"),
        "outside": ("link", "LINK_OUTSIDE"),
        "dir": ("link", "LINK_TO_DIRECTORY"),
        "shut": ("directory", "PERMISSION_DENIED"),
    }
    if protocol == "https":
        (source / "deep" / "fifo").unlink()
        del expected["deep/fifo"]
    (source / "shut").mkdir()
    places.storages.give(places.a)
    (source / "shut").chmod(0)
    if protocol == "file" or not owner():
        # The daemon of the tests may read everything.
        (source / "shut").rmdir()
    there = {name: what for name, what in expected.items() if os.path.lexists(source / name)}

    copied = _copy(service, protocol, source, places.b / "new")
    path = f"/jobs/{copied['id']}"
    assert copied["status"] == ("FAILED" if "shut" in there else "DONE")
    assert tree(places.b / "new") == {"a": b"a", "z": b"z", "deep/er": b"deep/er"}
    assert copied["skipped"] == len(there)
    _, job = service.call("alice", "GET", path)
    _, status = service.call("alice", "GET", f"{path}/status")
    counts: dict[str, int] = dict(Counter(code for _, code in there.values()))
    assert job["skipped_by_code"] == status["skipped_by_code"] == counts
    assert status["skipped"] == len(there)
    _, skipped = service.call("alice", "GET", f"{path}/skipped")
    assert {each["path"]: (each["type"], each["code"]) for each in skipped} == {
        str(source / name): what for name, what in there.items()
    }
    assert all(each["reason"] and each["count"] == 1 for each in skipped)
    pages, after = [], 0
    while page := service.call("alice", "GET", f"{path}/skipped?limit=2&after={after}")[1]:
        pages += page
        after = page[-1]["id"]
    assert pages == skipped
    if copied["status"] == "DONE":
        _, output = service.call("alice", "GET", f"{path}/elements/0/output")
        assert output["skipped"] == [{"path": each["path"], "reason": each["reason"]} for each in skipped]


@pytest.mark.parametrize("protocol", usual(_WITHOUT_GRIDFTP, ["ssh", "file"]))
def test_a_removal_does_not_follow_links_to_directories(protocol: str, service: TestService, places: Places) -> None:
    precious = places.put(places.a / "outside" / "deep" / "precious")
    tree_ = places.a / "tree"
    places.put(tree_ / "sub" / "file")
    (tree_ / "empty").mkdir()
    (tree_ / "sub" / "dir").symlink_to(precious.parent.parent)
    (places.a / "named").symlink_to(precious.parent.parent)
    if protocol == "xroot":
        (tree_ / "dangling").symlink_to("/nowhere/at/all")
        (tree_ / "loop").symlink_to("loop")
    places.storages.give(places.a)
    removed = run(service, "remove", protocol, "A", tree_, extra_opts={"recursive": True})
    assert precious.read_bytes() == b"content"
    named = run(service, "remove", protocol, "A", places.a / "named", extra_opts={"recursive": True})
    assert precious.read_bytes() == b"content"
    if protocol in SHOWS_LINKS:
        assert (removed["status"], named["status"]) == ("DONE", "DONE")
        assert sorted(path.name for path in places.a.iterdir()) == ["outside"]
    else:
        # The server removes no such link, so the directories above it stay: nothing else does.
        assert (removed["status"], removed["num_failed"], named["status"]) == ("FAILED", 3, "FAILED")
        assert [path.name for path in tree_.rglob("*")] == ["sub", "dir"]
        _, failed = service.call("alice", "GET", f"/jobs/{removed['id']}/elements?status=FAILED")
        errors = {Path(each["src_filepath"]).name: each["error"] for each in failed}
        assert {name: error["code"] for name, error in errors.items()} == {
            "dir": "UNSUPPORTED",
            "sub": "NOT_EMPTY",
            "tree": "NOT_EMPTY",
        }
        assert "symbolic link to a directory" in errors["dir"]["message"]
        assert "symbolic link to a directory" in _error(service, named)["message"]


@pytest.mark.parametrize(
    ("protocol", "warned"), [("ssh", False), ("https", True), pytest.param("xroot", True, marks=pytest.mark.full)]
)
def test_removing_a_tree_warns_of_links_first(
    protocol: str, warned: bool, service: TestService, places: Places
) -> None:
    places.put(places.a / "tree" / "file")
    done = service.pdm("alice", "rm", "-r", f"{protocol}-A:{places.a / 'tree'}")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert ("symbolic links" in lines[0]) == warned
    assert lines[1 if warned else 0].endswith("submitted")
    assert lines[-1] == "removed 2, skipped 0, failed 0"


@pytest.mark.parametrize("protocol", usual(_WITHOUT_GRIDFTP, ["ssh", "file"]))
def test_files_that_are_there_already_are_counted_apart(protocol: str, service: TestService, places: Places) -> None:
    source = places.a / "tree"
    for name in ("one", "two", "three", "nothing"):
        places.put(source / name, b"" if name == "nothing" else b"x" * 300_000)
    first = _copy(service, protocol, source, places.b / "new")
    assert (first["already_there"], first["bytes_already_there"]) == (0, 0)
    assert first["progress"]["average"] > 0
    again = _copy(service, protocol, source, places.b / "new")
    assert (again["status"], again["already_there"], again["bytes_already_there"]) == ("DONE", 4, 900_000)
    assert (again["bytes_done"], again["progress"]["average"]) == (900_000, None)
    _, element = service.call("alice", "GET", f"/jobs/{again['id']}/elements/1")
    _, status = service.call("alice", "GET", f"/jobs/{again['id']}/elements/1/status")
    assert (element["already_there"], status["transferred"], status["average"]) == (True, 0, None)
    (places.b / "new" / "two").unlink()
    mixed = _copy(service, protocol, source, places.b / "new")
    assert (mixed["already_there"], mixed["bytes_already_there"]) == (3, 600_000)
    rate = 300_000 / mixed["progress"]["elapsed"]
    assert mixed["progress"]["average"] == pytest.approx(rate)


@pytest.mark.parametrize("protocol", ["file", pytest.param("ssh", marks=pytest.mark.full)])
def test_with_preserved_times_a_second_sync_finds_all_files_there(
    protocol: str, service: TestService, places: Places
) -> None:
    for number in range(4):
        path = places.put(places.a / "tree" / f"f{number}", b"x" * number)
        path.chmod(0o640)
        os.utime(path, (1_000_000_000, 1_000_000_000 + number))
    places.storages.give(places.a)
    options = {"sync": "mtime", "preserve": ["mtime", "mode"], "checksum": "SHA256"}
    for there in (0, 4):
        wanted = {"dst_siteid": SITES["ssh", "B"], "dst_filepath": str(places.b / "tree"), "extra_opts": options}
        job = run(service, "copy", protocol, "A", places.a / "tree", **wanted)
        assert (job["status"], job["already_there"]) == ("DONE", there)
        lines = _receipt(service, job["id"])
        assert not any("not_preserved" in line for line in lines)
        # Those that are there are not even compared.
        assert {line["attempts"] for line in lines} == ({0} if there else {1})
    for path in (places.b / "tree").iterdir():
        assert path.stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_preserved_is_in_the_receipt(service: TestService, places: Places) -> None:
    path = places.put(places.a / "f")
    wanted = {"dst_siteid": SITES["https", "B"], "dst_filepath": str(places.b / "f")}
    options = {"preserve": ["mtime", "mode"], "checksum": "MD5"}
    job = run(service, "copy", "file", "A", path, **wanted, extra_opts=options)
    assert job["status"] == "DONE"
    (line,) = _receipt(service, job["id"])
    assert (line["outcome"], line["not_preserved"]) == ("done", "mtime,mode")
    assert line["checksum"] == "MD5:9a0364b9e99bb480dd25e1f0284c8555"


def _receipt(service: TestService, job: int) -> list[dict[str, Any]]:
    """The lines of the files of a job."""
    printed = service.pdm("alice", "receipt", str(job)).stdout
    lines = [json.loads(line) for line in printed.splitlines()]
    return [line for line in lines if line["line"] == "element" and line["type"] == "COPY"]


def test_pairs_that_do_not_work_are_named(service: TestService, places: Places) -> None:
    body = {"src_siteid": 1, "src_filepath": "/a", "dst_siteid": ONLY_DUMMY, "dst_filepath": "/b", "protocol": "SSH"}
    status, problem = service.call("alice", "POST", "/copy", body)
    assert status == 400
    assert problem["detail"] == (
        "site nothing offers DUMMY; by SSH this service can copy SSH to GRIDFTP, SSH to SSH, SSH to FILE, SSH to HTTPS,"
        " SSH to XROOT, SSH to S3"
    )


def _compared(places: Places) -> Path:
    """Trees at both sites: a new file, an unchanged one, others of another content or size, and an extra one."""
    source, destination = places.a / "tree", places.b / "tree"
    for directory in (source, destination):
        places.put(directory / "d" / "same", b"same")
    places.put(source / "d" / "näw", b"new")
    for name, here, there in (("content", b"one", b"two"), ("size", b"longer", b"short")):
        places.put(source / name, here)
        places.put(destination / name, there)
    places.put(destination / "extra" / "x y", b"x")
    for path in (*source.rglob("*"), *destination.rglob("*")):
        if path.is_file():
            os.utime(path, (1_000_000_000, 1_000_000_000))
    os.utime(source / "content", (1_100_000_000, 1_100_000_000))
    return source


@pytest.mark.parametrize(
    ("protocol", "other", "level"),
    usual(
        [
            *(("ssh", "ssh", level) for level in ("size", "checksum", "exists", "mtime")),
            ("https", "https", "size"),
            ("xroot", "xroot", "mtime"),
            ("ssh", "https", "checksum"),
            ("file", "xroot", "size"),
        ],
        [("ssh", "ssh", "size"), ("xroot", "xroot", "mtime"), ("ssh", "https", "checksum")],
    ),
)
def test_a_mirror(protocol: str, other: str, level: str, service: TestService, places: Places) -> None:
    source = _compared(places)
    before = tree(places.b / "tree")
    wanted = {"dst_siteid": SITES[other, "B"], "dst_filepath": str(places.b / "tree")}
    options = {"sync": level, "delete_extra": True}
    planned = run(service, "copy", protocol, "A", source, **wanted, extra_opts={**options, "dry_run": True})
    assert planned["status"] == "DONE", service.call("alice", "GET", f"/jobs/{planned['id']}/errors")
    assert planned["plan"]["actions"]["DELETE"] == {"files": 1, "directories": 1, "bytes": 1}
    assert tree(places.b / "tree") == before
    mirrored = run(service, "copy", protocol, "A", source, **wanted, extra_opts=options)
    assert mirrored["status"] == "DONE", service.call("alice", "GET", f"/jobs/{mirrored['id']}/errors")
    kept = {"exists": ("content", "size"), "size": ("content",)}.get(level, ())
    assert tree(places.b / "tree") == tree(source) | {name: before[name] for name in kept}
    assert not (places.b / "tree" / "extra").exists()
    assert mirrored["already_there"] == 1 + len(kept)


@pytest.mark.parametrize(
    ("protocol", "other"),
    [
        pair if pair in _PAIRS[:2] else pytest.param(*pair, marks=pytest.mark.full)
        for pair in itertools.permutations(PROTOCOLS, 2)
    ],
)
def test_a_move_between_unlike_sites(protocol: str, other: str, service: TestService, places: Places) -> None:
    source = places.a / "tree"
    for number in range(5):
        places.put(source / f"d {number % 2}" / f"file {number}", bytes([number]) * 1000 * number)
    (source / "empty").mkdir()
    places.storages.give(places.a)
    expected = tree(source)
    moved = run(
        service,
        "copy",
        protocol,
        "A",
        source,
        dst_siteid=SITES[other, "B"],
        dst_filepath=str(places.b / "new"),
        extra_opts={"move": True},
    )
    assert moved["status"] == "DONE", service.call("alice", "GET", f"/jobs/{moved['id']}/errors")
    assert tree(places.b / "new") == expected
    assert (places.b / "new" / "empty").is_dir()
    assert not source.exists()


#: From which protocol to which → the cases that are always run.
_EVERYDAY_CASES = {
    ("file", "file"): {
        "mtime, no /tmp/, delete",
        "a directory where a file must go, and the reverse",
        "more than may be removed",
    },
    ("ssh", "ssh"): {"size, all, delete", "checksum, only *.root, without tmp/, delete"},
    ("https", "file"): set[str](),
    ("ssh", "xroot"): set[str](),
}


@pytest.mark.skipif(shutil.which("rclone") is None, reason="rclone is not installed")
@pytest.mark.parametrize(
    ("protocol", "other", "case"),
    [
        pytest.param(
            *pair,
            case,
            id=f"{pair[0]} to {pair[1]}: {case.name}",
            marks=() if case.name in everyday else (pytest.mark.full,),
        )
        for pair, everyday in _EVERYDAY_CASES.items()
        for case in CASES
        # All of them where rclone ran; between unlike protocols one of each level.
        if pair[0] == pair[1] or case.name.endswith("no tmp/, delete")
    ],
)
def test_a_copy_leads_to_what_rclone_leads_to(
    protocol: str, other: str, case: SyncCase, service: TestService, places: Places, tmp_path: Path
) -> None:
    write_tree(places.a / "tree", case.source)
    write_tree(places.b / "tree", case.destination)
    for directory in (places.a, places.b):
        places.storages.give(directory)
    theirs = run_rclone(case, tmp_path)
    job = run(
        service,
        "copy",
        protocol,
        "A",
        places.a / "tree",
        dst_siteid=SITES[other, "B"],
        dst_filepath=str(places.b / "tree"),
        extra_opts=dict(case.options),
    )
    elements = service.call("alice", "GET", f"/jobs/{job['id']}/elements")
    assert job["status"] == ("FAILED" if case.fails else "DONE"), elements
    assert read_tree(places.b / "tree") == expected(case, theirs), elements

"""Copies from and to tape through the daemon: the WLCG tape REST API beside a real WebDAV server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from tests.protocols.places import Places
from tests.support.cluster import cluster_of
from tests.support.fts_door import ask_door
from tests.support.loopback import grid_of, service_of, trust_storages
from tests.support.tape_server import TapeServer

pytestmark = pytest.mark.timeout(120)
TAPE, DISK, NO_API, NO_HTTPS = 1, 2, 3, 4
_TAPE_SETTINGS = {"poll": "100ms", "longest_poll": "400ms", "timeout": "3s"}


@pytest.fixture(scope="module")
def tape_server(storages: TestStorages) -> Iterator[TapeServer]:
    assert storages.credentials is not None
    with TapeServer(storages.credentials.host).running() as server:
        yield server


@pytest.fixture
def tape(tape_server: TapeServer) -> TapeServer:
    tape_server.reset()
    return tape_server


def sites_of(storages: TestStorages, tape: TapeServer) -> str:
    return f"""\
[tape]
id = {TAPE}
https = {storages.xrootd["A"].url}
tape = {tape.api}

[disk]
id = {DISK}
https = {storages.xrootd["B"].url}
tape = {tape.api}

[no-api]
id = {NO_API}
https = {storages.xrootd["A"].url}

[no-https]
id = {NO_HTTPS}
xroot = {storages.xrootd["A"].root_url}
"""


def new_service(storages: TestStorages, tape: TapeServer, directory: Path, **settings: dict[str, str]) -> TestService:
    queue = {"first_pause": "100ms", "longest_pause": "300ms"}
    sites = sites_of(storages, tape)
    return service_of(storages, directory / "instance", sites, queue=queue, tape=_TAPE_SETTINGS, **settings)


@pytest.fixture(scope="module")
def service(
    storages: TestStorages, tape_server: TapeServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestService]:
    door = {"port": str(reserve_port())}
    service = new_service(storages, tape_server, tmp_path_factory.mktemp("tape"), fts=door)
    with service.running():
        service.delegate("alice")
        yield service
    assert "Traceback" not in service.log_path.read_text()


def copy(service: TestService, source: Path, target: Path, *, site: int = TAPE, **options: Any) -> dict[str, Any]:
    return service.submit(
        "alice",
        "copy",
        src_siteid=site,
        src_filepath=str(source),
        dst_siteid=DISK,
        dst_filepath=str(target),
        protocol="https",
        extra_opts=options,
    )


def ended(service: TestService, job: dict[str, Any]) -> dict[str, Any]:
    return service.wait_for("alice", job["id"])


def elements(service: TestService, job: dict[str, Any]) -> list[dict[str, Any]]:
    _, found = service.call("alice", "GET", f"/jobs/{job['id']}/elements")
    return [one for one in found if one["type"] == "COPY"]


def until(what: Callable[[], object], service: TestService) -> None:
    give_up_at = time.monotonic() + 30
    while not what():
        assert time.monotonic() < give_up_at, service.tail()
        time.sleep(0.05)


def files_on_tape(tape: TapeServer, places: Places, count: int) -> list[Path]:
    found = [places.put(places.a / "tree" / f"file {n}", b"%d" % n * 1000) for n in range(count)]
    return [tape.put_to_tape(path) for path in found]


def test_files_are_staged_copied_and_released(service: TestService, tape: TapeServer, places: Places) -> None:
    on_tape = files_on_tape(tape, places, 3)
    places.put(places.a / "tree" / "on disk", b"here")
    tape.recall_s = 1.0
    job = copy(service, places.a / "tree", places.b / "new", stage=True, stage_lifetime="2h")
    # What is on disk does not wait for what is not.
    until((places.b / "new" / "on disk").exists, service)
    held = service.wait_for("alice", job["id"], until=("HELD", "DONE"))
    assert (held["status"], held["hold"]["code"], held["hold"]["count"]) == ("HELD", "STAGING", 3)
    _, why = service.call("alice", "GET", f"/jobs/{job['id']}/why")
    assert any("staging from tape: 1 requests are accepted" in one["reason"] for one in why["reasons"]), why
    assert ended(service, job)["status"] == "DONE"
    for n, path in enumerate(on_tape):
        assert (places.b / "new" / path.name).read_bytes() == b"%d" % n * 1000
    assert all(one["attempts"] == 1 for one in elements(service, job))
    (request,) = tape.requests.values()
    # Each as soon as its copy has ended.
    until(lambda: request.released == set(map(str, on_tape)), service)
    assert not request.cancelled
    assert set(request.lifetimes) == {"PT7200S"}
    # One request for all.
    assert [count for action, count in tape.log if action == "stage"] == [3], tape.log


def test_a_copy_is_done_when_it_is_on_tape(service: TestService, tape: TapeServer, places: Places) -> None:
    tape.migrate_s = 1.0
    source = places.put(places.a / "file", b"content")
    job = copy(service, source, places.b / "copy", archive=True, move=True)
    held = service.wait_for("alice", job["id"], until=("HELD", "DONE"))
    assert (held["status"], held["hold"]["code"], held["num_done"]) == ("HELD", "ARCHIVING", 1)
    # A moved source stays until then.
    assert source.exists()
    assert ended(service, job)["status"] == "DONE"
    assert not source.exists()
    (element,) = elements(service, job)
    assert (element["status"], element["attempts"]) == ("DONE", 1)


def test_what_has_no_tape_api_is_refused(service: TestService, tape: TapeServer, places: Places) -> None:
    body = {"src_siteid": NO_HTTPS, "src_filepath": "/x", "dst_siteid": NO_HTTPS, "dst_filepath": "/y"}
    for option in ("stage", "archive"):
        status, problem = service.call(
            "alice", "POST", "/copy", {**body, "protocol": "xroot", "extra_opts": {option: True}}
        )
        assert (status, problem["pointer"]) == (400, f"$.extra_opts.{option}"), problem
    # Whether an endpoint names one is known only when it is asked.
    job = copy(service, places.put(places.a / "file"), places.b / "new", site=NO_API, stage=True)
    assert ended(service, job)["status"] == "FAILED"
    (element,) = elements(service, job)
    assert element["error"]["code"] == "UNSUPPORTED" and "no tape API" in element["error"]["message"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("action", "fault", "most_requests"),
    [
        ("archiveinfo", "500", 1),
        ("archiveinfo", "garbage", 1),
        ("archiveinfo", "fewer", 2),
        ("archiveinfo", "reversed", 1),
        ("archiveinfo", "lost", 1),
        ("stage", "500", 1),
        ("stage", 1, 1),
        ("stage", "garbage", 2),
        ("stage", "lost", 2),
        ("stage", "hang", 2),
        ("status", "500", 1),
        ("status", 1, 1),
        ("status", "hang", 1),
        ("status", "garbage", 1),
        ("status", "deep", 1),
        ("status", "fewer", 2),
        ("status", "reversed", 1),
        ("status", "lost", 1),
        ("release", "500", 1),
        ("release", "lost", 1),
    ],
)
def test_a_server_that_misbehaves(
    action: str, fault: Any, most_requests: int, service: TestService, tape: TapeServer, places: Places
) -> None:
    on_tape = files_on_tape(tape, places, 4)
    tape.recall_s = 0.8
    tape.faults[action].append(fault)
    job = copy(service, places.a / "tree", places.b / "new", stage=True)
    assert ended(service, job)["status"] == "DONE", elements(service, job)
    for n, path in enumerate(on_tape):
        assert (places.b / "new" / path.name).read_bytes() == b"%d" % n * 1000
    assert all(one["attempts"] == 1 for one in elements(service, job))
    # Nothing is recalled twice, whatever was lost.
    assert tape.recalls == dict.fromkeys(map(str, on_tape), 1)
    assert tape.count("stage") <= most_requests, tape.log
    until(lambda: any(request.released for request in tape.requests.values()), service)


@pytest.mark.full
def test_a_forgotten_request_is_made_again(service: TestService, tape: TapeServer, places: Places) -> None:
    on_tape = files_on_tape(tape, places, 3)
    tape.recall_s = None
    job = copy(service, places.a / "tree", places.b / "new", stage=True)
    until(lambda: tape.count("status"), service)
    tape.recall_s = 0.0
    tape.requests.clear()
    assert ended(service, job)["status"] == "DONE"
    assert tape.count("stage") == 2 and tape.recalls == dict.fromkeys(map(str, on_tape), 1)


def test_a_name_that_no_tape_api_takes_fails_alone(service: TestService, tape: TapeServer, places: Places) -> None:
    files_on_tape(tape, places, 2)
    name = os.fsdecode(b"not \xff UTF-8")
    places.put(places.a / "tree" / name, b"x" * 1000)
    # It has failed when the request of the others is visited again.
    tape.recall_s = 1.0
    job = copy(service, places.a / "tree", places.b / "new", stage=True)
    found = ended(service, job)
    assert (found["status"], found["num_done"], found["num_failed"]) == ("FAILED", 3, 1)
    (failed,) = (one for one in elements(service, job) if one["status"] == "FAILED")
    assert failed["error"]["code"] == "INVALID_NAME"
    (request,) = (*tape.requests.values(), *tape.deleted)
    until(lambda: len(request.released) == 2, service)


def test_a_file_that_has_left_the_disk_again_is_requested_again(
    service: TestService, tape: TapeServer, places: Places
) -> None:
    (path,) = files_on_tape(tape, places, 1)
    tape.states[str(path)] = "COMPLETED"
    tape.recall_s = None
    job = copy(service, places.a / "tree", places.b / "new", stage=True)
    until(lambda: tape.count("status"), service)
    tape.recall_s = 0.0
    assert ended(service, job)["status"] == "DONE"
    assert tape.count("stage") > 1
    assert (places.b / "new" / path.name).read_bytes() == b"0" * 1000


@pytest.mark.full
def test_failures_of_single_files(service: TestService, tape: TapeServer, places: Places) -> None:
    good, lost, refused, broken, late = files_on_tape(tape, places, 5)
    tape.localities[str(lost)] = "LOST"
    tape.localities[str(late)] = "UNAVAILABLE"
    tape.errors[str(refused)] = "permission denied"
    tape.errors[str(broken)] = "drive 7 is on fire"
    job = copy(service, places.a / "tree", places.b / "new", stage=True, stage_timeout="6s")
    found = ended(service, job)
    assert (found["status"], found["num_done"]) == ("FAILED", 2)
    errors = {
        Path(one["src_filepath"]): (one["error"]["code"], one["error"]["scope"])
        for one in elements(service, job)
        if one["status"] == "FAILED"
    }
    assert errors == {
        lost: ("LOST", "source"),
        refused: ("PERMISSION_DENIED", "source"),
        broken: ("TAPE_ERROR", "source"),
        late: ("TAPE_TIMEOUT", "source"),
    }
    assert (places.b / "new" / good.name).exists()
    # The request ends with its last file; the site was never asked for the others.
    (request,) = (*tape.requests.values(), *tape.deleted)
    until(lambda: request.released, service)
    assert (request.released, request.cancelled) == ({str(good)}, {str(refused), str(broken)})
    # What has failed is staged again by a retry.
    tape.errors.clear()
    tape.localities[str(late)] = "DISK"
    service.call("alice", "POST", f"/jobs/{job['id']}/retry")
    assert ended(service, job)["num_done"] == 5


@pytest.mark.full
def test_a_cancelled_job_withdraws_its_request(service: TestService, tape: TapeServer, places: Places) -> None:
    files_on_tape(tape, places, 3)
    tape.recall_s = None
    job = copy(service, places.a / "tree", places.b / "new", stage=True)
    until(lambda: tape.requests, service)
    service.call("alice", "DELETE", f"/jobs/{job['id']}")
    assert ended(service, job)["status"] == "CANCELLED"
    until(lambda: not tape.requests, service)
    assert tape.count("delete") == 1


@pytest.mark.full
def test_a_client_of_fts3_stages_and_archives(service: TestService, tape: TapeServer, places: Places) -> None:
    source = tape.put_to_tape(places.put(places.a / "file", b"content"))
    target = places.b / "copied"
    tape.recall_s, tape.migrate_s = 3.0, 2.0
    urls = (places.storages.url("https", "A", source), places.storages.url("https", "B", target))
    params = {"bring_online": 3600, "copy_pin_lifetime": 7200, "archive_timeout": 3600}
    body = {"files": [{"sources": urls[:1], "destinations": urls[1:]}], "params": params}
    status, answer = ask_door(service, "alice", "POST", "/jobs", body)
    assert status == 200, answer
    door_job = f"/jobs/{answer['job_id']}"

    def file_states() -> list[str]:
        return [one["file_state"] for one in ask_door(service, "alice", "GET", f"{door_job}/files")[1]]

    until(lambda: tape.requests and file_states() == ["STAGING"], service)
    (request,) = tape.requests.values()
    assert set(request.lifetimes) == {"PT7200S"}
    until(lambda: file_states() == ["ARCHIVING"], service)
    until(lambda: file_states() == ["FINISHED"], service)
    assert target.read_bytes() == b"content"
    _, job = ask_door(service, "alice", "GET", door_job)
    assert {key: job[key] for key in params} == params


@pytest.mark.full
def test_an_endpoint_names_its_api(service: TestService, tape: TapeServer, places: Places) -> None:
    """Discovery at the server of the tape API itself; the sources are on the local disk."""
    path = tape.put_to_tape(places.put(places.a / "file", b"content"))
    body = {"name": "discovered", "endpoints": {"HTTPS": tape.root, "XROOT": places.storages.xrootd["A"].root_url}}
    status, site = service.call("admin", "POST", "/sites", {**body, "public": True})
    assert status in (200, 201), site
    job = service.submit(
        "alice",
        "copy",
        src_siteid=site["id"],
        src_filepath=str(path),
        dst_siteid=DISK,
        dst_filepath=str(places.b / "new"),
        protocol="xroot",
        extra_opts={"stage": True},
    )
    assert ended(service, job)["status"] == "DONE", elements(service, job)
    assert (places.b / "new").read_bytes() == b"content"
    assert tape.count("discover") == 1


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "named",
    [
        ["polled"],
        pytest.param(["looked at", "requested", "accepted", "copied", "released", "archiving"], marks=pytest.mark.full),
    ],
    ids=["polled", "others"],
)
def test_a_daemon_that_is_killed(
    named: list[str], storages: TestStorages, tape: TapeServer, places: Places, tmp_path: Path
) -> None:
    """kill -9 when the request is announced, sent, polled, when files are copied, released, and archived."""
    service = new_service(storages, tape, tmp_path)
    service.start()
    service.delegate("alice")
    moments: dict[str, Callable[[], object]] = {
        "looked at": lambda: tape.count("archiveinfo"),
        "requested": lambda: tape.arrived["stage"],
        "accepted": lambda: tape.count("stage"),
        "polled": lambda: tape.count("status") > 1,
        "copied": lambda: list(places.b.rglob("file 1")),
        "released": lambda: tape.arrived["release"],
        "archiving": lambda: tape.count("archiveinfo") > 2,
    }
    try:
        for number, moment in enumerate(named):
            tape.reset()
            tape.recall_s, tape.migrate_s = 0.5, 2.0
            if moment == "requested":
                tape.faults["stage"].append("lost")
            source = places.a / f"tree{number}"
            files = [places.put(source / f"file {n}", b"%d" % n * 1000) for n in range(3)]
            for path in files:
                tape.put_to_tape(path)
            target = places.b / f"new{number}"
            job = copy(service, source, target, stage=True, archive=True)
            until(moments[moment], service)
            service.kill()
            service.start()
            assert ended(service, job)["status"] == "DONE", (moment, elements(service, job))
            for n, path in enumerate(files):
                assert (target / path.name).read_bytes() == b"%d" % n * 1000, moment
            assert tape.recalls == dict.fromkeys(map(str, files), 1), moment
            assert tape.count("stage") <= 2, moment
            if moment not in ("looked at", "requested", "accepted"):
                # Of a request whose name was lost, the lifetime ends: the kill may come before it is stored.
                (request,) = tape.requests.values()
                until(partial(request.released.issuperset, list(map(str, files))), service)
    finally:
        service.kill()


@pytest.mark.full
@pytest.mark.timeout(180)
def test_two_daemons(storages: TestStorages, tape: TapeServer, places: Places, tmp_path: Path) -> None:
    """Both poll, one of them at a time; one is killed in between."""
    grid = grid_of(storages)
    credentials = {"trust_dir": grid["ca_dir"]}
    with cluster_of(
        2, tmp_path, grid=grid, start=False, credentials=credentials, tape=_TAPE_SETTINGS, queue={"lease": "2s"}
    ) as cluster:
        for node in cluster.nodes:
            (node.directory / "sites.d" / "sites.conf").write_text(sites_of(storages, tape))
            trust_storages(node, storages)
        cluster.start()
        first, second = cluster.nodes
        first.delegate("alice")
        files = files_on_tape(tape, places, 20)
        tape.recall_s = 8.0
        job = copy(first, places.a / "tree", places.b / "new", stage=True)
        until(lambda: tape.count("status"), first)
        first.kill()
        assert second.wait_for("alice", job["id"])["status"] == "DONE", elements(second, job)
        assert tape.recalls == dict.fromkeys(map(str, files), 1)
        assert tape.count("stage") == 1
        (request,) = tape.requests.values()
        until(lambda: request.released == set(map(str, files)), second)

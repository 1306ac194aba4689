"""Copies from and to tape through the daemon: the WLCG tape REST API beside a real WebDAV server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from tests.protocols.places import Places
from tests.support.loopback import service_of
from tests.support.tape_server import TapeServer

pytestmark = pytest.mark.timeout(120)
TAPE, DISK, NO_API, NO_HTTPS = 1, 2, 3, 4
_TAPE_SETTINGS = {"poll": "100ms", "longest_poll": "400ms", "timeout": "2s"}


@pytest.fixture(scope="module")
def tape_server(storages: TestStorages) -> Iterator[TapeServer]:
    assert storages.credentials is not None
    with TapeServer(storages.credentials.host).running() as server:
        yield server


@pytest.fixture
def tape(tape_server: TapeServer) -> TapeServer:
    tape_server.reset()
    return tape_server


def new_service(storages: TestStorages, tape: TapeServer, directory: Path) -> TestService:
    sites = f"""\
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
    queue = {"first_pause": "100ms", "longest_pause": "300ms"}
    return service_of(storages, directory / "instance", sites, queue=queue, tape=_TAPE_SETTINGS)


@pytest.fixture(scope="module")
def service(
    storages: TestStorages, tape_server: TapeServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestService]:
    service = new_service(storages, tape_server, tmp_path_factory.mktemp("tape"))
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
    until(lambda: request.released, service)
    assert request.released == set(map(str, on_tape)) and not request.cancelled
    assert set(request.lifetimes) == {"PT7200S"}
    # One request for all, and one look at them.
    assert [each for each in tape.log if each[0] in ("archiveinfo", "stage")] == [("archiveinfo", 4), ("stage", 3)]


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

"""What the service itself lacks: programs and libraries of a protocol, or room for the credentials of its users."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService, set_keys
from pdm.testgrid.storages import TestStorages
from tests.helpers.driver import HelperProcess
from tests.protocols.places import Places, judged
from tests.support.loopback import service_of

pytestmark = pytest.mark.timeout(180)
_RELAY = (
    "from pdm.workqueue.helpers import main_relay; from pdm.workqueue.helpers.backends import {module}; "
    "{module}.{name} = '/nope/python'; main_relay.main()"
)
_XROOT = _RELAY.format(module="xrootd_session", name="SYSTEM_PYTHON")


@pytest.mark.parametrize(
    ("protocol", "code", "changes"),
    [
        ("ssh", ["-m", "pdm.workqueue.helpers.main_relay"], {"PATH": "/nope"}),
        ("xroot", ["-c", _XROOT], {}),
    ],
)
def test_a_program_that_is_missing_is_named(
    protocol: str, code: list[str], changes: dict[str, str], storages: TestStorages, places: Places
) -> None:
    with HelperProcess(code, {**storages.environment(), **changes}) as helper:
        event = helper.list(places.url(protocol, places.a))[-1]
        assert judged(protocol, event) == "service DEPENDENCY_MISSING"
        assert "install the package" in str(event)


@pytest.fixture
def service(storages: TestStorages, tmp_path: Path) -> Iterator[TestService]:
    sites = f"[a]\nid = 1\nhttps = {storages.server('https', 'A').url}\n[g]\nid = 2\ngridftp = gsiftp://localhost:1\n"
    queue = {"first_pause": "50ms", "longest_pause": "200ms", "poll_interval": "500ms"}
    service = service_of(storages, tmp_path / "instance", sites, queue=queue)
    yield service
    if service.process is not None:
        service.kill()


def until_says(service: TestService, *status: str) -> None:
    give_up_at = time.monotonic() + 30
    while (found := service.call("alice", "GET", "/health")[1])["status"] not in status:
        assert time.monotonic() < give_up_at, (found, service.tail())
        time.sleep(0.05)


@pytest.mark.full
def test_a_library_that_is_missing_holds_jobs_until_it_is_there(service: TestService, tmp_path: Path) -> None:
    broken = tmp_path / "libraries" / "libglobus_gssapi_gsi.so.4"
    broken.parent.mkdir()
    broken.write_text("no library\n")
    set_keys(service.directory / "workqueue.conf", {"agents": {"library_path": str(broken.parent)}})
    with service.running():
        service.delegate("alice")
        submitted = service.submit("alice", "list", src_siteid=2, src_filepath="/t", protocol="GRIDFTP", max_tries=1)
        job = f"/jobs/{submitted['id']}"
        service.wait_for("alice", submitted["id"], until=["HELD"])
        _, element = service.call("alice", "GET", f"{job}/elements/0")
        assert element["error"]["code"] == "DEPENDENCY_MISSING" and element["error"]["scope"] == "service"
        assert "libglobus_gssapi_gsi.so.4" in element["error"]["message"]
        assert "GRIDFTP cannot be used" in service.log_path.read_text()
    broken.unlink()
    with service.running():
        # No server is there: but it is asked.
        give_up_at = time.monotonic() + 30
        while service.call("alice", "GET", f"{job}/elements/0")[1]["error"]["code"] != "CONNECTION":
            assert time.monotonic() < give_up_at, service.tail()
            time.sleep(0.05)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
@pytest.mark.full
def test_a_full_credentials_directory_fails_no_jobs(service: TestService, places: Places) -> None:
    directory = service.directory / "full"
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", directory], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    set_keys(service.directory / "workqueue.conf", {"credentials": {"folder": str(directory)}})
    source = places.put(places.a / "file")
    try:
        with service.running():
            service.delegate("alice")
            filler = directory / "filler"
            with filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096 and os.statvfs(directory).f_bavail:
                    pass
            jobs = [
                service.submit("alice", "list", src_siteid=1, src_filepath=str(source), protocol="HTTPS", max_tries=1)[
                    "id"
                ]
                for _ in range(20)
            ]
            until_says(service, "paused")
            assert service.call("alice", "GET", "/health")[1]["faults"][0]["part"] == "credential files"
            time.sleep(1.5)
            states = [service.call("alice", "GET", f"/jobs/{job}/elements/0")[1] for job in jobs]
            assert {each["status"] for each in states} == {"SUBMITTED"}
            assert max(each["attempts"] for each in states) <= 1
            filler.unlink()
            assert {service.wait_for("alice", job)["status"] for job in jobs} == {"DONE"}
            until_says(service, "ok")
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)

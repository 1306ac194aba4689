"""A path that always fails ends by itself, and does not delay other work at the same server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from tests.protocols.places import Places
from tests.support.loopback import service_of
from tests.support.redirecting_server import RedirectingServer

pytestmark = pytest.mark.timeout(180)
_GOOD = 4


@pytest.fixture
def server(storages: TestStorages) -> Iterator[RedirectingServer]:
    credentials = storages.credentials
    assert credentials is not None
    with RedirectingServer(credentials.host.certificate, credentials.host.key, credentials.trust) as running:
        yield running


@pytest.fixture
def service(storages: TestStorages, server: RedirectingServer, tmp_path: Path) -> Iterator[TestService]:
    (tmp_path / "tree").mkdir()
    sites = f"[local]\nid = 1\nfile = file://{tmp_path}\n[dav]\nid = 2\nhttps = {server.url}\n"
    sites += f"[real]\nid = 3\nhttps = {storages.server('https', 'B').url}\n"
    # The pause of an endpoint that is taken to be away is longer than all that the test waits for.
    queue = {"first_pause": "1s", "longest_pause": "100s", "poll_interval": "500ms"}
    service = service_of(storages, tmp_path / "instance", sites, queue=queue)
    with service.running():
        service.delegate("alice")
        yield service


def copy(service: TestService, name: str, destination: str, site: int = 2) -> int:
    job = service.submit(
        "alice",
        "copy",
        src_siteid=1,
        src_filepath=name,
        dst_siteid=site,
        dst_filepath=destination,
        protocol="FILE",
        max_tries=2,
    )
    return int(job["id"])


@pytest.mark.full
@pytest.mark.parametrize("status", [0, pytest.param(503, marks=pytest.mark.full)])
def test_one_bad_directory_does_not_starve_others(
    status: int, service: TestService, server: RedirectingServer, tmp_path: Path
) -> None:
    server.broken["/bad/"] = status
    for name in ("bad", *(f"good{number}" for number in range(_GOOD))):
        (tmp_path / name).write_text(name)
    bad = [copy(service, "bad", f"/bad/{number}") for number in range(4)]
    time.sleep(1)
    good = [copy(service, f"good{number}", f"/directory/good{number}") for number in range(_GOOD)]
    for job in good:
        assert service.wait_for("alice", job, timeout_s=20)["status"] == "DONE", service.tail()
    for job in bad:
        assert service.wait_for("alice", job, timeout_s=40)["status"] == "FAILED", service.tail()
        _, element = service.call("alice", "GET", f"/jobs/{job}/elements/1")
        assert element["attempts"] == 2, (element, service.tail())
    assert "is paused until" not in service.log_path.read_text()


@pytest.mark.full
def test_a_server_that_is_away_costs_nothing_and_is_found_by_a_look(
    service: TestService, places: Places, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("content")
    places.storages.server("https", "B").stop()
    jobs = [copy(service, "file", f"{places.b}/file{number}", 3) for number in range(3)]
    give_up_at = time.monotonic() + 30
    while "is paused until" not in service.log_path.read_text():
        assert time.monotonic() < give_up_at, service.tail()
        time.sleep(0.1)
    attempts = sum(service.call("alice", "GET", f"/jobs/{job}/elements/1")[1]["attempts"] for job in jobs)
    time.sleep(3)
    again = [service.call("alice", "GET", f"/jobs/{job}/elements/1")[1] for job in jobs]
    # Looks, and no element, find out that it is still away.
    assert sum(each["attempts"] for each in again) <= attempts + 2
    places.storages.server("https", "B").start()
    for job in jobs:
        assert service.wait_for("alice", job, timeout_s=60)["status"] == "DONE", service.tail()

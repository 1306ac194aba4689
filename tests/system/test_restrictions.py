"""Drained sites and banned users, and a second daemon that hears of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pdm.testgrid.service import TestService

_SITE = {"name": "DRAINED", "endpoints": {"DUMMY": "dummy://drained"}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    service = TestService(tmp_path_factory.mktemp("restrictions") / "instance")
    service.init()
    with service.running():
        yield service
    assert "Traceback" not in service.log_path.read_text()


def call(service: TestService, method: str, path: str, body: Any = None) -> Any:
    status, answer = service.call("admin", method, path, body)
    assert status in (200, 201), answer
    return answer


@pytest.mark.full
def test_nothing_new_starts_at_a_drained_site(service: TestService) -> None:
    number = call(service, "POST", "/sites", _SITE)["id"]
    slow = service.submit(
        "admin", "list", src_siteid=number, src_filepath="a", protocol="DUMMY", extra_opts={"dummy": {"list_delay": 1}}
    )
    service.wait_for("admin", slow["id"], until=("RUNNING",))
    assert "new disks" in service.pdm("admin", "site", "drain", "DRAINED", "new disks").stdout
    waiting = service.submit("admin", "list", src_siteid=number, src_filepath="b", protocol="DUMMY")
    # It is accepted; the response says that it will wait, and why.
    assert waiting["waiting"] == [f"site DRAINED ({number}) is drained: new disks"]
    told = service.pdm("admin", "mkdir", "--no-wait", "--protocol", "dummy", "DRAINED:c")
    assert (told.returncode, "is drained: new disks" in told.stderr) == (0, True), told.stderr
    told = service.pdm("admin", "ls", "--timeout", "1s", "--protocol", "dummy", "DRAINED:d")
    assert (told.returncode, told.stderr.count("is drained: new disks")) == (10, 1), told.stderr
    # What runs ends; and work at other sites does not wait behind what may not begin.
    assert service.wait_for("admin", slow["id"])["status"] == "DONE"
    other = service.submit("admin", "list", src_siteid=1, src_filepath="c", protocol="DUMMY")
    assert service.wait_for("admin", other["id"])["status"] == "DONE"
    seen = call(service, "GET", f"/jobs/{waiting['id']}")
    assert (seen["status"], seen["waiting"]) == ("SUBMITTED", [f"site DRAINED ({number}) is drained: new disks"])
    assert "[drained: new disks]" in service.pdm("admin", "sites").stdout
    assert service.pdm("admin", "site", "resume", "DRAINED").returncode == 0
    # Also the two of `pdm`, which follow.
    for job in range(waiting["id"], other["id"]):
        assert service.wait_for("admin", job)["status"] == "DONE"
    assert service.pdm("admin", "site", "remove", "DRAINED").returncode == 0
    log = service.log_path.read_text()
    assert "site.drain" in log
    assert "new disks" in service.pdm("admin", "audit").stdout


@pytest.mark.full
def test_the_sites_survive_a_restart(service: TestService) -> None:
    printed = service.pdm("admin", "site", "add", "KEPT", "--dummy", "dummy://kept", "--folder", "/x", "--public")
    assert printed.returncode == 0, printed.stderr
    number = next(each["id"] for each in call(service, "GET", "/sites") if each["name"] == "KEPT")
    trust = service.directory / "var" / "trust" / "left-over"
    trust.mkdir()
    assert service.stop() == 0
    service.start()
    assert not trust.exists()
    assert "/x" in service.pdm("admin", "site", "show", str(number)).stdout
    checked = service.pdm("admin", "site", "check", "KEPT")
    assert checked.returncode == 0, checked.stdout
    listed = service.pdm("admin", "ls", "--protocol", "dummy", "KEPT:")
    assert listed.returncode == 0, listed.stderr
    changed = service.pdm("admin", "site", "change", "KEPT", "--private", "--limit-in", "4", "--name", "RENAMED")
    assert "private" in changed.stdout
    assert "4 streams may go in" in changed.stdout

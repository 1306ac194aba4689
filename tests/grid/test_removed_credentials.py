"""A credential that is removed while agents work with it: they end, and what they did is held, at no cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService


@pytest.fixture
def service(grid: TestGrid, tmp_path: Path) -> TestService:
    service = TestService(tmp_path / "instance", grid.description(), grid.directory)
    service.init(agents={"cancel_grace": "200ms"})
    return service


@pytest.mark.full
def test_what_runs_with_a_removed_proxy_is_held(service: TestService, grid: TestGrid, grid_directories: Any) -> None:
    server = grid.sites["A"].server
    with service.running():
        service.delegate("bob")
        server.freeze()
        job = service.submit("bob", "list", src_siteid=1, src_filepath=str(grid_directories.a), max_tries=1)
        service.wait_for("bob", job["id"], until=["RUNNING"])
        used = service.directory / "var" / "credentials"
        give_up_at = time.monotonic() + 20
        while not list(used.iterdir()):
            assert time.monotonic() < give_up_at
            time.sleep(0.02)
        proxy = next(each for each in service.call("bob", "GET", "/credentials")[1] if each["kind"] == "proxy")
        assert service.call("bob", "DELETE", f"/credentials/{proxy['id']}")[0] == 204
        # The server does not answer: it is not that the attempt has come to its end.
        held = service.wait_for("bob", job["id"], until=["HELD"], timeout_s=15)
        assert held["hold"]["code"] == "CREDENTIAL_MISSING"
        while list(used.iterdir()):
            assert time.monotonic() < give_up_at, "the file goes with the agent"
            time.sleep(0.02)
        server.thaw()
        service.delegate("bob")
        ended = service.wait_for("bob", job["id"], timeout_s=15)
        assert (ended["status"], ended["max_tries"]) == ("DONE", 1)
    log = service.log_path.read_text()
    assert "attempts with a removed credential are ended" in log
    assert "Traceback" not in log


@pytest.mark.full
def test_a_renewed_proxy_ends_nothing(service: TestService, grid: TestGrid, grid_directories: Any) -> None:
    server = grid.sites["A"].server
    with service.running():
        service.delegate("bob")
        server.freeze()
        job = service.submit("bob", "list", src_siteid=1, src_filepath=str(grid_directories.a), max_tries=1)
        service.wait_for("bob", job["id"], until=["RUNNING"])
        service.delegate("bob")
        server.thaw()
        assert service.wait_for("bob", job["id"], timeout_s=15)["status"] == "DONE"
        assert service.call("bob", "GET", f"/jobs/{job['id']}/elements/0")[1]["attempts"] == 1

"""Sites of users on the real grid: checked, trusted by authorities of their own, away and back, drained."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.credentials import make_host
from pdm.testgrid.service import TestService
from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.certificates.pem_files import to_pem

FILES = 300


@pytest.fixture(scope="module")
def service(grid: TestGrid, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    """A daemon that is patient with sites, and tries them again soon."""
    service = TestService(tmp_path_factory.mktemp("sites") / "instance", grid.description(), grid.directory)
    service.init(queue={"first_pause": "200ms", "longest_pause": "500ms", "stall": "5s", "total": "20s"})
    with service.running():
        service.delegate("alice")
        yield service
    assert "Traceback" not in service.log_path.read_text()


def until(service: TestService, path: str, condition: Any, timeout_s: float = 60.0) -> Any:
    """Ask until the answer is as wanted."""
    give_up_at = time.monotonic() + timeout_s
    while True:
        status, answer = service.call("alice", "GET", path)
        if status == 200 and condition(answer):
            return answer
        assert time.monotonic() < give_up_at, f"{path}: {answer}\n{service.tail()}"
        time.sleep(0.05)


def add(service: TestService, name: str, user: str = "alice", **more: Any) -> int:
    status, site = service.call(user, "POST", "/sites", {"name": name, **more})
    assert status == 201, site
    return int(site["id"])


def test_a_site_that_goes_away_costs_no_tries(service: TestService, grid: TestGrid, grid_folders: Any) -> None:
    tree = grid_folders.a / "tree"
    tree.mkdir()
    for number in range(FILES):
        (tree / f"file{number}").write_bytes(b"x" * 1000)
    grid_folders.give()
    job = service.submit(
        "alice", "copy", src_siteid=1, src_filepath=str(tree), dst_siteid=2, dst_filepath=str(grid_folders.b / "copy")
    )
    path = f"/jobs/{job['id']}"
    until(service, path, lambda seen: seen["num_done"] > 1)
    grid.sites["B"].server.stop()
    site = until(service, "/sites/2", lambda seen: seen["state"] == "paused")
    assert "cannot be reached" in site["reason"]
    assert next(each["state"] for each in site["health"]) in ("open", "half-open")
    waiting = until(service, f"{path}/status", lambda seen: seen.get("waiting"))
    assert "site B (2) cannot be reached" in waiting["waiting"][0]
    assert "waits" in service.pdm("alice", "status", str(job["id"])).stdout
    assert "paused" in service.pdm("alice", "site", "show", "B").stdout
    # Some probes fail, and burn nothing.
    time.sleep(2)
    grid.sites["B"].server.start()
    ended = service.wait_for("alice", job["id"])
    assert (ended["status"], ended["num_failed"]) == ("DONE", 0), service.tail()
    assert len(list((grid_folders.b / "copy").iterdir())) == FILES
    assert not list((grid_folders.b / "copy").glob(".pdm-*"))
    assert until(service, "/sites/2", lambda seen: seen["state"] == "ok")["reason"] is None
    assert "can be reached again" in service.log_path.read_text()


def test_a_check_says_what_works(service: TestService, grid: TestGrid, grid_folders: Any) -> None:
    url = grid.sites["A"].server.url
    number = add(
        service,
        "TwoDoors",
        endpoints={"gridftp": [url, "gsiftp://localhost:1"], "xroot": "root://localhost:1"},
        default_folder=str(grid_folders.a),
    )
    status, checks = service.call("alice", "POST", f"/sites/{number}/check")
    assert status == 200
    works, away, other = checks
    assert (works["ok"], works["reachable"], works["login"], works["listing"]) == (True, True, True, True), works
    assert works["seconds"] > 0
    assert (away["ok"], away["reachable"], away["login"]) == (False, False, None)
    assert (away["error"]["code"], away["error"]["scope"]) == ("CONNECTION", "source")
    assert (other["protocol"], other["error"]["code"]) == ("XROOT", "CONNECTION")
    printed = service.pdm("alice", "site", "check", "TwoDoors")
    assert printed.returncode == 6
    assert f"gridftp {url}: reachable yes, login yes, listing yes" in printed.stdout
    assert service.call("alice", "PATCH", f"/sites/{number}", {"default_folder": "/no/such"})[0] == 200
    _, checks = service.call("alice", "POST", f"/sites/{number}/check")
    assert (checks[0]["login"], checks[0]["listing"], checks[0]["error"]["code"]) == (True, False, "NOT_FOUND")
    assert service.call("bob", "GET", f"/sites/{number}")[0] == 404
    assert service.call("bob", "POST", f"/sites/{number}/check")[0] == 404
    # The endpoint that is away is passed over.
    job = service.submit("alice", "list", src_siteid=number, src_filepath=str(grid_folders.a))
    assert service.wait_for("alice", job["id"])["status"] == "DONE"


def test_authorities_of_sites_are_trusted_there_only(
    service: TestService, grid: TestGrid, grid_folders: Any, tmp_path: Path
) -> None:
    """Two sites, each of an authority of its own that the service does not know, copy to each other."""
    (grid_folders.a / "file").write_text("content")
    grid_folders.give()
    foreign = Authority.create("/DC=org/DC=foreign/CN=Foreign CA")
    server = grid._start_server(
        "foreign", grid.sites["B"].root, make_host(grid.directory, foreign, "foreign", ["localhost"])
    )
    Authority.create("/DC=org/DC=usual/CN=Usual CA").write_trust(tmp_path / "trust")
    other = TestService(service.directory.parent / "other", grid.description(), grid.directory)
    other.init(credentials={"trust_dir": str(tmp_path / "trust")}, sites={"patience": "0"})
    ours = next(Path(grid.description()["ca_dir"]).glob("*.0")).read_text()
    theirs = to_pem(foreign.certificate).decode()
    url = grid.sites["A"].server.url
    with other.running():
        other.delegate("alice")
        first = add(other, "Ours", endpoints={"gridftp": url}, authorities=ours)
        second = add(other, "Theirs", endpoints={"gridftp": server.url}, authorities=theirs)
        mixed = [
            add(other, "Neither", endpoints={"gridftp": url}, authorities=theirs),
            add(other, "Nor", endpoints={"gridftp": server.url}, authorities=ours),
        ]
        _, shown = other.call("alice", "GET", f"/sites/{second}")
        assert shown["authorities"] == [foreign.dn]
        places = [(first, grid_folders.a / "file"), (second, grid_folders.b / "copy"), (first, grid_folders.a / "back")]
        for (source, path), (destination, copy) in pairwise(places):
            job = other.submit(
                "alice",
                "copy",
                src_siteid=source,
                src_filepath=str(path),
                dst_siteid=destination,
                dst_filepath=str(copy),
            )
            assert other.wait_for("alice", job["id"])["status"] == "DONE", other.tail()
            assert copy.read_text() == "content"
        for number in (1, *mixed):
            job = other.submit("alice", "list", src_siteid=number, src_filepath=str(grid_folders.a))
            assert other.wait_for("alice", job["id"])["status"] == "FAILED", number
            _, element = other.call("alice", "GET", f"/jobs/{job['id']}/elements/0")
            assert element["error"]["code"] == "CERTIFICATE", element
            _, checks = other.call("alice", "POST", f"/sites/{number}/check")
            check = next(each for each in checks if each["protocol"] == "GRIDFTP")
            assert (check["reachable"], check["login"], check["error"]["code"]) == (True, False, "CERTIFICATE")
        folders = list((other.directory / "var" / "trust").iterdir())
        assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}

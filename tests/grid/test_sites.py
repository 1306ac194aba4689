"""Sites of users on the real grid: checked, trusted by authorities of their own, away and back, drained."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService
from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.certificates.pem import to_pem

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


def test_a_site_that_goes_away_costs_no_tries(service: TestService, grid: TestGrid, grid_directories: Any) -> None:
    tree = grid_directories.a / "tree"
    tree.mkdir()
    for number in range(FILES):
        (tree / f"file{number}").write_bytes(b"x" * 1000)
    grid_directories.give()
    job = service.submit(
        "alice",
        "copy",
        src_siteid=1,
        src_filepath=str(tree),
        dst_siteid=2,
        dst_filepath=str(grid_directories.b / "copy"),
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
    assert len(list((grid_directories.b / "copy").iterdir())) == FILES
    assert not list((grid_directories.b / "copy").glob(".pdm-*"))
    assert until(service, "/sites/2", lambda seen: seen["state"] == "ok")["reason"] is None
    assert "can be reached again" in service.log_path.read_text()


@pytest.mark.full
def test_a_check_says_what_works(service: TestService, grid: TestGrid, grid_directories: Any) -> None:
    url = grid.sites["A"].server.url
    number = add(
        service,
        "TwoDoors",
        endpoints={"gridftp": [url, "gsiftp://localhost:1"], "xroot": "root://localhost:1"},
        default_folder=str(grid_directories.a),
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
    job = service.submit("alice", "list", src_siteid=number, src_filepath=str(grid_directories.a))
    assert service.wait_for("alice", job["id"])["status"] == "DONE"


# -- sites of unlike authorities


@pytest.fixture
def strangers(service: TestService, grid: TestGrid, tmp_path: Path) -> Iterator[TestService]:
    """A daemon that knows no authority of any storage server but those that sites bring."""
    Authority.create("/DC=org/DC=usual/CN=Usual CA").write_trust(tmp_path / "trust")
    other = TestService(tmp_path / "instance", grid.description(), grid.directory)
    other.init(credentials={"trust_dir": str(tmp_path / "trust")}, sites={"patience": "0"})
    with other.running():
        other.delegate("alice")
        yield other
    assert "Traceback" not in other.log_path.read_text()


class Institute:
    """A server with an authority of its own, which neither the service nor any other server knows.

    Attributes:
        false: URL of a second server that this authority vouches for, to stand in the place of another's.
    """

    def __init__(self, grid: TestGrid, name: str, home: str) -> None:
        self.authority = Authority.create(f"/DC=org/DC={name}/CN={name} CA")
        self.pem = to_pem(self.authority.certificate).decode()
        self.name = name
        self.servers = [grid.add_server(each, home=home, authority=self.authority) for each in (name, f"{name}-false")]
        self.url, self.false = (server.url for server in self.servers)


@pytest.fixture(scope="module")
def institutes(grid: TestGrid) -> Iterator[tuple[Institute, Institute]]:
    made = Institute(grid, "lab", "A"), Institute(grid, "campus", "B")
    yield made
    for server in (*made[0].servers, *made[1].servers):
        server.stop()


def copied(service: TestService, source: int, path: Path, destination: int, copy: Path) -> dict[str, Any]:
    """How a copy ended; its last error, if there is one."""
    submitted = service.submit(
        "alice", "copy", src_siteid=source, src_filepath=str(path), dst_siteid=destination, dst_filepath=str(copy)
    )
    ended = service.wait_for("alice", submitted["id"])
    _, elements = service.call("alice", "GET", f"/jobs/{ended['id']}/elements")
    _, element = service.call("alice", "GET", f"/jobs/{ended['id']}/elements/{len(elements) - 1}")
    return {"status": ended["status"], **(element.get("error") or {})}


def large(path: Path) -> Path:
    """A file that is left to the fallback, over connections of the Globus library's own."""
    with path.open("wb") as file:
        file.truncate(70 * 1024 * 1024)
    return path


@pytest.mark.full
def test_sites_of_unlike_authorities_copy_to_each_other(
    strangers: TestService, institutes: tuple[Institute, Institute], grid_directories: Any
) -> None:
    """From server to server: each is trusted by the authority of its site, and they know nothing of each other's."""
    lab, campus = (
        add(strangers, each.name, endpoints={"gridftp": each.url}, authorities=each.pem) for each in institutes
    )
    _, shown = strangers.call("alice", "GET", f"/sites/{campus}")
    assert shown["authorities"] == [institutes[1].authority.dn]
    (grid_directories.a / "small").write_text("content")
    large(grid_directories.a / "large")
    grid_directories.give()
    for name in ("small", "large"):
        path, there, back = grid_directories.a / name, grid_directories.b / name, grid_directories.a / f"{name} back"
        assert copied(strangers, lab, path, campus, there) == {"status": "DONE"}, strangers.tail()
        assert copied(strangers, campus, there, lab, back) == {"status": "DONE"}, strangers.tail()
        assert back.read_bytes() == path.read_bytes()
    directories = list((strangers.directory / "var" / "trust").iterdir())
    assert {directory.stat().st_mode & 0o777 for directory in directories} == {0o700}


@pytest.mark.full
def test_the_authority_of_a_site_vouches_for_no_other(
    strangers: TestService, institutes: tuple[Institute, Institute], grid_directories: Any
) -> None:
    """A real server with a certificate of the one, in the place of the other: alone, and as either end of a copy."""
    (grid_directories.a / "small").write_text("content")
    large(grid_directories.a / "large")
    grid_directories.give()
    for true, other in (institutes, institutes[::-1]):
        honest = add(strangers, f"true-{true.name}", endpoints={"gridftp": true.url}, authorities=true.pem)
        # It says that it is the other institute's, whose authority has not signed it.
        false = add(strangers, f"false-{true.name}", endpoints={"gridftp": true.false}, authorities=other.pem)
        bare = add(strangers, f"bare-{true.name}", endpoints={"gridftp": true.false})
        for number in (false, bare):
            _, (check,) = strangers.call("alice", "POST", f"/sites/{number}/check")
            assert (check["reachable"], check["login"], check["error"]["code"]) == (True, False, "CERTIFICATE")
            for name in ("small", "large"):
                found = copied(strangers, honest, grid_directories.a / name, number, grid_directories.b / "x")
                assert (found["status"], found["code"], found["scope"]) == ("FAILED", "CERTIFICATE", "destination")
                found = copied(strangers, number, grid_directories.a / name, honest, grid_directories.b / "x")
                assert (found["status"], found["code"], found["scope"]) == ("FAILED", "CERTIFICATE", "source")
        assert list(grid_directories.b.iterdir()) == []

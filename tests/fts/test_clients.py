"""CERN's own client, Rucio's transfertool and DIRAC's FTS3Job at the door, on the real grid."""

from __future__ import annotations

import json
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.fts.conftest import FtsClients
from tests.grid.agent_sites import Sites
from tests.helpers.driver import put

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]
COUNT = 1000
#: Nothing answers there.
NOWHERE = "gsiftp://192.0.2.1/x"


def make_files(sites: Sites, count: int) -> tuple[str, str]:
    """URLs of a directory with files of 2,000 bytes, and of an empty one."""
    for number in range(1, count + 1):
        put(sites.a / f"f{number}", number.to_bytes(2) * 1000)
    for directory in (sites.a, sites.b):
        sites.grid.give(directory)
    return sites.url(sites.a), sites.url(sites.b)


def pair(source: str, destination: str, name: str, **more: Any) -> dict[str, Any]:
    return {"sources": [f"{source}/{name}"], "destinations": [f"{destination}/{name}"], **more}


def submitted(output: str) -> str:
    found = re.search(r"Job id: (\S+)", output)
    assert found is not None, output
    return found[1]


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.2)


def test_a_session_of_the_commands(clients: FtsClients, sites: Sites, tmp_path: Path) -> None:
    source, destination = make_files(sites, COUNT)
    dn = clients.grid.description()["users"]["alice"]["dn"]
    assert f"User DN: {dn}\n" in clients.command("alice", "whoami")
    assert "Delegation id: " in clients.command("alice", "delegate", "-H", "6")
    bulk = tmp_path / "bulk.json"
    files = [
        pair(source, destination, f"f{number}", filesize=2000, metadata={"n": number}) for number in range(1, COUNT + 1)
    ]
    bulk.write_text(json.dumps({"files": files}))
    output = clients.command("alice", "transfer-submit", "-f", str(bulk), "-K", "--blocking", "-i", "1")
    assert "Job finished with state FINISHED" in output
    assert len(list(sites.b.iterdir())) == COUNT
    status = json.loads(clients.command("alice", "transfer-status", "-j", submitted(output)))
    assert [(each["file_state"], each["file_metadata"]["n"]) for each in status["files"]] == [
        ("FINISHED", number) for number in range(1, COUNT + 1)
    ]
    assert all(each["checksum"].startswith("ADLER32:") for each in status["files"])

    waiting = submitted(clients.command("alice", "transfer-submit", NOWHERE, f"{destination}/never"))
    assert waiting in clients.command("alice", "transfer-list")
    assert waiting not in clients.command("bob", "transfer-list")
    file = json.loads(clients.command("alice", "transfer-status", "-j", waiting))["files"][0]["file_id"]
    assert clients.command("alice", "transfer-cancel", f"{waiting}:{file}").strip() in ("CANCELED", "ACTIVE")
    assert clients.command("alice", "transfer-cancel", waiting).strip() == "CANCELED"
    assert "Status: CANCELED" in clients.command("alice", "transfer-status", waiting)
    assert "Not enough permissions" in clients.command("bob", "transfer-status", waiting, status=1)
    refused = clients.command("alice", "transfer-submit", "--multi-hop", NOWHERE, f"{destination}/x", status=1)
    assert "multihop: this service copies without hops" in refused


def test_a_submission_that_is_repeated_after_a_crash(clients: FtsClients, sites: Sites, tmp_path: Path) -> None:
    source, destination = make_files(sites, 20)
    clients.command("alice", "delegate")
    bulk = tmp_path / "bulk.json"
    files = [pair(source, destination, f"f{number}") for number in range(1, 21)]
    bulk.write_text(json.dumps({"files": files, "params": {"id_generator": "deterministic", "sid": "after a crash"}}))
    first = submitted(clients.command("alice", "transfer-submit", "-f", str(bulk)))
    clients.service.kill()
    clients.service.start()
    again = clients.command("alice", "transfer-submit", "-f", str(bulk), status=1)
    assert "409" in again
    wait_for(lambda: "Status: FINISHED\n" in clients.command("alice", "transfer-status", first))
    assert len(list(sites.b.iterdir())) == 20


def test_the_transfertool_of_rucio(clients: FtsClients, sites: Sites) -> None:
    source, destination = make_files(sites, 10)
    clients.command("alice", "delegate")
    found = clients.script("alice", "rucio_session.py", source, destination)
    assert found == {
        "version": 3,
        "user": clients.grid.description()["users"]["alice"]["dn"],
        "same id again": True,
        "bulk": ["FINISHED"] * 5,
        "unknown": None,
        "several sources": ["f7", "FINISHED"],
        "details": 2,
        "priority": 5,
        "cancelled": "CANCELED",
    }


def test_the_jobs_of_dirac(clients: FtsClients, sites: Sites) -> None:
    source, destination = make_files(sites, 10)
    proxy = clients.grid.description()["users"]["alice"]["proxy"]
    found = clients.script("alice", "dirac_session.py", proxy, source, destination)
    assert "NOT_FOUND" in found.pop("error")
    assert found == {
        "submitted": [1, 2, 3],
        "status": "Finisheddirty",
        "files": {"1": "Finished", "2": "Finished", "3": "Defunct"},
        "accounting": [["Finished", 2, 4000], ["Failed", 0, 0]],
        "cancelled": "Canceled",
        "lost": "Failed",
    }


def test_one_of_two_files_that_run_is_cancelled(clients: FtsClients, sites: Sites, tmp_path: Path) -> None:
    source, destination = make_files(sites, 2)
    clients.command("alice", "delegate")
    bulk = tmp_path / "bulk.json"
    bulk.write_text(json.dumps({"files": [pair(source, destination, name) for name in ("f1", "f2")]}))
    server = clients.grid.sites["A"].server

    def states(job: str) -> list[str]:
        _, files = clients.call("alice", "GET", f"/jobs/{job}/files")
        return [file["file_state"] for file in files]

    server.freeze()
    try:
        job = submitted(clients.command("alice", "transfer-submit", "-f", str(bulk)))
        wait_for(lambda: states(job) == ["ACTIVE", "ACTIVE"])
        _, files = clients.call("alice", "GET", f"/jobs/{job}/files")
        assert clients.command("alice", "transfer-cancel", f"{job}:{files[0]['file_id']}").strip() == "CANCELED"
        assert states(job)[0] == "CANCELED"
        assert states(job)[1] in ("ACTIVE", "SUBMITTED")
    finally:
        server.thaw()
    wait_for(lambda: states(job) == ["CANCELED", "FINISHED"], 120)
    assert [path.name for path in sites.b.iterdir()] == ["f2"]


def test_operations_at_storages(clients: FtsClients, sites: Sites) -> None:
    source, destination = make_files(sites, 3)
    clients.command("alice", "delegate")

    def dm(method: str, name: str, body: object = None, **query: str) -> tuple[int, Any]:
        return clients.call("alice", method, f"/dm/{name}" + (f"?{urlencode(query)}" if query else ""), body)

    status, listing = dm("GET", "list", surl=source)
    assert (status, {name: each["size"] for name, each in listing.items()}) == (200, {f"f{n}": 2000 for n in (1, 2, 3)})
    assert dm("POST", "mkdir", {"surl": f"{destination}/made"}) == (200, 0)
    status, made = dm("GET", "stat", surl=f"{destination}/made")
    assert (status, stat.S_ISDIR(made["mode"])) == (200, True)
    assert dm("POST", "rename", {"old": f"{source}/f1", "new": f"{source}/g1"}) == (200, 0)
    assert dm("POST", "unlink", {"surl": f"{source}/f2"}) == (200, 0)
    assert sorted(path.name for path in sites.a.iterdir()) == ["f3", "g1"]
    status, error = dm("GET", "stat", surl=f"{source}/f1")
    assert (status, error["status"]) == (404, "404 Not Found")
    assert dm("POST", "unlink", {"surl": f"{destination}/made"})[0] == 400
    put(sites.b / "made" / "inside", b"x")
    assert dm("POST", "rmdir", {"surl": f"{destination}/made"})[0] == 400
    assert dm("POST", "rmdir", {"surl": f"{source}/f3"})[0] == 400
    assert (sites.b / "made" / "inside").exists() and (sites.a / "f3").exists()
    (sites.b / "made" / "inside").unlink()
    assert dm("POST", "rmdir", {"surl": f"{destination}/made"}) == (200, 0)
    assert not (sites.b / "made").exists()
    assert dm("GET", "list", surl="file:///etc")[0] == 400

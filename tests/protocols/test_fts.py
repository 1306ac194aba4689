"""Copies between HTTPS, XROOT and GRIDFTP that are handed over to an FTS3, which is another daemon with a door."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from tests.helpers.driver import tree
from tests.protocols.places import Places
from tests.support.attempt_logs import job_logs
from tests.support.fts_pair import FtsPair
from tests.support.instances import until
from tests.support.loopback import service_of

PROTOCOLS = ("https", "xroot", "gridftp")
SITES = {(protocol, letter): 2 * n + m for n, protocol in enumerate(PROTOCOLS) for m, letter in enumerate("AB", 1)}
QUEUE = {"first_pause": "100ms", "longest_pause": "300ms", "stall": "30s", "total": "60s"}
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def pair(storages: TestStorages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FtsPair]:
    """Daemons with the same sites; for the worker, those with the letter B name the other as their FTS3."""
    assert storages.credentials is not None
    host, port = storages.credentials.host, reserve_port()
    directory = tmp_path_factory.mktemp("fts")
    fts = service_of(
        storages,
        directory / "fts",
        _sites(storages, ""),
        queue=QUEUE,
        fts={"host": "localhost", "port": str(port)},
        tls={"certificate": str(host.certificate), "key": str(host.key)},
    )
    # By which its callers know it.
    shutil.copyfile(next(storages.credentials.trust.glob("*.0")), fts.directory / "certificates" / "ca.crt")
    worker = service_of(
        storages,
        directory / "worker",
        _sites(storages, f"fts = https://localhost:{port}\n"),
        queue=QUEUE,
        fts={"poll": "300ms"},
    )
    with fts.running(), worker.running():
        worker.delegate("alice")
        yield FtsPair(fts, worker)
    for service in (fts, worker):
        assert "Traceback" not in service.log_path.read_text()


def _sites(storages: TestStorages, fts: str) -> str:
    return "\n".join(
        f"[{protocol}-{letter}]\nid = {number}\n{protocol} = {_endpoint(storages, protocol, letter)}\n"
        + (fts if letter == "B" else "")
        for (protocol, letter), number in SITES.items()
    )


def _endpoint(storages: TestStorages, protocol: str, letter: str) -> str:
    return storages.xrootd[letter].root_url if protocol == "xroot" else storages.server(protocol, letter).url


def submit(pair: FtsPair, protocol: str, other: str, **fields: Any) -> int:
    """Have the worker copy from A by one protocol to B by another; the number of the job."""
    where = {"src_siteid": SITES[protocol, "A"], "dst_siteid": SITES[other, "B"], "protocol": protocol}
    number: int = pair.worker.submit("alice", "copy", **where, **fields)["id"]
    return number


def log_of(service: TestService) -> str:
    """The log of the newest job."""
    return max(job_logs(service.directory / "var" / "logs"), key=lambda path: path.stat().st_mtime).read_text()


def handed_over(pair: FtsPair) -> int:
    """How many files the FTS3 has been given so far."""
    _, jobs = pair.fts.call("alice", "GET", "/jobs?limit=500")
    return sum(job["num_elements"] for job in jobs)


def errors(pair: FtsPair, job: int) -> dict[str, tuple[str, str]]:
    """Scope and code of each failed element, by the name of its source."""
    _, found = pair.worker.call("alice", "GET", f"/jobs/{job}/elements?status=FAILED")
    return {Path(each["src_filepath"]).name: (each["error"]["scope"], each["error"]["code"]) for each in found}


@pytest.mark.parametrize(
    ("protocol", "other"),
    [
        ("https", "https"),
        ("xroot", "xroot"),
        *(
            pytest.param(protocol, other, marks=pytest.mark.full)
            for protocol in PROTOCOLS
            for other in PROTOCOLS
            if protocol != other
        ),
    ],
)
def test_a_tree_is_transferred_by_the_fts_then_proven_and_renamed(
    protocol: str, other: str, pair: FtsPair, places: Places
) -> None:
    source = places.put_tree()
    before = handed_over(pair)
    number = submit(pair, protocol, other, src_filepath=str(source), dst_filepath=str(places.b / "new"))
    copied = pair.worker.wait_for("alice", number, timeout_s=150.0)
    assert copied["status"] == "DONE", log_of(pair.worker)
    assert tree(places.b / "new") == tree(source)
    assert (places.b / "new" / "d 2").is_dir()
    assert places.left() == []
    assert handed_over(pair) - before == 6
    log = log_of(pair.worker)
    assert log.count(": FINISHED") == log.count(": renamed to ") == 6
    assert log.count(" bytes, ADLER32:") == 6


@pytest.mark.parametrize("protocol", PROTOCOLS[:2])
def test_faults_before_and_at_the_fts_have_the_codes_of_the_services_own_copies(
    protocol: str, pair: FtsPair, places: Places
) -> None:
    items, same = [], {"good", "missing", "there", "unreadable"}
    for name in sorted(same):
        if name != "missing":
            places.put(places.a / name, name.encode() * 1000)
        items.append({"src": str(places.a / name), "dst": str(places.b / name)})
    places.put(places.b / "there", b"other bytes")
    (places.a / "unreadable").chmod(0)
    expected = {}
    for mover in ("native", None):
        (places.b / "good").unlink(missing_ok=True)
        options = {"items": items, "overwrite": "never"} | ({} if mover is None else {"mover": mover})
        number = submit(pair, protocol, protocol, extra_opts=options, max_tries=1)
        job = pair.worker.wait_for("alice", number, timeout_s=150.0)
        assert (job["status"], job["num_done"], job["num_failed"]) == ("FAILED", 1, 3), log_of(pair.worker)
        assert tree(places.b) == {"good": b"good" * 1000, "there": b"other bytes"}
        expected[mover] = errors(pair, number)
    assert expected[None] == expected["native"]
    assert expected[None]["missing"] == ("source", "NOT_FOUND")
    assert expected[None]["there"] == ("destination", "EXISTS")
    assert expected[None]["unreadable"] == ("source", "PERMISSION_DENIED")


@pytest.mark.parametrize("protocol", PROTOCOLS[:2])
def test_what_changes_while_the_fts_has_the_files_fails_as_what_it_is(
    protocol: str, pair: FtsPair, places: Places
) -> None:
    names = ("good", "gone", "taken")
    for name in names:
        places.put(places.a / name, name.encode() * 1000)
    items = [{"src": str(places.a / name), "dst": str(places.b / name)} for name in names]
    site = f"/sites/{SITES[protocol, 'B']}"
    assert pair.fts.call("admin", "POST", f"{site}/drain", {"message": "waits"})[0] == 200
    before = handed_over(pair)
    try:
        number = submit(pair, protocol, protocol, extra_opts={"items": items, "overwrite": "never"}, max_tries=1)
        until(pair.worker, lambda: handed_over(pair) - before == 3)
        (places.a / "gone").unlink()
        places.put(places.b / "taken", b"other bytes")
    finally:
        pair.fts.call("admin", "POST", f"{site}/resume")
    job = pair.worker.wait_for("alice", number, timeout_s=150.0)
    assert (job["status"], job["num_done"], job["num_failed"]) == ("FAILED", 1, 2), log_of(pair.worker)
    assert errors(pair, number) == {"gone": ("source", "NOT_FOUND"), "taken": ("destination", "EXISTS")}
    assert tree(places.b) == {"good": b"good" * 1000, "taken": b"other bytes"}

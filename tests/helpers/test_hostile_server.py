"""The GridFTP helper against servers that send wrong, endless or no replies: it reports an error, and continues."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.wire.agent_events import CancelledEvent, DoneEvent, EntriesEvent, StartedEvent, UnreadableEvent
from pdm.workqueue.wire.agent_requests import CancelRequest, CopyItem, ListRequest, TimeLimits
from tests.helpers.conftest import StartHelper
from tests.helpers.driver import HelperProcess, digest, entries, fault, outcomes
from tests.helpers.ftp_server import FtpServer, Listing, endless, sends, silent_server

GOOD = b"Type=cdir; .\r\nType=file;Size=3; good\r\n"


@pytest.fixture
def helper(start_helper: StartHelper) -> HelperProcess:
    try:
        ctypes.CDLL("libglobus_gssapi_gsi.so.4")
    except OSError as missing:
        pytest.skip(f"the Globus security library is not installed: {missing}")
    return start_helper("gridftp")


@pytest.fixture
def server() -> Iterator[FtpServer]:
    with FtpServer() as running:
        running.listings[b"/good"] = sends(GOOD)
        yield running


def test_a_server_that_cannot_connect_to_us_is_connected_to(helper: HelperProcess, server: FtpServer) -> None:
    assert set(entries(helper.list(server.url + "/good"))) == {"good"}
    assert b"PASV\r\n" in server.commands


@pytest.mark.parametrize(
    "listing",
    [
        sends(b"Type=file;Size=3; ..\r\n"),
        sends(b"Type=dir; .\r\n"),
        sends(b"Type=file;Size=3; ../../etc/passwd\r\n"),
        sends(b"Type=file;Size=3; a/b\r\n"),
        sends(b"Type=file;Size=-3; negative\r\n"),
        sends(b"Type=file;Size=18446744073709551616; large\r\n"),
        sends(b"Type=file;Size=three; words\r\n"),
        sends(b"total 12\r\n-rw-r--r-- 1 root root 3 Jan 1 1970 unix\r\n"),
        sends(b"Type=file;Size=3; " + b"n" * 10 * 1024 * 1024 + b"\r\n"),
        sends(b"\xff\0" * 100_000),
        endless(b"no end of line "),
        endless(b"Type=file;Size=1;"),
    ],
)
def test_a_bad_listing_fails_and_the_helper_lives(helper: HelperProcess, server: FtpServer, listing: Listing) -> None:
    server.listings[b"/bad"] = listing
    assert fault(helper.list(server.url + "/bad")[-1]) == ("source", "BAD_LISTING")
    assert set(entries(helper.list(server.url + "/good"))) == {"good"}
    assert _memory_mib(helper) < 200


def test_a_bad_directory_below_leaves_the_rest(helper: HelperProcess, server: FtpServer) -> None:
    server.listings[b"/top"] = sends(b"Type=dir; bad\r\nType=dir; good\r\nType=dir; gone\r\nType=file;Size=1; f\r\n")
    server.listings[b"/top/bad"] = endless(b"x" * 1000)
    server.listings[b"/top/good"] = sends(GOOD)
    events = helper.list(server.url + "/top")
    assert set(entries(events)) == {"bad", "good", "gone", "f", "good/good"}
    unreadable = {event.path: event.fault.code for event in events if isinstance(event, UnreadableEvent)}
    assert unreadable == {"bad": "BAD_LISTING", "gone": None}


def test_an_endless_honest_listing_ends_with_a_cancel(helper: HelperProcess, server: FtpServer) -> None:
    server.listings[b"/endless"] = endless(b"".join(b"Type=file;Size=1; f%d\r\n" % number for number in range(5000)))
    request = ListRequest(helper.new_id(), 7, server.url + "/endless", None, TimeLimits())
    helper.send(request)
    assert isinstance(helper.event(), StartedEvent)
    for _ in range(20):
        assert isinstance(helper.event(), EntriesEvent)
    helper.send(CancelRequest(request.id))
    assert isinstance(helper.rest(request.id)[-1], CancelledEvent)
    assert set(entries(helper.list(server.url + "/good"))) == {"good"}


def test_a_server_that_says_nothing_is_not_reached(helper: HelperProcess, server: FtpServer) -> None:
    with silent_server() as address:
        assert fault(helper.list(f"gsiftp://{address}/x", stall_s=0.3)[-1]) == ("source", "CONNECTION")
        assert fault(helper.list(f"gsiftp://{address}/x", stall_s=5, total_s=0.3)[-1]) == ("source", "CONNECTION")
    assert set(entries(helper.list(server.url + "/good"))) == {"good"}


def test_a_login_that_hangs_can_be_cancelled(helper: HelperProcess) -> None:
    with silent_server() as address:
        request = ListRequest(helper.new_id(), 1, f"gsiftp://{address}/x", None, TimeLimits())
        helper.send(request)
        assert isinstance(helper.event(), StartedEvent)
        time.sleep(0.1)
        helper.send(CancelRequest(request.id))
        assert isinstance(outcomes(helper.rest(request.id))[1], CancelledEvent)


@pytest.mark.parametrize("facts", [b"Type=file;Size=-1;", b"Type=file;", b"nothing"])
def test_a_bad_answer_about_the_path_itself_is_a_bad_listing(
    helper: HelperProcess, server: FtpServer, facts: bytes
) -> None:
    server.facts[b"/x"] = facts
    assert fault(helper.list(server.url + "/x", depth=0)[-1]) == ("source", "BAD_LISTING")


@pytest.mark.parametrize("algorithm", ChecksumAlgorithm)
def test_where_a_server_computes_no_checksums_files_are_read(
    helper: HelperProcess, server: FtpServer, algorithm: ChecksumAlgorithm
) -> None:
    server.facts[b"/good/b"] = b"Type=file;Size=3;"
    server.contents |= {b"/a": b"abc", b"/good/b": b"abc"}
    item = CopyItem(5, server.url + "/a", server.url + "/good/b", server.url + "/good/.t", [], 3)
    # It does not know the command, or not the algorithm, or it computes another.
    for refused in (b"500 'CKSM': command not understood.", b"504 Unknown checksum algorithm", b"213 1234"):
        if refused.startswith(b"213") and algorithm is ChecksumAlgorithm.ADLER32:
            continue
        server.replies[b"CKSM"] = refused
        done = helper.copy([item], checksum=algorithm)[5]
        assert isinstance(done, DoneEvent) and done.already_there, done
        assert done.checksum == digest(algorithm, b"abc")
    assert b"CKSM %s 0 -1 /a\r\n" % algorithm.encode() in server.commands
    server.contents[b"/good/b"] = b"abd"
    assert fault(helper.copy([item], checksum=algorithm)[5]) == ("destination", "EXISTS")
    del server.contents[b"/good/b"]
    assert fault(helper.copy([item], checksum=algorithm)[5])[0] == "destination"


def _memory_mib(helper: HelperProcess) -> float:
    status = Path(f"/proc/{helper.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

"""XROOT alone: third-party copies, certificates, servers that want more than is theirs."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import pytest

from pdm.testgrid.storage_servers import XrootdServer, descendants
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends import xrootd
from pdm.workqueue.helpers.backends.xrootd import XrootdBackend
from pdm.workqueue.helpers.storage import StorageError, Timeouts
from pdm.workqueue.wire.agent_events import CancelledEvent, DoneEvent, EntriesEvent, FailedEvent
from pdm.workqueue.wire.agent_requests import CancelRequest, CopyRequest, PathItem
from tests.helpers.driver import LIMITS, HelperProcess, adler, copy_item
from tests.protocols.places import Places, judged
from tests.protocols.test_faults import huge, wait_for_bytes
from tests.support import hostile_xrootd as hostile
from tests.support.hostile_xrootd import HostileXrootd

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]
pytestmark = pytest.mark.timeout(180)


def test_large_files_go_from_server_to_server(own: HelperProcess, places: Places) -> None:
    content = os.urandom(9_000_001)
    source = places.put(places.a / "large file", content)
    plain = places.put(places.a / "large", content)
    done = own.copy([places.item("xroot", plain, places.b / "new" / "large")])[1]
    assert isinstance(done, DoneEvent) and done.checksum == adler(content), done
    assert (places.b / "new" / "large").read_bytes() == content
    before = _read_by(own)
    assert before < len(content)
    # A name that cannot be written into the query of another.
    done = own.copy([places.item("xroot", source, places.b / "new" / "large file")])[1]
    assert isinstance(done, DoneEvent) and done.checksum == adler(content), done
    assert _read_by(own) - before > len(content)
    assert places.left() == []


def test_all_of_it_by_tls(own: HelperProcess, places: Places) -> None:
    for size in (5, 9_000_001):
        source = places.put(places.a / str(size), os.urandom(size))
        item = places.item("xroot", source, places.b / "new" / str(size))
        item = copy_item(1, f"roots{item.source[4:]}", f"roots{item.destination[4:]}", size)
        done = own.copy([item])[1]
        assert isinstance(done, DoneEvent) and done.checksum == adler(source.read_bytes()), done
    assert places.left() == []


def _read_by(helper: HelperProcess) -> int:
    """Bytes that the relay has read from its workers."""
    return int(re.findall(r"rchar: (\d+)", Path(f"/proc/{helper.process.pid}/io").read_text())[0])


class Distrustful(XrootdServer):
    """One whose program for copies knows no authorities, so that it gets into no other server."""

    def environment(self) -> Mapping[str, str]:
        return {"X509_CERT_DIR": "/nonexistent"}


def test_what_servers_cannot_copy_goes_through_here(own: HelperProcess, places: Places) -> None:
    storages, content = places.storages, os.urandom(9_000_001)
    assert storages.credentials is not None
    server = Distrustful(storages.directory, "distrustful", storages.root("B"), storages.credentials, storages.account)
    source = places.put(places.a / "large", content)
    server.start()
    try:
        item = copy_item(
            1, places.url("xroot", source), f"{server.root_url}/{quote(str(places.b / 'large'))}", len(content)
        )
        done = own.copy([item])[1]
    finally:
        server.stop()
    assert isinstance(done, DoneEvent) and done.checksum == adler(content), done
    assert (places.b / "large").read_bytes() == content
    assert places.left() == []


def test_a_cancelled_copy_ends_at_the_servers_too(own: HelperProcess, places: Places) -> None:
    server = places.storages.xrootd["B"].pid
    assert server is not None
    request = CopyRequest(
        own.new_id(), [places.item("xroot", huge(places), places.b / "huge")], "never", "checksum", LIMITS
    )
    own.send(request)
    wait_for_bytes(places.b)
    assert descendants(server)
    own.send(CancelRequest(request.id))
    assert isinstance(own.rest(request.id)[-1], CancelledEvent)
    give_up_at = time.monotonic() + 30
    while descendants(server):
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    assert places.left() == []


def test_memory_stays_bounded(own: HelperProcess, places: Places) -> None:
    source = places.put(places.a / "large file", b"")
    os.truncate(source, 128 * 1024**2)
    done = own.copy([places.item("xroot", source, places.b / "large file")])[1]
    assert isinstance(done, DoneEvent)
    for pid in (own.process.pid, *descendants(own.process.pid)):
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert int(peak) < 80 * 1024


@pytest.mark.parametrize(
    ("proxy", "trust", "verdict"),
    [
        ("alice-expired.proxy", "certificates", "service CREDENTIAL_EXPIRED"),
        ("mallory.proxy", "stranger-certificates", "source CREDENTIAL_REFUSED"),
        ("alice.proxy", "users", "source CERTIFICATE"),
        ("nobody.proxy", "certificates", "service CREDENTIAL_MISSING"),
    ],
)
def test_certificates(proxy: str, trust: str, verdict: str, storages: TestStorages, places: Places) -> None:
    directory = storages.directory
    environment = {
        **storages.environment(),
        "X509_USER_PROXY": str(directory / "users" / proxy),
        "X509_CERT_DIR": str(directory / trust),
    }
    with HelperProcess(RELAY, environment) as helper:
        assert judged("xroot", helper.list(places.url("xroot", places.a))[-1]) == verdict
        if verdict.endswith("CERTIFICATE"):
            tls = f"roots{places.url('xroot', places.a)[4:]}"
            assert judged("xroot", helper.list(tls)[-1]) == verdict


@pytest.mark.parametrize("scheme", ["root", "roots"])
def test_a_certificate_must_be_for_the_name_in_the_url(scheme: str, relay: HelperProcess, places: Places) -> None:
    url = places.url("xroot", places.a).replace("root://localhost", f"{scheme}://127.0.0.2")
    assert judged("xroot", relay.list(url)[-1]) == "source CERTIFICATE"


def test_clients_are_never_sent_to_files_of_this_machine(own: HelperProcess, places: Places, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"the service's own")
    answers = {
        hostile.STAT: lambda path: hostile.status(0, secret.stat().st_size),
        hostile.OPEN: lambda path: hostile.elsewhere(b"file://localhost" + bytes(secret)),
    }
    with HostileXrootd(answers) as server:
        item = copy_item(1, f"{server.url}//x", places.url("file", places.b / "x"), secret.stat().st_size)
        assert judged("xroot", own.copy([item])[1]).startswith("source ")
    assert list(places.b.iterdir()) == []


@pytest.mark.skipif(
    ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1)) < 1, reason="no Landlock in this kernel"
)
def test_servers_cannot_have_files_made_on_this_machine(own: HelperProcess, places: Places, tmp_path: Path) -> None:
    made = tmp_path / "made"

    def status(path: bytes) -> tuple[int, bytes]:
        return hostile.status(2, 0) if path.rstrip(b"\0").endswith(b"/directory") else hostile.error(3011)

    answers = {hostile.STAT: status, hostile.OPEN: lambda path: hostile.elsewhere(b"file://localhost" + bytes(made))}
    with HostileXrootd(answers) as server:
        item = copy_item(1, places.url("file", places.put(places.a / "f")), f"{server.url}//directory/x", 7)
        assert isinstance(own.copy([item])[1], FailedEvent)
    assert not made.exists()


@pytest.mark.parametrize("name", [b"..", b"a/b", b"/etc/passwd", b"../../x"])
def test_a_listing_cannot_lead_out_of_its_directory(name: bytes, own: HelperProcess) -> None:
    said = b".\n0 0 0 0\n" + name + b"\n1 5 16 1000000000\n" + b"fine\n1 5 16 1000000000\0"
    answers = {hostile.STAT: lambda path: hostile.status(2, 0), hostile.DIRLIST: lambda path: (hostile.OK, said)}
    with HostileXrootd(answers) as server:
        events = own.list(f"{server.url}//directory")
    assert judged("xroot", events[-1]) == "source BAD_LISTING"
    told = [entry.path for event in events if isinstance(event, EntriesEvent) for entry in event.entries]
    assert not any(".." in path or "passwd" in path or "/" in path for path in told)


@pytest.mark.parametrize(
    "name", [b"data?x=1", b"data?oss.asize=0", b"new\nline", b"\xe9", b"-rf?tpc.src=evil:1094", b"nul\0"]
)
def test_names_that_would_be_taken_for_others_are_refused(name: bytes, relay: HelperProcess, places: Places) -> None:
    victim = places.put(places.a / "data", b"stays")
    odd = places.url("xroot", places.a) + "/" + "".join(f"%{byte:02X}" for byte in name)
    url = places.url("xroot", victim)
    assert judged("xroot", relay.remove(PathItem(0, odd))[0]) == "source INVALID_NAME"
    assert judged("xroot", relay.rename(url, odd)) == "destination INVALID_NAME"
    assert judged("xroot", relay.make(odd)[0]) == "destination INVALID_NAME"
    assert judged("xroot", relay.list(odd)[-1]) == "source INVALID_NAME"
    item = copy_item(1, odd, places.url("xroot", places.b / "x"), 5)
    assert judged("xroot", relay.copy([item])[1]) == "source INVALID_NAME"
    assert victim.read_bytes() == b"stays"
    assert list(places.b.iterdir()) == []


@pytest.mark.parametrize("authority", ["-o", "user@h:1", "h:1?x", "h:x", "a b", "h:1&y"])
def test_an_authority_is_a_host_and_a_port(authority: str) -> None:
    backend = XrootdBackend()
    backend.timeouts = Timeouts(1, 0, time.monotonic() + 5)
    with pytest.raises(StorageError, match="HOST:PORT"):
        backend.stat(StorageUrl(f"root://{authority}//x"))


def test_small_files_cost_no_program_at_the_server() -> None:
    assert xrootd._SMALL > 1024**2

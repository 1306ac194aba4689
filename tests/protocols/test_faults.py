"""What goes wrong at real servers: code, scope, and that nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.wire.agent_events import AgentEvent, CancelledEvent, DoneEvent, FailedEvent
from pdm.workqueue.wire.agent_requests import CancelRequest, CopyItem, CopyRequest, PathItem, TimeLimits
from tests.helpers.driver import HelperProcess
from tests.protocols.places import Places, judged, owner
from tests.protocols.stands import relay_as
from tests.support.variants import usual

PROTOCOLS = ["ssh", "https", "xroot"]
#: Larger than any machine copies before a test can say stop.
HUGE = 64 * 1024**3
protocols = pytest.mark.parametrize(
    "protocol", [pytest.param(name, marks=pytest.mark.full) if name == "xroot" else name for name in PROTOCOLS]
)
pytestmark = pytest.mark.timeout(180)
as_root = pytest.mark.skipif(not owner(), reason="permissions are real only where root starts the servers")


def copied(relay: HelperProcess, item: CopyItem) -> AgentEvent:
    return relay.copy([item])[1]


@protocols
def test_a_missing_source(protocol: str, relay: HelperProcess, places: Places) -> None:
    there = places.put(places.b / "there", b"stays")
    assert (
        judged(protocol, copied(relay, places.item(protocol, places.a / "none", places.b / "new")))
        == "source NOT_FOUND"
    )
    item = places.item(protocol, places.a / "none", there)
    request = CopyRequest(relay.new_id(), [item], "always", "checksum", TimeLimits(60.0, 120.0, 500_000.0))
    assert judged(protocol, relay.run(request)[-1]) == "source NOT_FOUND"
    assert there.read_bytes() == b"stays"
    assert places.left() == []
    assert judged(protocol, relay.list(places.url(protocol, places.a / "none"))[-1]) == "source NOT_FOUND"


@protocols
@as_root
def test_permission_denied(protocol: str, relay: HelperProcess, places: Places) -> None:
    secret, file = places.put(places.a / "secret"), places.put(places.a / "file")
    closed = places.b / "closed"
    closed.mkdir()
    os.chown(secret, 0, 0)
    secret.chmod(0o600)
    closed.chmod(0o755)  # root's
    assert (
        judged(protocol, copied(relay, places.item(protocol, secret, places.b / "new"))) == "source PERMISSION_DENIED"
    )
    assert judged(protocol, copied(relay, places.item(protocol, file, closed / "new"))) == (
        "destination PERMISSION_DENIED"
    )
    in_it = closed / "in it"
    in_it.touch()
    url = places.url(protocol, in_it)
    assert judged(protocol, relay.remove(PathItem(0, url))[0]) == "source PERMISSION_DENIED"
    assert judged(protocol, relay.rename(url, places.url(protocol, closed / "x"))) == "destination PERMISSION_DENIED"
    assert judged(protocol, relay.make(places.url(protocol, closed / "sub"))[0]) == "destination PERMISSION_DENIED"
    closed.chmod(0o700)
    assert judged(protocol, relay.list(places.url(protocol, closed))[-1]) == "source PERMISSION_DENIED"
    assert places.left() == []


@protocols
def test_an_unreachable_server(protocol: str, own: HelperProcess, places: Places) -> None:
    file = places.put(places.a / "f")
    places.storages.server(protocol, "B").stop()
    assert judged(protocol, copied(own, places.item(protocol, file, places.b / "f"))) == "destination CONNECTION"
    url = places.url(protocol, places.b)
    event = own.list(url)[-1]
    assert judged(protocol, event) == "source CONNECTION"
    # It is known that no server is there, not only that the connection ended.
    assert isinstance(event, FailedEvent)
    assert MOVERS[JobProtocol.parse(protocol)].classify(event.fault).unreachable
    assert judged(protocol, own.make(url)[0]) == "destination CONNECTION"
    places.storages.server(protocol, "B").start()
    assert isinstance(copied(own, places.item(protocol, file, places.b / "f")), DoneEvent)


def huge(places: Places) -> Path:
    source = places.put(places.a / "huge", b"")
    os.truncate(source, HUGE)
    return source


def wait_for_bytes(directory: Path) -> None:
    give_up_at = time.monotonic() + 30
    while not any(path.stat().st_blocks > 2000 for path in directory.rglob("*") if path.is_file()):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("protocol", "site"),
    usual([(protocol, site) for protocol in PROTOCOLS for site in "AB"], [("https", "A"), ("ssh", "B")]),
)
def test_a_server_killed_in_mid_transfer(protocol: str, site: str, own: HelperProcess, places: Places) -> None:
    item = places.item(protocol, huge(places), places.b / "huge")
    request = CopyRequest(own.new_id(), [item], "never", "checksum", TimeLimits(20.0, 60.0, 500_000.0))
    own.send(request)
    wait_for_bytes(places.b)
    places.storages.server(protocol, site).kill()
    outcome = own.rest(request.id)[-1]
    assert isinstance(outcome, FailedEvent), outcome
    assert judged(protocol, outcome) == f"{'source' if site == 'A' else 'destination'} CONNECTION"
    assert outcome.leftover == (site == "B")
    places.storages.server(protocol, site).start()
    assert isinstance(own.discard(item.temporary)[0], DoneEvent)
    assert places.left() == []
    file = places.put(places.a / "small")
    assert isinstance(copied(own, places.item(protocol, file, places.b / "small")), DoneEvent)


@protocols
def test_a_cancelled_copy_leaves_nothing(protocol: str, own: HelperProcess, places: Places) -> None:
    item = places.item(protocol, huge(places), places.b / "huge")
    request = CopyRequest(own.new_id(), [item], "never", "checksum", TimeLimits(20.0, 60.0, 500_000.0))
    own.send(request)
    wait_for_bytes(places.b)
    own.send(CancelRequest(request.id))
    outcome = own.rest(request.id)[-1]
    assert isinstance(outcome, CancelledEvent) and not outcome.leftover, outcome
    assert places.left() == []


@pytest.mark.parametrize("protocol", usual(PROTOCOLS, ["https"]))
def test_a_frozen_server_stalls(protocol: str, own: HelperProcess, places: Places) -> None:
    item = places.item(protocol, huge(places), places.b / "huge")
    request = CopyRequest(own.new_id(), [item], "never", "checksum", TimeLimits(1.5, 60.0, 500_000.0))
    own.send(request)
    wait_for_bytes(places.b)
    places.storages.server(protocol, "A").freeze()
    assert judged(protocol, own.rest(request.id)[-1]) == "source STALLED"
    places.storages.server(protocol, "A").thaw()
    assert places.left() == []


@pytest.fixture
def small_disk(places: Places) -> Iterator[Path]:
    directory = places.b / "small disk"
    directory.mkdir()
    mounted = owner() and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(directory)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    places.storages.give(directory)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@protocols
def test_a_full_disk(protocol: str, relay: HelperProcess, places: Places, small_disk: Path) -> None:
    source = places.put(places.a / "large", os.urandom(6_000_000))
    outcome = copied(relay, places.item(protocol, source, small_disk / "large"))
    assert judged(protocol, outcome) == "destination NO_SPACE"
    assert list(small_disk.iterdir()) == []


@pytest.fixture
def other_disk(places: Places) -> Iterator[Path]:
    """Another file system in the directory at B."""
    directory = places.b / "other disk"
    directory.mkdir()
    options = ["-o", "size=8m,mode=0777"]
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(directory)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize("protocol", usual([*PROTOCOLS, "file"], ["ssh", "file"]))
@as_root
def test_a_read_only_file_system(protocol: str, relay: HelperProcess, places: Places, other_disk: Path) -> None:
    file, old = places.put(places.a / "file"), other_disk / "old"
    old.write_bytes(b"old")
    places.storages.give(other_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(other_disk)], check=True)
    url = places.url(protocol, other_disk / "new")
    outcomes = {
        "copy": judged(protocol, copied(relay, places.item(protocol, file, other_disk / "new"))),
        "mkdir": judged(protocol, relay.make(url)[0]),
        "rename": judged(protocol, relay.rename(places.url(protocol, old), url)),
        "remove": judged(protocol, relay.remove(PathItem(1, places.url(protocol, old)))[1]),
    }
    assert {job: said.partition(" ")[2] for job, said in outcomes.items()} == dict.fromkeys(outcomes, "READ_ONLY")


@pytest.mark.parametrize("protocol", usual([*PROTOCOLS, "file"], ["ssh", "file"]))
@as_root
def test_a_rename_to_another_file_system(protocol: str, relay: HelperProcess, places: Places, other_disk: Path) -> None:
    file = places.put(places.b / "file")
    (places.b / "directory").mkdir()
    places.storages.give(places.b)
    for name in ("file", "directory"):
        event = relay.rename(places.url(protocol, places.b / name), places.url(protocol, other_disk / name))
        assert judged(protocol, event).partition(" ")[2] == "UNSUPPORTED", (name, event)
    assert file.read_bytes() == b"content"
    assert list(other_disk.iterdir()) == []


@pytest.mark.parametrize("protocol", usual([*PROTOCOLS, "file"], ["ssh", "file"]))
@as_root
def test_a_drop_box(protocol: str, relay: HelperProcess, places: Places) -> None:
    """A directory of another owner that takes files and cannot be listed."""
    box = places.b / "box"
    box.mkdir()
    items = [
        places.item(protocol, places.put(places.a / f"{number}"), box / f"{number}", number) for number in range(1, 41)
    ]
    os.chown(box, 0, 0)
    box.chmod(0o733)
    account = places.storages.account
    assert account is not None
    if protocol == "file":
        # Other servers act as the account by themselves.
        with HelperProcess(relay_as(account), places.storages.environment()) as as_account:
            outcomes = as_account.copy(items)
    else:
        outcomes = relay.copy(items)
    assert {key: event for key, event in outcomes.items() if not isinstance(event, DoneEvent)} == {}
    assert len(list(box.iterdir())) == 40


@protocols
def test_what_comes_during_a_copy_is_not_overwritten(protocol: str, own: HelperProcess, places: Places) -> None:
    source = places.put(places.a / "source", b"")
    os.truncate(source, 64 * 1024**2)
    number = own.new_id()
    item = places.item(protocol, source, places.b / "new")
    own.send(CopyRequest(number, [item], "never", "size", TimeLimits(60.0, 120.0, 500_000.0)))
    give_up_at = time.monotonic() + 30
    while not places.left():
        assert time.monotonic() < give_up_at
        time.sleep(0.001)
    own.process.send_signal(signal.SIGSTOP)
    try:
        assert places.left(), "the copy was done before it could be stopped"
        places.put(places.b / "new", b"the rival's")
    finally:
        own.process.send_signal(signal.SIGCONT)
    assert judged(protocol, own.rest(number)[-1]) == "destination EXISTS"
    assert (places.b / "new").read_bytes() == b"the rival's"
    assert places.left() == []

"""What goes wrong at real servers: code, scope, and that nothing is left of it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.workqueue.wire import agent_messages as wire
from tests.agents.helpers.driver import HelperProcess
from tests.protocols.places import Places, judged, owner

PROTOCOLS = ["ssh", "https", "xroot"]
#: Larger than any machine copies before a test can say stop.
HUGE = 64 * 1024**3
protocols = pytest.mark.parametrize("protocol", PROTOCOLS)
pytestmark = pytest.mark.timeout(180)
as_root = pytest.mark.skipif(not owner(), reason="permissions are real only where root starts the servers")


def copied(relay: HelperProcess, item: wire.CopyItem) -> wire.Event:
    return relay.copy([item])[1]


@protocols
def test_a_missing_source(protocol: str, relay: HelperProcess, places: Places) -> None:
    there = places.put(places.b / "there", b"stays")
    assert (
        judged(protocol, copied(relay, places.item(protocol, places.a / "none", places.b / "new")))
        == "source NOT_FOUND"
    )
    item = places.item(protocol, places.a / "none", there)
    request = wire.CopyRequest(relay.new_id(), [item], "always", "checksum", wire.Limits(60.0, 120.0, 500_000.0))
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
    assert judged(protocol, relay.remove(wire.PathItem(0, url))[0]) == "source PERMISSION_DENIED"
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
    assert judged(protocol, own.list(url)[-1]) == "source CONNECTION"
    assert judged(protocol, own.make(url)[0]) == "destination CONNECTION"
    places.storages.server(protocol, "B").start()
    assert isinstance(copied(own, places.item(protocol, file, places.b / "f")), wire.Done)


def huge(places: Places) -> Path:
    source = places.put(places.a / "huge", b"")
    os.truncate(source, HUGE)
    return source


def wait_for_bytes(folder: Path) -> None:
    give_up_at = time.monotonic() + 30
    while not any(path.stat().st_blocks > 2000 for path in folder.rglob("*") if path.is_file()):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


@protocols
@pytest.mark.parametrize("site", ["A", "B"])
def test_a_server_killed_in_mid_transfer(protocol: str, site: str, own: HelperProcess, places: Places) -> None:
    item = places.item(protocol, huge(places), places.b / "huge")
    request = wire.CopyRequest(own.new_id(), [item], "never", "checksum", wire.Limits(20.0, 60.0, 500_000.0))
    own.send(request)
    wait_for_bytes(places.b)
    places.storages.server(protocol, site).kill()
    outcome = own.rest(request.id)[-1]
    assert isinstance(outcome, wire.Failed), outcome
    assert judged(protocol, outcome) == f"{'source' if site == 'A' else 'destination'} CONNECTION"
    assert outcome.residue == (site == "B")
    places.storages.server(protocol, site).start()
    assert isinstance(own.discard(item.temporary)[0], wire.Done)
    assert places.left() == []
    file = places.put(places.a / "small")
    assert isinstance(copied(own, places.item(protocol, file, places.b / "small")), wire.Done)


@protocols
def test_a_cancelled_copy_leaves_nothing(protocol: str, own: HelperProcess, places: Places) -> None:
    item = places.item(protocol, huge(places), places.b / "huge")
    request = wire.CopyRequest(own.new_id(), [item], "never", "checksum", wire.Limits(20.0, 60.0, 500_000.0))
    own.send(request)
    wait_for_bytes(places.b)
    own.send(wire.CancelRequest(request.id))
    outcome = own.rest(request.id)[-1]
    assert isinstance(outcome, wire.Cancelled) and not outcome.residue, outcome
    assert places.left() == []


@protocols
def test_a_frozen_server_stalls(protocol: str, own: HelperProcess, places: Places) -> None:
    item = places.item(protocol, huge(places), places.b / "huge")
    request = wire.CopyRequest(own.new_id(), [item], "never", "checksum", wire.Limits(1.5, 60.0, 500_000.0))
    own.send(request)
    wait_for_bytes(places.b)
    places.storages.server(protocol, "A").freeze()
    assert judged(protocol, own.rest(request.id)[-1]) == "source STALLED"
    places.storages.server(protocol, "A").thaw()
    assert places.left() == []


@pytest.fixture
def small_disk(places: Places) -> Iterator[Path]:
    folder = places.b / "small disk"
    folder.mkdir()
    mounted = owner() and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    places.storages.give(folder)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@protocols
def test_a_full_disk(protocol: str, relay: HelperProcess, places: Places, small_disk: Path) -> None:
    source = places.put(places.a / "large", os.urandom(6_000_000))
    outcome = copied(relay, places.item(protocol, source, small_disk / "large"))
    assert judged(protocol, outcome) == "destination NO_SPACE"
    assert list(small_disk.iterdir()) == []

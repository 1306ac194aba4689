"""GridFTP: sources that are written to while they are copied, and sessions of servers that go on too late."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pdm.testgrid.storage_servers import descendants
from pdm.workqueue.wire.agent_events import DoneEvent, FailedEvent
from pdm.workqueue.wire.agent_requests import (
    LEASE_OVER_STATUS,
    CopyItem,
    CopyRequest,
    LeaseRequest,
    PathItem,
    TimeLimits,
)
from tests.grid.agent_sites import Sites
from tests.helpers.driver import HelperProcess, fault, outcomes, tree

MIB = 1024 * 1024
OLD = 1_700_000_000


def freeze(sites: Sites) -> None:
    """Stop both servers with all their sessions, and wait until none of them runs."""
    for site in sites.grid.sites.values():
        site.server.freeze()
    for site in sites.grid.sites.values():
        assert site.server.pid is not None
        for pid in (site.server.pid, *descendants(site.server.pid)):
            give_up_at = time.monotonic() + 30
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZX":
                assert time.monotonic() < give_up_at
                time.sleep(0.005)


@pytest.mark.parametrize(
    ("mib", "verify", "age"),
    [
        (60, "size", "old"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [(60, "checksum", "new"), (60, "size", "new"), (300, "size", "old"), (300, "checksum", "new")]
        ),
    ],
    ids=str,
)
def test_a_source_that_is_rewritten_in_place_is_copied_anew_or_not_at_all(
    own: HelperProcess, sites: Sites, mib: int, verify: str, age: str
) -> None:
    """The smaller is copied pipelined, and again by the fallback once its writer has ended."""
    source = sites.put(sites.a / "source", b"o" * mib * MIB)
    if age == "old":
        os.utime(source, (OLD, OLD))
    destination = sites.b / "copy"
    item = sites.item(source, destination)
    request = CopyRequest(own.new_id(), [item], "never", verify, TimeLimits(stall_s=60.0))  # type: ignore[arg-type]
    own.send(request)
    give_up_at = time.monotonic() + 60
    while not sites.arriving():
        assert time.monotonic() < give_up_at, "no byte arrives"
        time.sleep(0.001)
    freeze(sites)
    assert not destination.exists(), "it was copied before it could be rewritten"
    assert sites.arriving() < (mib - 1) * MIB, "nearly all of it was copied before it could be rewritten"
    with source.open("r+b") as file:
        file.write(b"n" * MIB)
        file.seek(-MIB, os.SEEK_END)
        file.write(b"n" * MIB)
    for site in sites.grid.sites.values():
        site.server.thaw()
    outcome = outcomes(own.rest(request.id))[1]
    if isinstance(outcome, DoneEvent):
        assert destination.read_bytes() == source.read_bytes()
    else:
        # MDTM counts seconds: of a file written anew within the second, only the checksum tells; it is copied again.
        expected = [("source", "SIZE_CHANGED"), ("transfer", "CHECKSUM_MISMATCH")][: 1 + (verify == "checksum")]
        assert fault(outcome) in expected, outcome
        assert not destination.exists()
    assert not list(sites.b.rglob(".pdm-*"))


@pytest.mark.parametrize(
    ("verify", "others"),
    [
        ("size", 0),
        pytest.param("size", 2000, marks=pytest.mark.full),
        pytest.param("checksum", 0, marks=pytest.mark.full),
    ],
)
@pytest.mark.full
def test_of_many_sources_those_that_are_rewritten_in_place_are_found(
    own: HelperProcess, sites: Sites, verify: str, others: int
) -> None:
    """Their times come from a listing of their directory, or from a command for each if it is large."""
    files = [sites.put(sites.a / f"f{number:03}", b"o" * MIB) for number in range(160)]
    for file in files:
        os.utime(file, (OLD, OLD))
    for number in range(others):
        (sites.a / f"x{number}").touch()
    items = [sites.item(file, sites.b / "new" / file.name, key) for key, file in enumerate(files)]
    request = CopyRequest(own.new_id(), items, "never", verify, TimeLimits(stall_s=60.0))  # type: ignore[arg-type]
    own.send(request)
    give_up_at = time.monotonic() + 60
    while sites.arriving() < 10 * MIB:
        assert time.monotonic() < give_up_at, "nothing arrives"
        time.sleep(0.001)
    freeze(sites)
    under_way = [file for file in files if not (sites.b / "new" / file.name).exists()]
    assert under_way, "all were copied before they could be rewritten"
    for file in under_way:
        with file.open("r+b") as source:
            source.write(b"n" * 1000)
            source.seek(-1000, os.SEEK_END)
            source.write(b"n" * 1000)
    for site in sites.grid.sites.values():
        site.server.thaw()
    ended = outcomes(own.rest(request.id))
    assert set(ended) == set(range(len(files)))
    for key, file in enumerate(files):
        if isinstance(ended[key], DoneEvent):
            # What was proven before the writer came, and only had no name yet, is a copy of what it was.
            assert (sites.b / "new" / file.name).read_bytes() in (b"o" * MIB, file.read_bytes()), file.name
        else:
            assert fault(ended[key]) == ("source", "SIZE_CHANGED"), ended[key]


def test_a_session_that_thaws_after_the_copy_was_done_changes_nothing(own: HelperProcess, sites: Sites) -> None:
    """A frozen session of the destination writes later to a name that is not used any more."""
    files = [sites.put(sites.a / f"f{number}", os.urandom(MIB // 4)) for number in range(120)]
    items = [sites.item(file, sites.b / file.name, key) for key, file in enumerate(files)]
    # So that the kept sessions are there.
    (warm,) = own.copy([sites.item(sites.put(sites.a / "warm"), sites.b / "warm", 1000)]).values()
    assert isinstance(warm, DoneEvent)
    server = sites.grid.sites["B"].server
    assert server.pid is not None
    request = CopyRequest(own.new_id(), items, "never", "checksum", TimeLimits(stall_s=1.0, total_s=60.0))
    own.send(request)
    give_up_at = time.monotonic() + 30
    while not any(sites.b.glob(".pdm-*")):
        assert time.monotonic() < give_up_at, "nothing arrives"
        time.sleep(0.0005)
    sessions = descendants(server.pid)
    for pid in sessions:
        os.kill(pid, signal.SIGSTOP)
    # What the frozen sessions have opened, or will open when they go on.
    known = {path.stat().st_ino for path in sites.b.glob(".pdm-*")}
    assert known
    try:
        ended = outcomes(own.rest(request.id))
        left = [item for item in items if not isinstance(ended[item.key], DoneEvent)]
        again = [CopyItem(i.key, i.source, i.destination, f"{i.temporary}2", [i.temporary], i.size) for i in left]
        assert left, "the sessions were frozen too late"
        # What was under way when the server said nothing fails by itself; its next attempt copies it.
        while again:
            ended |= own.copy(again, stall_s=5.0)
            again = [item for item in again if not isinstance(ended[item.key], DoneEvent)]
        assert {path.name: path.read_bytes() for path in sites.b.glob("f*")} == {
            path.name: path.read_bytes() for path in files
        }
        assert not known & {path.stat().st_ino for path in sites.b.glob("f*")}, "a frozen session knows a final file"
    finally:
        for pid in sessions:
            os.kill(pid, signal.SIGCONT)
    # They carry out what they were told, and then find their connections closed. The helper may still keep one that was
    # idle when it was frozen: that one ends with the helper.
    own.end()
    enough_at = time.monotonic() + 10
    while set(sessions) & set(descendants(server.pid)) and time.monotonic() < enough_at:
        # Now and then one sleeps for ever: its control connection is closed, its data connection has bytes left.
        time.sleep(0.01)
    names = {file.name for file in files}
    assert {name: content for name, content in tree(sites.b).items() if name in names} == {
        file.name: file.read_bytes() for file in files
    }


def boot_seconds() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_transfer_between_servers_ends_with_the_lease(own: HelperProcess, sites: Sites) -> None:
    """Its connections end with the helper, and with them what the servers do."""
    item = sites.item(sites.huge(), sites.b / "copy")
    own.send(LeaseRequest(boot_seconds() + 60.0))
    own.send(CopyRequest(own.new_id(), [item], "never", "size", TimeLimits()))
    give_up_at = time.monotonic() + 60
    while not sites.arriving():
        assert time.monotonic() < give_up_at, "no byte arrives"
        time.sleep(0.01)
    own.send(LeaseRequest(boot_seconds() + 0.5))
    assert own.process.wait(30) == LEASE_OVER_STATUS
    arrived = -1
    give_up_at = time.monotonic() + 20
    while arrived != sites.arriving():
        assert time.monotonic() < give_up_at, "the servers go on"
        arrived = sites.arriving()
        time.sleep(0.5)
    assert arrived > 0
    assert [path.name for path in sites.b.iterdir() if not path.name.startswith(".pdm-")] == []


@pytest.mark.full
def test_a_helper_that_was_suspended_beyond_the_lease_gives_no_file_its_name(own: HelperProcess, sites: Sites) -> None:
    files = [sites.put(sites.a / f"f{number}", os.urandom(1024)) for number in range(1500)]
    items = [sites.item(file, sites.b / "new" / file.name, key) for key, file in enumerate(files)]
    own.send(LeaseRequest(boot_seconds() + 10.0))
    own.send(CopyRequest(own.new_id(), items, "never", "checksum", TimeLimits()))
    give_up_at = time.monotonic() + 30
    while not any((sites.b / "new").glob("f*")):
        assert time.monotonic() < give_up_at, "nothing arrives"
        time.sleep(0.002)
    own.process.send_signal(signal.SIGSTOP)
    time.sleep(10.2)
    named = set((sites.b / "new").glob("f*"))
    assert len(named) < len(files), "all was done before it was suspended"
    own.process.send_signal(signal.SIGCONT)
    assert own.process.wait(30) == LEASE_OVER_STATUS
    time.sleep(0.5)
    assert set((sites.b / "new").glob("f*")) == named


def test_what_was_written_after_it_was_listed_is_not_removed(own: HelperProcess, sites: Sites) -> None:
    """By an attempt that follows one that was lost: it may have removed the file that was listed."""
    files = [sites.put(sites.b / f"f{number}") for number in range(40)]
    for file in files[:-2]:
        os.utime(file, (OLD, OLD))
    listed_at = float(OLD + 100)
    items = [PathItem(key, sites.url(file), again=True, listed_at=listed_at) for key, file in enumerate(files)]
    files[0].unlink()
    ended = own.remove(*items)
    assert {key for key, event in ended.items() if isinstance(event, FailedEvent)} == {38, 39}
    assert {fault(ended[key]) for key in (38, 39)} == {("source", "CHANGED")}
    assert {path.name for path in sites.b.iterdir()} == {"f38", "f39"}

"""Many files under way at once: what fails fails alone, and no file is taken for another."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.gridftp.connections import ChannelPool, host_port, server_path
from pdm.workqueue.helpers.gridftp.download import Downloads
from pdm.workqueue.helpers.gridftp.event_loop import Waker, run_until_answered
from pdm.workqueue.helpers.gridftp.gsi import Gsi
from pdm.workqueue.helpers.gridftp.replies import Reply
from pdm.workqueue.helpers.gridftp.session import ControlSession
from pdm.workqueue.helpers.storage import StorageError, Timeouts
from pdm.workqueue.wire.agent_events import AgentEvent, CancelledEvent, DoneEvent, FailedEvent, LogEvent
from pdm.workqueue.wire.agent_requests import CancelRequest, CopyItem, CopyRequest, PathItem, TimeLimits
from tests.grid.agent_sites import Sites, judged
from tests.helpers.driver import HelperProcess, adler, digest, entries, outcomes, put, tree
from tests.support.variants import usual

FALLBACK = "left to the fallback"


def files_of_one_size(sites: Sites, count: int, size: int = 1024) -> list[Path]:
    """Files that differ in nothing but their bytes, a hundred in a directory."""
    files = [put(sites.a / f"d{number // 100}" / f"f{number}", os.urandom(size)) for number in range(count)]
    sites.grid.give(sites.a)
    return files


def items_of(sites: Sites, files: Sequence[Path]) -> list[CopyItem]:
    return [sites.item(file, sites.b / file.relative_to(sites.a), key) for key, file in enumerate(files)]


def fallbacks(events: Sequence[AgentEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, LogEvent) and event.text.startswith(FALLBACK)]


@pytest.mark.parametrize("verify", ["checksum", "size"])
def test_good_files_need_no_fallback(own: HelperProcess, sites: Sites, verify: str) -> None:
    files = files_of_one_size(sites, 300)
    items = items_of(sites, files)
    events = own.run(CopyRequest(own.new_id(), items, "never", verify, TimeLimits()))  # type: ignore[arg-type]
    assert fallbacks(events) == []
    sums = [adler(file.read_bytes()) if verify == "checksum" else None for file in files]
    assert outcomes(events) == {key: DoneEvent(1, key, 1024, 1024, checksum) for key, checksum in enumerate(sums)}
    assert tree(sites.b) == tree(sites.a)

    again = own.run(CopyRequest(own.new_id(), items, "never", verify, TimeLimits()))  # type: ignore[arg-type]
    assert fallbacks(again) == []
    assert all(isinstance(event, DoneEvent) and event.transferred == 0 for event in outcomes(again).values())


def test_temporary_names_of_many_attempts_do_not_flood_a_server(own: HelperProcess, sites: Sites) -> None:
    """Globus stops for ever when some 1,300 commands wait for it; 100 files have four names of each attempt."""
    files = files_of_one_size(sites, 100, size=10)
    (sites.b / "d0").mkdir()
    sites.grid.give(sites.b)
    items = items_of(sites, files)
    stale = [[item.temporary.replace(".pdm-", f".pdm-{attempt}") for attempt in range(4)] for item in items]
    items = [msgspec.structs.replace(item, stale=names) for item, names in zip(items, stale, strict=True)]
    events = own.run(CopyRequest(own.new_id(), items, "never", "size", TimeLimits(stall_s=10.0)))
    assert fallbacks(events) == []
    assert not [event for event in events if isinstance(event, LogEvent) and "has not answered" in event.text]
    assert tree(sites.b) == tree(sites.a)


_RENAME_FOR_EVER = """
import itertools, pathlib, sys
for number in itertools.cycle(range(150)):
    name = pathlib.Path(sys.argv[1], f"other{number}")
    name.with_suffix(".part").touch()
    name.with_suffix(".part").rename(name)
    if number % 3 == 0:
        name.unlink()
"""


def test_files_that_come_and_go_beside_a_batch_disturb_it_not(own: HelperProcess, sites: Sites) -> None:
    """Globus breaks off a listing when an entry goes meanwhile, as when other batches rename temporary files."""
    files = [put(sites.a / f"f{number}", b"%d" % number) for number in range(800)]
    there = sites.b / "there"
    there.mkdir()
    for path in (sites.a, sites.b):
        sites.grid.give(path)
    items = [sites.item(file, there / file.name, key) for key, file in enumerate(files)]
    with subprocess.Popen([sys.executable, "-c", _RENAME_FOR_EVER, there]) as others:
        try:
            for start in range(0, 800, 100):
                part = items[start : start + 100]
                events = own.run(CopyRequest(own.new_id(), part, "never", "size", TimeLimits()))
                failed = [event for event in outcomes(events).values() if not isinstance(event, DoneEvent)]
                assert failed == []
                for file in files[start : start + 100]:
                    (there / file.name).rename(sites.b / file.name)
        finally:
            others.kill()
    for file in files:
        assert (sites.b / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("algorithm", usual([ChecksumAlgorithm.MD5, ChecksumAlgorithm.SHA256], [ChecksumAlgorithm.MD5]))
def test_each_algorithm_needs_no_fallback(own: HelperProcess, sites: Sites, algorithm: ChecksumAlgorithm) -> None:
    files = files_of_one_size(sites, 30)
    items = items_of(sites, files)
    for overwrite, transferred in (("never", 1024), ("different", 0)):
        request = CopyRequest(own.new_id(), items, overwrite, "checksum", TimeLimits(), algorithm)  # type: ignore[arg-type]
        events = own.run(request)
        assert fallbacks(events) == []
        for key, file in enumerate(files):
            done = outcomes(events)[key]
            assert isinstance(done, DoneEvent), done
            assert (done.transferred, done.checksum) == (transferred, digest(algorithm, file.read_bytes()))


def test_the_content_of_a_file_is_read_over_a_data_connection(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the checksums that a server does not compute."""
    for name, value in sites.grid.environment().items():
        monkeypatch.setenv(name, value)
    content = os.urandom(3_000_011)
    file = sites.put(sites.a / "file", content)
    session = ControlSession(ChannelPool(Gsi()))
    downloads, timeouts = Downloads(session), Timeouts.within(30.0)
    read = lambda path: downloads.content(sites.url(file), path, timeouts, print)  # noqa: E731
    assert b"".join(read(os.fsencode(file))) == content
    with pytest.raises(StorageError) as raised:
        list(read(os.fsencode(file) + b"x"))
    assert raised.value.errno == errno.ENOENT
    session.connections.drop_all()


@pytest.mark.parametrize("verify", ["checksum", pytest.param("size", marks=pytest.mark.full)])
def test_a_file_that_cannot_be_read_never_takes_the_bytes_of_the_next(
    own: HelperProcess, sites: Sites, verify: str
) -> None:
    # All of one size: only the bytes tell one from the other.
    files = files_of_one_size(sites, 240)
    items = items_of(sites, files)
    bad = {7, 8, 100, 239}
    for key in bad:
        files[key].unlink()
    outcome = own.copy(items, verify=verify)
    assert {key for key, event in outcome.items() if isinstance(event, FailedEvent)} == bad
    assert {judged(outcome[key]) for key in bad} == {"source NOT_FOUND"}
    assert tree(sites.b) == tree(sites.a)


@pytest.mark.full
def test_a_directory_that_takes_nothing_is_its_own_files_trouble(own: HelperProcess, sites: Sites) -> None:
    files = files_of_one_size(sites, 300)
    items = items_of(sites, files)
    shut = sites.b / "d1"
    shut.mkdir()
    if os.geteuid() == 0:
        os.chown(shut, 0, 0)
    else:
        shut.chmod(0o500)
    outcome = own.copy(items)
    assert {key for key, event in outcome.items() if isinstance(event, FailedEvent)} == set(range(100, 200))
    assert {judged(outcome[key]) for key in range(100, 200)} == {"destination PERMISSION_DENIED"}
    shut.chmod(0o700)
    assert {name: content for name, content in tree(sites.a).items() if not name.startswith("d1/")} == tree(sites.b)


def test_what_is_at_the_destination_decides_file_by_file(own: HelperProcess, sites: Sites) -> None:
    files = files_of_one_size(sites, 60)
    before = {}
    for key, file in enumerate(files[:40]):
        there = sites.b / file.relative_to(sites.a)
        if key < 10:
            put(there, file.read_bytes())
        elif key < 20:
            put(there, os.urandom(1024))
        elif key < 30:
            put(there, b"shorter")
        else:
            there.mkdir(parents=True)
        before[key] = there.read_bytes() if there.is_file() else None
    sites.grid.give(sites.b)
    outcome = own.copy(items_of(sites, files))
    assert all(isinstance(outcome[key], DoneEvent) for key in (*range(10), *range(40, 60)))
    assert {judged(outcome[key]) for key in range(10, 30)} == {"destination EXISTS"}
    assert {judged(outcome[key]) for key in range(30, 40)} == {"destination IS_A_DIRECTORY"}
    for key in range(30):
        assert (sites.b / files[key].relative_to(sites.a)).read_bytes() == before[key]

    outcome = own.copy(items_of(sites, files), overwrite="different")
    done = [event for event in outcome.values() if isinstance(event, DoneEvent)]
    assert len(done) == 50
    assert sum(event.transferred > 0 for event in done) == 20
    assert all((sites.b / file.relative_to(sites.a)).read_bytes() == file.read_bytes() for file in files[:30])


def test_a_directory_that_two_batches_fill_keeps_what_is_there(own: HelperProcess, sites: Sites) -> None:
    files = files_of_one_size(sites, 200)
    files += [sites.put(sites.a / "d1" / name, os.urandom(1024)) for name in ("x\u00e9", "spaced name")]
    items = items_of(sites, files)
    first, second = items[:130], items[130:]
    assert all(isinstance(event, DoneEvent) for event in own.copy(first).values())
    # A name that differs in case is another one here; what has the very name is neither replaced nor taken for a copy.
    upper = put(sites.b / "d1" / "F150", b"upper")
    taken = put(sites.b / "d1" / "f160", b"taken")
    sites.grid.give(sites.b)

    events = own.run(CopyRequest(own.new_id(), second, "never", "size", TimeLimits()))
    outcome = outcomes(events)
    assert [key for key, event in outcome.items() if not isinstance(event, DoneEvent)] == [160]
    assert judged(outcome[160]) == "destination EXISTS"
    assert len(fallbacks(events)) == 1
    assert (upper.read_bytes(), taken.read_bytes()) == (b"upper", b"taken")
    expected = tree(sites.a) | {"d1/F150": b"upper", "d1/f160": b"taken"}
    assert tree(sites.b) == expected


@pytest.mark.parametrize("site", [pytest.param("A", marks=pytest.mark.full), "B"])
@pytest.mark.full
def test_sessions_that_end_in_the_middle_cost_nothing(own: HelperProcess, sites: Sites, site: str) -> None:
    files = files_of_one_size(sites, 1000, size=20_000)
    server = sites.grid.sites[site].server

    def kill_some() -> None:
        deadline = time.monotonic() + 20
        while not any(sites.b.rglob("f5*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        server.kill_sessions()

    killer = threading.Thread(target=kill_some)
    killer.start()
    outcome = own.copy(items_of(sites, files))
    killer.join()
    assert all(isinstance(event, DoneEvent) for event in outcome.values())
    assert tree(sites.b) == tree(sites.a)


def test_a_cancel_leaves_whole_files_or_none(own: HelperProcess, sites: Sites) -> None:
    files = files_of_one_size(sites, 1000, size=200_000)
    request = CopyRequest(own.new_id(), items_of(sites, files), "never", "checksum", TimeLimits())
    own.send(request)
    events = _events_until(own, DoneEvent)
    own.send(CancelRequest(request.id))
    asked = time.monotonic()
    outcome = outcomes([*events, *own.rest(request.id)])
    assert {type(event) for event in outcome.values()} == {DoneEvent, CancelledEvent}
    arrived = tree(sites.b)
    for key, file in enumerate(files):
        name = str(file.relative_to(sites.a))
        if isinstance(outcome[key], DoneEvent):
            assert arrived[name] == file.read_bytes()
        else:
            # It may have got its name in the last moment; then it is whole.
            assert arrived.get(name) in (None, file.read_bytes())
    leftovers = [event for event in outcome.values() if isinstance(event, CancelledEvent) and event.leftover]
    assert not [name for name in arrived if ".pdm-" in name] or leftovers
    assert time.monotonic() - asked < 20
    # The helper continues.
    assert isinstance(own.copy([sites.item(sites.put(sites.a / "f"), sites.b / "g")])[1], DoneEvent)


def test_a_frozen_server_stalls_one_file_at_a_time(own: HelperProcess, sites: Sites) -> None:
    files = files_of_one_size(sites, 1000, size=200_000)
    # Also the timeout of each step of the login that follows: a busy machine must not exceed it.
    request = CopyRequest(own.new_id(), items_of(sites, files), "never", "checksum", TimeLimits(stall_s=5.0))
    own.send(request)
    events = _events_until(own, DoneEvent)
    server = sites.grid.sites["B"].server
    server.freeze()
    events += _events_until(own, FailedEvent)
    server.thaw()
    outcome = outcomes([*events, *own.rest(request.id)])
    assert set(outcome) == set(range(1000))
    (failed,) = (event for event in outcome.values() if isinstance(event, FailedEvent))
    assert failed.fault.code == FailureCode.STALLED
    for key in set(outcome) - {failed.key}:
        assert isinstance(outcome[key], DoneEvent)
        assert (sites.b / files[key].relative_to(sites.a)).read_bytes() == files[key].read_bytes()


def test_a_server_that_was_frozen_before_any_transfer_costs_no_file(own: HelperProcess, sites: Sites) -> None:
    items = items_of(sites, files_of_one_size(sites, 20))
    assert isinstance(own.copy(items[:1])[0], DoneEvent)
    server = sites.grid.sites["B"].server
    server.freeze()
    request = CopyRequest(own.new_id(), items[1:], "never", "checksum", TimeLimits(stall_s=5.0))
    own.send(request)
    events = _events_until(own, LogEvent)
    assert isinstance(events[-1], LogEvent)
    assert "has not answered in time" in events[-1].text
    server.thaw()
    outcome = outcomes([*events, *own.rest(request.id)])
    assert set(outcome) == set(range(1, 20))
    assert all(isinstance(event, DoneEvent) for event in outcome.values())
    assert tree(sites.b) == tree(sites.a)


def _events_until(helper: HelperProcess, kind: type[AgentEvent]) -> list[AgentEvent]:
    """The events of a running request up to the first one of a kind."""
    events: list[AgentEvent] = []
    while not (events and isinstance(events[-1], kind)):
        event = helper.event()
        assert event is not None
        events.append(event)
    return events


def test_hostile_names_in_a_listing_forge_no_end(own: HelperProcess, sites: Sites) -> None:
    names = ["a\r\n250 End.", "b\r\n150 End.\r\n226 x", "c\r\nd", "e\n250 End.", "250 End.", " 250 End."]
    for name in names:
        sites.put(sites.a / "odd" / name)
    for number in range(1500):
        put(sites.a / "many" / f"f{number}", b"")
    for number in range(40):
        put(sites.a / f"few{number}" / "deep" / "f", b"")
    sites.grid.give(sites.a)
    found = entries(own.list(sites.url(sites.a)))
    assert sum(path.startswith("odd/") for path in found) == len(names)
    assert sum(path.startswith("many/") for path in found) == 1500
    assert sum(path.endswith("/deep/f") for path in found) == 40


def test_what_an_earlier_attempt_has_done_unheard_counts_as_done(own: HelperProcess, sites: Sites) -> None:
    gone = sites.url(sites.a / "gone")
    assert judged(own.remove(PathItem(1, gone))[1]) == "source NOT_FOUND"
    assert isinstance(own.remove(PathItem(1, gone, again=True))[1], DoneEvent)


@pytest.mark.full
def test_thousands_are_removed_and_made(own: HelperProcess, sites: Sites) -> None:
    urls = [sites.url(sites.a / f"d{number}") for number in range(600)]
    assert all(isinstance(event, DoneEvent) for event in own.make(*urls).values())
    assert {judged(event) for event in own.make(*urls[:5]).values()} == {"destination EXISTS"}
    items = [PathItem(key, url, directory=True) for key, url in enumerate([*urls, sites.url(sites.a / "none")])]
    outcome = own.remove(*items)
    assert judged(outcome.pop(600)) == "source NOT_FOUND"
    assert all(isinstance(event, DoneEvent) for event in outcome.values())
    assert not list(sites.a.iterdir())


def test_an_item_that_the_pipelined_way_stumbles_over_fails_alone(own: HelperProcess, sites: Sites) -> None:
    files = files_of_one_size(sites, 20)
    items = items_of(sites, files)
    items[7] = msgspec.structs.replace(items[7], source="gsiftp://localhost")
    outcome = own.copy(items)
    assert {key for key, event in outcome.items() if isinstance(event, FailedEvent)} == {7}
    removals = [PathItem(key, sites.url(sites.b / file.relative_to(sites.a))) for key, file in enumerate(files)]
    removals[7] = PathItem(7, "gsiftp://localhost")
    removed = own.remove(*removals)
    assert {key for key, event in removed.items() if isinstance(event, FailedEvent)} == {7}
    assert tree(sites.b) == {}


@pytest.mark.full
def test_only_large_files_have_progress_while_they_arrive(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same two sessions copy small files, then a large one, then small ones."""
    for name, value in sites.grid.environment().items():
        monkeypatch.setenv(name, value)
    source = sites.put(sites.a / "f")
    connections, waker = ChannelPool(Gsi()), Waker()
    addresses = host_port(sites.url(sites.a)), host_port(sites.url(sites.b))
    said: list[list[int]] = []
    pairs = []
    try:
        for number, large in enumerate([False, True, False]):
            pairs.append(connections.pair(*addresses, large=large))
            at_source, at_destination = pairs[-1]
            marks: list[Reply] = []
            command = b"STOR " + server_path(sites.url(sites.b / f"g{number}"))
            at_destination.send(command, lambda reply: None, None, marks.append)
            at_source.send(b"RETR " + server_path(sites.url(source)), lambda reply: None)
            run_until_answered(pairs[-1], waker, lambda: False, lambda: None, lambda: 30.0)
            said.append([mark.code for mark in marks if mark.code in (111, 112)])
    finally:
        connections.drop_all()
    assert pairs[0] == pairs[1] == pairs[2]
    assert not said[0]
    assert set(said[1]) == {111, 112}
    assert not said[2]


def test_the_library_of_the_grid_leaves_signals_to_programs_that_are_started(grid_programs: None) -> None:
    program = """
import subprocess
from pdm.workqueue.helpers.gridftp.gsi import Gsi
gsi = Gsi()
child = subprocess.Popen(["sleep", "60"])
child.terminate()
print(child.wait(10))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == (f"{-signal.SIGTERM}\n", 0), done.stderr


def test_items_without_a_size_or_with_a_checksum_are_copied_one_by_one(own: HelperProcess, sites: Sites) -> None:
    files = files_of_one_size(sites, 4)
    plain, *others = items_of(sites, files)
    given = [None, adler(files[2].read_bytes()), "ADLER32:00000001"]
    items = [
        plain,
        *(msgspec.structs.replace(each, size=-1, checksum=its) for each, its in zip(others, given, strict=True)),
    ]
    ended = outcomes(own.run(CopyRequest(own.new_id(), items, "never", "checksum", TimeLimits())))
    for key, file in enumerate(files[:3]):
        assert ended[key] == DoneEvent(1, key, 1024, 1024, adler(file.read_bytes()))
    failed = ended[3]
    assert isinstance(failed, FailedEvent)
    assert failed.fault.code == "CHECKSUM_MISMATCH"
    arrived = tree(sites.b)
    assert len(arrived) == len(tree(sites.a)) - 1
    assert not any("f3" in name or "part" in name for name in arrived)

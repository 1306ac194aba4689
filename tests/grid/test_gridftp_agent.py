"""The GridFTP helper against real servers: every byte, every name, every fault, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from pdm.testgrid import TestGrid
from pdm.workqueue.wire.agent_events import CancelledEvent, DoneEvent, FailedEvent, StartedEvent, UnreadableEvent
from pdm.workqueue.wire.agent_requests import CancelRequest, CopyRequest, PathItem, TimeLimits
from tests.grid.agent_sites import Sites, helper_as, judged
from tests.helpers.driver import (
    ODD_NAMES,
    HelperProcess,
    adler,
    assert_checked,
    check_items,
    copy_item,
    entries,
    outcomes,
    put,
    tree,
)

# -- copies


def test_a_tree_of_odd_names_arrives_byte_by_byte(shared: HelperProcess, sites: Sites) -> None:
    files = [sites.put(sites.a / "deep" / os.fsdecode(name), name) for name in (*ODD_NAMES, b"n" * 255)]
    files.append(sites.put(sites.a / "empty", b""))
    files.append(sites.put(sites.a / "large", os.urandom(20 * 1024 * 1024)))
    listed = entries(shared.list(sites.url(sites.a)))
    assert sum(entry.type == "file" for entry in listed.values()) == len(files)
    to = sites.b / "new" / "tree"
    outcome = shared.copy([sites.item(file, to / file.relative_to(sites.a), key) for key, file in enumerate(files)])
    assert tree(to) == tree(sites.a)
    for key, file in enumerate(files):
        content = file.read_bytes()
        done = outcome[key]
        assert isinstance(done, DoneEvent)
        assert (done.size, done.transferred, done.checksum) == (len(content), len(content), adler(content))


@pytest.mark.parametrize(
    ("overwrite", "there", "expected", "result"),
    [
        ("never", b"same one", b"same one", 0),
        ("never", b"an other", b"an other", "destination EXISTS"),
        ("different", b"same one", b"same one", 0),
        ("different", b"an other", b"same one", 8),
        ("always", b"same one", b"same one", 8),
        ("always", b"longer than that", b"same one", 8),
    ],
)
def test_what_is_at_the_destination(
    shared: HelperProcess, sites: Sites, overwrite: str, there: bytes, expected: bytes, result: int | str
) -> None:
    source, destination = sites.put(sites.a / "f", b"same one"), sites.put(sites.b / "g", there)
    outcome = shared.copy([sites.item(source, destination)], overwrite)[1]
    assert tree(sites.b) == {"g": expected}
    if isinstance(result, str):
        assert judged(outcome) == result
    else:
        assert isinstance(outcome, DoneEvent)
        assert (outcome.transferred, outcome.checksum) == (result, adler(b"same one"))


def test_files_are_checked_where_they_are(shared: HelperProcess, sites: Sites) -> None:
    items = check_items(sites.url, sites.b)
    sites.put(sites.b / "another")
    before = tree(sites.b)
    assert_checked(shared.check(items), "destination", judged)
    assert tree(sites.b) == before


def test_the_destination_of_a_copy_is_listed_first(shared: HelperProcess, sites: Sites) -> None:
    sites.put(sites.a / "sub" / "f", b"1")
    sites.put(sites.b / "sub" / "x", b"12345")
    closed = sites.put(sites.b / "closed" / "g").parent
    closed.chmod(0)
    events = shared.list_both(sites.url(sites.a), sites.url(sites.b))
    there = entries(events, destination=True)
    assert {path: entry.size for path, entry in there.items() if entry.type == "file"} == {"sub/x": 5}
    assert list(entries(events)) == ["sub", "sub/f"]
    unreadable = [event for event in events if isinstance(event, UnreadableEvent)]
    assert [(event.destination, event.path, event.fault.scope) for event in unreadable] == [
        (True, "closed", "destination")
    ]
    assert entries(shared.list_both(sites.url(sites.a), sites.url(sites.b / "missing")), destination=True) == {}


def test_a_server_looks_for_the_names_of_owners_only_where_they_are_shown(shared: HelperProcess, sites: Sites) -> None:
    file = sites.put(sites.a / "tree" / "f")
    names, state = (file.owner(), file.group()), file.stat()
    for owners, expected in ((True, names), (False, (str(state.st_uid), str(state.st_gid)))):
        listed = entries(shared.list(sites.url(sites.a / "tree"), owners=owners))["f"]
        assert (listed.owner, listed.group) == expected


def test_what_was_planned_is_removed_if_it_is_as_listed(shared: HelperProcess, sites: Sites) -> None:
    files = [sites.put(sites.a / "tree" / name) for name in ("same", "changed")]
    listed = entries(shared.list(sites.url(sites.a / "tree")))
    files[1].write_bytes(b"other content")
    items = [
        PathItem(
            number,
            sites.url(path),
            again=True,
            listed_size=listed[path.name].size,
            listed_mtime=listed[path.name].mtime,
        )
        for number, path in enumerate(files)
    ]
    outcome = shared.remove(*items)
    assert isinstance(outcome[0], DoneEvent)
    assert judged(outcome[1]) == "source CHANGED"
    directory = PathItem(0, sites.url(files[0].parent), directory=True, again=True, may_stay=True)
    assert isinstance(shared.remove(directory)[0], DoneEvent)
    assert files[1].exists()


def test_faults_are_each_files_own(shared: HelperProcess, sites: Sites) -> None:
    good = sites.put(sites.a / "f")
    (sites.a / "dir").mkdir()
    shut = sites.put(sites.a / "shut" / "f")
    shut.chmod(0)
    (sites.b / "dir").mkdir()
    sites.put(sites.b / "file")
    closed = sites.b / "closed"
    closed.mkdir(mode=0o500)
    items = [
        sites.item(good, sites.b / "1", 1),
        sites.item(sites.a / "gone", sites.b / "2", 2),
        sites.item(good, sites.b / "dir", 3),
        sites.item(good, sites.b / "file" / "below", 4),
        sites.item(good, sites.b / ("n" * 256), 5),
        copy_item(6, sites.url(good), sites.url(sites.b / "6"), 8),
        copy_item(7, sites.url(sites.a / "dir"), sites.url(sites.b / "7"), 0),
        sites.item(shut, sites.b / "8", 8),
        sites.item(good, closed / "9", 9),
    ]
    outcome = shared.copy(items)
    assert isinstance(outcome[1], DoneEvent)
    expected = {
        2: "source NOT_FOUND",
        3: "destination IS_A_DIRECTORY",
        4: "destination NOT_A_DIRECTORY",
        5: "destination INVALID_NAME",
        6: "source SIZE_CHANGED",
        7: "source IS_A_DIRECTORY",
        8: "source PERMISSION_DENIED",
        9: "destination PERMISSION_DENIED",
    }
    if sites.grid.users["alice"].account is None and os.geteuid() == 0:
        pytest.skip("root may do everything")
    assert {key: judged(outcome[key]) for key in expected} == expected
    assert not any(event.leftover for event in outcome.values() if isinstance(event, FailedEvent))
    assert tree(sites.b) == {"1": b"content", "file": b"content"}


@pytest.mark.full
def test_many_bad_sources_do_not_hold_up_the_good_ones(shared: HelperProcess, sites: Sites) -> None:
    good = sites.put(sites.a / "f")
    items = [sites.item(good if key % 4 == 0 else sites.a / f"gone{key}", sites.b / f"{key}", key) for key in range(40)]
    outcome = shared.copy(items)
    for key, event in outcome.items():
        if key % 4 == 0:
            assert isinstance(event, DoneEvent)
        else:
            assert judged(event) == "source NOT_FOUND"
    assert tree(sites.b) == {f"{key}": b"content" for key in range(0, 40, 4)}


def test_what_earlier_attempts_left_goes_first(shared: HelperProcess, sites: Sites) -> None:
    item = sites.item(sites.put(sites.a / "f"), sites.b / "g", attempt=3)
    for url in item.stale:
        sites.put(sites.b / url.rpartition("/")[2], b"half of it")
    assert isinstance(shared.copy([item])[1], DoneEvent)
    assert tree(sites.b) == {"g": b"content"}


@pytest.mark.full
def test_two_helpers_may_make_the_same_directories(shared: HelperProcess, own: HelperProcess, sites: Sites) -> None:
    files = [sites.put(sites.a / f"f{number}") for number in range(40)]
    requests = []
    for helper, half in ((shared, files[::2]), (own, files[1::2])):
        items = [
            sites.item(file, sites.b / f"d{key // 2}" / "deep" / "er" / file.name, key) for key, file in enumerate(half)
        ]
        requests.append((helper, CopyRequest(helper.new_id(), items, "never", "checksum", TimeLimits())))
    for helper, request in requests:
        helper.send(request)
    for helper, request in requests:
        assert all(isinstance(event, DoneEvent) for event in outcomes(helper.rest(request.id)).values())
    assert len(tree(sites.b)) == 40


# -- listings and the rest


def test_a_listing_names_what_is_there_and_follows_nothing(shared: HelperProcess, sites: Sites) -> None:
    for name in ODD_NAMES:
        sites.put(sites.a / "names" / os.fsdecode(name))
    sites.put(sites.a / "shut" / "f")
    (sites.a / "empty").mkdir()
    (sites.a / "loop").symlink_to(".")
    (sites.a / "link").symlink_to("names/a b")
    (sites.a / "shut").chmod(0)
    os.chown(sites.a / "shut", 0, 0) if os.geteuid() == 0 else None
    events = shared.list(sites.url(sites.a))
    found = entries(events)
    (sites.a / "shut").chmod(0o700)
    plain = {path: entry.type for path, entry in found.items() if not path.startswith("names/")}
    assert plain == {"names": "directory", "shut": "directory", "empty": "directory", "loop": "link", "link": "link"}
    assert sum(path.startswith("names/") for path in found) == len(ODD_NAMES)
    assert found["link"].target == str(sites.a / "names" / "a b").replace(" ", "%20")
    assert found["link"].target_is_file
    unreadable = [event for event in events if isinstance(event, UnreadableEvent)]
    assert [(event.path, event.fault.errno) for event in unreadable] == [("shut", 13)]


def test_depth_and_single_files(shared: HelperProcess, sites: Sites) -> None:
    sites.put(sites.a / "d" / "e" / "f", b"123")
    (sites.a / "link").symlink_to("d")
    url = sites.url(sites.a)
    assert {path: entry.type for path, entry in entries(shared.list(url, 0)).items()} == {"": "directory"}
    assert set(entries(shared.list(url, 1))) == {"d", "link"}
    assert set(entries(shared.list(url, 2))) == {"d", "link", "d/e"}
    assert entries(shared.list(url + "/d/e/f"))[""].size == 3
    assert set(entries(shared.list(url + "/link"))) == {"e", "e/f"}
    assert entries(shared.list(url + "/link", follow=False))[""].type == "link"
    assert judged(shared.list(url + "/gone")[-1]) == "source NOT_FOUND"


def test_removal_and_rename_and_new_directories(shared: HelperProcess, sites: Sites) -> None:
    sites.put(sites.a / "full" / "f", b"f")
    sites.put(sites.a / "g", b"g")
    (sites.a / "link").symlink_to("full")
    url = sites.url(sites.a)
    assert judged(shared.rename(url + "/gone", url + "/new")) == "source NOT_FOUND"
    assert judged(shared.rename(url + "/g", url + "/full/f")) == "destination EXISTS"
    assert judged(shared.rename(url + "/g", url + "/full", "always")) == "destination IS_A_DIRECTORY"
    assert isinstance(shared.rename(url + "/g", url + "/full/f", "always"), DoneEvent)
    assert isinstance(shared.rename(url + "/full", url + "/moved%0Ahere"), DoneEvent)
    assert tree(sites.a) == {"moved\nhere/f": b"g"}

    outcome = shared.make(url + "/x/y", url + "/z", url + "/z")
    assert [judged(outcome[0]), judged(outcome[2])] == ["destination NOT_FOUND", "destination EXISTS"]
    outcome = shared.make(url + "/x/y", url + "/z", parents=True)
    assert all(isinstance(event, DoneEvent) for event in outcome.values())

    removed = shared.remove(
        PathItem(0, url + "/moved%0Ahere", directory=True),
        PathItem(1, url + "/moved%0Ahere/f"),
        PathItem(2, url + "/moved%0Ahere", directory=True),
        PathItem(3, url + "/moved%0Ahere", directory=True),
        PathItem(4, url + "/x"),
        PathItem(5, url + "/link"),
    )
    assert [judged(removed[key]) for key in (0, 3, 4)] == [
        "source NOT_EMPTY",
        "source NOT_FOUND",
        "source IS_A_DIRECTORY",
    ]
    assert all(isinstance(removed[key], DoneEvent) for key in (1, 2))
    assert all(isinstance(event, DoneEvent) for event in shared.discard(url + "/gone").values())


# -- who may come in, and who is there


def test_servers_that_are_not_there(shared: HelperProcess, sites: Sites) -> None:
    source, url = sites.put(sites.a / "f"), sites.url(sites.b) + "/x"
    nowhere, unknown = "gsiftp://localhost:1/x", "gsiftp://no-such-host.invalid:2811/x"
    for missing in (nowhere, unknown):
        assert judged(shared.copy([copy_item(1, missing, url, 7)])[1]) == "source CONNECTION"
        assert judged(shared.copy([copy_item(1, sites.url(source), missing, 7)])[1]) == "destination CONNECTION"
        assert judged(shared.list(missing)[-1]) == "source CONNECTION"


@pytest.mark.full
def test_credentials_that_do_not_do(grid: TestGrid, sites: Sites, tmp_path: Path) -> None:
    url = sites.url(sites.put(sites.a / "f"))
    (tmp_path / "garbage").write_text("garbage")
    (tmp_path / "garbage").chmod(0o600)
    (tmp_path / "trust").mkdir()
    unmapped = tmp_path / "unmapped"
    grid.credentials.authority.user("nobody knows").proxy().write_bundle(unmapped)
    cases: list[tuple[Mapping[str, str], str]] = [
        ({"X509_USER_PROXY": str(grid.users["alice"].files.expired_proxy)}, "service CREDENTIAL_EXPIRED"),
        ({"X509_USER_PROXY": str(tmp_path / "gone")}, "service CREDENTIAL_MISSING"),
        ({"X509_USER_PROXY": str(tmp_path / "garbage")}, "service CREDENTIAL_MISSING"),
        ({"X509_CERT_DIR": str(tmp_path / "trust")}, "source CERTIFICATE"),
        (grid.environment("mallory"), "source CERTIFICATE"),
        ({"X509_USER_PROXY": str(unmapped)}, "source CREDENTIAL_REFUSED"),
    ]
    for changes, expected in cases:
        with helper_as(grid, **changes) as helper:
            assert judged(helper.list(url)[-1]) == expected


def test_a_server_with_another_hosts_certificate(grid: TestGrid, shared: HelperProcess, sites: Sites) -> None:
    impostor = grid.add_server("impostor", ["wrong.example.org"])
    item = copy_item(1, sites.url(sites.put(sites.a / "f")), f"{impostor.url}{sites.b}/x", 7)
    assert judged(shared.copy([item])[1]) == "destination CERTIFICATE"
    impostor.stop()


# -- in the middle of a transfer


def begin(helper: HelperProcess, sites: Sites, keys: int = 1, stall_s: float = 60.0) -> int:
    """Begin a transfer that never ends; returns the request once bytes arrive."""
    source = sites.huge()
    items = [sites.item(source, sites.b / f"to{key}", key) for key in range(keys)]
    request = CopyRequest(helper.new_id(), items, "never", "checksum", TimeLimits(stall_s=stall_s, total_s=60.0))
    helper.send(request)
    assert isinstance(helper.event(), StartedEvent)
    deadline = time.monotonic() + 30
    while sites.arriving() == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return request.id


def test_a_cancelled_transfer_is_dead_and_gone(own: HelperProcess, sites: Sites) -> None:
    request_id = begin(own, sites, keys=3)
    own.send(CancelRequest(request_id))
    assert outcomes([StartedEvent(request_id, 0), *own.rest(request_id)]) == {
        key: CancelledEvent(request_id, key) for key in range(3)
    }
    assert tree(sites.b) == {}
    # The helper continues.
    assert isinstance(own.copy([sites.item(sites.put(sites.a / "f"), sites.b / "g")])[1], DoneEvent)


@pytest.mark.parametrize("site", [pytest.param("A", marks=pytest.mark.full), "B"])
def test_a_killed_server_fails_the_transfer_and_leaves_nothing(own: HelperProcess, sites: Sites, site: str) -> None:
    request_id = begin(own, sites)
    assert sites.grid.sites[site].server.kill_sessions() > 0
    failed = own.rest(request_id)[-1]
    assert judged(failed) == "transfer CONNECTION"
    # On a busy machine the time for cleaning may run out: then it must say so.
    assert failed.leftover is bool(tree(sites.b))  # type: ignore[union-attr]
    # Connections that were used a moment ago are not taken for ones that a server has closed for their idleness.
    time.sleep(1.2)
    assert isinstance(own.copy([sites.item(sites.put(sites.a / "f"), sites.b / "g")])[1], DoneEvent)


@pytest.mark.parametrize("site", ["A", pytest.param("B", marks=pytest.mark.full)])
def test_a_frozen_server_stalls_the_transfer(own: HelperProcess, sites: Sites, site: str) -> None:
    # Long enough for a login on a busy machine.
    request_id = begin(own, sites, stall_s=6.0)
    server = sites.grid.sites[site].server
    server.freeze()
    failed = own.rest(request_id)[-1]
    server.thaw()
    # If it was seen that bytes had arrived; else it is asked whether it says anything at all.
    assert judged(failed) in ("transfer STALLED", f"{'source' if site == 'A' else 'destination'} CONNECTION")
    # A destination that does not answer cannot be cleaned.
    assert failed.leftover is (site == "B")  # type: ignore[union-attr]
    assert isinstance(own.copy([sites.item(sites.put(sites.a / "f"), sites.b / "g")])[1], DoneEvent)


@pytest.mark.parametrize("site", [pytest.param("A", marks=pytest.mark.full), "B"])
def test_a_cancel_does_not_wait_for_a_frozen_server(own: HelperProcess, sites: Sites, site: str) -> None:
    request_id = begin(own, sites)
    server = sites.grid.sites[site].server
    server.freeze()
    own.send(CancelRequest(request_id))
    cancelled = own.rest(request_id)[-1]
    server.thaw()
    assert isinstance(cancelled, CancelledEvent)
    assert cancelled.leftover is (site == "B")
    assert isinstance(own.copy([sites.item(sites.put(sites.a / "f"), sites.b / "g")])[1], DoneEvent)


def test_sessions_that_were_closed_meanwhile_are_renewed_in_silence(own: HelperProcess, sites: Sites) -> None:
    source = sites.put(sites.a / "f")
    for name in ("one", "two"):
        assert isinstance(own.copy([sites.item(source, sites.b / name)])[1], DoneEvent)
        for site in sites.grid.sites.values():
            site.server.kill_sessions()
        time.sleep(1.1)
    assert set(entries(own.list(sites.url(sites.a)))) == {"f"}


def test_a_killed_helper_leaves_no_transfer_running(own: HelperProcess, sites: Sites) -> None:
    begin(own, sites)
    own.process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(site.server.sessions() for site in sites.grid.sites.values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.full
def test_a_helper_without_requests_leaves_no_transfer_running(own: HelperProcess, sites: Sites) -> None:
    begin(own, sites)
    assert own.process.stdin is not None
    own.process.stdin.close()
    assert own.process.wait(timeout=10) == 0


# -- how fast


@pytest.mark.full
def test_a_thousand_small_files(shared: HelperProcess, sites: Sites, capsys: pytest.CaptureFixture[str]) -> None:
    files = [put(sites.a / f"d{number // 100}" / f"f{number}", os.urandom(1024)) for number in range(1000)]
    sites.grid.give(sites.a)
    items = [sites.item(file, sites.b / file.relative_to(sites.a), key) for key, file in enumerate(files)]
    began = time.monotonic()
    outcome = shared.copy(items)
    elapsed = time.monotonic() - began
    assert all(isinstance(event, DoneEvent) for event in outcome.values())
    assert subprocess.run(["diff", "-r", sites.a, sites.b], check=False).returncode == 0
    with capsys.disabled():
        sys.stdout.write(f"\n1000 files of 1 KiB, each proven by size and checksum: {1000 / elapsed:.0f} files/s\n")

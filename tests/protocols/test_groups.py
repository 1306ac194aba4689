"""Small files are copied in groups: all that holds for one file holds for each of them."""

from __future__ import annotations

import errno
import itertools
import os
import time
from pathlib import Path

import pytest

from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent, FailedEvent, LogEvent
from pdm.workqueue.wire.agent_requests import CancelRequest, CopyItem, CopyRequest, TimeLimits
from tests.helpers.driver import HelperProcess, adler, fault, outcomes, tree
from tests.protocols.places import Places
from tests.support.variants import usual

OLD = 1_700_000_000
PROTOCOLS = ("ssh", "https", "xroot", "gridftp")
#: Protocols whose files go in groups.
_GROUPED = ("ssh", "https", "xroot")
_ROUTES = [
    pair
    if pair[0] == pair[1] or pair in (("ssh", "https"), ("https", "xroot"))
    else pytest.param(pair, marks=pytest.mark.full)
    for pair in itertools.product(PROTOCOLS, repeat=2)
    # Third-party, by another helper; and not each one with it.
    if "gridftp" not in pair or pair in (("gridftp", "ssh"), ("https", "gridftp"))
]
_WAIT_S = 60.0


def old(places: Places, path: Path, content: bytes) -> Path:
    """A file that was written long ago: a younger one is copied alone."""
    places.put(path, content)
    os.utime(path, (OLD, OLD))
    return path


def make_sources(places: Places, count: int = 40, size: int = 1000) -> list[Path]:
    """Files of many sizes, also of none, in two directories."""
    return [
        old(places, places.a / "tree" / f"d{number % 2}" / f"f;&+%41 {number:03}", bytes([number]) * (number * size))
        for number in range(count)
    ]


def items_of(places: Places, route: tuple[str, str], sources: list[Path]) -> list[CopyItem]:
    return [
        places.item(route[0], source, places.b / source.relative_to(places.a), key, to=route[1])
        for key, source in enumerate(sources)
    ]


def copied(
    helper: HelperProcess, items: list[CopyItem], overwrite: str = "never", verify: str = "checksum"
) -> tuple[dict[int, AgentEvent], set[int]]:
    """The outcomes of a copy, and the keys of the files that came in a group."""
    request = CopyRequest(helper.new_id(), items, overwrite, verify, TimeLimits(stall_s=20.0))  # type: ignore[arg-type]
    events = helper.run(request)
    together = {event.key for event in events if isinstance(event, LogEvent) and "with others" in event.text}
    return outcomes(events), together


@pytest.mark.parametrize("verify", ["checksum", "size"])
@pytest.mark.parametrize("route", _ROUTES)
def test_all_files_of_a_group_arrive(relay: HelperProcess, places: Places, route: tuple[str, str], verify: str) -> None:
    sources = make_sources(places)

    ended, together = copied(relay, items_of(places, route, sources), verify=verify)

    assert tree(places.b) == tree(places.a)
    assert together == set(range(len(sources)))
    for key, source in enumerate(sources):
        content = source.read_bytes()
        done = ended[key]
        assert isinstance(done, DoneEvent), done
        assert (done.size, done.transferred) == (len(content), len(content))
        assert done.checksum == (adler(content) if verify == "checksum" else None)


@pytest.mark.parametrize("protocol", usual(PROTOCOLS, ["ssh", "https"]))
def test_one_that_cannot_be_copied_is_no_harm_to_the_others(
    relay: HelperProcess, places: Places, protocol: str
) -> None:
    sources = make_sources(places)
    items = items_of(places, (protocol, protocol), sources)
    absent, longer, shut, taken, young = 3, 5, 6, 8, 11
    sources[shut].chmod(0)
    sources[absent].unlink()
    with sources[longer].open("ab") as file:
        file.write(b"more")
    os.utime(sources[longer], (OLD, OLD))
    there = places.put(places.b / sources[taken].relative_to(places.a), b"another")
    os.utime(sources[young])

    ended, together = copied(relay, items)

    failed = {key: fault(event) for key, event in ended.items() if not isinstance(event, DoneEvent)}
    assert failed == {
        absent: ("source", failed[absent][1]),
        longer: ("source", "SIZE_CHANGED"),
        shut: ("source", errno.EACCES),
        taken: ("destination", "EXISTS"),
    }
    assert there.read_bytes() == b"another"
    assert together == set(ended) - {absent, longer, shut, taken, young}
    for key in together | {young}:
        assert (places.b / sources[key].relative_to(places.a)).read_bytes() == sources[key].read_bytes()
    assert places.left() == []


@pytest.mark.parametrize("protocol", usual(_GROUPED, ["ssh", "https"]))
def test_what_is_there_is_replaced_where_that_is_asked_for(relay: HelperProcess, places: Places, protocol: str) -> None:
    sources = make_sources(places)
    for source in sources[:10]:
        places.put(places.b / source.relative_to(places.a), b"another")

    ended, together = copied(relay, items_of(places, (protocol, protocol), sources), overwrite="always")

    assert {type(event) for event in ended.values()} == {DoneEvent}
    assert together == set(range(10, len(sources)))
    assert tree(places.b) == tree(places.a)


@pytest.mark.parametrize("route", _ROUTES)
def test_files_that_are_the_same_are_found_together(
    relay: HelperProcess, places: Places, route: tuple[str, str]
) -> None:
    sources = make_sources(places)
    for number, source in enumerate(sources):
        content = source.read_bytes()
        other = b"x" * len(content) if number % 10 == 9 else content
        old(places, places.b / source.relative_to(places.a), other)
    items = items_of(places, route, sources)
    events = relay.run(CopyRequest(relay.new_id(), items, "different", "checksum", TimeLimits(stall_s=60.0)))
    ended = outcomes(events)
    alone = {event.key for event in events if isinstance(event, LogEvent) and "is copied alone" in event.text}
    different = {key for key in ended if key % 10 == 9}
    assert alone == different
    for key, source in enumerate(sources):
        done = ended[key]
        assert isinstance(done, DoneEvent), done
        assert (done.already_there, done.checksum) == (key not in different, adler(source.read_bytes()))
        assert done.transferred == (done.size if key in different else 0)
    assert tree(places.b) == tree(places.a)


@pytest.mark.parametrize("protocol", usual(_GROUPED, ["ssh"]))
def test_a_group_that_is_cancelled_leaves_nothing(own: HelperProcess, places: Places, protocol: str) -> None:
    sources = make_sources(places, count=200)
    request = CopyRequest(
        own.new_id(), items_of(places, (protocol, protocol), sources), "never", "size", TimeLimits(stall_s=60.0)
    )
    own.send(request)
    give_up_at = time.monotonic() + _WAIT_S
    while not list(places.b.rglob("*.part")):
        assert time.monotonic() < give_up_at, "no file arrives"
    own.send(CancelRequest(request.id))

    ended = outcomes(own.rest(request.id))

    assert places.left() == []
    for key, source in enumerate(sources):
        arrived = places.b / source.relative_to(places.a)
        if isinstance(ended[key], DoneEvent):
            assert arrived.exists()
        # The server may have carried out a rename to which the response was not awaited any more.
        assert not arrived.exists() or arrived.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("protocol", usual(_GROUPED, ["https"]))
def test_a_server_that_dies_under_a_group_leaves_each_file_whole_or_absent(
    own: HelperProcess, places: Places, protocol: str
) -> None:
    sources = make_sources(places, count=200)
    items = items_of(places, (protocol, protocol), sources)
    request = CopyRequest(own.new_id(), items, "never", "size", TimeLimits(stall_s=60.0))
    server = places.storages.server(protocol, "B")
    own.send(request)
    give_up_at = time.monotonic() + _WAIT_S
    while not list(places.b.rglob("*.part")):
        assert time.monotonic() < give_up_at, "no file arrives"
    server.kill()
    server.start()

    ended = outcomes(own.rest(request.id))

    for key, event in ended.items():
        arrived = places.b / sources[key].relative_to(places.a)
        if isinstance(event, DoneEvent):
            assert arrived.read_bytes() == sources[key].read_bytes()
        else:
            assert isinstance(event, FailedEvent), event
            assert event.leftover or not Path(arrived.parent, Path(items[key].temporary).name).exists()

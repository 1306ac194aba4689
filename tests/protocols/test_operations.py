"""All five job types by each protocol, against real servers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent, UnreadableEvent
from pdm.workqueue.wire.agent_requests import PathItem
from tests.helpers.driver import ODD_NAMES, HelperProcess, adler, entries, tree
from tests.protocols.places import Places, judged

PROTOCOLS = ["ssh", "https", "xroot"]
#: Names that a protocol cannot carry, whatever the client does.
CANNOT: dict[str, list[bytes]] = {
    "https": [b"new\nline", b"#?*;&'", b"tab\t", b"cr\rx"],
    "xroot": [b"new\nline", b"#?*;&'", b"\xe9"],
}
protocols = pytest.mark.parametrize("protocol", PROTOCOLS)
pytestmark = pytest.mark.timeout(180)


def names_for(protocol: str) -> list[str]:
    return [os.fsdecode(name) for name in ODD_NAMES if name not in CANNOT.get(protocol, [])]


@protocols
def test_a_listing_has_names_kinds_sizes_and_times(protocol: str, relay: HelperProcess, places: Places) -> None:
    for name in names_for(protocol):
        places.put(places.a / "tree" / name, b"12345")
    (places.a / "tree" / "sub" / "empty").mkdir(parents=True)
    places.put(places.a / "tree" / "sub" / "file", b"")
    os.utime(places.a / "tree" / "sub" / "file", (1_000_000_000, 1_000_000_000))
    found = entries(relay.list(places.url(protocol, places.a / "tree")))
    expected = {
        "/".join(wire_name(part) for part in path.relative_to(places.a / "tree").parts): "directory"
        if path.is_dir()
        else "file"
        for path in (places.a / "tree").rglob("*")
    }
    assert {path: entry.type for path, entry in found.items()} == expected
    assert found["a%20b"].size == 5
    assert (found["sub/file"].size, found["sub/file"].mtime) == (0, 1_000_000_000)
    owner = (places.a / "tree" / "a b").owner() if protocol == "ssh" else None
    assert found["a%20b"].owner == owner
    (itself,) = entries(relay.list(places.url(protocol, places.a / "tree" / "a b"))).values()
    assert (itself.path, itself.size) == ("", 5)


def wire_name(name: str) -> str:
    from urllib.parse import quote_from_bytes

    return quote_from_bytes(os.fsencode(name), safe="")


@protocols
@pytest.mark.parametrize("verify", ["checksum", pytest.param("size", marks=pytest.mark.full)])
def test_copies_with_every_name_are_proven(protocol: str, verify: str, relay: HelperProcess, places: Places) -> None:
    contents = [
        b"",
        b"x",
        os.urandom(5_000_011),
        *[name.encode(errors="surrogateescape") for name in names_for(protocol)],
    ]
    names = ["nothing", "one", "large", *names_for(protocol)]
    items = [
        places.item(protocol, places.put(places.a / name, content), places.b / "new" / "dir" / name, key)
        for key, (name, content) in enumerate(zip(names, contents, strict=True))
    ]
    outcomes = relay.copy(items, verify=verify)
    for key, content in enumerate(contents):
        done = outcomes[key]
        assert isinstance(done, DoneEvent), (names[key], done)
        assert (done.size, done.transferred) == (len(content), len(content))
        assert done.checksum == (adler(content) if verify == "checksum" else None)
    assert tree(places.b / "new" / "dir") == tree(places.a)
    assert places.left() == []


@protocols
def test_overwriting(protocol: str, relay: HelperProcess, places: Places) -> None:
    source, there = places.put(places.a / "f", b"new"), places.put(places.b / "f", b"old")
    item = places.item(protocol, source, there)
    assert judged(protocol, relay.copy([item])[1]) == "destination EXISTS"
    assert there.read_bytes() == b"old"
    assert isinstance(relay.copy([item], overwrite="always")[1], DoneEvent)
    assert there.read_bytes() == b"new"
    again = relay.copy([item])[1]
    assert isinstance(again, DoneEvent) and again.transferred == 0
    assert places.left() == []


@protocols
def test_the_destination_of_a_copy_is_listed_first(protocol: str, relay: HelperProcess, places: Places) -> None:
    places.put(places.a / "tree" / "sub" / "f", b"1")
    places.put(places.b / "tree" / "sub" / "x", b"12345")
    closed = places.put(places.b / "tree" / "closed" / "g").parent
    closed.chmod(0)
    source = places.url(protocol, places.a / "tree")
    events = relay.list_both(source, places.url(protocol, places.b / "tree") + "/")
    there = entries(events, destination=True)
    assert {path: entry.size for path, entry in there.items() if entry.type == "file"} == {"sub/x": 5}
    assert list(entries(events)) == ["sub", "sub/f"]
    unreadable = [event for event in events if isinstance(event, UnreadableEvent)]
    assert [(event.destination, event.path, event.fault.scope) for event in unreadable] == [
        (True, "closed", "destination")
    ]
    assert entries(relay.list_both(source, places.url(protocol, places.b / "missing")), destination=True) == {}
    closed.chmod(0o755)


@protocols
def test_what_was_planned_is_removed_if_it_is_as_listed(protocol: str, relay: HelperProcess, places: Places) -> None:
    files = [places.put(places.a / "tree" / name) for name in ("same", "changed")]
    listed = entries(relay.list(places.url(protocol, places.a / "tree")))
    files[1].write_bytes(b"other content")
    items = [
        PathItem(
            number,
            places.url(protocol, path),
            again=True,
            listed_size=listed[path.name].size,
            listed_mtime=listed[path.name].mtime,
        )
        for number, path in enumerate(files)
    ]
    outcome = relay.remove(*items)
    assert isinstance(outcome[0], DoneEvent)
    assert judged(protocol, outcome[1]) == "source CHANGED"
    directory = PathItem(0, places.url(protocol, files[0].parent), directory=True, again=True, may_stay=True)
    assert isinstance(relay.remove(directory)[0], DoneEvent)
    files[1].unlink()
    assert isinstance(relay.remove(directory)[0], DoneEvent)
    assert not files[0].parent.exists()


@protocols
def test_directories_are_made(protocol: str, relay: HelperProcess, places: Places) -> None:
    one, deep = places.a / "one", places.a / "x" / "y z"
    assert isinstance(relay.make(places.url(protocol, one))[0], DoneEvent)
    assert judged(protocol, relay.make(places.url(protocol, one))[0]) == "destination EXISTS"
    assert judged(protocol, relay.make(places.url(protocol, deep))[0]) == "destination NOT_FOUND"
    assert isinstance(relay.make(places.url(protocol, deep), parents=True)[0], DoneEvent)
    assert deep.is_dir()
    assert one.is_dir()
    file = places.put(places.a / "file")
    assert judged(protocol, relay.make(places.url(protocol, file / "below"), parents=True)[0]) == (
        "destination NOT_A_DIRECTORY"
    )


@protocols
def test_removing(protocol: str, relay: HelperProcess, places: Places) -> None:
    for name in names_for(protocol):
        file = places.put(places.a / name)
        outcome = relay.remove(PathItem(0, places.url(protocol, file)))[0]
        assert isinstance(outcome, DoneEvent), (name, outcome)
        assert not file.exists()
    full = places.put(places.a / "full" / "file").parent
    (places.a / "empty").mkdir()
    places.storages.give(places.a)

    def removed(path: Path, *, directory: bool) -> AgentEvent:
        return relay.remove(PathItem(0, places.url(protocol, path), directory))[0]

    assert judged(protocol, removed(places.a / "none", directory=False)) == "source NOT_FOUND"
    assert judged(protocol, removed(full, directory=True)) == "source NOT_EMPTY"
    assert judged(protocol, removed(full, directory=False)) == "source IS_A_DIRECTORY"
    assert (full / "file").exists()
    assert judged(protocol, removed(places.a / "empty", directory=False)) == "source IS_A_DIRECTORY"
    assert isinstance(removed(places.a / "empty", directory=True), DoneEvent)
    assert not (places.a / "empty").exists()


@protocols
def test_renaming(protocol: str, relay: HelperProcess, places: Places) -> None:
    file, other = places.put(places.a / "f", b"one"), places.put(places.a / "o", b"two")
    urls = [places.url(protocol, path) for path in (file, other, places.a / "new", places.a / "none")]
    assert judged(protocol, relay.rename(urls[0], urls[1])) == "destination EXISTS"
    assert (file.read_bytes(), other.read_bytes()) == (b"one", b"two")
    assert isinstance(relay.rename(urls[0], urls[2]), DoneEvent)
    assert (places.a / "new").read_bytes() == b"one"
    assert isinstance(relay.rename(urls[2], urls[1], "always"), DoneEvent)
    assert other.read_bytes() == b"one"
    assert judged(protocol, relay.rename(urls[3], urls[0])) == "source NOT_FOUND"
    (places.a / "dir").mkdir()
    places.put(places.a / "dir" / "in it")
    directory, moved = places.a / "dir", places.a / "moved"
    assert isinstance(relay.rename(places.url(protocol, directory), places.url(protocol, moved)), DoneEvent)
    assert (moved / "in it").exists()


def test_what_xrootd_would_take_for_another_name_is_refused(relay: HelperProcess, places: Places) -> None:
    victim = places.put(places.a / "data", b"stays")
    odd = places.put(places.a / "data?x=1", b"odd")
    url = places.url("https", odd)
    assert judged("https", relay.remove(PathItem(0, url))[0]) == "source INVALID_NAME"
    assert judged("https", relay.rename(places.url("https", victim), url)) == "destination INVALID_NAME"
    assert judged("https", relay.copy([places.item("https", odd, places.b / "x")])[1]).endswith("INVALID_NAME")
    tail = places.url("https", places.a / "data\n")
    assert judged("https", relay.rename(places.url("https", victim), tail)) == "destination INVALID_NAME"
    assert victim.read_bytes() == b"stays" and odd.exists()
    assert list(places.b.iterdir()) == []

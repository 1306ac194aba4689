"""Listings of a copy's destination before its source, and removals of what was planned, by the FILE helper."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdm.workqueue.wire.agent_events import DoneEvent, EntriesEvent, RootEvent, UnreadableEvent
from pdm.workqueue.wire.agent_requests import PathItem
from tests.helpers.driver import HelperProcess, entries, fault, put


def test_the_destination_comes_first(file_helper: HelperProcess, site: Path) -> None:
    put(site / "source" / "a" / "f", b"123")
    put(site / "there" / "a" / "g", b"12345")
    (site / "there" / "link").symlink_to("a/g")
    events = file_helper.list_both((site / "source").as_uri(), (site / "there").as_uri() + "/")
    assert {path: entry.type for path, entry in entries(events, destination=True).items()} == {
        "a": "directory",
        "a/g": "file",
        "link": "link",
    }
    assert {path: entry.size for path, entry in entries(events).items() if entry.type == "file"} == {"a/f": 3}
    roots = [(event.destination, event.path) for event in events if isinstance(event, RootEvent)]
    assert roots == [(True, str(site / "there")), (False, str(site / "source"))]


@pytest.mark.parametrize("name", ["missing", "file/below"])
def test_a_destination_that_is_missing_is_empty(file_helper: HelperProcess, site: Path, name: str) -> None:
    put(site / "source" / "f")
    put(site / "file")
    events = file_helper.list_both((site / "source").as_uri(), f"{site.as_uri()}/{name}")
    assert entries(events, destination=True) == {}
    assert list(entries(events)) == ["f"]


@pytest.mark.parametrize(("place", "path"), [("there/", "a%20b"), ("there/a%20b", ""), ("there/g", None)])
def test_of_a_single_file_only_its_place_is_shown(
    file_helper: HelperProcess, site: Path, place: str, path: str | None
) -> None:
    source = put(site / "a b", b"1")
    put(site / "there" / "a b", b"1234")
    put(site / "there" / "other")
    events = file_helper.list_both(source.as_uri(), f"{site.as_uri()}/{place}")
    shown = entries(events, destination=True)
    assert {path: entry.size for path, entry in shown.items()} == ({} if path is None else {path: 4})
    assert list(entries(events)) == [""]


def test_a_missing_source_fails_at_the_source(file_helper: HelperProcess, site: Path) -> None:
    put(site / "there" / "f")
    events = file_helper.list_both((site / "missing").as_uri(), (site / "there").as_uri())
    assert fault(events[-1]) == ("source", "NOT_FOUND")
    assert not any(isinstance(event, EntriesEvent) for event in events)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_directory_of_the_destination_that_may_not_be_read_is_named(file_helper: HelperProcess, site: Path) -> None:
    put(site / "source" / "f")
    closed = put(site / "there" / "closed" / "f").parent
    closed.chmod(0)
    try:
        events = file_helper.list_both((site / "source").as_uri(), (site / "there").as_uri())
    finally:
        closed.chmod(0o755)
    (found,) = [event for event in events if isinstance(event, UnreadableEvent)]
    assert (found.destination, found.path, found.fault.scope) == (True, "closed", "destination")
    assert list(entries(events)) == ["f"]


def item(key: int, path: Path, **more: object) -> PathItem:
    """The removal of a file as it is now."""
    there = path.lstat()
    listed = PathItem(key, path.as_uri(), again=True, listed_size=there.st_size, listed_mtime=int(there.st_mtime))
    return PathItem(**{name: getattr(listed, name) for name in listed.__struct_fields__} | more)


def test_another_file_than_was_listed_stays(file_helper: HelperProcess, site: Path) -> None:
    files = [put(site / name) for name in ("same", "longer", "later", "directory", "gone")]
    items = [item(number, path) for number, path in enumerate(files)]
    files[1].write_bytes(b"other content")
    os.utime(files[2], (1, 1))
    files[3].unlink()
    files[3].mkdir()
    files[4].unlink()
    outcome = file_helper.remove(*items)
    assert [isinstance(outcome[number], DoneEvent) for number in range(5)] == [True, False, False, False, True]
    assert {fault(outcome[number]) for number in (1, 2, 3)} == {("source", "CHANGED")}
    assert sorted(path.name for path in site.iterdir()) == ["directory", "later", "longer"]


def test_failures_at_the_destination_are_its_own(file_helper: HelperProcess, site: Path) -> None:
    path = put(site / "f")
    changed = item(1, path, listed_size=99, at_destination=True)
    assert fault(file_helper.remove(changed)[1]) == ("destination", "CHANGED")
    assert path.exists()


def test_a_link_is_removed_whatever_it_leads_to(file_helper: HelperProcess, site: Path) -> None:
    target = put(site / "target")
    link = site / "link"
    link.symlink_to("target")
    moved = item(1, link, listed_size=7, listed_mtime=None)
    target.unlink()
    assert isinstance(file_helper.remove(moved)[1], DoneEvent)
    assert not link.is_symlink()


def test_a_directory_that_is_not_empty_may_stay(file_helper: HelperProcess, site: Path) -> None:
    full = put(site / "full" / "f").parent
    (site / "empty").mkdir()
    items = [
        PathItem(number, path.as_uri(), directory=True, again=True, may_stay=True)
        for number, path in enumerate((full, site / "empty"))
    ]
    outcome = file_helper.remove(*items)
    assert [isinstance(outcome[number], DoneEvent) for number in (0, 1)] == [True, True]
    assert [path.name for path in site.iterdir()] == ["full"]

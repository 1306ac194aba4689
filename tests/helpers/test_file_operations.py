"""Listings, removals, renames and new directories of the FILE helper, as a real process."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends import local_paths
from pdm.workqueue.helpers.backends.local import LocalStorage
from pdm.workqueue.helpers.storage import StorageError
from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent, EntriesEvent, RawEntry, UnreadableEvent
from pdm.workqueue.wire.agent_requests import PathItem
from tests.helpers.driver import ODD_NAMES, HelperProcess, entries, fault, put


def kinds(events: list[AgentEvent]) -> dict[str, str]:
    return {path: entry.type for path, entry in entries(events).items()}


def test_a_tree_is_listed_without_following_links(file_helper: HelperProcess, site: Path) -> None:
    put(site / "top" / "a" / "f", b"123")
    (site / "top" / "empty").mkdir()
    (site / "top" / "a" / "loop").symlink_to("..")
    (site / "top" / "link").symlink_to("a/f")
    (site / "top" / "broken").symlink_to("nowhere")
    (site / "top" / "out").symlink_to("/etc/passwd")
    os.mkfifo(site / "top" / "pipe")
    found = entries(file_helper.list((site / "top").as_uri()))
    assert {path: entry.type for path, entry in found.items()} == {
        "a": "directory",
        "a/f": "file",
        "a/loop": "link",
        "empty": "directory",
        "link": "link",
        "broken": "link",
        "out": "link",
        "pipe": "other",
    }
    assert found["a/f"].size == 3
    link = found["link"]
    by = (site.owner(), site.group())
    assert link == RawEntry("link", "link", 3, link.mode, link.mtime, str(site / "top" / "a" / "f"), True, False, *by)
    assert found["a/loop"].target == str(site / "top")
    assert found["broken"].target is None
    assert found["out"].target is None


def test_odd_names_come_percent_encoded(file_helper: HelperProcess, site: Path) -> None:
    for name in ODD_NAMES:
        put(site / "top" / os.fsdecode(name))
    found = entries(file_helper.list((site / "top").as_uri()))
    assert sorted(map(unquote_to_bytes, found)) == sorted(ODD_NAMES)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (0, {"": "directory"}),
        (1, {"a": "directory"}),
        (2, {"a": "directory", "a/b": "directory"}),
        (3, {"a": "directory", "a/b": "directory", "a/b/f": "file"}),
        (None, {"a": "directory", "a/b": "directory", "a/b/f": "file"}),
    ],
)
def test_depth(file_helper: HelperProcess, site: Path, depth: int | None, expected: dict[str, str]) -> None:
    put(site / "top" / "a" / "b" / "f")
    assert kinds(file_helper.list((site / "top").as_uri(), depth)) == expected


def test_a_file_lists_itself(file_helper: HelperProcess, site: Path) -> None:
    put(site / "f", b"1234")
    for depth in (0, 1, None):
        found = entries(file_helper.list((site / "f").as_uri(), depth))
        assert {path: (entry.type, entry.size) for path, entry in found.items()} == {"": ("file", 4)}


def test_the_link_itself_is_followed_only_if_asked(file_helper: HelperProcess, site: Path) -> None:
    put(site / "dir" / "f")
    (site / "link").symlink_to("dir")
    assert kinds(file_helper.list((site / "link").as_uri())) == {"f": "file"}
    assert kinds(file_helper.list((site / "link").as_uri(), follow=False)) == {"": "link"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_directory_that_may_not_be_read_is_named_and_the_rest_listed(file_helper: HelperProcess, site: Path) -> None:
    put(site / "top" / "shut" / "f")
    put(site / "top" / "open" / "f")
    (site / "top" / "shut").chmod(0)
    events = file_helper.list((site / "top").as_uri())
    (site / "top" / "shut").chmod(0o700)
    assert set(entries(events)) == {"shut", "open", "open/f"}
    assert [(event.path, event.fault.errno) for event in events if isinstance(event, UnreadableEvent)] == [("shut", 13)]


def test_what_is_not_there_or_not_ours_fails(file_helper: HelperProcess, site: Path) -> None:
    assert fault(file_helper.list((site / "gone").as_uri())[-1]) == ("source", "NOT_FOUND")
    assert fault(file_helper.list("file:///etc")[-1]) == ("source", "PERMISSION_DENIED")
    assert fault(file_helper.list(f"{site.as_uri()}/../site")[-1]) == ("source", "PERMISSION_DENIED")
    assert fault(file_helper.list(f"{site.as_uri()}-next")[-1]) == ("source", "PERMISSION_DENIED")


def test_a_long_listing_comes_in_pieces(file_helper: HelperProcess, site: Path) -> None:
    (site / "top").mkdir()
    for number in range(2500):
        (site / "top" / f"{number:04}{'n' * 200}").touch()
    events = file_helper.list((site / "top").as_uri())
    assert len(entries(events)) == 2500
    assert [len(event.entries) for event in events if isinstance(event, EntriesEvent)] == [1000, 1000, 500]


def test_removal(file_helper: HelperProcess, site: Path) -> None:
    put(site / "full" / "f")
    put(site / "f")
    (site / "empty").mkdir()
    (site / "link").symlink_to("full")
    outcome = file_helper.remove(
        PathItem(1, (site / "f").as_uri()),
        PathItem(2, (site / "empty").as_uri(), directory=True),
        PathItem(3, (site / "full").as_uri(), directory=True),
        PathItem(4, (site / "full").as_uri()),
        PathItem(5, (site / "link").as_uri()),
        PathItem(6, (site / "gone").as_uri()),
        PathItem(7, site.as_uri(), directory=True),
    )
    assert [isinstance(outcome[key], DoneEvent) for key in range(1, 8)] == [
        True,
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    assert [fault(outcome[key]) for key in (3, 4, 6, 7)] == [
        ("source", 39),
        ("source", 21),
        ("source", 2),
        ("source", "PERMISSION_DENIED"),
    ]
    assert sorted(path.name for path in site.rglob("*")) == ["f", "full"]


def test_discarding_what_is_not_there_is_done(file_helper: HelperProcess, site: Path) -> None:
    left = put(site / ".pdm-x.1.1.part")
    outcome = file_helper.discard(left.as_uri(), (site / "gone").as_uri(), (site / "no" / "dir").as_uri())
    assert all(isinstance(event, DoneEvent) for event in outcome.values())
    assert not left.exists()


def test_rename(file_helper: HelperProcess, site: Path) -> None:
    put(site / "f", b"f")
    put(site / "g", b"g")
    put(site / "dir" / "x", b"x")

    def rename(source: str, destination: str, overwrite: str = "never") -> AgentEvent:
        return file_helper.rename(f"{site.as_uri()}/{source}", f"{site.as_uri()}/{destination}", overwrite)

    assert fault(rename("gone", "new")) == ("source", "NOT_FOUND")
    assert fault(rename("f", "g")) == ("destination", "EXISTS")
    assert fault(rename("f", "no/dir")) == ("destination", 2)
    assert fault(rename("f", "dir", "always")) == ("destination", "IS_A_DIRECTORY")
    assert fault(rename("dir", "dir/in/itself")) == ("destination", 2)
    assert (site / "g").read_bytes() == b"g"
    assert isinstance(rename("f", "g", "always"), DoneEvent)
    assert isinstance(rename("dir", "moved"), DoneEvent)
    assert (site / "g").read_bytes() == b"f"
    assert (site / "moved" / "x").read_bytes() == b"x"
    assert not (site / "f").exists()


def test_new_directories(file_helper: HelperProcess, site: Path) -> None:
    put(site / "f")
    deep, new, file = ((site / path).as_uri() for path in ("a/b/c", "new", "f"))
    outcome = file_helper.make(deep, new, new, file)
    assert isinstance(outcome[1], DoneEvent)
    assert [fault(outcome[key]) for key in (0, 2, 3)] == [("destination", 2), ("destination", 17), ("destination", 17)]
    outcome = file_helper.make(deep, deep, new, file, file + "/below", parents=True)
    assert [isinstance(outcome[key], DoneEvent) for key in range(5)] == [True, True, True, False, False]
    assert [fault(outcome[key]) for key in (3, 4)] == [("destination", "NOT_A_DIRECTORY"), ("destination", 20)]
    assert (site / "a" / "b" / "c").is_dir()


def test_a_file_system_with_neither_exclusive_renames_nor_links(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FAT and many of FUSE: what is there is not replaced, what is not is named."""

    def refuse(*_arguments: object, **_named: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(local_paths, "_libc", object())
    monkeypatch.setattr(os, "link", refuse)
    storage = LocalStorage(local_paths.Roots([str(site)]))
    old, there = put(site / "old", b"ours"), put(site / "there", b"theirs")
    with pytest.raises(StorageError) as refused:
        storage.rename(StorageUrl(old.as_uri()), StorageUrl(there.as_uri()), replace=False)
    assert refused.value.errno == errno.EEXIST
    storage.rename(StorageUrl(old.as_uri()), StorageUrl((site / "new").as_uri()), replace=False)
    assert ((site / "new").read_bytes(), there.read_bytes(), old.exists()) == (b"ours", b"theirs", False)

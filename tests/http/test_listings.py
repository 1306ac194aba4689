"""Listings as JSON in pieces: grouped by directory whatever the order, written once each."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from pdm.workqueue.domain.jobs import ListedEntry
from pdm.workqueue.http.listings import ListingJson

_result_of: Callable[[Any], Any] = SynchronousTestCase().successResultOf


def _listed(
    pages: Sequence[Sequence[ListedEntry]], root: str = "/data", depth: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the JSON says, and with which details; keys that come twice are an error."""

    async def read() -> AsyncGenerator[Sequence[ListedEntry]]:
        for page in pages:
            yield page

    async def both() -> tuple[bytes, bytes]:
        listing = ListingJson(read, root, depth)
        names = b"".join([piece async for piece in listing.names()])
        return names, b"".join([piece async for piece in listing.details()])

    names, details = _result_of(Deferred.fromCoroutine(both()))
    return _decoded(names), _decoded(details)


def _decoded(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key stands there twice"
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _file(path: str) -> ListedEntry:
    return ListedEntry(path, "file", 7, 0o644, 1000)


def _directory(path: str) -> ListedEntry:
    return ListedEntry(path, "directory")


def test_a_tree_is_grouped_by_directory() -> None:
    names, details = _listed([[_directory(""), _directory("sub"), _file("a")], [_file("sub/b"), _directory("empty")]])
    assert names == {"/data": ["sub", "a", "empty"], "/data/sub": ["b"], "/data/empty": []}
    assert details["/data/sub"] == [{"name": "b", "type": "file", "size": 7, "mode": 0o644, "mtime": 1000}]


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("/data/file", {"/data": ["file"]}),
        ("~/file", {"~": ["file"]}),
        ("file", {".": ["file"]}),
        ("/file", {"/": ["file"]}),
    ],
)
def test_a_file_lists_itself_in_its_directory(root: str, expected: dict[str, list[str]]) -> None:
    assert _listed([[_file("")]], root)[0] == expected


@pytest.mark.parametrize("pages", [[], [[]], [[_directory("")]]])
def test_an_empty_directory_has_no_names(pages: list[list[ListedEntry]]) -> None:
    assert _listed(pages) == ({"/data": []}, {"/data": []})


def test_the_root_stays_as_the_user_gave_it() -> None:
    names, _ = _listed([[_file("a"), _directory("sub"), _file("sub/b")]], "run7/")
    assert names == {"run7/": ["a", "sub"], "run7/sub": ["b"]}
    names, _ = _listed([[_directory("etc"), _file("etc/b")]], "/")
    assert names == {"/": ["etc"], "/etc": ["b"]}


def test_what_was_not_looked_into_is_not_called_empty() -> None:
    assert _listed([[_directory("sub"), _file("a")]], depth=1)[0] == {"/data": ["sub", "a"]}
    assert _listed([[_directory("sub"), _directory("sub/deep")]], depth=2)[0] == {
        "/data": ["sub"],
        "/data/sub": ["deep"],
    }
    assert _listed([[_directory("")]], depth=0)[0] == {"/": ["data"]}


def test_a_link_has_its_target() -> None:
    _, details = _listed([[ListedEntry("l", "link", target="/elsewhere"), ListedEntry("dead", "link")]])
    by_name = {entry["name"]: entry for entry in details["/data"]}
    assert by_name["l"]["target"] == "/elsewhere"
    assert "target" not in by_name["dead"]


_PATHS = st.lists(
    st.lists(st.sampled_from(["a", "b", "ä", 'q"', "\n"]), min_size=1, max_size=4).map("/".join), unique=True
)


@given(paths=_PATHS, page=st.integers(1, 4))
def test_every_entry_stands_once_in_its_directory(paths: list[str], page: int) -> None:
    """Whatever the order and however many pages: more than are kept in memory, too."""
    entries = [_file(path) for path in paths]
    pages = [entries[at : at + page] for at in range(0, len(entries), page)]
    names, details = _listed(pages)
    found = [f"{directory}/{name}" for directory, content in names.items() for name in content]
    assert sorted(found) == sorted(f"/data/{path}" for path in paths)
    assert {directory: [entry["name"] for entry in content] for directory, content in details.items()} == names


def test_memory_holds_only_what_is_not_complete() -> None:
    """Directories that are complete go out before the end: the first piece of a long listing comes early."""
    read: list[int] = []

    async def pages() -> AsyncGenerator[Sequence[ListedEntry]]:
        for number in range(100):
            read.append(number)
            yield [_file(f"d{number}/f{each}") for each in range(10)]

    async def first() -> bytes:
        listing = ListingJson(pages, "/data", None)
        return await anext(listing.names())

    piece = _result_of(Deferred.fromCoroutine(first()))
    assert json.loads(piece + b"}") == {"/data/d0": [f"f{each}" for each in range(10)]}
    # The survey reads all; then only the first page was needed.
    assert read == [*range(100), 0]

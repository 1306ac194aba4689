"""Paths as text, bytes and URLs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.domain import paths


@given(st.binary(max_size=300))
def test_every_name_has_one_text_that_leads_back(raw: bytes) -> None:
    text = paths.text_from_bytes(raw)
    assert paths.bytes_from_text(text) == raw
    # Databases and JSON hold well-formed text only.
    text.encode()


@given(st.text(max_size=100), st.text(max_size=100))
def test_two_texts_of_one_name_are_equal_once_read_back(one: str, other: str) -> None:
    try:
        first, second = paths.bytes_from_text(one), paths.bytes_from_text(other)
    except paths.InvalidPathError:
        return
    assert (paths.text_from_bytes(first) == paths.text_from_bytes(second)) == (first == second)


@given(st.binary(max_size=300))
def test_the_url_form_is_ascii_and_leads_back(raw: bytes) -> None:
    encoded = paths.encoded(paths.text_from_bytes(raw))
    assert encoded.isascii()
    assert not set(encoded) & set('\n\r" #?[]\\\0')
    assert paths.decoded(encoded) == paths.text_from_bytes(raw)


def test_latin_1_and_the_private_use_area_stay_apart() -> None:
    assert paths.text_from_bytes(b"caf\xe9") == "caf\uefe9"
    assert paths.bytes_from_text(paths.text_from_bytes("\uefe9".encode())) == "\uefe9".encode()


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "empty"),
        ("a\0b", "NUL"),
        ("x" * 256, "255 bytes"),
        ("é" * 128, "255 bytes"),
        ("a/" * 2100, "4096 bytes"),
        ("\ud800", "Unicode"),
    ],
)
def test_what_no_site_can_hold_is_refused(path: str, says: str) -> None:
    with pytest.raises(paths.InvalidPathError, match=says):
        paths.checked(path)


@pytest.mark.parametrize("path", ["/a b", "~", "~/x", "-x", "new\nline", "x" * 255, "..", "a/../b", "%41"])
def test_any_other_path_is_taken_as_it_is(path: str) -> None:
    assert paths.checked(path) == path


@pytest.mark.parametrize(
    ("path", "directory", "expected"),
    [("/x", "/home", "/x"), ("x", "/home", "/home/x"), ("~/x", "/home", "~/x"), ("x", "~", "~/x"), ("x", "", "/x")],
)
def test_relative_paths_begin_at_the_default_directory(path: str, directory: str, expected: str) -> None:
    assert paths.resolved(path, directory) == expected


@pytest.mark.parametrize(
    ("path", "directory", "inside"),
    [
        ("/a/b", "/a", True),
        ("/a", "/a", True),
        ("/a/", "/a", True),
        ("/ab", "/a", False),
        ("/a/../b", "/a", False),
        ("/x/../a/b", "/a/", True),
        ("/anything", "/", True),
        ("~/a", "/a", False),
        ("//a/b", "/a", True),
    ],
)
def test_inside(path: str, directory: str, inside: bool) -> None:
    assert paths.is_inside(path, directory) is inside


@pytest.mark.parametrize(
    ("name", "safe"),
    [("a", True), ("..a", True), ("...", True), ("..", False), (".", False), ("", False), ("\0", False)],
)
def test_names_a_listing_may_give(name: str, safe: bool) -> None:
    for path in (name, f"d/{name}", f"{name}/f", f"d/{name}/f", f"d\n/{name}/\n"):
        assert paths.is_safe_path(path) is safe

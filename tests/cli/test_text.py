"""What a terminal gets to see of names and messages that others have written."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.cli.display import display_json, display_width, table, truncate
from pdm.workqueue.domain.formatting import (
    display_bytes,
    display_duration,
    display_line,
    display_mode,
    display_name,
    display_text,
    display_time,
)
from pdm.workqueue.domain.paths import text_from_bytes

DANGEROUS = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"plain name (1).root", "plain name (1).root"),
        ("übung größe 試験".encode(), "übung größe 試験"),
        (b"two\nlines", r"two\nlines"),
        (b"\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        (b"back\\slash", r"back\\slash"),
        (b"latin \xe9", r"latin \xe9"),
        ("\u202eevil".encode(), r"\u202eevil"),
        ("\u2028".encode(), r"\u2028"),
        ("\x9b31m".encode(), r"\x9b31m"),
        ("\U000e0041".encode(), r"\U000e0041"),
    ],
)
def test_names(raw: bytes, shown: str) -> None:
    assert display_name(text_from_bytes(raw)) == shown


@given(st.text())
def test_no_name_reaches_a_terminal_with_control_characters(name: str) -> None:
    assert not {unicodedata.category(c) for c in display_name(name)} & DANGEROUS


@given(st.lists(st.binary(min_size=1, max_size=12), min_size=2, max_size=2, unique=True))
def test_two_names_never_look_the_same(names: list[bytes]) -> None:
    assert display_name(text_from_bytes(names[0])) != display_name(text_from_bytes(names[1]))


@given(st.text())
def test_messages_keep_line_ends_and_nothing_else_that_moves_a_cursor(text: str) -> None:
    assert not {unicodedata.category(c) for c in display_text(text) if c not in "\n\t"} & DANGEROUS
    assert "\n" not in display_line(text)


@given(st.dictionaries(st.text(), st.text()))
def test_json_stays_the_same_and_is_safe(value: dict[str, str]) -> None:
    shown = display_json(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(shown) == value
    assert not {unicodedata.category(c) for c in shown if c != "\n"} & DANGEROUS


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (268435456, "256 MiB"), (1.5 * 2**40, "1.5 TiB")],
)
def test_sizes(count: float, shown: str) -> None:
    assert display_bytes(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "0 s"), (59, "59 s"), (200, "3 m 20 s"), (7500, "2 h 5 m"), (273600, "3 d 4 h")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert display_duration(seconds) == shown


def test_modes_and_times() -> None:
    assert display_mode("directory", 0o750) == "drwxr-x---"
    assert display_mode("file", None) == "-?????????"
    assert display_time(0) == "1970-01-01 00:00"
    assert display_time(None).isspace()
    assert display_time(2**62).strip() == "?"


def test_tables_line_up() -> None:
    assert table(["ID", "NAME"], [["7", "a"], ["12", "bb"]], right=[0]) == "ID  NAME\n 7  a\n12  bb"


def test_a_table_is_made_to_fit() -> None:
    rows = [["7", "a" * 40, "b" * 30], ["12", "日本語" * 10, "short"]]
    for width in range(30, 100):
        lines = table(["ID", "WHAT", "LABEL"], rows, right=[0], width=width, flexible=[1, 2]).splitlines()
        assert max(map(display_width, lines)) <= width
        assert len(lines) == 3
    assert table(["ID", "WHAT", "LABEL"], rows, right=[0], flexible=[1, 2]).count("a") == 40


@given(st.text(), st.integers(4, 30), st.booleans())
def test_what_is_cut_fits(text: str, width: int, keep_end: bool) -> None:
    shown = truncate(display_name(text), width, keep_end=keep_end)
    assert display_width(shown) <= width


def test_paths_keep_their_end() -> None:
    assert truncate("/data/2026/run7", 9, keep_end=True) == "...6/run7"
    assert truncate("/data", 9, keep_end=True) == "/data"
    assert truncate("a message that is long", 10) == "a messa..."

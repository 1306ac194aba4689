"""The page is made of results."""

from __future__ import annotations

from typing import Any

import docutils.core
import docutils.utils
import pytest
from catalogue import CATALOGUE
from figures import spread
from table import machine_line, replaced, rows_of, table

_RESULT: dict[str, Any] = {
    "benchmark": "small_files",
    "at": "2026-03-01T12:00:00Z",
    "quick": False,
    "sizes": {"files": 10_000},
    "machine": {"cores": 2, "processor": "P", "kernel": "6", "python": "3.11", "load": 0.5},
    "unit": "files/s",
    "ratio": spread([0.4, 0.45, 0.5]),
    "ours": spread([400.0, 450.0, 500.0]),
    "bare": spread([1000.0, 1000.0, 1000.0]),
    "bare is": "globus-url-copy -pp -f LIST",
    "bare modes": {"globus-url-copy -pp -f LIST": 1000.0, "globus-url-copy -f LIST": 500.0},
    "cpu ms each, ours": {"daemon": 0.5, "helpers": 1.0},
    "peak MiB": {"daemon": 100.0},
    "checksums": "off: size",
    "bars": [{"bar": "0.50 of it", "figure": 0.45, "met": False}],
}


def test_a_row_shows_all_figures_and_a_missed_bar() -> None:
    made = table({"small_files": _RESULT})

    for text in (
        "script/bench small_files",
        "Checksums: off: size.",
        "0.50 of it: 0.45 **(missed)**",
        "0.45 (0.4 to 0.5)",
        "450 (400 to 500) files/s",
        "(slower: 500: ``globus-url-copy -f LIST``)",
        "daemon 0.5, helpers 1",
    ):
        assert text in made
    assert made.count("not measured") == len(CATALOGUE) - 1
    assert "Measured 2026-03-01, load 0.5: files 10,000." in made
    assert "on 2 cores (P)" in machine_line({"small_files": _RESULT})


def test_the_table_is_good_restructuredtext() -> None:
    settings = {"halt_level": 2, "report_level": 5}
    found = docutils.core.publish_doctree(table({"small_files": _RESULT}), settings_overrides=settings)

    assert "globus-url-copy -pp -f LIST" in found.astext()


def test_only_the_table_of_a_page_is_replaced() -> None:
    page = "Before\n\n.. the table begins\n\nold\n\n.. the table ends\n\nAfter\n"

    once = replaced(page, "new")

    assert once == page.replace("old", "new")
    assert replaced(once, "new") == once
    with pytest.raises(ValueError, match="no lines"):
        replaced("no marks", "new")


def test_a_row_without_a_new_result_stays() -> None:
    page = replaced(".. the table begins\n\n.. the table ends\n", table({"small_files": _RESULT}))
    newer = {**_RESULT, "benchmark": "large_file", "ours": spread([7.0])}

    again = table({"large_file": newer}, rows_of(page))

    assert "0.45 (0.4 to 0.5)" in again
    assert again.count("not measured") == len(CATALOGUE) - 2
    assert table({}, rows_of(replaced(page, again))) == again


def test_a_result_that_is_compared_with_nothing() -> None:
    left_out = ("ratio", "ours", "bare", "bare is", "bare modes")
    alone = {name: value for name, value in _RESULT.items() if name not in left_out}
    made = table({"cluster": {**alone, "benchmark": "cluster", "3": {"rate": spread([7.0])}}})

    assert "3: rate 7" in made
    docutils.core.publish_doctree(made, settings_overrides={"halt_level": 2, "report_level": 5})

"""Options of a copy: from the command line to the ``extra_opts`` of the job, and what is refused before it is sent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import pytest

from pdm.workqueue.cli.copy_options import AGE, SIZE, CopyCommand, copy_options, copy_settings
from pdm.workqueue.domain.paths import text_from_bytes


def settings(*arguments: str) -> dict[str, Any]:
    """The ``extra_opts`` of a command line."""

    @click.command(cls=CopyCommand)
    @copy_options
    @click.option("--move", is_flag=True)
    def command(move: bool, **given: Any) -> dict[str, Any]:
        found = copy_settings(given, move=move)
        assert given == {}
        return found

    found: dict[str, Any] = command.main(list(arguments), standalone_mode=False)
    return found


@pytest.mark.parametrize(
    ("typed", "count"),
    [
        ("0", 0),
        ("500", 500),
        ("500B", 500),
        ("10k", 10240),
        ("10M", 10 * 2**20),
        ("1.5GiB", 1610612736),
        ("2MB", 2 * 10**6),
    ],
)
def test_sizes(typed: str, count: int) -> None:
    assert SIZE.convert(typed, None, None) == count


@pytest.mark.parametrize("typed", ["", "-1", "10X", "ten", "1e6"])
def test_no_sizes(typed: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        SIZE.convert(typed, None, None)


def test_ages_stay_relative_or_become_utc() -> None:
    assert AGE.convert("12h", None, None) == "12h"
    assert AGE.convert("2026-03-02", None, None) == "2026-03-02T00:00:00Z"
    assert AGE.convert("2026-03-02T11:04+01:00", None, None) == "2026-03-02T10:04:00Z"
    with pytest.raises(click.BadParameter, match="neither a timestamp"):
        AGE.convert("yesterday", None, None)


def test_without_options_nothing_is_sent() -> None:
    assert settings() == {}


def test_each_option_is_sent_by_its_name_of_the_api() -> None:
    typed = "--sync mtime --delete --max-delete 7 --min-size 1k --max-size 2M --newer-than 7d --older-than 2026-01-01"
    assert settings(*typed.split(), "-n", "-p", "--checksum", "sha256") == {
        "sync": "mtime",
        "delete_extra": True,
        "max_delete": 7,
        "min_size": 1024,
        "max_size": 2 * 2**20,
        "newer_than": "7d",
        "older_than": "2026-01-01T00:00:00Z",
        "dry_run": True,
        "preserve": ["mtime", "mode"],
        "checksum": "SHA256",
    }
    assert settings("--overwrite", "always", "--verify", "size", "--move") == {
        "overwrite": "always",
        "verify": "size",
        "move": True,
    }


def test_patterns_keep_the_order_in_which_they_were_typed(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text("# a comment\n\n+ /calib/\n- *.tmp\n")
    typed = ["--exclude", "a", "--include=b", "--filter-from", str(rules), "--exclude=-c", "--include", "--exclude"]
    assert settings(*typed)["filters"] == [
        {"exclude": "a"},
        {"include": "b"},
        {"include": "/calib/"},
        {"exclude": "*.tmp"},
        {"exclude": "-c"},
        {"include": "--exclude"},
    ]


def test_patterns_are_read_as_paths_are(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_bytes("+ form\ffeed\r\n- line\u2028end\n- ".encode() + b"latin \xe9\n")
    latin = text_from_bytes(b"latin \xe9")
    assert settings("--filter-from", str(rules), "--include", os.fsdecode(b"latin \xe9"))["filters"] == [
        {"include": "form\ffeed"},
        {"exclude": "line\u2028end"},
        {"exclude": latin},
        {"include": latin},
    ]


def test_a_bad_line_is_shown_in_short(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_bytes(bytes(100_000))
    with pytest.raises(click.UsageError) as caught:
        settings("--filter-from", str(rules))
    assert "line 1:" in caught.value.message
    assert len(caught.value.message) < 300 + len(str(rules))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--sync size --overwrite always", "--sync and --overwrite contradict each other: sync says"),
        ("--delete", "--delete needs --sync"),
        ("--sync size --max-delete 3", "--max-delete needs --delete"),
        ("--sync size --delete --move", "--move and --delete contradict each other"),
        ("--checksum MD5 --verify size", "--verify and --checksum contradict each other: --verify size computes no"),
        ("--min-size 2M --max-size 1M", "--min-size and --max-size contradict each other"),
        ("--filter-from /nonexistent/rules", "--filter-from /nonexistent/rules cannot be read"),
        ("--sync time", "exists"),
    ],
)
def test_contradictions_name_the_pair(arguments: str, words: str) -> None:
    with pytest.raises(click.UsageError, match=words):
        settings(*arguments.split())


def test_a_bad_line_of_a_file_of_patterns_is_named(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text("+ good\n*.tmp\n")
    with pytest.raises(click.UsageError, match=r"line 2: '\+ PATTERN' or '- PATTERN' is expected, not '\*\.tmp'"):
        settings("--filter-from", str(rules))

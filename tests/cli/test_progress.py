"""The progress that ``pdm`` shows of a running job."""

from __future__ import annotations

import io
import itertools
import re
import sys
from typing import Any

import pytest
from attrs import define
from msgspec import UNSET

from pdm.workqueue.cli.display import (
    BarDisplay,
    LineDisplay,
    bar_line,
    display_for_stderr,
    display_fraction,
    display_width,
    fraction,
    progress_parts,
    summary,
)
from pdm.workqueue.wire.responses import JobProgressView, JobView
from tests.client.samples import job_view, progress_of


def seen(**changes: Any) -> JobView:
    return job_view(progress=progress_of(**changes))


def progress(**changes: Any) -> JobProgressView:
    found = seen(**changes).progress
    assert found is not UNSET
    return found


@pytest.mark.parametrize(
    ("job", "parts"),
    [
        (seen(), ["1.3 KiB of 2.9 KiB", "1/3 files", "2.0 KiB/s", "2 files/s", "ETA 1 m 5 s", "running 2"]),
        (seen(instant=None, eta=None, files_per_second=0.4), ["1.3 KiB of 2.9 KiB", "1/3 files", "running 2"]),
        (
            seen(listing=True, bytes_total=None, files_total=None, eta=None, files_per_second=None),
            ["listing, 3 found", "1 files done", "2.0 KiB/s", "running 2"],
        ),
        (
            seen(bytes_total=0, bytes_done=0, bytes_moving=0, instant=None, average=None, eta=3.0),
            ["1/3 files", "2 files/s", "ETA 3 s", "running 2"],
        ),
        (job_view(num_failed=1), ["2/4 elements", "1000 B of 2.9 KiB", "running 2", "failed 1"]),
    ],
)
def test_what_is_known_is_shown(job: JobView, parts: list[str]) -> None:
    assert progress_parts(job) == parts


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "46%"),
        ({"bytes_done": 2999, "bytes_moving": None}, "99%"),
        ({"bytes_done": 3000, "bytes_moving": 0}, "100%"),
        ({"bytes_total": 0, "bytes_done": 0}, "33%"),
        ({"bytes_total": None, "files_total": None}, ""),
        ({"bytes_total": 0, "files_total": 0}, ""),
    ],
)
def test_percent_is_rounded_down(changes: dict[str, Any], shown: str) -> None:
    assert display_fraction(progress(**changes)) == shown
    assert (fraction(progress(**changes)) is None) == (shown == "")


def test_an_ended_job_has_its_duration() -> None:
    ended = job_view(
        status="DONE", num_done=4, num_running=0, bytes_done=3000, progress=progress_of(elapsed=200.0, average=15.0)
    )
    assert summary(ended) == "job 7 DONE  4/4 elements  2.9 KiB of 2.9 KiB  in 3 m 20 s  15 B/s"
    assert summary(job_view(status="DONE", num_running=0)).endswith("2/4 elements  1000 B of 2.9 KiB")


@define
class Clock:
    """A time that is moved by hand."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_lines_come_soon_at_first_and_then_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = LineDisplay(clock)
    display.show(job_view(status="SUBMITTED"))
    said_at = []
    for second in range(1200):
        clock.seconds = float(second)
        display.show(seen(bytes_moving=second))
        if capsys.readouterr().err:
            said_at.append(second)
    display.show(job_view(status="DONE"))
    display.close()
    assert capsys.readouterr().err == "", "the end is said by others"
    pauses = [later - earlier for earlier, later in itertools.pairwise(said_at)]
    assert said_at[0] == 0
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (5, 60)


def test_lines_say_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = LineDisplay(clock)
    for second in range(100):
        clock.seconds = float(second)
        display.show(seen())
    shown = capsys.readouterr().err
    assert shown.startswith("job 7 RUNNING  46%  1.3 KiB of 2.9 KiB  1/3 files")
    assert shown.count("\n") == 1


def test_a_line_says_why_a_job_waits(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = LineDisplay(clock)
    waiting = {"status": "SUBMITTED", "num_running": 0, "progress": progress_of(listing=True)}
    display.show(job_view(**waiting))
    assert "waits" not in capsys.readouterr().err
    clock.seconds = 1.0
    display.show(job_view(**waiting, waiting=["site A is drained: new\x1b[2J disks", "it is number 3"]))
    assert capsys.readouterr().err == "job 7 SUBMITTED, waits: site A is drained: new\\x1b[2J disks; it is number 3\n"
    clock.seconds = 2.0
    display.show(job_view(**waiting, waiting=["it is number 2"]))
    assert capsys.readouterr().err == ""
    clock.seconds = 7.0
    display.show(job_view(**waiting, waiting=["it is number 1"]))
    assert capsys.readouterr().err == "job 7 SUBMITTED, waits: it is number 1\n"


@pytest.mark.parametrize("width", range(20, 160))
def test_the_bar_line_fits_and_keeps_the_percentage(width: int) -> None:
    busy = seen(instant=518.4 * 2**20, bytes_total=3 * 2**40, bytes_moving=2**40, eta=7500.0)
    line = bar_line(busy, width)
    assert display_width(line) <= width
    assert width < 21 or " 33%" in line
    if width >= 79:
        assert re.search(r"━+─+  33%  1\.0 TiB of 3\.0 TiB  .*  ETA 2 h 5 m", line)


def test_what_cannot_be_known_has_no_bar() -> None:
    assert bar_line(seen(bytes_total=None, files_total=None, listing=True, eta=None, instant=None), 79) == (
        "job 7 RUNNING  listing, 3 found  1 files done  2 files/s  running 2"
    )
    assert "#" in bar_line(seen(), 79, unicode=False)
    assert bar_line(seen(), 79, unicode=False).isascii()


@pytest.mark.parametrize(("term", "kind"), [("xterm-256color", BarDisplay), ("dumb", LineDisplay), ("", LineDisplay)])
def test_only_a_terminal_that_can_move_its_cursor_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, term: str, kind: type
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", term)
    assert type(display_for_stderr()) is kind
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    assert type(display_for_stderr()) is LineDisplay


def test_files_that_move_are_shown_below_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    bar = BarDisplay(stream)
    bar.show_files([("/data/" + "long/" * 20 + "a\x1b.h5", 0.125, 2048.0), ("/b", None, None)] + [("/c", 1.0, 0.0)] * 9)
    bar.show(seen())
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert all(display_width(line) < 80 for line in lines)
    assert re.fullmatch(r"  \.\.\.\S+long/a\\x1b\.h5 +12%  +2\.0 KiB/s", lines[1])
    assert lines[2] == "  /b"
    bar.show(job_view(num_running=0))
    assert "/b" not in stream.getvalue().rpartition("\x1b[J")[2]

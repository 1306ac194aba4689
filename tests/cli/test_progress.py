"""What ``pdm`` shows of a job that goes on."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from attrs import define
from msgspec import UNSET

from pdm.workqueue.cli.progress import LineDisplay, fraction, progress_parts, shown_fraction, summary
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
    assert shown_fraction(progress(**changes)) == shown
    assert (fraction(progress(**changes)) is None) == (shown == "")


def test_an_ended_job_tells_how_long_it_took() -> None:
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

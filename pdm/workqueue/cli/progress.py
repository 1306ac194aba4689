"""How a job gets on, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol

from msgspec import UNSET

from pdm.workqueue.cli.session import say
from pdm.workqueue.cli.text import shown_bytes, shown_duration
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.wire.responses import JobProgressView, JobView

#: Seconds between two plain lines about a job whose numbers change: soon at first, then a line a minute.
_FIRST_LINE_S, _LONGEST_LINE_S, _GROWTH = 5.0, 60.0, 1.5


class ProgressDisplay(Protocol):
    """Shows each state of a job that it is given."""

    def show(self, job: JobView) -> None:
        """The job as it is now."""

    def close(self) -> None:
        """Nothing more follows."""


def display_for_stderr() -> ProgressDisplay:
    """A bar where stderr is a terminal, lines otherwise."""
    return BarDisplay() if sys.stderr.isatty() else LineDisplay()


def summary(job: JobView) -> str:
    """One line: ``job 214 DONE  1204/1204 elements  3.4 GiB of 3.4 GiB  in 1 h 50 m  518 MiB/s``."""
    parts = [f"job {job.id} {job.status}", f"{job.num_done}/{job.num_elements} elements"]
    if job.bytes_total:
        parts.append(f"{shown_bytes(job.bytes_done)} of {shown_bytes(job.bytes_total)}")
    if job.progress is not UNSET and JobStatus.parse(job.status).is_final and job.progress.elapsed is not None:
        parts.append(f"in {shown_duration(job.progress.elapsed)}")
        if job.progress.average is not None:
            parts.append(f"{shown_bytes(job.progress.average)}/s")
    return "  ".join([*parts, *_troubles(job)])


def fraction(progress: JobProgressView) -> float | None:
    """How much of a job is done, 0 to 1, bytes that move included; None while nobody knows how much there is."""
    if progress.bytes_total:
        return (progress.bytes_done + (progress.bytes_moving or 0)) / progress.bytes_total
    return progress.files_done / progress.files_total if progress.files_total else None


def shown_fraction(progress: JobProgressView) -> str:
    """``46%``; rounded down, for 100% is what is all there."""
    part = fraction(progress)
    return "" if part is None else f"{int(part * 100)}%"


def progress_parts(job: JobView) -> list[str]:
    """``1.6 GiB of 3.4 GiB``, ``553/1204 files``, ``518 MiB/s``, ``ETA 59 m``, ``failed 3``: what is known of it."""
    progress = job.progress
    if progress is UNSET:
        return [*summary(job).split("  ")[1:]]
    parts = []
    if progress.listing:
        # How much there is, nobody knows yet; what has been found so far says that it goes on.
        parts.append(f"listing, {max(job.num_elements - 1, 0)} found")
        parts.append(f"{progress.files_done} files done")
    else:
        if progress.bytes_total:
            moved = progress.bytes_done + (progress.bytes_moving or 0)
            parts.append(f"{shown_bytes(moved)} of {shown_bytes(progress.bytes_total)}")
        parts.append(f"{progress.files_done}/{progress.files_total} files")
    if progress.instant is not None:
        parts.append(f"{shown_bytes(progress.instant)}/s")
    if progress.files_per_second is not None and progress.files_per_second >= 1:
        parts.append(f"{progress.files_per_second:.0f} files/s")
    if progress.eta is not None:
        parts.append(f"ETA {shown_duration(progress.eta)}")
    return [*parts, *_troubles(job)]


def _troubles(job: JobView) -> list[str]:
    counts = (("running", job.num_running), ("held", job.held), ("failed", job.num_failed))
    return [f"{word} {count}" for word, count in (*counts, ("cancelled", job.num_cancelled)) if count]


class LineDisplay:
    """Plain lines: at each change of the status, and now and then while numbers change; the end is others'.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._status: str | None = None
        self._line = ""
        self._next_at = 0.0
        self._pause_s = _FIRST_LINE_S

    def show(self, job: JobView) -> None:
        percent = [] if job.progress is UNSET else [shown_fraction(job.progress)]
        line = "  ".join(part for part in (f"job {job.id} {job.status}", *percent, *progress_parts(job)) if part)
        if line == self._line or JobStatus.parse(job.status).is_final:
            return
        now = self._clock()
        if job.status != self._status:
            self._pause_s = _FIRST_LINE_S
        elif now < self._next_at:
            return
        else:
            self._pause_s = min(self._pause_s * _GROWTH, _LONGEST_LINE_S)
        say(line)
        self._status, self._line, self._next_at = job.status, line, now + self._pause_s

    def close(self) -> None:
        """Lines need no end."""


class BarDisplay:
    """One line with a bar: of bytes where there are any, else of files; what is done, the rates, the time left."""

    def __init__(self) -> None:
        # Only a terminal pays for importing rich.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[percent]:>4}", markup=False),
            TextColumn("{task.fields[parts]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar = self._progress.add_task("", total=None, percent="", parts="")
        self._progress.start()

    def show(self, job: JobView) -> None:
        known = None if job.progress is UNSET else fraction(job.progress)
        self._progress.update(
            self._bar,
            description=f"job {job.id} {job.status}",
            completed=known or 0,
            # Without a total the bar shows that something goes on, and no more.
            total=None if known is None else 1.0,
            percent="" if job.progress is UNSET else shown_fraction(job.progress),
            parts="  ".join(progress_parts(job)),
        )

    def close(self) -> None:
        self._progress.stop()

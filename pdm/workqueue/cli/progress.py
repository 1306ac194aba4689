"""How a job gets on, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Protocol

from pdm.workqueue.cli.session import say
from pdm.workqueue.cli.text import shown_bytes
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.wire.responses import JobView

#: Seconds between two plain lines about a job whose numbers change.
_LINE_EVERY_S = 5.0


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
    """One line: ``job 214 RUNNING  553/1204 elements  1.5/3.4 GiB  failed 3``."""
    parts = [f"job {job.id} {job.status}", f"{job.num_done}/{job.num_elements} elements"]
    if job.bytes_total:
        parts.append(f"{shown_bytes(job.bytes_done)} of {shown_bytes(job.bytes_total)}")
    for word, count in (("running", job.num_running), ("failed", job.num_failed), ("cancelled", job.num_cancelled)):
        if count:
            parts.append(f"{word} {count}")
    return "  ".join(parts)


class LineDisplay:
    """Plain lines: at each change of the status, and every few seconds while numbers change; the end is others'."""

    def __init__(self) -> None:
        self._status: str | None = None
        self._line = ""
        self._said_at = 0.0

    def show(self, job: JobView) -> None:
        line = summary(job)
        if line == self._line or JobStatus.parse(job.status).is_final:
            return
        now = time.monotonic()
        if job.status != self._status or now - self._said_at >= _LINE_EVERY_S:
            say(line)
            self._status, self._line, self._said_at = job.status, line, now

    def close(self) -> None:
        """Lines need no end."""


class BarDisplay:
    """A bar: of bytes where there are any, else of elements; the rate, the time left, and what failed."""

    def __init__(self) -> None:
        # Only a terminal pays for importing rich.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TextColumn("{task.fields[counts]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar = self._progress.add_task("", total=None, counts="")
        self._rate = Rate()
        self._progress.start()

    def show(self, job: JobView) -> None:
        parts = summary(job).split("  ")[1:]
        if (rate := self._rate.after(job.bytes_done, time.monotonic())) is not None:
            parts.append(f"{shown_bytes(rate)}/s")
        by_bytes = job.bytes_total > 0
        self._progress.update(
            self._bar,
            description=f"job {job.id} {job.status}",
            completed=job.bytes_done if by_bytes else job.num_done,
            # Before the listing has ended nobody knows how much there is.
            total=(job.bytes_total if by_bytes else job.num_elements) if job.num_elements > 1 else None,
            counts="  ".join(parts),
        )

    def close(self) -> None:
        self._progress.stop()


class Rate:
    """Bytes per second over the last few seconds."""

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def after(self, count: int, now_s: float) -> float | None:
        """The rate once `count` bytes have arrived by `now_s`; None before it can be told."""
        self._seen.append((now_s, count))
        while now_s - self._seen[0][0] > self._window_s and len(self._seen) > 2:
            self._seen.popleft()
        then_s, before = self._seen[0]
        return (count - before) / (now_s - then_s) if now_s > then_s and count > before else None

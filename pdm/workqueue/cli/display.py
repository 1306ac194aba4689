"""Text for the terminal: widths, tables, JSON and the progress bar."""

from __future__ import annotations

import os
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

import click
from msgspec import UNSET

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.formatting import (
    UNPRINTABLE,
    display_bytes,
    display_duration,
    display_line,
    display_name,
)
from pdm.workqueue.domain.paths import InvalidPathError, bytes_from_text
from pdm.workqueue.wire.responses import JobProgressView, JobView


def print_stderr(line: str) -> None:
    """Print a line for people; stdout is for data only."""
    click.echo(line, err=True)


def print_wrapped(line: str, *, err: bool = True) -> None:
    """Print a line for people; on a terminal it is broken at blanks, and continues with a deeper indent."""
    columns = terminal_width(sys.stderr if err else sys.stdout)
    if columns is not None and display_width(line) > columns:
        text = line.lstrip()
        indent = " " * (len(line) - len(text))
        line = textwrap.fill(
            text,
            columns,
            initial_indent=indent,
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    click.echo(line, err=err)


def display_json(text: str) -> str:
    """Equivalent JSON, in which control characters are JSON escapes."""
    if text.isascii() and "\x7f" not in text:  # JSON has escaped the other control characters of ASCII itself
        return text
    return "".join(_json_escape(c) if c != "\n" and unicodedata.category(c) in UNPRINTABLE else c for c in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def write_bytes(text: str, end: bytes) -> None:
    """Write the raw bytes of a name to stdout."""
    try:
        raw = bytes_from_text(text)
    except InvalidPathError:
        raw = text.encode("utf-8", "replace")
    sys.stdout.flush()
    sys.stdout.buffer.write(raw + end)


def display_width(text: str) -> int:
    """Columns of a text on a terminal: wide characters (CJK, emoji) take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in unicodedata.normalize("NFC", text)
    )


def truncate(text: str, width: int, *, keep_end: bool = False) -> str:
    """Shorten a line to `width` columns (4 or more), with ``...`` at its end, or with `keep_end` at its beginning."""
    if display_width(text) <= width:
        return text
    kept = text
    # Each round removes at least one character; a wide one frees two columns.
    while kept and display_width(kept) > width - 3:
        surplus = max((display_width(kept) - width + 3) // 2, 1)
        kept = kept[surplus:] if keep_end else kept[:-surplus]
    return "..." + kept if keep_end else kept + "..."


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal of a stream; None if it is not a terminal."""
    if not stream.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def terminal_height(stream: TextIO) -> int:
    """Lines of the terminal of a stream."""
    try:
        return os.get_terminal_size(stream.fileno()).lines or 24
    except (OSError, ValueError):
        return 24


def stdout_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = (), flexible: Sequence[int] = ()
) -> str:
    """A `table` for stdout: on a terminal the flexible columns are shortened to fit."""
    return table(header, rows, right, width=terminal_width(sys.stdout), flexible=flexible)


#: Minimum columns of a flexible column.
_MIN_COLUMN = 8


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int] = (),
    *,
    width: int | None = None,
    flexible: Sequence[int] = (),
) -> str:
    """Columns of minimal width, separated by two blanks; cells must be safe to print.

    The columns with the indexes `right` are right-aligned. To fit into `width`, those with the indexes `flexible` are
    shortened, the widest first.
    """
    widths = [max(display_width(row[i]) for row in [header, *rows]) for i in range(len(header))]
    surplus = 0 if width is None else sum(widths) + 2 * (len(widths) - 1) - width
    while surplus > 0 and flexible:
        widest = max(flexible, key=lambda i: widths[i])
        if widths[widest] <= max(_MIN_COLUMN, len(header[widest])):
            break
        widths[widest] -= 1
        surplus -= 1
    lines = []
    for row in [header, *rows]:
        cells = []
        for i, (text, column) in enumerate(zip(row, widths, strict=True)):
            shown = truncate(text, column) if i in flexible else text
            blanks = " " * max(column - display_width(shown), 0)
            cells.append(blanks + shown if i in right else shown + blanks)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


#: Seconds between two plain lines: short at first, then a line a minute.
_FIRST_LINE_INTERVAL_S, _MAX_LINE_INTERVAL_S, _LINE_INTERVAL_GROWTH = 5.0, 60.0, 1.5
#: Columns of a bar.
_MIN_BAR, _MAX_BAR = 10, 30
#: Maximum lines of one reason for waiting, on a terminal.
_REASON_LINES = 4


#: Running files that are shown below the bar.
MAX_MOVING = 3


class ProgressDisplay(Protocol):
    #: Whether it shows single files.
    shows_files: bool

    def show_files(self, files: Sequence[tuple[str, float | None, float | None]]) -> None:
        """Show files from the next state on: path, completed fraction and bytes/s; None is unknown."""

    def show(self, job: JobView) -> None:
        """Show the present state of the job."""

    def print_line(self, line: str) -> None:
        """Print a line that stays."""

    def close(self) -> None: ...


def display_for_stderr() -> ProgressDisplay:
    """A bar if stderr is a terminal that can move its cursor, else lines (``TERM=dumb``, files, pipes)."""
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown"):
        return BarDisplay(sys.stderr)
    return LineDisplay()


def is_waiting(job: JobView) -> bool:
    """Whether no element of a job runs, for known reasons."""
    return bool(job.waiting) and not job.num_running and not JobStatus.parse(job.status).is_final


def summary(job: JobView) -> str:
    """One line: ``job 214 DONE  1204/1204 elements  3.4 GiB of 3.4 GiB  in 1 h 50 m  518 MiB/s``."""
    parts = [f"job {job.id} {job.status}", f"{job.num_done}/{job.num_elements} elements"]
    if job.bytes_total:
        parts.append(f"{display_bytes(job.bytes_done)} of {display_bytes(job.bytes_total)}")
    if job.progress is not UNSET and JobStatus.parse(job.status).is_final and job.progress.elapsed is not None:
        parts.append(f"in {display_duration(job.progress.elapsed)}")
        if job.progress.average:
            parts.append(f"{display_bytes(job.progress.average)}/s")
    return "  ".join([*parts, *_unfinished_counts(job)])


def fraction(progress: JobProgressView) -> float | None:
    """Completed fraction of a job, 0 to 1, including bytes in transfer; None while the total is unknown."""
    if progress.bytes_total:
        return (progress.bytes_done + (progress.bytes_moving or 0)) / progress.bytes_total
    return progress.files_done / progress.files_total if progress.files_total else None


def display_fraction(progress: JobProgressView) -> str:
    """``46%``; rounded down, so that 100% means complete."""
    part = fraction(progress)
    return "" if part is None else f"{int(part * 100)}%"


def progress_parts(job: JobView) -> list[str]:
    """``1.6 GiB of 3.4 GiB``, ``553/1204 files``, ``518 MiB/s``, ``ETA 59 m``, ``failed 3``, where known."""
    return [part for _, part in _ranked_parts(job)]


def _ranked_parts(job: JobView) -> list[tuple[int, str]]:
    """The parts of a line in order, with their ranks; on a narrow terminal the highest ranks are dropped first."""
    progress = job.progress
    if progress is UNSET:
        return [(rank, part) for rank, part in enumerate(summary(job).split("  ")[1:])]
    parts = []
    if progress.listing:
        # The total is unknown until the listing ends; the number of entries found shows that it advances.
        parts.append((1, f"listing, {max(job.num_elements - 1, 0)} found"))
        parts.append((3, f"{progress.files_done} files done"))
    else:
        if progress.bytes_total:
            moved = progress.bytes_done + (progress.bytes_moving or 0)
            parts.append((3, f"{display_bytes(moved)} of {display_bytes(progress.bytes_total)}"))
        parts.append((5, f"{progress.files_done}/{progress.files_total} files"))
    if progress.instant is not None:
        parts.append((4, f"{display_bytes(progress.instant)}/s"))
    if progress.files_per_second is not None and progress.files_per_second >= 1:
        parts.append((6, f"{progress.files_per_second:.0f} files/s"))
    if progress.eta is not None:
        parts.append((2, f"ETA {display_duration(progress.eta)}"))
    return [*parts, *((7 if part.startswith("running") else 0, part) for part in _unfinished_counts(job))]


def _unfinished_counts(job: JobView) -> list[str]:
    counts = (("running", job.num_running), ("held", job.held), ("failed", job.num_failed))
    return [f"{word} {count}" for word, count in (*counts, ("cancelled", job.num_cancelled)) if count]


class LineDisplay:
    """Plain lines at each change of the status, and at intervals; the caller reports the end of the job."""

    shows_files = False

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._state: tuple[str, bool] | None = None
        self._line = ""
        self._next_at = 0.0
        self._pause_s = _FIRST_LINE_INTERVAL_S

    def show(self, job: JobView) -> None:
        if is_waiting(job):
            reasons = "; ".join(display_line(reason) for reason in job.waiting or ())
            line = f"job {job.id} {job.status}, waits: {reasons}"
        else:
            percent = [] if job.progress is UNSET else [display_fraction(job.progress)]
            line = "  ".join(part for part in (f"job {job.id} {job.status}", *percent, *progress_parts(job)) if part)
        if line == self._line or JobStatus.parse(job.status).is_final:
            return
        now = self._clock()
        # A change of state is reported at once; reasons for waiting change too often for that.
        state = (job.status, is_waiting(job))
        if state != self._state:
            self._pause_s = _FIRST_LINE_INTERVAL_S
        elif now < self._next_at:
            return
        else:
            self._pause_s = min(self._pause_s * _LINE_INTERVAL_GROWTH, _MAX_LINE_INTERVAL_S)
        print_stderr(line)
        self._state, self._line, self._next_at = state, line, now + self._pause_s

    def show_files(self, files: Sequence[tuple[str, float | None, float | None]]) -> None:
        """Nothing: there would be too many lines."""

    def print_line(self, line: str) -> None:
        print_stderr(line)

    def close(self) -> None:
        """Nothing to erase."""


class BarDisplay:
    """A line with a bar that is redrawn on a terminal, and below it what moves, or why the job waits."""

    shows_files = True

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._files: Sequence[tuple[str, float | None, float | None]] = ()
        self._drawn = 0

    def show(self, job: JobView) -> None:
        # Some terminals wrap a line that fills the last column.
        width = (terminal_width(self._stream) or 80) - 1
        lines = [bar_line(job, width, unicode=_draws_blocks(self._stream))]
        if is_waiting(job):
            for reason in job.waiting or ():
                lines += textwrap.wrap(f"waits: {display_line(reason)}", width, subsequent_indent="  ")[:_REASON_LINES]
        elif job.num_running:
            lines += [_file_line(*file, width) for file in self._files]
        self._stream.write(self._erase() + "\n".join(lines))
        self._stream.flush()
        self._drawn = len(lines)

    def show_files(self, files: Sequence[tuple[str, float | None, float | None]]) -> None:
        self._files = files[:MAX_MOVING]

    def print_line(self, line: str) -> None:
        self.close()
        print_stderr(line)

    def close(self) -> None:
        self._stream.write(self._erase())
        self._stream.flush()

    def _erase(self) -> str:
        """Escape sequence that erases the lines drawn before."""
        if not self._drawn:
            return ""
        up = f"\x1b[{self._drawn - 1}A" if self._drawn > 1 else ""
        self._drawn = 0
        return f"\r{up}\x1b[J"


def _file_line(path: str, part: float | None, rate: float | None, width: int) -> str:
    """``  .../calib/a.h5    12%  98 MiB/s`` in at most `width` columns."""
    percent = "" if part is None else f"{int(part * 100)}%"
    numbers = f"  {percent:>4}  {'' if rate is None else display_bytes(rate) + '/s':>11}"
    name = truncate(display_name(path), max(width - len(numbers) - 2, _MIN_COLUMN), keep_end=True)
    return f"  {name}{' ' * (width - len(numbers) - 2 - display_width(name))}{numbers}"[:width].rstrip()


def _draws_blocks(stream: TextIO) -> bool:
    try:
        "━─".encode(stream.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def bar_line(job: JobView, width: int, *, unicode: bool = True) -> str:
    """``job 7 RUNNING ━━━━━━━─────────  46%  1.3 KiB of 2.9 KiB  ETA 3 s`` in at most `width` columns.

    On a narrow terminal the bar is shortened first, then the least important numbers are dropped.
    """
    head = f"job {job.id} {job.status}"
    known = None if job.progress is UNSET else fraction(job.progress)
    percent = "" if job.progress is UNSET or known is None else f"{display_fraction(job.progress):>4}"
    space = width - len(head) - (len(percent) + 1 if percent else 0)
    parts = _ranked_parts(job)
    bar_space = _MIN_BAR + 1 if percent else 0
    while parts and sum(len(part) + 2 for _, part in parts) + bar_space > space:
        parts.remove(max(parts))
    shown = "".join(f"  {part}" for _, part in parts)
    length = min(space - len(shown) - 1, _MAX_BAR)
    if percent and known is not None and length >= _MIN_BAR:
        full = int(length * known)
        done, left = ("━", "─") if unicode else ("#", "-")
        head += f" {done * full}{left * (length - full)}"
    return truncate(f"{head} {percent}{shown}" if percent else f"{head}{shown}", width)

"""The log files of jobs, read as an operator reads them: ``grep`` for the lines of one attempt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_LINE = re.compile(r"(\S+Z) (\d+)\.(\d+) (.*)")


def job_logs(logs: Path) -> Iterator[Path]:
    """The log files of all jobs below the directory of all logs, of every daemon."""
    return (path for path in logs.glob("*/*/log*") if path.is_file())


def attempt_lines(file: Path) -> dict[tuple[int, int], list[str]]:
    """The lines of each attempt in the log file of a job, by element and attempt, without these two words.

    Incomplete lines, as a killed daemon may leave them, are skipped. A missing file has no lines.
    """
    found: dict[tuple[int, int], list[str]] = {}
    text = file.read_text("utf-8", "surrogateescape") if file.exists() else ""
    for line in text.split("\n"):
        if match := _LINE.fullmatch(line):
            moment, element, attempt, words = match.groups()
            found.setdefault((int(element), int(attempt)), []).append(f"{moment} {words}")
    return found


def moved_elements(logs: Path) -> set[tuple[int, int]]:
    """Elements, with the number of the attempt, that a daemon has moved, even if only in part."""
    return {
        attempt
        for file in job_logs(logs)
        for attempt, lines in attempt_lines(file).items()
        if any(" progress bytes=" in line for line in lines)
    }

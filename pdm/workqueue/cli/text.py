"""Text for terminals: escaped names, sizes, rates, durations and tables."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TextIO

from pdm.workqueue.domain.paths import InvalidPathError, bytes_from_text

#: Control and format characters, line and paragraph separators, half pairs, private and unassigned characters.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"})
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}


def _escape(character: str) -> str:
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    number = ord(character)
    if 0xEF80 <= number <= 0xEFFF:  # a byte of a name that is not UTF-8, see domain.paths
        return f"\\x{number - 0xEF00:02x}"
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def display_name(name: str) -> str:
    """A file name on one line: unprintable characters as backslash escapes, backslashes doubled."""
    if name.isprintable() and name.isascii() and "\\" not in name:
        return name
    return "".join(_escape(c) if c == "\\" or unicodedata.category(c) in _UNPRINTABLE else c for c in name)


def display_text(text: str) -> str:
    """A message of several lines: control characters are escaped, except line ends and tabs."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _UNPRINTABLE else _escape(c) for c in text)


def display_line(text: str) -> str:
    """A message on one line."""
    return display_text(" ".join(text.split()))


def display_json(text: str) -> str:
    """Equivalent JSON, in which control characters are JSON escapes."""
    if text.isascii() and "\x7f" not in text:  # JSON has escaped the other control characters of ASCII itself
        return text
    return "".join(_json_escape(c) if c != "\n" and unicodedata.category(c) in _UNPRINTABLE else c for c in text)


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


def display_bytes(count: float) -> str:
    """A size: ``0 B``, ``17 B``, ``1.5 KiB``, ``12 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if count < 1024 or unit == "PiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def display_duration(seconds: float) -> str:
    """A duration: ``4 s``, ``3 m 20 s``, ``2 h 5 m``, ``3 d 4 h``."""
    whole = max(0, round(seconds))
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit} {rest} {smaller}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def display_mode(kind: str, mode: int | None) -> str:
    """Type and permission bits as in ``ls -l``; ``?`` for unknown bits."""
    letter = {"directory": "d", "link": "l", "file": "-"}.get(kind, "?")
    if mode is None:
        return letter + "?" * 9
    return letter + "".join("rwx"[i % 3] if mode >> (8 - i) & 1 else "-" for i in range(9))


def display_time(seconds: float | None) -> str:
    """Seconds since the epoch as ``2026-03-02 11:04`` (UTC); blanks if unknown, ``?`` if out of range."""
    if seconds is None:
        return " " * 16
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return "?".rjust(16)


def display_timestamp(timestamp: datetime) -> str:
    """A timestamp: ``2026-03-02 11:04:05 UTC``."""
    return timestamp.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


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

"""Text for people, on a terminal and on a page: escaped names, sizes, durations and times."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime

#: Control and format characters, line and paragraph separators, half pairs, private and unassigned characters.
UNPRINTABLE = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"})


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
    return "".join(_escape(c) if c == "\\" or unicodedata.category(c) in UNPRINTABLE else c for c in name)


def display_text(text: str) -> str:
    """A message of several lines: control characters are escaped, except line ends and tabs."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in UNPRINTABLE else _escape(c) for c in text)


def display_line(text: str) -> str:
    """A message on one line."""
    return display_text(" ".join(text.split()))


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

"""Reads the listings of GridFTP servers (MLSD, MLST), of which nothing is trusted.

An entry is ``fact=value;fact=value; name``. A name may hold any byte but ``/`` and NUL, so a line break inside a name
looks like the end of the entry: only a break that is followed by facts is one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from pdm.workqueue.agents.helpers.storage import StorageError, Thing

#: No honest entry is longer: a name has at most 255 bytes, a link's target 4096 (thrice that when encoded).
LONGEST_ENTRY = 64 * 1024
LARGEST_SIZE = 2**63 - 1
_FACTS = re.compile(rb"((?:[A-Za-z][A-Za-z0-9._-]*=[^;\r\n]*;)+) ")
_BREAK = re.compile(rb"\r\n(?=(?:[A-Za-z][A-Za-z0-9._-]*=[^;\r\n]*;)+ )")
_DIGITS = re.compile(rb"[0-9]{1,20}\Z")
_MODE = re.compile(rb"[0-7]{1,6}\Z")


class Line(NamedTuple):
    """One entry: its name, what it is, and facts of the listed folder.

    Attributes:
        role: ``cdir`` and ``pdir`` for the listed folder and the one above, empty for what is in it.
        counted: of ``cdir``: how many entries the server has for the folder.
    """

    name: bytes
    thing: Thing
    role: str = ""
    counted: int | None = None


def read_entry(line: bytes) -> Line:
    """One entry without its line break.

    Raises:
        StorageError: BAD_LISTING.
    """
    match = _FACTS.match(line)
    if match is None:
        raise bad(f"an entry has no facts: {line[:200]!r}")
    name = line[match.end() :]
    facts: dict[bytes, bytes] = {}
    for fact in match.group(1)[:-1].split(b";"):
        key, _, value = fact.partition(b"=")
        facts[key.lower()] = value
    kind = facts.get(b"type", b"").lower()
    if not kind:
        raise bad(f"an entry has no type: {line[:200]!r}")
    if not name or b"\0" in name:
        raise bad(f"an entry has no legal name: {line[:200]!r}")
    role = kind.decode() if kind in (b"cdir", b"pdir") else ""
    thing = _thing(kind, facts, line)
    count = facts.get(b"x.count", b"")
    return Line(name, thing, role, int(count) if _DIGITS.match(count) else None)


def _thing(kind: bytes, facts: dict[bytes, bytes], line: bytes) -> Thing:
    plain = {b"file": "file", b"dir": "directory", b"cdir": "directory", b"pdir": "directory"}.get(kind, "other")
    size = 0
    if plain == "file":
        text = facts.get(b"size")
        if text is None or not _DIGITS.match(text) or int(text) > LARGEST_SIZE:
            raise bad(f"an entry has no possible size: {line[:200]!r}")
        size = int(text)
    mode = facts.get(b"unix.mode", b"")
    target = facts.get(b"unix.slink")
    common = (size, int(mode, 8) & 0o7777 if _MODE.match(mode) else None, moment(facts.get(b"modify", b"")))
    if target is not None or kind.startswith(b"os.unix=slink"):
        return Thing("link", *common, unquote_to_bytes(target) if target else None, plain)
    return Thing(plain, *common)


@functools.lru_cache(maxsize=4096)
def moment(text: bytes) -> int | None:
    """The seconds since 1970 of a time as FTP servers write it; None if it is none."""
    if len(text) < 14 or not _DIGITS.match(text[:14]):
        return None
    year, month, day, hour, minute, second = (int(text[:4]), *(int(text[at : at + 2]) for at in range(4, 14, 2)))
    try:
        return int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp())
    except ValueError:
        return None


def read_listing(pieces: Iterable[bytes]) -> Iterator[Line]:
    """The entries of a listing that arrives in pieces, with bounded memory.

    Raises:
        StorageError: BAD_LISTING.
    """
    rest = b""
    for piece in pieces:
        rest += piece
        *lines, rest = _BREAK.split(rest)
        for line in lines:
            yield read_entry(line)
        if len(rest) > LONGEST_ENTRY:
            raise bad(f"an entry is longer than {LONGEST_ENTRY} bytes: {rest[:200]!r}")
    if rest.endswith(b"\r\n"):
        rest = rest[:-2]
    if rest:
        yield read_entry(rest)


class WrappedEntries:
    """The entries of a listing of which the server has wrapped each line by itself (MLSC).

    A line that begins with a blank is an entry; any other is more of the name of the last, which holds a line end.

    Args:
        found: called with each entry.

    Attributes:
        trouble: why the listing is not valid; then nothing more is found.
    """

    def __init__(self, found: Callable[[Line], None]) -> None:
        self._found = found
        self._entry = b""
        self.trouble: StorageError | None = None

    def take(self, piece: bytes) -> None:
        """Take what was wrapped as one."""
        if piece[:1] == b" ":
            self.end()
            self._entry = piece[1:]
        elif len(self._entry) < LONGEST_ENTRY:
            self._entry += piece
        elif self.trouble is None:
            self.trouble = bad(f"an entry is longer than {LONGEST_ENTRY} bytes")

    def end(self) -> None:
        """That was all, or all of an entry."""
        entry, self._entry = self._entry, b""
        if not entry or self.trouble is not None:
            return
        try:
            self._found(read_entry(entry.removesuffix(b"\r\n")))
        except StorageError as trouble:
            self.trouble = trouble


def bad(why: str) -> StorageError:
    """A listing that cannot be true."""
    return StorageError(f"the server's listing is not valid: {why}", code="BAD_LISTING")

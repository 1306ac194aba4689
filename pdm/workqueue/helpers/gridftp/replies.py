"""Parsing of GridFTP replies and listings (MLSD, MLST), which may be hostile.

An entry of a listing is ``fact=value;fact=value; name``. A name may contain any byte but ``/`` and NUL, so a line break
in a name looks like the end of the entry: only a break that is followed by facts is one.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.storage import FileKind, FileStat, StorageError, account_name

#: Maximum bytes of an entry: a name has at most 255 bytes, a link's target 4096 (thrice that when encoded).
LONGEST_ENTRY = 64 * 1024
LARGEST_SIZE = 2**63 - 1
_FACTS = re.compile(rb"((?:[A-Za-z][A-Za-z0-9._-]*=[^;\r\n]*;)+) ")
_USUAL_FACTS = re.compile(
    rb"Type=file;Modify=([0-9]{14});Size=([0-9]{1,18});UNIX\.mode=([0-7]{1,6})"
    rb"(?:;UNIX\.owner=([^;\r\n]{1,256}))?(?:;UNIX\.group=([^;\r\n]{1,256}))?"
    rb"(?:;UNIX\.uid=([0-9]{1,10}))?(?:;UNIX\.gid=([0-9]{1,10}))?\Z"
)
#: Longer facts are not remembered.
_LONGEST_USUAL = 512
_PASSIVE_ADDRESS = re.compile(r"227 [^\n]{0,200}?((?:\d{1,3},){5}\d{1,3})")
_BREAK = re.compile(rb"\r\n(?=(?:[A-Za-z][A-Za-z0-9._-]*=[^;\r\n]*;)+ )")
_SIZE_FACT = re.compile(r" ?(?:[A-Za-z][A-Za-z0-9._-]*=[^;\r\n]*;)*?[Ss]ize=([0-9]{1,19});")
_DIGITS = re.compile(rb"[0-9]{1,20}\Z")
_MODE = re.compile(rb"[0-7]{1,6}\Z")


class Reply(NamedTuple):
    """A server's reply to a command.

    Attributes:
        code: three digits, as a number.
        text: all of its lines, without the wrapping.
    """

    code: int
    text: str

    @property
    def good(self) -> bool:
        """Whether the command succeeded, or waits for its second half (RNFR)."""
        return self.code < 400

    @property
    def closes(self) -> bool:
        """Whether the server is about to close the connection."""
        return self.code == 421

    @property
    def data_address(self) -> tuple[bytes, tuple[str, int]] | None:
        """The address in a reply to PASV: as an argument of PORT, and as host and port."""
        found = _PASSIVE_ADDRESS.match(self.text)
        if found is None:
            return None
        *host, high, low = found.group(1).split(",")
        return found.group(1).encode(), (".".join(host), int(high) * 256 + int(low))


class ListingEntry(NamedTuple):
    """One entry: its name and state, and facts about the listed directory.

    Attributes:
        role: ``cdir`` and ``pdir`` for the listed directory and its parent, empty for its entries.
        counted: of ``cdir``: number of entries that the server counts in the directory.
    """

    name: bytes
    file_stat: FileStat
    role: str = ""
    counted: int | None = None


def read_entry(line: bytes) -> ListingEntry:
    """Parse one entry without its line break.

    Raises:
        StorageError: BAD_LISTING.
    """
    usual, _, usual_name = line.partition(b"; ")
    if usual_name and len(usual) <= _LONGEST_USUAL and b"\0" not in usual_name:
        file_stat = _usual_file(usual)
        if file_stat is not None:
            return ListingEntry(usual_name, file_stat)
    match = _FACTS.match(line)
    if match is None:
        raise invalid_listing(f"an entry has no facts: {line[:200]!r}")
    name = line[match.end() :]
    facts: dict[bytes, bytes] = {}
    for fact in match.group(1)[:-1].split(b";"):
        key, _, value = fact.partition(b"=")
        facts[key.lower()] = value
    kind = facts.get(b"type", b"").lower()
    if not kind:
        raise invalid_listing(f"an entry has no type: {line[:200]!r}")
    if not name or b"\0" in name:
        raise invalid_listing(f"an entry has no legal name: {line[:200]!r}")
    role = kind.decode() if kind in (b"cdir", b"pdir") else ""
    file_stat = _file_stat(kind, facts, line)
    count = facts.get(b"x.count", b"")
    return ListingEntry(name, file_stat, role, int(count) if _DIGITS.match(count) else None)


@functools.lru_cache(maxsize=8192)
def _usual_file(facts: bytes) -> FileStat | None:
    """The state of a file by facts in the order of Globus servers; None for any others.

    A copy lists its files before and after their transfer: parsing the same facts anew takes half the time of that.
    """
    usual = _USUAL_FACTS.match(facts)
    if usual is None:
        return None
    modify, size, mode, owner, group, uid, gid = usual.groups()
    common = (int(size), int(mode, 8) & 0o7777, parse_time(modify))
    return FileStat("file", *common, account_name(owner or uid), account_name(group or gid))


_KINDS: Mapping[bytes, FileKind] = {b"file": "file", b"dir": "directory", b"cdir": "directory", b"pdir": "directory"}


def _file_stat(kind: bytes, facts: dict[bytes, bytes], line: bytes) -> FileStat:
    plain = _KINDS.get(kind, "other")
    size = 0
    if plain == "file":
        text = facts.get(b"size")
        if text is None or not _DIGITS.match(text) or int(text) > LARGEST_SIZE:
            raise invalid_listing(f"an entry has no possible size: {line[:200]!r}")
        size = int(text)
    mode = facts.get(b"unix.mode", b"")
    target = facts.get(b"unix.slink")
    common = (
        size,
        int(mode, 8) & 0o7777 if _MODE.match(mode) else None,
        parse_time(facts.get(b"modify", b"")),
        account_name(facts.get(b"unix.owner") or facts.get(b"unix.uid")),
        account_name(facts.get(b"unix.group") or facts.get(b"unix.gid")),
    )
    if target is not None or kind.startswith(b"os.unix=slink"):
        return FileStat("link", *common, unquote_to_bytes(target) if target else None, plain)
    return FileStat(plain, *common)


@functools.lru_cache(maxsize=4096)
def parse_time(text: bytes) -> int | None:
    """Seconds since 1970 of a time in FTP's format; None if it is invalid."""
    if len(text) < 14 or not _DIGITS.match(text[:14]):
        return None
    year, month, day, hour, minute, second = (int(text[:4]), *(int(text[at : at + 2]) for at in range(4, 14, 2)))
    try:
        return int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp())
    except ValueError:
        return None


def read_listing(pieces: Iterable[bytes]) -> Iterator[ListingEntry]:
    """Parse a listing that arrives in pieces, with bounded memory.

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
            raise invalid_listing(f"an entry is longer than {LONGEST_ENTRY} bytes: {rest[:200]!r}")
    if rest.endswith(b"\r\n"):
        rest = rest[:-2]
    if rest:
        yield read_entry(rest)


class WrappedEntries:
    """Parses a listing whose lines were wrapped one by one (MLSC).

    A line that begins with a blank is an entry; any other line continues the name of the last entry, which has a line
    end.

    Args:
        found: called with each entry.

    Attributes:
        storage_error: why the listing is invalid; further lines are ignored.
    """

    def __init__(self, found: Callable[[ListingEntry], None]) -> None:
        self._found = found
        self._entry = b""
        self.storage_error: StorageError | None = None

    def take(self, piece: bytes) -> None:
        """Parse one wrapped line."""
        if piece[:1] == b" ":
            self.end()
            self._entry = piece[1:]
        elif len(self._entry) < LONGEST_ENTRY:
            self._entry += piece
        elif self.storage_error is None:
            self.storage_error = invalid_listing(f"an entry is longer than {LONGEST_ENTRY} bytes")

    def end(self) -> None:
        """End the current entry, or the listing."""
        entry, self._entry = self._entry, b""
        if not entry or self.storage_error is not None:
            return
        try:
            self._found(read_entry(entry.removesuffix(b"\r\n")))
        except StorageError as storage_error:
            self.storage_error = storage_error


def invalid_listing(why: str) -> StorageError:
    """The error for an invalid listing."""
    return StorageError(f"the server's listing is not valid: {why}", code=FailureCode.BAD_LISTING)


#: Newer Globus servers end an error reply with structured lines.
_ERRNO = re.compile(r"^\d{3}-GridFTP-Errno: (\d+)", re.MULTILINE)
_CODE = re.compile(r"GlobusError: v=\d+ c=([A-Z_]+)")
_CODES = {
    "PATH_NOT_FOUND": errno.ENOENT,
    "PATH_EXISTS": errno.EEXIST,
    "NOT_A_DIRECTORY": errno.ENOTDIR,
    "IS_A_DIRECTORY": errno.EISDIR,
    "DIR_NOT_EMPTY": errno.ENOTEMPTY,
    "QUOTA_EXCEEDED": errno.EDQUOT,
    "NO_SPACE_LEFT": errno.ENOSPC,
}
_STRERRORS = {os.strerror(number): number for number in sorted(errno.errorcode, reverse=True)}
#: Older ones, and all of them during transfers, have text only.
_PROSE = re.compile(
    r"System error in [\w ./()-]+: (" + "|".join(re.escape(text) for text in sorted(_STRERRORS, key=len)[::-1]) + ")"
)
#: A first line, the entry, and a last line.
_LINES_OF_MLST = 3
#: The reply to MDTM.
_MDTM_TIME = re.compile(r"213 ([0-9]{14})")
#: Not logged in, for reasons that concern the server's files and certificates: 530 to 539.
_LOGIN = 53
#: The connection is lost: a new one may work.
_LOST = re.compile(
    r"an end-of-file was reached|Connection reset by peer|Broken pipe|Connection timed out|No route to host"
    r"|Handle not in the proper state|not in the proper state CLOSING|the connection was closed",
    re.MULTILINE,
)
#: The server does not have CKSM, or not this algorithm.
_NO_CHECKSUM = re.compile(
    r"Unknown checksum algorithm"
    r"|^50[0-4][ -].*(?:unrecognized|not (?:understood|implemented|supported)|unknown command|invalid command)",
    re.MULTILINE | re.IGNORECASE,
)


def refusal(reply: Reply) -> StorageError:
    """The error for an error reply."""
    text = reply.text
    lost = reply.closes or _LOST.search(text) is not None
    # Errors of a connection or a login are not about the file.
    is_of_the_file = not lost and reply.code // 10 != _LOGIN
    return StorageError(text, errno=errno_of_reply(text) if is_of_the_file else None, lost=lost)


def errno_of_reply(text: str) -> int | None:
    """The errno for the text of an error reply; None if it is not known."""
    found = _ERRNO.search(text)
    if found is not None and int(found.group(1)) in errno.errorcode:
        return int(found.group(1))
    found = _CODE.search(text)
    if found is not None and found.group(1) in _CODES:
        return _CODES[found.group(1)]
    found = _PROSE.search(text)
    return _STRERRORS[found.group(1)] if found is not None else None


def lacks_checksum(error: StorageError) -> bool:
    """Whether an error reply to CKSM means that the server has no checksums."""
    return error.errno is None and not error.lost and _NO_CHECKSUM.search(error.message) is not None


def time_in(reply: Reply) -> int | None:
    """Seconds since 1970 in a reply to MDTM; None if there are none."""
    found = _MDTM_TIME.match(reply.text)
    return parse_time(found.group(1).encode()) if found is not None else None


def status_in(reply: Reply, path: bytes) -> FileStat:
    """The state of a path in a reply to MLST; the path may contain line ends.

    Raises:
        StorageError: an error reply, or an invalid one (BAD_LISTING).
    """
    if not reply.good:
        raise refusal(reply)
    lines = reply.text.split("\n")
    if len(lines) == _LINES_OF_MLST:
        return read_entry(lines[1].strip().encode()).file_stat
    # The first line and the entry contain the path: the facts are before the last occurrence, on one line.
    before = reply.text.rpartition(path.decode("utf-8", "backslashreplace"))[0]
    return read_entry(before.rpartition("\n")[2].strip().encode() + b" path").file_stat


def file_stat_in(reply: Reply) -> FileStat | None:
    """The state of a path in a reply to MLST; None if it cannot be parsed."""
    lines = reply.text.split("\n")
    try:
        return read_entry(lines[1].strip().encode()).file_stat if reply.good and len(lines) == _LINES_OF_MLST else None
    except StorageError:
        return None


def size_of_directory_in(reply: Reply) -> int:
    """The bytes of a directory itself in a reply to MLST; 0 if they are not told."""
    found = _SIZE_FACT.match(reply.text.partition("\n")[2])
    return int(found.group(1)) if found is not None else 0

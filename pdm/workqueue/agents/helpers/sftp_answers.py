"""What SFTP's answers say of files and file systems, with what servers leave out.

The type of a file stands in the upper bits of its permissions. Servers on Windows and for object stores leave those
bits out, or all permissions: then the type is that of the long name of a listing, or nobody has said it.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

from pdm.workqueue.agents.helpers.sftp_session import ATTRS, HANDLE, NAME, Answer, Reader
from pdm.workqueue.agents.helpers.storage import StorageError, Thing

_SIZE, _OWNER, _PERMISSIONS, _TIMES, _EXTENDED = 1, 2, 4, 8, 0x80000000
#: A line of ls -l, as OpenSSH and its kin send it for a long name.
_LONG_NAME = re.compile(rb"([-dlbcpsD])[-r][-w][-xsStT][-r][-w][-xsStT][-r][-w][-xsStT]")
_KINDS_OF_LONG_NAMES = {b"-": "file", b"d": "directory", b"l": "link"}
#: A file system with less room than this is full.
_LEAST_ROOM = 1024 * 1024
_READ_ONLY = 1


class Attributes(NamedTuple):
    """What an answer says of a file.

    Attributes:
        kind: as of `Thing`; None if the server has not said.
        size: bytes; None if the server has not said.
        mode: permission bits; None if the server has not said.
        mtime: seconds since 1970 UTC; None if the server has not said.
    """

    kind: str | None
    size: int | None
    mode: int | None
    mtime: int | None

    def thing(self, kind: str | None = None) -> Thing:
        """The same as a `Thing`; of the given kind, if the server has not said one."""
        kind = self.kind or kind or "file"
        return Thing(kind, (self.size or 0) if kind == "file" else 0, self.mode, self.mtime)


class FileSystem(NamedTuple):
    """What ``statvfs@openssh.com`` says.

    Attributes:
        number: of the file system.
        is_full: whether it has no room for more, as far as it counts.
        is_read_only: whether nothing can be written.
    """

    number: int
    is_full: bool
    is_read_only: bool


def attributes_of(answer: Answer) -> Attributes:
    """The attributes in an answer to STAT, LSTAT or FSTAT; `StorageError` if it has none."""
    if answer.type != ATTRS:
        raise StorageError("the server gave no attributes of a file", code="BAD_LISTING")
    return _attributes(Reader(answer.body))


def handle_of(answer: Answer) -> bytes:
    """The handle in an answer to OPEN or OPENDIR; `StorageError` if it has none."""
    if answer.type != HANDLE:
        raise StorageError("the server gave no handle", code="BAD_LISTING")
    return Reader(answer.body).string()


def names_of(answer: Answer) -> Iterator[tuple[bytes, Attributes]]:
    """The names in an answer to READDIR or REALPATH, with their attributes."""
    if answer.type != NAME:
        raise StorageError("the server gave no names", code="BAD_LISTING")
    reader = Reader(answer.body)
    for _ in range(reader.number()):
        name, long_name = reader.string(), reader.string()
        found = _attributes(reader)
        if found.kind is None and (line := _LONG_NAME.match(long_name)):
            found = found._replace(kind=_KINDS_OF_LONG_NAMES.get(line[1], "other"))
        yield name, found


def file_system_of(answer: Answer) -> FileSystem:
    """What an answer to ``statvfs@openssh.com`` says."""
    reader = Reader(answer.body)
    _, unit, blocks, _, free, inodes, _, free_inodes, number, flags = (reader.long() for _ in range(10))
    # What a file system does not count is zero of zero: it is not full for that.
    is_full = (blocks > 0 and free * unit < _LEAST_ROOM) or (inodes > 0 and free_inodes == 0)
    return FileSystem(number, is_full, bool(flags & _READ_ONLY))


def _attributes(reader: Reader) -> Attributes:
    flags = reader.number()
    size = reader.long() if flags & _SIZE else None
    if flags & _OWNER:
        reader.long()
    mode = reader.number() if flags & _PERMISSIONS else None
    mtime = None
    if flags & _TIMES:
        reader.number()
        mtime = reader.number()
    if flags & _EXTENDED:
        for _ in range(reader.number()):
            reader.string()
            reader.string()
    kind = None if mode is None else _kind(mode)
    return Attributes(kind, size, stat.S_IMODE(mode) if mode else None, mtime)


def _kind(mode: int) -> str | None:
    if not stat.S_IFMT(mode):
        return None
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "link" if stat.S_ISLNK(mode) else "other"

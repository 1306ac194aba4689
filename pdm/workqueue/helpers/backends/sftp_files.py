"""Files at SFTP servers: attributes, file types, link targets, and pipelined reads and writes.

Servers may omit attributes; missing types are found by further requests.
"""

from __future__ import annotations

import contextlib
import errno
import re
import stat
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.backends import sftp_session as sftp
from pdm.workqueue.helpers.backends.sftp_session import (
    ATTRS,
    HANDLE,
    NAME,
    PacketReader,
    SftpResponse,
    SftpSession,
    StatusError,
    string,
)
from pdm.workqueue.helpers.storage import FileKind, FileStat, StorageError, account_name
from pdm.workqueue.helpers.storage_backend import Pieces

_SIZE, _OWNER, _PERMISSIONS, _TIMES, _EXTENDED = 1, 2, 4, 8, 0x80000000
#: A line of ls -l, as OpenSSH and related servers send it for a long name.
_LONG_NAME = re.compile(rb"([-dlbcpsD])[-r][-w][-xsStT][-r][-w][-xsStT][-r][-w][-xsStT]")
#: What follows there: number of links, owner, group, size.
_OWNERS = re.compile(rb"\S{10,11} +[0-9]+ +(\S{1,256}) +(\S{1,256}) +[0-9]+ ")
_KINDS_OF_LONG_NAMES: Mapping[bytes, FileKind] = {b"-": "file", b"d": "directory", b"l": "link"}
#: Free bytes below which a file system counts as full.
_LEAST_ROOM = 1024 * 1024
_READ_ONLY = 1
_STATVFS = b"statvfs@openssh.com"
_LAST_TIME = 2**32 - 1


class Attributes(NamedTuple):
    """The attributes in a response.

    Attributes:
        kind: as in `FileStat`; None if missing.
        size: bytes; None if missing.
        mode: permission bits; None if missing.
        mtime: seconds since 1970 UTC; None if missing.
        owner: name of the account, or its number; None if missing.
        group: the same of its group.
    """

    kind: FileKind | None
    size: int | None
    mode: int | None
    mtime: int | None
    owner: str | None
    group: str | None

    def file_stat(self, kind: FileKind | None = None) -> FileStat:
        """Convert to `FileStat`, with the given kind if there is none."""
        kind = self.kind or kind or "file"
        size = (self.size or 0) if kind == "file" else 0
        return FileStat(kind, size, self.mode, self.mtime, self.owner, self.group)


class FileSystem(NamedTuple):
    """The response to ``statvfs@openssh.com``.

    Attributes:
        number: of the file system.
        free_bytes: for this account; None for a server that does not report it.
        is_full: whether it reports no free space; False for a server that does not report it.
        is_read_only: whether it is mounted read-only.
    """

    number: int
    free_bytes: int | None
    is_full: bool
    is_read_only: bool


def attributes_of(answer: SftpResponse) -> Attributes:
    """The attributes in a response to STAT, LSTAT or FSTAT; `StorageError` if it has none."""
    if answer.type != ATTRS:
        raise StorageError("the server gave no attributes of a file", code=FailureCode.BAD_LISTING)
    return _attributes(PacketReader(answer.body))


def handle_of(answer: SftpResponse) -> bytes:
    """The handle in a response to OPEN or OPENDIR; `StorageError` if it has none."""
    if answer.type != HANDLE:
        raise StorageError("the server gave no handle", code=FailureCode.BAD_LISTING)
    return PacketReader(answer.body).string()


def names_of(answer: SftpResponse) -> Iterator[tuple[bytes, Attributes]]:
    """The names in a response to READDIR or REALPATH, with their attributes."""
    if answer.type != NAME:
        raise StorageError("the server gave no names", code=FailureCode.BAD_LISTING)
    reader = PacketReader(answer.body)
    for _ in range(reader.number()):
        name, long_name = reader.string(), reader.string()
        found = _attributes(reader)
        if found.kind is None and (line := _LONG_NAME.match(long_name)):
            found = found._replace(kind=_KINDS_OF_LONG_NAMES.get(line[1], "other"))
        if owners := _OWNERS.match(long_name):
            found = found._replace(owner=account_name(owners[1]), group=account_name(owners[2]))
        yield name, found


def file_system_of(answer: SftpResponse) -> FileSystem:
    """Parse a response to ``statvfs@openssh.com``."""
    reader = PacketReader(answer.body)
    _, unit, blocks, _, free, inodes, _, free_inodes, number, flags = (reader.long() for _ in range(10))
    # File systems without a counter report zero of zero: not full.
    is_full = (blocks > 0 and free * unit < _LEAST_ROOM) or (inodes > 0 and free_inodes == 0)
    return FileSystem(number, free * unit if blocks else None, is_full, bool(flags & _READ_ONLY))


def file_system_at(session: SftpSession, path: bytes) -> FileSystem | None:
    """The file system of a path; None if the server does not report file systems."""
    if _STATVFS not in session.extensions:
        return None
    return file_system_of(session.call(sftp.EXTENDED, string(_STATVFS), string(path)))


def file_system_above(session: SftpSession, path: bytes) -> FileSystem | None:
    """The file system of a path's directory; None if the server does not report it."""
    with contextlib.suppress(StatusError):
        return file_system_at(session, path.rpartition(b"/")[0] or b"/")
    return None


def with_mode(mode: int) -> bytes:
    """Attributes for SETSTAT: permission bits."""
    return struct.pack(">II", _PERMISSIONS, mode)


def with_mtime(mtime: int) -> bytes:
    """Attributes for SETSTAT: modification time in seconds since 1970, and now as the time of the last access.

    Raises:
        StorageError: version 3 of the protocol cannot express it.
    """
    if not 0 <= mtime <= _LAST_TIME:
        raise StorageError(f"SFTP cannot express the modification time {mtime}", code=FailureCode.UNSUPPORTED)
    return struct.pack(">III", _TIMES, min(int(time.time()), _LAST_TIME), mtime)


def _attributes(reader: PacketReader) -> Attributes:
    flags = reader.number()
    size = reader.long() if flags & _SIZE else None
    owner = group = None
    if flags & _OWNER:
        owner, group = str(reader.number()), str(reader.number())
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
    return Attributes(kind, size, stat.S_IMODE(mode) if mode else None, mtime, owner, group)


def _kind(mode: int) -> FileKind | None:
    if not stat.S_IFMT(mode):
        return None
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "link" if stat.S_ISLNK(mode) else "other"


#: Names whose types are requested at once: each may cost the server an open handle.
_AT_ONCE = 16


def with_types(
    session: SftpSession, found: Sequence[tuple[bytes, Attributes]], *, links: bool = True
) -> list[FileStat]:
    """Names with their types; missing types are requested.

    Args:
        session: with the server.
        found: paths with their attributes.
        links: whether a path may be a link itself; False if the attributes are those of its target.
    """
    unknown = [path for path, attributes in found if attributes.kind is None]
    kinds: dict[bytes, FileKind] = {}
    for start in range(0, len(unknown), _AT_ONCE):
        asked = unknown[start : start + _AT_ONCE]
        are_links = _succeed(session, [(sftp.READLINK, path) for path in asked]) if links else [False] * len(asked)
        are_directories = _are_directories(session, asked)
        for path, is_link, is_directory in zip(asked, are_links, are_directories, strict=True):
            kinds[path] = "link" if is_link else "directory" if is_directory else "file"
    return [attributes.file_stat(kinds.get(path)) for path, attributes in found]


def _are_directories(session: SftpSession, paths: Sequence[bytes]) -> list[bool]:
    """Which paths are directories, determined by operations on them.

    Some servers open a file as a directory, and fail when it is read, or show it empty: then it is a file if it can be
    opened as one.
    """
    requests = [session.send(sftp.OPENDIR, string(path)) for path in paths]
    found: list[bool | None] = []
    reads: list[tuple[int, bytes, int]] = []
    for number, request in enumerate(requests):
        try:
            handle = handle_of(session.receive(request))
        except StatusError as error:
            # OPENDIR of a file fails with ENOTDIR, whatever its permissions.
            found.append(error.errno == errno.EACCES)
        else:
            found.append(None)
            reads.append((number, handle, session.send(sftp.READDIR, string(handle))))
    for number, handle, request in reads:
        try:
            answer = session.receive(request)
        except StatusError:
            found[number] = False
        else:
            found[number] = True if answer.type == sftp.NAME else None
        close_handle(session, handle)
    return [_opens_not(session, path) if is_one is None else is_one for path, is_one in zip(paths, found, strict=True)]


def _opens_not(session: SftpSession, path: bytes) -> bool:
    """Whether a path cannot be opened as a file."""
    try:
        request = session.send(sftp.OPEN, string(path), sftp.TO_READ)
        close_handle(session, handle_of(session.receive(request)))
    except StatusError:
        return True
    return False


def with_targets(session: SftpSession, links: list[tuple[bytes, FileStat]]) -> list[FileStat]:
    """Targets of links; all requests are sent before the first response is read."""
    asked = [(session.send(sftp.STAT, string(path)), session.send(sftp.REALPATH, string(path))) for path, _ in links]
    file_stats = []
    for (path, link), (status, real) in zip(links, asked, strict=True):
        try:
            target = attributes_of(session.receive(status))
        except StatusError:
            session.forget([real])
            file_stats.append(link)
            continue
        where: bytes | None = None
        with contextlib.suppress(StatusError):
            where = next((name for name, _ in names_of(session.receive(real))), None)
        (led_to,) = with_types(session, [(path, target)], links=False)
        file_stats.append(link._replace(size=led_to.size, target=where, target_kind=led_to.kind))
    return file_stats


def close_handle(session: SftpSession, handle: bytes) -> None:
    """Close a file or directory without waiting for the reply."""
    if not session.closed:
        session.forget([session.send(sftp.CLOSE, string(handle))])


def _succeed(session: SftpSession, requests: Sequence[tuple[int, bytes]]) -> list[bool]:
    """Which of some requests succeed; all are sent before the first response is read."""
    numbers = [session.send(kind, string(path)) for kind, path in requests]
    done = []
    for number in numbers:
        try:
            session.receive(number)
        except StatusError:
            done.append(False)
        else:
            done.append(True)
    return done


#: Bytes that every server must accept; more only if the server allows it.
_SAFE_PIECE_SIZE, _MAX_PIECE_SIZE = 32 * 1024, 128 * 1024
#: Minimum bytes of a request, even if a server offers less.
_MIN_PIECE_SIZE = 512
#: Bytes of a packet that are not data: mostly the handle.
_HEADERS = 1024
#: Bytes in flight: less than the window of an SSH channel, so that neither end waits for the other to read.
_WINDOW = 1024 * 1024


class PieceSizes(NamedTuple):
    """Maximum bytes of one request.

    Attributes:
        reading: of READ.
        writing: of WRITE.
    """

    reading: int = _SAFE_PIECE_SIZE
    writing: int = _SAFE_PIECE_SIZE

    @classmethod
    def of(cls, limits: bytes) -> PieceSizes:
        """Parse a response to ``limits@openssh.com``; zero means no limit.

        Args:
            limits: body of the response.
        """
        reader = PacketReader(limits)
        packet, reading, writing = reader.long(), reader.long(), reader.long()
        most = min(packet - _HEADERS, _MAX_PIECE_SIZE) if packet > _HEADERS else _SAFE_PIECE_SIZE
        return cls(*(max(min(limit or _SAFE_PIECE_SIZE, most), _MIN_PIECE_SIZE) for limit in (reading, writing)))


def write_pipelined(session: SftpSession, handle: bytes, pieces: Iterator[bytes], most: int) -> None:
    """Write pieces to an open file, at most ``most`` bytes with a request; returns after the last acknowledgement."""
    under_way: deque[tuple[int, int]] = deque()
    offset = waiting = 0
    opening = string(handle)
    try:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), most):
                part = view[start : start + most]
                place = struct.pack(">QI", offset, len(part))
                under_way.append((session.send(sftp.WRITE, opening, place, part), len(part)))
                offset += len(part)
                waiting += len(part)
                while waiting > _WINDOW:
                    request, count = under_way.popleft()
                    waiting -= count
                    session.receive(request)
        while under_way:
            session.receive(under_way.popleft()[0])
    finally:
        session.forget([request for request, _ in under_way])


class ReadAhead:
    """Reads a file, several requests ahead.

    Args:
        session: with the server.
        handle: of the open file.
        piece: bytes of one request.
    """

    def __init__(self, session: SftpSession, handle: bytes, piece: int) -> None:
        self._session = session
        self._handle = string(handle)
        self._piece = piece
        self._asked: deque[tuple[int, int, int]] = deque()
        self._next = 0
        #: Requests in flight: few at first, because small files end early; more as bytes arrive.
        self._ahead = 2

    def pieces(self) -> Pieces:
        """All bytes of the file."""
        while True:
            while len(self._asked) < self._ahead:
                self._ask(self._next, self._piece)
                self._next += self._piece
            request, offset, wanted = self._asked.popleft()
            answer = self._session.receive(request)
            if answer.type == sftp.STATUS:
                return
            data = PacketReader(answer.body).string()
            if len(data) > wanted:
                raise StorageError("the server sent more bytes than it was asked for", code=FailureCode.BAD_LISTING)
            if not data:
                # An empty response without an end of file: another request would return the same for ever.
                return
            yield data
            if len(data) < wanted:
                # A short read: the end of the file, or the server's maximum. Request the rest.
                self._again(offset + len(data), max(len(data), _MIN_PIECE_SIZE))
            self._ahead = min(self._ahead + 1, max(_WINDOW // self._piece, 1))

    def _ask(self, offset: int, length: int) -> None:
        request = self._session.send(sftp.READ, self._handle, struct.pack(">QI", offset, length))
        self._asked.append((request, offset, length))

    def _again(self, offset: int, piece: int) -> None:
        self.end()
        self._next = offset
        self._piece = piece
        # Usually the end of the file: one request shows it.
        self._ahead = 1

    def end(self) -> None:
        """Discard pending requests."""
        if not self._session.closed:
            self._session.forget([request for request, _, _ in self._asked])
        self._asked.clear()

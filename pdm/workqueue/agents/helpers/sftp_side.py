"""SFTP servers as a storage.

``PDM_SSH_KNOWN_HOSTS`` says where one may log in, ``PDM_CREDENTIALS`` with which key of the user and as whom;
``PDM_SSH_KEY`` is the service's own, for servers for which the user has none; ``PDM_SSH_USER`` is the account where
none is named.

SFTP has no checksums: they are made by reading. Its status "Failure" says nothing: what it was is found by looking.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import NoReturn
from urllib.parse import unquote_to_bytes

from pdm.workqueue.agents.helpers import sftp_session as sftp
from pdm.workqueue.agents.helpers.endpoints import credential_at
from pdm.workqueue.agents.helpers.sftp_session import Reader, SftpSession, StatusError, string
from pdm.workqueue.agents.helpers.side import Pieces, WakingSide
from pdm.workqueue.agents.helpers.storage import Entries, Patience, StorageError, Thing, Version

_SIZE, _OWNER, _PERMISSIONS, _TIMES, _EXTENDED = 1, 2, 4, 8, 0x80000000
_READ, _CREATE_NEW = 0x01, 0x02 | 0x08 | 0x20
_FAILURE = 4
_NO_ATTRIBUTES = struct.pack(">I", 0)
#: What every server must take; more only where the server says so.
_SAFE_PIECE, _PIECE = 32 * 1024, 128 * 1024
#: Bytes under way: less than the window of an SSH channel, so that neither end ever waits for the other to read.
_WINDOW = 1024 * 1024
#: A disk with less room than this is full.
_LEAST_ROOM = 1024 * 1024
_LONGEST_CONNECT_S = 30.0
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*|[0-9A-Fa-f:.]+", re.ASCII)
_POSIX_RENAME, _FSYNC, _STATVFS, _LIMITS = (
    b"posix-rename@openssh.com",
    b"fsync@openssh.com",
    b"statvfs@openssh.com",
    b"limits@openssh.com",
)


class SftpSide(WakingSide):
    """One lane's sessions, one for each server."""

    def __init__(self) -> None:
        super().__init__()
        self._sessions: dict[str, SftpSession] = {}
        self._pieces: dict[str, int] = {}

    # -- names

    def look(self, url: str) -> Thing | None:
        session, path = self._at(url)
        try:
            thing = _thing(Reader(session.call(sftp.LSTAT, string(path)).body))
        except StatusError as error:
            if error.errno == errno.ENOENT:
                return None
            raise _about(error, path) from error
        return self._followed(session, [(path, thing)])[0] if thing.kind == "link" else thing

    def entries(self, url: str) -> Entries:
        session, path = self._at(url)
        try:
            handle = _handle(session.call(sftp.OPENDIR, string(path)))
        except StatusError as error:
            if error.errno in (errno.ENOENT, None):
                self._refuse_folder(url, path, error)
            raise _about(error, path) from error
        try:
            while True:
                answer = session.call(sftp.READDIR, string(handle))
                if answer.type == sftp.STATUS:
                    return
                yield from self._named(session, path, Reader(answer.body))
        finally:
            self._close(session, handle)

    def _named(self, session: SftpSession, folder: bytes, reader: Reader) -> Iterator[tuple[bytes, Thing]]:
        found: list[tuple[bytes, Thing]] = []
        for _ in range(reader.number()):
            name = reader.string()
            reader.string()
            thing = _thing(reader)
            if name not in (b".", b".."):
                found.append((name, thing))
        links = [(folder.rstrip(b"/") + b"/" + name, thing) for name, thing in found if thing.kind == "link"]
        followed = iter(self._followed(session, links))
        for name, thing in found:
            yield name, next(followed) if thing.kind == "link" else thing

    @staticmethod
    def _followed(session: SftpSession, links: list[tuple[bytes, Thing]]) -> list[Thing]:
        """Where links lead; all asked for before the first answer is waited for."""
        asked = [
            (session.send(sftp.STAT, string(path)), session.send(sftp.REALPATH, string(path))) for path, _ in links
        ]
        things = []
        for (_, link), (status, real) in zip(links, asked, strict=True):
            try:
                target = _thing(Reader(session.receive(status).body))
            except StatusError:
                session.forget([real])
                things.append(link)
                continue
            where: bytes | None = None
            with contextlib.suppress(StatusError):
                reader = Reader(session.receive(real).body)
                where = reader.string() if reader.number() else None
            size = target.size if target.kind == "file" else 0
            things.append(link._replace(size=size, target=where, target_kind=target.kind))
        return things

    def make_directory(self, url: str) -> None:
        session, path = self._at(url)
        try:
            session.call(sftp.MKDIR, string(path), _NO_ATTRIBUTES)
        except StatusError as error:
            if error.status == _FAILURE and self.look(url) is not None:
                raise StorageError(f"{_shown(path)} is there", errno=errno.EEXIST) from error
            raise self._diagnosed(session, error, path) from error

    def remove(self, url: str, *, directory: bool) -> None:
        session, path = self._at(url)
        try:
            session.call(sftp.RMDIR if directory else sftp.REMOVE, string(path))
        except StatusError as error:
            there = self.look(url) if error.errno in (errno.ENOENT, None) else None
            if there is not None:
                self._refuse_removal(url, path, there, error, directory=directory)
            raise _about(error, path) from error

    def _refuse_removal(self, url: str, path: bytes, there: Thing, error: StatusError, *, directory: bool) -> None:
        if directory and there.kind != "directory":
            raise StorageError(f"{_shown(path)} is not a directory", errno=errno.ENOTDIR) from error
        if not directory and there.kind == "directory":
            raise StorageError(f"{_shown(path)} is a directory", errno=errno.EISDIR) from error
        if directory:
            with contextlib.closing(self.entries(url)) as entries:
                if next(entries, None) is not None:
                    raise StorageError(f"{_shown(path)} is not empty", errno=errno.ENOTEMPTY) from error

    def rename(self, source: str, destination: str, *, replace: bool) -> None:
        session, old = self._at(source)
        new = _path(destination)
        try:
            if replace and _POSIX_RENAME in session.extensions:
                session.call(sftp.EXTENDED, string(_POSIX_RENAME), string(old), string(new))
            else:
                # SFTP's own never replaces. A server that cannot replace at once loses the old file first.
                if replace and self.look(destination) is not None:
                    session.call(sftp.REMOVE, string(new))
                session.call(sftp.RENAME, string(old), string(new))
        except StatusError as error:
            there = self.look(destination) if error.status == _FAILURE else None
            if there is not None and not replace:
                raise StorageError(f"{_shown(new)} is there", errno=errno.EEXIST) from error
            if there is not None and there.kind == "directory":
                raise StorageError(
                    f"{_shown(new)} is a directory that cannot be replaced", errno=errno.ENOTEMPTY
                ) from error
            raise self._diagnosed(session, error, new) from error

    def size(self, url: str) -> int:
        return self.version(url).size

    def version(self, url: str) -> Version:
        session, path = self._at(url)
        try:
            there = _thing(Reader(session.call(sftp.STAT, string(path)).body))
        except StatusError as error:
            raise _about(error, path) from error
        return Version(there.size, there.mtime)

    # -- bytes

    def read(self, url: str) -> Pieces:
        session, path = self._at(url)
        try:
            handle = _handle(session.call(sftp.OPEN, string(path), struct.pack(">I", _READ), _NO_ATTRIBUTES))
            status = _thing(Reader(session.call(sftp.FSTAT, string(handle)).body))
        except StatusError as error:
            raise self._of_reading(url, path, error) from error
        if status.kind == "directory":
            self._close(session, handle)
            raise StorageError(f"{_shown(path)} is a directory", errno=errno.EISDIR)
        reading = _Reading(session, handle, self._piece(session, url))
        try:
            yield from reading.pieces()
        except StatusError as error:
            raise _about(error, path) from error
        finally:
            reading.end()
            self._close(session, handle)

    def _of_reading(self, url: str, path: bytes, error: StatusError) -> StorageError:
        if error.status == _FAILURE:
            there = self.look(url)
            if there is not None and "directory" in (there.kind, there.target_kind):
                return StorageError(f"{_shown(path)} is a directory", errno=errno.EISDIR)
        return _about(error, path)

    def write(self, url: str, pieces: Iterator[bytes], size: int) -> None:
        session, path = self._at(url)
        flags = struct.pack(">I", _CREATE_NEW)
        try:
            handle = _handle(session.call(sftp.OPEN, string(path), flags, _NO_ATTRIBUTES))
        except StatusError as error:
            if error.status == _FAILURE and self.look(url) is not None:
                raise StorageError(f"{_shown(path)} is there", errno=errno.EEXIST) from error
            raise self._diagnosed(session, error, path) from error
        closed = False
        try:
            self._write(session, handle, pieces, self._piece(session, url))
            if _FSYNC in session.extensions:
                session.call(sftp.EXTENDED, string(_FSYNC), string(handle))
            closed = True
            # A server may tell only now that the disk was full.
            session.call(sftp.CLOSE, string(handle))
        except StatusError as error:
            raise self._diagnosed(session, error, path) from error
        finally:
            if not closed:
                self._close(session, handle)

    @staticmethod
    def _write(session: SftpSession, handle: bytes, pieces: Iterator[bytes], most: int) -> None:
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

    # -- sessions

    def _at(self, url: str) -> tuple[SftpSession, bytes]:
        """The session with the server of a URL, and the path there."""
        self.check()
        authority = url.partition("://")[2].partition("/")[0]
        session = self._sessions.get(authority)
        if session is None or not session.is_alive():
            session = SftpSession(_command(authority, self.patience), _environment(), self.patience, self._wake)
            self._sessions[authority] = session
            self._pieces.pop(authority, None)
        session.patience = self.patience
        return session, _path(url)

    def _piece(self, session: SftpSession, url: str) -> int:
        """How many bytes one request may move."""
        authority = url.partition("://")[2].partition("/")[0]
        if authority not in self._pieces:
            self._pieces[authority] = _SAFE_PIECE
            if _LIMITS in session.extensions:
                reader = Reader(session.call(sftp.EXTENDED, string(_LIMITS)).body)
                _, reading, writing = reader.long(), reader.long(), reader.long()
                self._pieces[authority] = max(min(reading, writing, _PIECE), _SAFE_PIECE)
        return self._pieces[authority]

    @staticmethod
    def _close(session: SftpSession, handle: bytes) -> None:
        if not session.closed:
            session.forget([session.send(sftp.CLOSE, string(handle))])

    def _diagnosed(self, session: SftpSession, error: StatusError, path: bytes) -> StorageError:
        """An error of writing: OpenSSH says no more than "Failure" when the disk is full."""
        if error.status == _FAILURE and _STATVFS in session.extensions:
            folder = path.rpartition(b"/")[0] or b"/"
            with contextlib.suppress(StatusError):
                reader = Reader(session.call(sftp.EXTENDED, string(_STATVFS), string(folder)).body)
                _, unit, _, _, free, _, _, inodes = (reader.long() for _ in range(8))
                if free * unit < _LEAST_ROOM or inodes == 0:
                    return StorageError(f"No space left on device: {_shown(path)}", errno=errno.ENOSPC)
        return _about(error, path)

    def _refuse_folder(self, url: str, path: bytes, error: StatusError) -> NoReturn:
        there = self.look(url)
        if there is not None and "directory" not in (there.kind, there.target_kind):
            raise StorageError(f"{_shown(path)} is not a directory", errno=errno.ENOTDIR) from error
        raise _about(error, path) from error


class _Reading:
    """A file that is being read, several requests ahead."""

    def __init__(self, session: SftpSession, handle: bytes, piece: int) -> None:
        self._session = session
        self._handle = string(handle)
        self._piece = piece
        self._asked: deque[tuple[int, int, int]] = deque()
        self._next = 0
        #: The first few requests of small files would be in vain: the window opens as bytes come.
        self._ahead = 2

    def pieces(self) -> Pieces:
        while True:
            while len(self._asked) < self._ahead:
                self._ask(self._next, self._piece)
                self._next += self._piece
            request, offset, wanted = self._asked.popleft()
            answer = self._session.receive(request)
            if answer.type == sftp.STATUS:
                return
            data = Reader(answer.body).string()
            yield data
            if len(data) < wanted:
                # Less than asked for: the rest of it comes next, or it is the end.
                self._again(offset + len(data))
            self._ahead = min(self._ahead + 1, max(_WINDOW // self._piece, 1))

    def _ask(self, offset: int, length: int) -> None:
        request = self._session.send(sftp.READ, self._handle, struct.pack(">QI", offset, length))
        self._asked.append((request, offset, length))

    def _again(self, offset: int) -> None:
        self.end()
        self._next = offset

    def end(self) -> None:
        """Forget what was asked for."""
        if not self._session.closed:
            self._session.forget([request for request, _, _ in self._asked])
        self._asked.clear()


def _thing(reader: Reader) -> Thing:
    flags = reader.number()
    size = reader.long() if flags & _SIZE else 0
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
    kind = _kind(mode)
    return Thing(kind, size if kind == "file" else 0, None if mode is None else stat.S_IMODE(mode), mtime)


def _kind(mode: int | None) -> str:
    if mode is None or stat.S_ISREG(mode):
        return "file"
    kinds: tuple[tuple[Callable[[int], bool], str], ...] = ((stat.S_ISDIR, "directory"), (stat.S_ISLNK, "link"))
    return next((kind for fits, kind in kinds if fits(mode)), "other")


def _handle(answer: sftp.Answer) -> bytes:
    if answer.type != sftp.HANDLE:
        raise StorageError("the server gave no handle", code="BAD_LISTING")
    return Reader(answer.body).string()


def _path(url: str) -> bytes:
    """The path at the server; what begins with ``~`` is relative to where the account starts."""
    path = unquote_to_bytes("/" + url.partition("://")[2].partition("/")[2])
    if path == b"/~" or path.startswith(b"/~/"):
        return b"./" + path[3:]
    return path


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


def _about(error: StatusError, path: bytes) -> StorageError:
    return StorageError(f"{error.message}: {_shown(path)}", errno=error.errno)


def _command(authority: str, patience: Patience) -> list[str]:
    host, port = authority, ""
    if authority.startswith("["):
        host, _, port = authority[1:].partition("]")
        port = port.removeprefix(":")
    elif ":" in authority:
        host, _, port = authority.partition(":")
    if not _HOST.fullmatch(host) or not (port.isdecimal() or not port):
        raise StorageError(f"{authority} is no HOST:PORT", code="UNSUPPORTED")
    known_hosts = os.environ.get("PDM_SSH_KNOWN_HOSTS")
    if not known_hosts:
        raise StorageError("the service has no file of known hosts: set known_hosts in [ssh]", code="CERTIFICATE")
    given = credential_at(("sftp",), authority)
    key = os.environ.get("PDM_SSH_KEY") if given is None else given.file
    if not key:
        raise StorageError("there is no SSH key to log in with", code="CREDENTIAL_MISSING", scope="service")
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": _quoted(known_hosts),
        "GlobalKnownHostsFile": "none",
        "UpdateHostKeys": "no",
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "IdentityFile": _quoted(key),
        "PreferredAuthentications": "publickey",
        "ControlPath": "none",
        "ClearAllForwardings": "yes",
        "ConnectTimeout": str(max(int(min(patience.stall_s, _LONGEST_CONNECT_S)), 1)),
        "LogLevel": "ERROR",
    }
    command = ["ssh", "-F", "none", "-T", "-x", "-a"]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    if port:
        command += ["-p", port]
    if user := (given and given.account) or os.environ.get("PDM_SSH_USER"):
        command += ["-l", user]
    return [*command, "-s", "--", host, "sftp"]


def _quoted(path: str) -> str:
    """A path as ssh(1) reads it in an option: it splits at blanks and expands per cent signs."""
    return '"' + path.replace("%", "%%") + '"'


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C"}

"""SFTP servers as a storage backend."""

from __future__ import annotations

import contextlib
import errno
import shutil
import struct
from collections.abc import Iterator, Sequence
from typing import NoReturn

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends import sftp_groups
from pdm.workqueue.helpers.backends import sftp_session as sftp
from pdm.workqueue.helpers.backends.sftp_files import (
    Attributes,
    PieceSizes,
    ReadAhead,
    attributes_of,
    close_handle,
    file_system_above,
    file_system_at,
    handle_of,
    names_of,
    with_mode,
    with_mtime,
    with_targets,
    with_types,
    write_pipelined,
)
from pdm.workqueue.helpers.backends.sftp_session import SftpSession, StatusError, string
from pdm.workqueue.helpers.backends.ssh_command import ssh_command, ssh_environment
from pdm.workqueue.helpers.group_backend import FileContent, GroupBackend
from pdm.workqueue.helpers.storage import EntryIterator, FileStat, FileVersion, StorageError
from pdm.workqueue.helpers.storage_backend import Pieces, WakeableBackend

_NO_ATTRIBUTES = struct.pack(">I", 0)
_POSIX_RENAME, _HARD_LINK, _LIMITS = (
    b"posix-rename@openssh.com",
    b"hardlink@openssh.com",
    b"limits@openssh.com",
)
#: Message instead of the server's "Failure".
_WORDS = {errno.EROFS: "Read-only file system", errno.ENOSPC: "No space left on device"}


class SftpBackend(WakeableBackend, GroupBackend):
    """The sessions of one thread, one for each server."""

    def __init__(self) -> None:
        super().__init__()
        self._sessions: dict[str, SftpSession] = {}
        self._piece_sizes: dict[SftpSession, PieceSizes] = {}
        #: Server → whether it makes hard links, if that was tried.
        self._linking: dict[SftpSession, bool] = {}
        #: Path of the last written file.
        self._written = b""

    @classmethod
    def missing_software(cls) -> str | None:
        return None if shutil.which("ssh") else "there is no ssh on the PATH: install the package openssh-client"

    # -- names

    def stat(self, url: StorageUrl) -> FileStat | None:
        session, path = self._at(url)
        try:
            found = attributes_of(session.call(sftp.LSTAT, string(path)))
            (file_stat,) = with_types(session, [(path, found)])
        except StatusError as error:
            if error.errno == errno.ENOENT:
                return None
            raise _about(error, path) from error
        return with_targets(session, [(path, file_stat)])[0] if file_stat.kind == "link" else file_stat

    def entries(self, url: StorageUrl) -> EntryIterator:
        session, path = self._at(url)
        try:
            handle = handle_of(session.call(sftp.OPENDIR, string(path)))
        except StatusError as error:
            if error.errno in (errno.ENOENT, None):
                self._refuse_directory(url, path, error)
            raise _about(error, path) from error
        try:
            while True:
                answer = session.call(sftp.READDIR, string(handle))
                if answer.type == sftp.STATUS:
                    return
                found = list(names_of(answer))
                if not found:
                    # Some servers end a listing so; another request would return the same for ever.
                    return
                yield from self._named(session, path, found)
        except StatusError as error:
            raise _about(error, path) from error
        finally:
            close_handle(session, handle)

    def _named(
        self, session: SftpSession, directory: bytes, found: list[tuple[bytes, Attributes]]
    ) -> Iterator[tuple[bytes, FileStat]]:
        found = [(name, attributes) for name, attributes in found if name not in (b".", b"..")]
        paths = [(directory.rstrip(b"/") + b"/" + name, attributes) for name, attributes in found]
        file_stats = with_types(session, paths)
        links = [
            (path, file_stat)
            for (path, _), file_stat in zip(paths, file_stats, strict=True)
            if file_stat.kind == "link"
        ]
        targets = iter(with_targets(session, links))
        for (name, _), file_stat in zip(found, file_stats, strict=True):
            yield name, next(targets) if file_stat.kind == "link" else file_stat

    def real_path(self, url: StorageUrl, there: FileStat) -> bytes | None:
        session, path = self._at(url)
        try:
            names = list(names_of(session.call(sftp.REALPATH, string(path))))
        except StatusError:
            return there.target
        return names[0][0] if names else there.target

    def make_directory(self, url: StorageUrl) -> None:
        session, path = self._at(url)
        if not session.is_openssh and self.stat(url) is not None:
            # Some servers report success for an existing directory.
            raise StorageError(f"{_shown(path)} is there", errno=errno.EEXIST)
        try:
            session.call(sftp.MKDIR, string(path), _NO_ATTRIBUTES)
        except StatusError as error:
            if error.status == sftp.FAILURE and self.stat(url) is not None:
                raise StorageError(f"{_shown(path)} is there", errno=errno.EEXIST) from error
            raise self._diagnosed(session, error, path) from error

    def remove(self, url: StorageUrl, *, directory: bool) -> None:
        session, path = self._at(url)
        try:
            session.call(sftp.RMDIR if directory else sftp.REMOVE, string(path))
        except StatusError as error:
            there = self.stat(url) if error.errno in (errno.ENOENT, None) else None
            if there is not None:
                self._refuse_removal(url, path, there, error, directory=directory)
            raise self._diagnosed(session, error, path) from error

    def _refuse_removal(
        self, url: StorageUrl, path: bytes, there: FileStat, error: StatusError, *, directory: bool
    ) -> None:
        if directory and there.kind != "directory":
            raise StorageError(f"{_shown(path)} is not a directory", errno=errno.ENOTDIR) from error
        if not directory and there.kind == "directory":
            raise StorageError(f"{_shown(path)} is a directory", errno=errno.EISDIR) from error
        if directory:
            with contextlib.closing(self.entries(url)) as entries:
                if next(entries, None) is not None:
                    raise StorageError(f"{_shown(path)} is not empty", errno=errno.ENOTEMPTY) from error

    def rename(self, source: StorageUrl, destination: StorageUrl, *, replace: bool) -> None:
        session, old = self._at(source)
        new = _path(destination)
        try:
            if replace:
                self._replace(session, old, destination)
            else:
                self._name_new(session, old, destination)
        except StatusError as error:
            there = self.stat(destination) if error.errno in (errno.EEXIST, errno.ENOTEMPTY, None) else None
            if there is not None and not replace:
                raise StorageError(f"{_shown(new)} is there", errno=errno.EEXIST) from error
            if there is not None and there.kind == "directory":
                raise StorageError(
                    f"{_shown(new)} is a directory that cannot be replaced", errno=errno.ENOTEMPTY
                ) from error
            raise self._diagnosed(session, error, new, old) from error

    def _replace(self, session: SftpSession, old: bytes, destination: StorageUrl) -> None:
        """Rename and replace, atomically if the server can."""
        new = _path(destination)
        if _POSIX_RENAME in session.extensions:
            try:
                session.call(sftp.EXTENDED, string(_POSIX_RENAME), string(old), string(new))
            except StatusError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
            else:
                return
        try:
            # RENAME of some servers replaces.
            session.call(sftp.RENAME, string(old), string(new))
        except StatusError as error:
            there = self.stat(destination) if error.errno in (errno.EEXIST, errno.EACCES, None) else None
            if there is None or there.kind == "directory":
                raise
            # The server cannot replace atomically: remove the old file first.
            session.call(sftp.REMOVE, string(new))
            session.call(sftp.RENAME, string(old), string(new))

    def _name_new(self, session: SftpSession, old: bytes, destination: StorageUrl) -> None:
        """Rename to a free name.

        RENAME of OpenSSH never replaces a file: it makes a hard link and removes the old name. That of other servers
        may, so the same is done here. Without hard links the name is checked right before RENAME.
        """
        new = _path(destination)
        if not session.is_openssh:
            if self._link(session, old, destination):
                session.call(sftp.REMOVE, string(old))
                return
            if self.stat(destination) is not None:
                raise StorageError(f"{_shown(new)} is there", errno=errno.EEXIST)
        try:
            session.call(sftp.RENAME, string(old), string(new))
        except StatusError as error:
            # OpenSSH on a file system without hard links fails with this error although the name is free.
            unsure = error.errno in (errno.EOPNOTSUPP, errno.EPERM, None)
            if not unsure or _POSIX_RENAME not in session.extensions or self.stat(destination) is not None:
                raise
            session.call(sftp.EXTENDED, string(_POSIX_RENAME), string(old), string(new))

    def _link(self, session: SftpSession, old: bytes, destination: StorageUrl) -> bool:
        """Make a hard link with the new name, which never replaces a file; False if that is not possible."""
        # A file written here is no link. On some systems a hard link to a symbolic link would be one to its target.
        if old != self._written:
            found = attributes_of(session.call(sftp.LSTAT, string(old)))
            if with_types(session, [(old, found)])[0].kind != "file":
                return False
        if not self._makes_links(session, old):
            return False
        try:
            session.call(sftp.EXTENDED, string(_HARD_LINK), string(old), string(_path(destination)))
        except StatusError as error:
            if self.stat(destination) is not None:
                raise StorageError(f"{_shown(_path(destination))} is there", errno=errno.EEXIST) from error
            return False
        return True

    def _makes_links(self, session: SftpSession, file: bytes) -> bool:
        """Whether a server with the hardlink extension makes hard links: rclone reports success and does nothing.

        Args:
            session: with the server.
            file: a file; a link from it to itself fails at servers that make links.
        """
        if session not in self._linking:
            refused = _HARD_LINK in session.extensions
            if refused:
                with contextlib.suppress(StatusError):
                    session.call(sftp.EXTENDED, string(_HARD_LINK), string(file), string(file))
                    refused = False
            self._linking[session] = refused
        return self._linking[session]

    def size(self, url: StorageUrl) -> int:
        return self.version(url).size

    def version(self, url: StorageUrl) -> FileVersion:
        there = self._attributes(url)
        if there.size is None:
            raise StorageError(f"{url}: the server does not tell the size", code=FailureCode.UNSUPPORTED)
        return FileVersion(there.size, there.mtime)

    def attributes(self, url: StorageUrl) -> FileStat:
        return self._attributes(url).file_stat()

    def _attributes(self, url: StorageUrl) -> Attributes:
        """Of what is at a path, links followed."""
        session, path = self._at(url)
        try:
            return attributes_of(session.call(sftp.STAT, string(path)))
        except StatusError as error:
            raise _about(error, path) from error

    def set_mtime(self, url: StorageUrl, mtime: int) -> None:
        session, path = self._at(url)
        session.call(sftp.SETSTAT, string(path), with_mtime(mtime))

    def set_mode(self, url: StorageUrl, mode: int) -> None:
        session, path = self._at(url)
        session.call(sftp.SETSTAT, string(path), with_mode(mode))

    # -- bytes

    def read(self, url: StorageUrl) -> Pieces:
        session, path = self._at(url)
        try:
            handle = handle_of(session.call(sftp.OPEN, string(path), sftp.TO_READ))
            found = attributes_of(session.call(sftp.FSTAT, string(handle)))
        except StatusError as error:
            raise self._of_reading(url, path, error) from error
        if found.kind == "directory":
            close_handle(session, handle)
            raise StorageError(f"{_shown(path)} is a directory", errno=errno.EISDIR)
        reading = ReadAhead(session, handle, self._sizes(session).reading)
        try:
            yield from reading.pieces()
        except StatusError as error:
            raise _about(error, path) from error
        finally:
            reading.end()
            close_handle(session, handle)

    def _of_reading(self, url: StorageUrl, path: bytes, error: StatusError) -> StorageError:
        if error.status == sftp.FAILURE:
            there = self.stat(url)
            if there is not None and "directory" in (there.kind, there.target_kind):
                return StorageError(f"{_shown(path)} is a directory", errno=errno.EISDIR)
        return _about(error, path)

    def write(self, url: StorageUrl, pieces: Iterator[bytes], size: int) -> None:
        session, path = self._at(url)
        try:
            handle = handle_of(session.call(sftp.OPEN, string(path), sftp.TO_CREATE))
        except StatusError as error:
            if error.status == sftp.FAILURE and self.stat(url) is not None:
                raise StorageError(f"{_shown(path)} is there", errno=errno.EEXIST) from error
            raise self._diagnosed(session, error, path) from error
        self._written = path
        closed = False
        try:
            write_pipelined(session, handle, pieces, self._sizes(session).writing)
            self._sync(session, handle)
            closed = True
            # Some servers report a full disk only at CLOSE.
            session.call(sftp.CLOSE, string(handle))
        except StatusError as error:
            raise self._diagnosed(session, error, path) from error
        finally:
            if not closed:
                close_handle(session, handle)

    @staticmethod
    def _sync(session: SftpSession, handle: bytes) -> None:
        if sftp.FSYNC in session.extensions:
            try:
                session.call(sftp.EXTENDED, string(sftp.FSYNC), string(handle))
            except StatusError as error:
                if error.errno not in sftp_groups.CANNOT_SYNC:
                    raise

    # -- groups

    def renames_groups(self, url: StorageUrl, replace: bool) -> bool:
        # RENAME of OpenSSH never replaces a file. At other servers, rename one file after the other.
        session, _ = self._at(url)
        return _POSIX_RENAME in session.extensions if replace else session.is_openssh

    def read_group(self, files: Sequence[tuple[StorageUrl, int]]) -> list[FileContent | None]:
        session, _ = self._at(files[0][0])
        return sftp_groups.read(session, [(_path(url), size) for url, size in files], self._sizes(session).reading)

    def group_versions(self, urls: Sequence[StorageUrl]) -> list[FileVersion | None]:
        session, _ = self._at(urls[0])
        return [sftp_groups.version_of(found) for found in sftp_groups.attributes(session, map(_path, urls))]

    def group_sizes(self, urls: Sequence[StorageUrl]) -> list[int | None]:
        return [version.size if version else None for version in self.group_versions(urls)]

    def are_free(self, urls: Sequence[StorageUrl]) -> list[bool]:
        session, _ = self._at(urls[0])
        return sftp_groups.are_free(session, map(_path, urls))

    def write_group(self, files: Sequence[tuple[StorageUrl, bytes]]) -> list[bool]:
        session, _ = self._at(files[0][0])
        return sftp_groups.write(session, [(_path(url), content) for url, content in files], self._sizes(session))

    def rename_group(self, files: Sequence[tuple[StorageUrl, StorageUrl, int]], *, replace: bool) -> list[bool]:
        session, _ = self._at(files[0][0])
        kind, prefix = (sftp.EXTENDED, string(_POSIX_RENAME)) if replace else (sftp.RENAME, b"")
        renames = [(kind, prefix + string(_path(old)) + string(_path(new))) for old, new, _ in files]
        return sftp_groups.carry_out(session, renames)

    def remove_group(self, urls: Sequence[StorageUrl]) -> list[bool]:
        session, _ = self._at(urls[0])
        return sftp_groups.remove(session, list(map(_path, urls)))

    # -- sessions

    def _at(self, url: StorageUrl) -> tuple[SftpSession, bytes]:
        """The session with the server of a URL, and the path there."""
        self.check()
        authority = url.authority
        session = self._sessions.get(authority)
        if session is None or not session.is_alive():
            if session is not None:
                self._piece_sizes.pop(session, None)
                self._linking.pop(session, None)
            session = SftpSession(ssh_command(authority, self.timeouts), ssh_environment(), self.timeouts, self._wake)
            self._sessions[authority] = session
        session.timeouts = self.timeouts
        return session, _path(url)

    def _sizes(self, session: SftpSession) -> PieceSizes:
        """Maximum bytes of one request."""
        if session not in self._piece_sizes:
            self._piece_sizes[session] = PieceSizes()
            if _LIMITS in session.extensions:
                with contextlib.suppress(StatusError):
                    self._piece_sizes[session] = PieceSizes.of(session.call(sftp.EXTENDED, string(_LIMITS)).body)
        return self._piece_sizes[session]

    def _diagnosed(
        self, session: SftpSession, error: StatusError, path: bytes, renamed: bytes | None = None
    ) -> StorageError:
        """An error of writing to a path with its reason: OpenSSH reports most errors as "Failure".

        ``renamed``: source of a rename to that path, if it was one.
        """
        number = error.errno
        system = file_system_above(session, path) if error.status == sftp.FAILURE and number is None else None
        if system is not None and system.is_read_only:
            number = errno.EROFS
        elif system is not None and system.is_full:
            number = errno.ENOSPC
        elif system is not None and renamed is not None:
            other = file_system_above(session, renamed)
            number = errno.EXDEV if other is not None and other.number != system.number else None
        if number == errno.EXDEV:
            return StorageError(
                f"{_shown(path)} is on another file system of the server, and a rename cannot cross: copy, then remove",
                errno=number,
                code=FailureCode.UNSUPPORTED,
            )
        words = _WORDS.get(number or 0) if error.errno is None else None
        return StorageError(f"{words or error.message}: {_shown(path)}", errno=number)

    def free_bytes(self, directory_url: StorageUrl) -> int | None:
        system = file_system_at(*self._at(directory_url))
        return None if system is None else system.free_bytes

    def _refuse_directory(self, url: StorageUrl, path: bytes, error: StatusError) -> NoReturn:
        there = self.stat(url)
        if there is not None and "directory" not in (there.kind, there.target_kind):
            raise StorageError(f"{_shown(path)} is not a directory", errno=errno.ENOTDIR) from error
        raise _about(error, path) from error


def _path(url: StorageUrl) -> bytes:
    """The path at the server; one that begins with ``~`` is relative to the account's start directory."""
    path = url.path
    if path == b"/~" or path.startswith(b"/~/"):
        return b"./" + path[3:]
    return path


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


def _about(error: StatusError, path: bytes) -> StorageError:
    return StorageError(f"{error.message}: {_shown(path)}", errno=error.errno)

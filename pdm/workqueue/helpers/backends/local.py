"""Local directories as a storage backend: confined to the roots of the FILE sites, and synced before a copy is done."""

from __future__ import annotations

import contextlib
import errno
import functools
import grp
import json
import os
import pwd
import stat
import time
from collections.abc import Iterator
from typing import Self

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.backends.local_paths import ResolvedPath, Roots, rename_without_replacing
from pdm.workqueue.helpers.checksums import running_checksum
from pdm.workqueue.helpers.storage import (
    EntryIterator,
    FileKind,
    FileStat,
    FileVersion,
    ProgressCallback,
    StoppedError,
    Storage,
    StorageError,
)
from pdm.workqueue.helpers.storage_backend import Pieces, StorageBackend

_CHUNK = 1024 * 1024
#: Bytes of one copy_file_range call: a cancel waits for it.
_KERNEL_CHUNK = 64 * 1024 * 1024
#: Seconds between two progress reports.
_PROGRESS_S = 0.5
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: copy_file_range does not support every pair of file systems.
_NOT_IN_KERNEL = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF})
#: Its errors that only the destination can cause.
_WRITE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


@contextlib.contextmanager
def storage_errors(url: StorageUrl) -> Iterator[None]:
    """Convert an `OSError` to a `StorageError` with the path."""
    try:
        yield
    except OSError as error:
        path = url.path.decode("utf-8", "backslashreplace")
        code = FailureCode.UNSUPPORTED if error.errno == errno.EXDEV else None
        raise StorageError(f"{error.strerror or error}: {path}", errno=error.errno, code=code) from error


class LocalStorage(Storage):
    """The file access of one thread."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._interrupted = False

    def stat(self, url: StorageUrl) -> FileStat | None:
        with storage_errors(url):
            try:
                with self._roots.resolved(url) as resolved:
                    status = os.stat(resolved.name, dir_fd=resolved.directory, follow_symlinks=False)
                    return self._file_stat(url, status)
            except FileNotFoundError:
                return None

    def _file_stat(self, url: StorageUrl, status: os.stat_result) -> FileStat:
        kind = _kind(status)
        common = (
            stat.S_IMODE(status.st_mode),
            int(status.st_mtime),
            _owner_name(status.st_uid),
            _group_name(status.st_gid),
        )
        if kind != "link":
            return FileStat(kind, status.st_size if kind == "file" else 0, *common)
        try:
            with self._roots.resolved(url, follow=True) as resolved:
                target = os.stat(resolved.name, dir_fd=resolved.directory, follow_symlinks=False)
        except (OSError, StorageError):
            # A dangling link, or one to a path outside of the roots.
            return FileStat("link", 0, *common)
        target_kind = _kind(target)
        return FileStat("link", target.st_size if target_kind == "file" else 0, *common, resolved.path, target_kind)

    def real_path(self, url: StorageUrl, there: FileStat) -> bytes | None:
        with storage_errors(url), self._roots.resolved(url, follow=True) as resolved:
            return resolved.path

    def entries(self, url: StorageUrl) -> EntryIterator:
        with storage_errors(url), self._roots.resolved(url, follow=True) as resolved:
            directory = os.open(
                resolved.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=resolved.directory
            )
            try:
                with os.scandir(directory) as found:
                    for entry in found:
                        if self._interrupted:
                            raise StoppedError
                        with contextlib.suppress(FileNotFoundError):
                            # It was removed meanwhile.
                            yield os.fsencode(entry.name), self._found(url, entry)
            finally:
                os.close(directory)

    def _found(self, directory_url: StorageUrl, entry: os.DirEntry[str]) -> FileStat:
        status = entry.stat(follow_symlinks=False)
        return self._file_stat(directory_url.child(os.fsencode(entry.name)), status)

    def make_directory(self, url: StorageUrl) -> None:
        with storage_errors(url), self._roots.resolved(url) as resolved:
            lease.check()
            os.mkdir(resolved.name, dir_fd=resolved.directory)

    def remove(self, url: StorageUrl, *, directory: bool) -> None:
        with storage_errors(url), self._roots.resolved(url) as resolved:
            _refuse_root(resolved)
            lease.check()
            (os.rmdir if directory else os.unlink)(resolved.name, dir_fd=resolved.directory)

    def rename(self, source: StorageUrl, destination: StorageUrl, *, replace: bool) -> None:
        with storage_errors(source), self._roots.resolved(source) as old, self._roots.resolved(destination) as new:
            _refuse_root(old)
            _refuse_root(new)
            lease.check()
            if replace:
                os.rename(old.name, new.name, src_dir_fd=old.directory, dst_dir_fd=new.directory)
            else:
                rename_without_replacing(old, new)

    def transfer(
        self,
        source: StorageUrl,
        temporary: StorageUrl,
        size: int,
        checksum: ChecksumAlgorithm | None,
        arrived: ProgressCallback,
    ) -> str | None:
        with self._opened(source, FailureScope.SOURCE) as reading, self._created(temporary) as writing:
            copy = _LocalCopy(self, reading, writing, arrived)
            digest = None
            if checksum is not None:
                digest = copy.with_checksum(checksum)
            else:
                copy.in_kernel()
            try:
                os.fsync(writing)
            except OSError as error:
                raise _scoped_error(FailureScope.DESTINATION, error) from error
        return digest

    def check(self) -> None:
        """Raise `StoppedError` or a timeout if the operation must end now."""
        lease.check()
        if self._interrupted:
            raise StoppedError
        if time.monotonic() > self.timeouts.until:
            raise StorageError("not finished in time", code=FailureCode.TIMEOUT, scope=FailureScope.TRANSFER)

    @contextlib.contextmanager
    def _opened(self, url: StorageUrl, scope: FailureScope | None = None) -> Iterator[int]:
        """Open a regular file for reading."""
        try:
            with storage_errors(url), self._roots.resolved(url, follow=True) as resolved:
                # Non-blocking: opening a pipe would wait for its writer.
                file = os.open(resolved.name, _READ, dir_fd=resolved.directory)
        except StorageError as error:
            error.scope = scope
            raise
        try:
            status = os.fstat(file)
            if stat.S_ISDIR(status.st_mode):
                raise StorageError(f"{url} is a directory", errno=errno.EISDIR, scope=scope)
            if not stat.S_ISREG(status.st_mode):
                raise StorageError(
                    f"{url} is neither a file nor a directory", code=FailureCode.UNSUPPORTED, scope=scope
                )
            yield file
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _created(self, url: StorageUrl) -> Iterator[int]:
        try:
            with storage_errors(url), self._roots.resolved(url) as resolved:
                lease.check()
                file = os.open(resolved.name, _CREATE, 0o666, dir_fd=resolved.directory)
        except StorageError as error:
            raise error.at(FailureScope.DESTINATION) from error.__cause__
        try:
            yield file
        finally:
            os.close(file)

    def size(self, url: StorageUrl) -> int:
        with storage_errors(url), self._roots.resolved(url, follow=True) as resolved:
            return os.stat(resolved.name, dir_fd=resolved.directory, follow_symlinks=False).st_size

    def version(self, url: StorageUrl) -> FileVersion:
        with storage_errors(url), self._roots.resolved(url, follow=True) as resolved:
            status = os.stat(resolved.name, dir_fd=resolved.directory, follow_symlinks=False)
        return version_of(status)

    def attributes(self, url: StorageUrl) -> FileStat:
        with storage_errors(url), self._roots.resolved(url, follow=True) as resolved:
            status = os.stat(resolved.name, dir_fd=resolved.directory, follow_symlinks=False)
        return FileStat("file", mode=stat.S_IMODE(status.st_mode), mtime=int(status.st_mtime))

    def set_mtime(self, url: StorageUrl, mtime: int) -> None:
        with storage_errors(url), self._opened(url) as file:
            lease.check()
            try:
                os.utime(file, (time.time(), mtime))
            except OverflowError as error:
                raise StorageError(f"{mtime} is no modification time of a file", errno=errno.EINVAL) from error
            os.fsync(file)

    def set_mode(self, url: StorageUrl, mode: int) -> None:
        with storage_errors(url), self._opened(url) as file:
            lease.check()
            os.fchmod(file, mode)
            os.fsync(file)

    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        with storage_errors(url), self._opened(url) as file:
            _forget_pages(file)
            digest = running_checksum(algorithm)
            buffer = memoryview(bytearray(_CHUNK))
            while count := os.readv(file, [buffer]):
                self.check()
                digest.update(buffer[:count])
        return digest.hexdigest()

    def free_bytes(self, directory_url: StorageUrl) -> int | None:
        with storage_errors(directory_url), self._roots.resolved(directory_url, follow=True) as resolved:
            directory = os.open(resolved.name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=resolved.directory)
            try:
                found = os.statvfs(directory)
            finally:
                os.close(directory)
        # A file system without blocks (many of FUSE) does not count.
        return found.f_bavail * found.f_frsize if found.f_blocks else None

    def interrupt(self) -> None:
        self._interrupted = True

    def resume(self) -> None:
        self._interrupted = False

    def sync_directory(self, directory_url: StorageUrl) -> None:
        with storage_errors(directory_url), self._roots.resolved(directory_url, follow=True) as resolved:
            try:
                directory = os.open(
                    resolved.name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=resolved.directory
                )
            except PermissionError:
                # A drop box can be written to but not opened: sync everything.
                os.sync()
                return
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def _forget_pages(file: int) -> None:
    """Drop the written pages of a file from the cache: a checksum must be that of the disk."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def version_of(status: os.stat_result) -> FileVersion:
    """The version of a file with this status."""
    tag = f"{status.st_dev}:{status.st_ino}:{status.st_mtime_ns}:{status.st_ctime_ns}"
    return FileVersion(status.st_size, status.st_mtime, tag, is_exact=True)


class _LocalCopy:
    """A copy from one open file to another."""

    def __init__(self, storage: LocalStorage, reading: int, writing: int, arrived: ProgressCallback) -> None:
        self._storage = storage
        self._reading = reading
        self._writing = writing
        self._arrived = arrived
        self._moved = 0
        self._told_at = time.monotonic()

    def with_checksum(self, algorithm: ChecksumAlgorithm) -> str:
        """Copy, and return the checksum of the bytes read."""
        digest = running_checksum(algorithm)
        buffer = memoryview(bytearray(_CHUNK))
        while count := self._read(buffer):
            digest.update(buffer[:count])
            rest = buffer[:count]
            while rest:
                try:
                    rest = rest[os.write(self._writing, rest) :]
                except OSError as error:
                    raise _scoped_error(FailureScope.DESTINATION, error) from error
            self._moved_on(count)
        return digest.hexdigest()

    def in_kernel(self) -> None:
        """Copy with copy_file_range; False if kernel or file systems do not support it."""
        try:
            while count := os.copy_file_range(self._reading, self._writing, _KERNEL_CHUNK):
                self._moved_on(count)
        except OSError as error:
            if error.errno not in _NOT_IN_KERNEL or self._moved:
                raise _scoped_error(
                    FailureScope.DESTINATION if error.errno in _WRITE_ERRNOS else FailureScope.TRANSFER, error
                ) from error
        if self._moved == 0:
            # Also for files with a size of 0 that have content, as in /proc.
            self.with_checksum(ChecksumAlgorithm.ADLER32)

    def _read(self, buffer: memoryview) -> int:
        try:
            return os.readv(self._reading, [buffer])
        except OSError as error:
            raise _scoped_error(FailureScope.SOURCE, error) from error

    def _moved_on(self, count: int) -> None:
        self._moved += count
        self._storage.check()
        now = time.monotonic()
        if now - self._told_at > _PROGRESS_S:
            self._told_at = now
            self._arrived(self._moved)


def _scoped_error(scope: FailureScope, error: OSError) -> StorageError:
    return StorageError(error.strerror or str(error), errno=error.errno, scope=scope)


@functools.lru_cache(maxsize=1024)
def _owner_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


@functools.lru_cache(maxsize=1024)
def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _kind(status: os.stat_result) -> FileKind:
    if stat.S_ISREG(status.st_mode):
        return "file"
    if stat.S_ISDIR(status.st_mode):
        return "directory"
    return "link" if stat.S_ISLNK(status.st_mode) else "other"


def _refuse_root(resolved: ResolvedPath) -> None:
    if resolved.name == b".":
        raise StorageError(
            "the root of the site cannot be changed", errno=errno.EACCES, code=FailureCode.PERMISSION_DENIED
        )


_STREAM_CHUNK = 1024 * 1024


class LocalBackend(LocalStorage, StorageBackend):
    """The directories of the FILE sites; a copy between them stays in the kernel."""

    def __init__(self, roots: Roots) -> None:
        LocalStorage.__init__(self, roots)

    @classmethod
    def from_environment(cls) -> Self:
        return cls(Roots(json.loads(os.environ.get("PDM_FILE_ROOTS", "[]"))))

    def read(self, url: StorageUrl) -> Pieces:
        with self._opened(url) as file:
            while piece := _read_chunk(file):
                yield piece

    def write(self, url: StorageUrl, pieces: Iterator[bytes], size: int) -> None:
        with self._created(url) as file:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[_write_chunk(file, rest) :]
            try:
                os.fsync(file)
            except OSError as error:
                raise _storage_error(error) from error

    def write_content(self, url: StorageUrl, content: bytes) -> None:
        """Write a new file, so that what is read of it next comes from the disk."""
        with storage_errors(url), self._created(url) as file:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
            _forget_pages(file)

    def transfer(
        self,
        source: StorageUrl,
        temporary: StorageUrl,
        size: int,
        checksum: ChecksumAlgorithm | None,
        arrived: ProgressCallback,
    ) -> str | None:
        return LocalStorage.transfer(self, source, temporary, size, checksum, arrived)

    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        return LocalStorage.checksum(self, url, algorithm)


def _read_chunk(file: int) -> bytes:
    try:
        return os.read(file, _STREAM_CHUNK)
    except OSError as error:
        raise _storage_error(error) from error


def _write_chunk(file: int, rest: memoryview) -> int:
    try:
        return os.write(file, rest)
    except OSError as error:
        raise _storage_error(error) from error


def _storage_error(error: OSError) -> StorageError:
    return StorageError(error.strerror or str(error), errno=error.errno)

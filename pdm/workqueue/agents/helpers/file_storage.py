"""Folders of this machine as a storage: confined to the roots of the FILE sites, and durable before they are done."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import zlib
from collections.abc import Iterator
from urllib.parse import quote_from_bytes, unquote_to_bytes

from pdm.workqueue.agents.helpers.confined import Place, Roots, rename_without_replacing
from pdm.workqueue.agents.helpers.storage import Arrived, Entries, StoppedError, Storage, StorageError, Thing

_CHUNK = 1024 * 1024
#: What the kernel copies in one call: a cancel waits for no more than this.
_KERNEL_CHUNK = 64 * 1024 * 1024
#: Seconds between two words about a running copy.
_PROGRESS_S = 0.5
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: copy_file_range is not for every pair of file systems.
_NOT_IN_KERNEL = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF})
#: Errors of it that can only come from the destination.
_OF_WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


@contextlib.contextmanager
def _about(url: str) -> Iterator[None]:
    """Turn an error of the system into one of the storage that names what it was about."""
    try:
        yield
    except OSError as error:
        path = unquote_to_bytes(url.partition("://")[2]).decode("utf-8", "backslashreplace")
        code = "UNSUPPORTED" if error.errno == errno.EXDEV else None
        raise StorageError(f"{error.strerror or error}: {path}", errno=error.errno, code=code) from error


class FileStorage(Storage):
    """One lane's way to the folders."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._interrupted = False

    def look(self, url: str) -> Thing | None:
        with _about(url):
            try:
                with self._roots.place(url) as place:
                    status = os.stat(place.name, dir_fd=place.folder, follow_symlinks=False)
                    return self._thing(url, status)
            except FileNotFoundError:
                return None

    def _thing(self, url: str, status: os.stat_result) -> Thing:
        kind = _kind(status)
        common = (stat.S_IMODE(status.st_mode), int(status.st_mtime))
        if kind != "link":
            return Thing(kind, status.st_size if kind == "file" else 0, *common)
        try:
            with self._roots.place(url, follow=True) as place:
                target = os.stat(place.name, dir_fd=place.folder, follow_symlinks=False)
        except (OSError, StorageError):
            # It leads nowhere, or to where this site does not reach.
            return Thing("link", 0, *common)
        target_kind = _kind(target)
        return Thing("link", target.st_size if target_kind == "file" else 0, *common, place.path, target_kind)

    def real_path(self, url: str, there: Thing) -> bytes | None:
        with _about(url), self._roots.place(url, follow=True) as place:
            return place.path

    def entries(self, url: str) -> Entries:
        with _about(url), self._roots.place(url, follow=True) as place:
            folder = os.open(
                place.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place.folder
            )
            try:
                with os.scandir(folder) as found:
                    for entry in found:
                        if self._interrupted:
                            raise StoppedError
                        with contextlib.suppress(FileNotFoundError):
                            # One that is removed meanwhile is not there.
                            yield os.fsencode(entry.name), self._found(url, entry)
            finally:
                os.close(folder)

    def _found(self, folder_url: str, entry: os.DirEntry[str]) -> Thing:
        status = entry.stat(follow_symlinks=False)
        url = f"{folder_url.rstrip('/')}/{quote_from_bytes(os.fsencode(entry.name), safe='')}"
        return self._thing(url, status)

    def make_directory(self, url: str) -> None:
        with _about(url), self._roots.place(url) as place:
            os.mkdir(place.name, dir_fd=place.folder)

    def remove(self, url: str, *, directory: bool) -> None:
        with _about(url), self._roots.place(url) as place:
            _refuse_root(place)
            (os.rmdir if directory else os.unlink)(place.name, dir_fd=place.folder)

    def rename(self, source: str, destination: str, *, replace: bool) -> None:
        with _about(source), self._roots.place(source) as old, self._roots.place(destination) as new:
            _refuse_root(old)
            _refuse_root(new)
            if replace:
                os.rename(old.name, new.name, src_dir_fd=old.folder, dst_dir_fd=new.folder)
            else:
                rename_without_replacing(old, new)

    def transfer(self, source: str, temporary: str, size: int, checksum: bool, arrived: Arrived) -> str | None:
        with self._opened(source, "source") as reading:
            before = os.fstat(reading)
            with self._created(temporary) as writing:
                copy = _Copy(self, reading, writing, arrived)
                digest = None
                if checksum:
                    digest = copy.with_checksum()
                else:
                    copy.in_kernel()
                try:
                    os.fsync(writing)
                except OSError as error:
                    raise _at("destination", error) from error
            after = os.fstat(reading)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise StorageError("the source was written to while it was copied", code="SIZE_CHANGED", scope="source")
        return digest

    def check(self) -> None:
        """Raise if the operation must end now."""
        if self._interrupted:
            raise StoppedError
        if time.monotonic() > self.patience.until:
            raise StorageError("not finished in time", code="TIMEOUT", scope="transfer")

    @contextlib.contextmanager
    def _opened(self, url: str, scope: str | None = None) -> Iterator[int]:
        """A regular file, open for reading."""
        try:
            with _about(url), self._roots.place(url, follow=True) as place:
                # Non-blocking: opening a pipe would wait for its writer.
                file = os.open(place.name, _READ, dir_fd=place.folder)
        except StorageError as error:
            error.scope = scope
            raise
        try:
            status = os.fstat(file)
            if stat.S_ISDIR(status.st_mode):
                raise StorageError(f"{url} is a directory", errno=errno.EISDIR, scope=scope)
            if not stat.S_ISREG(status.st_mode):
                raise StorageError(f"{url} is neither a file nor a directory", code="UNSUPPORTED", scope=scope)
            yield file
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _created(self, url: str) -> Iterator[int]:
        try:
            with _about(url), self._roots.place(url) as place:
                file = os.open(place.name, _CREATE, 0o666, dir_fd=place.folder)
        except StorageError as error:
            raise error.at("destination") from error.__cause__
        try:
            yield file
        finally:
            os.close(file)

    def size(self, url: str) -> int:
        with _about(url), self._roots.place(url, follow=True) as place:
            return os.stat(place.name, dir_fd=place.folder, follow_symlinks=False).st_size

    def checksum(self, url: str) -> str:
        with _about(url), self._opened(url) as file:
            # What is read again shall come from the disk: pages that are written back can be dropped.
            with contextlib.suppress(OSError):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            digest = 1
            buffer = memoryview(bytearray(_CHUNK))
            while count := os.readv(file, [buffer]):
                self.check()
                digest = zlib.adler32(buffer[:count], digest)
        return f"{digest:08x}"

    def interrupt(self) -> None:
        self._interrupted = True

    def resume(self) -> None:
        self._interrupted = False

    def settle(self, directory_url: str) -> None:
        with _about(directory_url), self._roots.place(directory_url, follow=True) as place:
            try:
                folder = os.open(place.name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place.folder)
            except PermissionError:
                # A drop box, which can be written to and not be opened: all that is on disks' way is written out.
                os.sync()
                return
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


class _Copy:
    """The bytes of one open file to another."""

    def __init__(self, storage: FileStorage, reading: int, writing: int, arrived: Arrived) -> None:
        self._storage = storage
        self._reading = reading
        self._writing = writing
        self._arrived = arrived
        self._moved = 0
        self._told_at = time.monotonic()

    def with_checksum(self) -> str:
        """Copy, and give the ADLER32 of what was read."""
        digest = 1
        buffer = memoryview(bytearray(_CHUNK))
        while count := self._read(buffer):
            digest = zlib.adler32(buffer[:count], digest)
            rest = buffer[:count]
            while rest:
                try:
                    rest = rest[os.write(self._writing, rest) :]
                except OSError as error:
                    raise _at("destination", error) from error
            self._moved_on(count)
        return f"{digest:08x}"

    def in_kernel(self) -> None:
        """Copy without seeing the bytes, where kernel and file systems can."""
        try:
            while count := os.copy_file_range(self._reading, self._writing, _KERNEL_CHUNK):
                self._moved_on(count)
        except OSError as error:
            if error.errno not in _NOT_IN_KERNEL or self._moved:
                raise _at("destination" if error.errno in _OF_WRITING else "transfer", error) from error
        if self._moved == 0:
            # Also for files that only seem empty to the kernel, as those of /proc do.
            self.with_checksum()

    def _read(self, buffer: memoryview) -> int:
        try:
            return os.readv(self._reading, [buffer])
        except OSError as error:
            raise _at("source", error) from error

    def _moved_on(self, count: int) -> None:
        self._moved += count
        self._storage.check()
        now = time.monotonic()
        if now - self._told_at > _PROGRESS_S:
            self._told_at = now
            self._arrived(self._moved)


def _at(scope: str, error: OSError) -> StorageError:
    return StorageError(error.strerror or str(error), errno=error.errno, scope=scope)


def _kind(status: os.stat_result) -> str:
    if stat.S_ISREG(status.st_mode):
        return "file"
    if stat.S_ISDIR(status.st_mode):
        return "directory"
    return "link" if stat.S_ISLNK(status.st_mode) else "other"


def _refuse_root(place: Place) -> None:
    if place.name == b".":
        raise StorageError("the root of the site stays as it is", errno=errno.EACCES, code="PERMISSION_DENIED")

"""Confined path resolution: open files below the roots of FILE sites only, even if symbolic links lead outside.

A path is resolved component by component; each is opened in its parent directory without following links, and the
target of a link is resolved in the same way. So a component that is replaced meanwhile cannot lead outside (no
time-of-check race).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.storage import StorageError

_MOST_LINKS = 40
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ANYTHING = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE = 1


class ResolvedPath(NamedTuple):
    """An open directory and a name in it, which may not exist; and both as one path, for messages and links."""

    directory: int
    name: bytes
    path: bytes


class Roots:
    """The root directories.

    Args:
        roots: their absolute paths, percent-encoded.
    """

    def __init__(self, roots: list[str]) -> None:
        self._roots = sorted((unquote_to_bytes(root).rstrip(b"/") for root in roots), key=len, reverse=True)

    @contextlib.contextmanager
    def resolved(self, url: StorageUrl, *, follow: bool = False) -> Iterator[ResolvedPath]:
        """Resolve a URL; the directory is closed at the end of the context.

        Args:
            url: ``file:///path``.
            follow: whether a link with that name is followed.

        Raises:
            StorageError: it is outside, or a component is missing or no directory.
        """
        path = url.path
        root = next((root for root in self._roots if path == root or path.startswith(root + b"/")), None)
        names = path[len(root) :].split(b"/") if root is not None else []
        if root is None or b".." in names:
            raise _outside(path)
        walk = _PathWalk(root or b"/")
        try:
            yield walk.to([name for name in names if name not in (b"", b".")], follow=follow)
        finally:
            walk.close()


class _PathWalk:
    def __init__(self, root: bytes) -> None:
        self._root = root
        self._directories = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        self._names: list[bytes] = []
        self._links = 0

    def close(self) -> None:
        for directory in self._directories:
            os.close(directory)

    def to(self, names: list[bytes], *, follow: bool) -> ResolvedPath:
        waiting = list(reversed(names))
        while waiting:
            name = waiting.pop()
            if name == b"..":
                self._up()
            elif waiting:
                self._down(name, waiting)
            elif not follow or not self._follow(name, waiting):
                return ResolvedPath(self._directories[-1], name, self._path(name))
        # The root itself, or a link whose target ends in "..".
        return ResolvedPath(self._directories[-1], b".", self._path())

    def _path(self, *more: bytes) -> bytes:
        return b"/".join((self._root.rstrip(b"/"), *self._names, *more)) or b"/"

    def _up(self) -> None:
        if not self._names:
            raise _outside(self._path(b".."))
        os.close(self._directories.pop())
        self._names.pop()

    def _down(self, name: bytes, waiting: list[bytes]) -> None:
        try:
            self._directories.append(os.open(name, _DIRECTORY, dir_fd=self._directories[-1]))
            self._names.append(name)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP) or not self._follow(name, waiting):
                raise

    def _follow(self, name: bytes, waiting: list[bytes]) -> bool:
        """Push the target of a link onto the remaining components; False if the name is no link, or missing."""
        try:
            thing = os.open(name, _ANYTHING, dir_fd=self._directories[-1])
        except FileNotFoundError:
            return False
        try:
            if not stat.S_ISLNK(os.fstat(thing).st_mode):
                return False
            target = os.readlink(b"", dir_fd=thing)
        finally:
            os.close(thing)
        self._links += 1
        if self._links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), self._path(name))
        if target.startswith(b"/"):
            target = self._below_root(target)
            while self._names:
                self._up()
        waiting.extend(reversed([part for part in target.split(b"/") if part not in (b"", b".")]))
        return True

    def _below_root(self, target: bytes) -> bytes:
        for root in (self._root, os.path.realpath(self._root)):
            if target == root or target.startswith(root.rstrip(b"/") + b"/"):
                return target[len(root) :]
        raise _outside(target)


def _outside(path: bytes) -> StorageError:
    return StorageError(
        f"{path.decode('utf-8', 'backslashreplace')} is not below the directory that this site serves",
        errno=errno.EACCES,
        code=FailureCode.PERMISSION_DENIED,
    )


#: Errors of a file system without hard links.
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_libc = ctypes.CDLL(None, use_errno=True)


def rename_without_replacing(source: ResolvedPath, destination: ResolvedPath) -> None:
    """Rename to a free name, atomically if the file system supports it.

    Raises:
        OSError: EEXIST if the name is taken.
    """
    call = getattr(_libc, "renameat2", None)
    if call is not None:
        if call(source.directory, source.name, destination.directory, destination.name, _RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number), destination.path)
    # File systems without RENAME_NOREPLACE (NFS, for example): a hard link never replaces.
    if not stat.S_ISDIR(os.stat(source.name, dir_fd=source.directory, follow_symlinks=False).st_mode):
        try:
            os.link(
                source.name,
                destination.name,
                src_dir_fd=source.directory,
                dst_dir_fd=destination.directory,
                follow_symlinks=False,
            )
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            os.unlink(source.name, dir_fd=source.directory)
            return
    # Directories have no hard links, nor have files of some file systems (FAT, many of FUSE): check right before the
    # rename.
    with contextlib.suppress(FileNotFoundError):
        os.stat(destination.name, dir_fd=destination.directory, follow_symlinks=False)
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), destination.path)
    os.rename(source.name, destination.name, src_dir_fd=source.directory, dst_dir_fd=destination.directory)

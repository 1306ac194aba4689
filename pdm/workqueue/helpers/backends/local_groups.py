"""Group operations of local directories: their steps cost no round trips, those of the server at the other end do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.local import LocalBackend, storage_errors, version_of
from pdm.workqueue.helpers.group_backend import FileContent, GroupBackend
from pdm.workqueue.helpers.storage import FileVersion, StorageError

_T = TypeVar("_T")


class GroupedLocalBackend(LocalBackend, GroupBackend):
    """The directories of the FILE sites, for one worker thread."""

    #: A copy within them stays in the kernel.
    has_round_trips = False

    def renames_groups(self, url: StorageUrl, replace: bool) -> bool:
        return True

    def read_group(self, files: Sequence[tuple[StorageUrl, int]]) -> list[FileContent | None]:
        return [self._result(partial(self._content, url, size)) for url, size in files]

    def _content(self, url: StorageUrl, size: int) -> FileContent:
        with storage_errors(url), self._opened(url) as file:
            version = version_of(os.fstat(file))
            data = b""
            # One byte more than expected, to detect that the file has grown.
            while len(data) <= size and (piece := os.read(file, size + 1 - len(data))):
                data += piece
        return FileContent(data, version)

    def group_versions(self, urls: Sequence[StorageUrl]) -> list[FileVersion | None]:
        return [self._result(partial(self.version, url)) for url in urls]

    def write_group(self, files: Sequence[tuple[StorageUrl, bytes]]) -> list[bool]:
        return [self._is_done(partial(self.write_content, url, content)) for url, content in files]

    def group_sizes(self, urls: Sequence[StorageUrl]) -> list[int | None]:
        return [self._result(partial(self.size, url)) for url in urls]

    def are_free(self, urls: Sequence[StorageUrl]) -> list[bool]:
        return [self._is_done(partial(self._check_free, url)) for url in urls]

    def _check_free(self, url: StorageUrl) -> None:
        if self.stat(url) is not None:
            raise StorageError(f"{url} is there", errno=errno.EEXIST)

    def rename_group(self, files: Sequence[tuple[StorageUrl, StorageUrl, int]], *, replace: bool) -> list[bool]:
        return [self._is_done(partial(self.rename, old, new, replace=replace)) for old, new, _ in files]

    def remove_group(self, urls: Sequence[StorageUrl]) -> list[bool]:
        return [self._is_done(partial(self._remove_file, url)) for url in urls]

    def _remove_file(self, url: StorageUrl) -> None:
        try:
            self.remove(url, directory=False)
        except StorageError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise

    def _result(self, act: Callable[[], _T]) -> _T | None:
        """The result for one file; None after an error of this file."""
        self.check()
        try:
            return act()
        except StorageError:
            return None

    def _is_done(self, act: Callable[[], None]) -> bool:
        """Whether something was done without an error."""
        self.check()
        try:
            act()
        except StorageError:
            return False
        return True

"""Folders of this machine as one end of a copy from or to elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pdm.workqueue.agents.helpers.confined import Roots
from pdm.workqueue.agents.helpers.file_storage import FileStorage
from pdm.workqueue.agents.helpers.side import Pieces, Side
from pdm.workqueue.agents.helpers.storage import Arrived, StorageError

_PIECE = 1024 * 1024


class FileSide(FileStorage, Side):
    """The folders of the FILE sites; a copy within them stays in the kernel."""

    def __init__(self, roots: Roots) -> None:
        FileStorage.__init__(self, roots)

    def read(self, url: str) -> Pieces:
        with self._opened(url) as file:
            while piece := _read(file):
                yield piece

    def write(self, url: str, pieces: Iterator[bytes], size: int) -> None:
        with self._created(url) as file:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[_write(file, rest) :]
            try:
                os.fsync(file)
            except OSError as error:
                raise _told(error) from error

    def transfer(self, source: str, temporary: str, size: int, checksum: bool, arrived: Arrived) -> str | None:
        return FileStorage.transfer(self, source, temporary, size, checksum, arrived)

    def checksum(self, url: str) -> str:
        return FileStorage.checksum(self, url)


def _read(file: int) -> bytes:
    try:
        return os.read(file, _PIECE)
    except OSError as error:
        raise _told(error) from error


def _write(file: int, rest: memoryview) -> int:
    try:
        return os.write(file, rest)
    except OSError as error:
        raise _told(error) from error


def _told(error: OSError) -> StorageError:
    return StorageError(error.strerror or str(error), errno=error.errno)

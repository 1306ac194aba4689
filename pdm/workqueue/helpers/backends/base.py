"""Base classes of storage backends whose bytes can pass through the service, and the streaming copy between two."""

from __future__ import annotations

import abc
import contextlib
import os
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Self

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.storage import ProgressCallback, StoppedError, Storage, StorageError, at_destination

#: Seconds between two words about a running copy.
_PROGRESS_S = 0.5

#: The bytes of a file, piece by piece; to be closed by who stops reading early.
Pieces = Generator[bytes]


class StorageBackend(Storage):
    """A storage that gives and takes bytes: one end of a copy through the service."""

    def __init__(self) -> None:
        self._interrupted = False

    @classmethod
    def from_environment(cls) -> Self:
        """The backend for one thread, with what the environment of the helper says."""
        return cls()

    @classmethod
    def missing_software(cls) -> str | None:
        """What this machine lacks for it, as a message for an operator; None for nothing."""
        return None

    @abc.abstractmethod
    def read(self, url: StorageUrl) -> Pieces:
        """The bytes of a file."""

    @abc.abstractmethod
    def write(self, url: StorageUrl, pieces: Iterator[bytes], size: int) -> None:
        """Make a new file of pieces; what goes wrong with ``pieces`` is raised as it is.

        Args:
            url: of the file, which must not be there.
            pieces: its bytes.
            size: how many they should be.
        """

    def transfer(
        self, source: StorageUrl, temporary: StorageUrl, size: int, checksum: bool, arrived: ProgressCallback
    ) -> str | None:
        return stream_copy(self, source, self, temporary, size, checksum, arrived)

    def checksum(self, url: StorageUrl) -> str:
        digest = 1
        with contextlib.closing(self.read(url)) as pieces:
            for piece in pieces:
                self.check()
                digest = zlib.adler32(piece, digest)
        return f"{digest:08x}"

    def check(self) -> None:
        """Raise if what is under way must end now."""
        lease.check()
        if self._interrupted:
            raise StoppedError
        if time.monotonic() > self.timeouts.until:
            raise StorageError("not finished in time", code=FailureCode.TIMEOUT, scope=FailureScope.TRANSFER)

    def interrupt(self) -> None:
        self._interrupted = True

    def resume(self) -> None:
        self._interrupted = False


class WakeableBackend(StorageBackend):
    """One that waits for descriptors: an interruption is seen there as something to read."""

    def __init__(self) -> None:
        super().__init__()
        #: Readable while what is under way must end.
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def interrupt(self) -> None:
        super().interrupt()
        os.eventfd_write(self._wake, 1)

    def resume(self) -> None:
        super().resume()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)


def stream_copy(
    source_backend: StorageBackend,
    source: StorageUrl,
    backend: StorageBackend,
    temporary: StorageUrl,
    size: int,
    checksum: bool,
    arrived: ProgressCallback,
) -> str | None:
    """Copy through this process; returns the ADLER32 of what was read, if it is asked for."""
    flow = _MeteredStream(backend.check, arrived, checksum)
    try:
        with contextlib.closing(source_backend.read(source)) as pieces:
            at_destination(backend.write, temporary, flow.through(pieces), size)
    except StorageError as error:
        # What `through` has not marked went wrong at the other end.
        raise error.at(FailureScope.DESTINATION) from error.__cause__
    return f"{flow.digest:08x}" if checksum else None


class _MeteredStream:
    """Byte stream that counts, checksums, reports progress and honours cancellation."""

    def __init__(self, check: Callable[[], None], arrived: ProgressCallback, checksum: bool) -> None:
        self.digest = 1
        self._check = check
        self._arrived = arrived
        self._checksum = checksum

    def through(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        moved, told_at = 0, time.monotonic()
        while True:
            try:
                piece = next(pieces)
            except StopIteration:
                return
            except StorageError as error:
                raise error.at(FailureScope.SOURCE) from error.__cause__
            self._check()
            if self._checksum:
                self.digest = zlib.adler32(piece, self.digest)
            yield piece
            moved += len(piece)
            if time.monotonic() - told_at > _PROGRESS_S:
                told_at = time.monotonic()
                self._arrived(moved)

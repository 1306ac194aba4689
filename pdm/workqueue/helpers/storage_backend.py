"""Storage backends: storages whose bytes can be read and written here, one end of a relayed copy."""

from __future__ import annotations

import abc
import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import Self

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.checksums import RunningChecksum, running_checksum
from pdm.workqueue.helpers.storage import ProgressCallback, StoppedError, Storage, StorageError, at_destination

#: Seconds between two progress reports.
_PROGRESS_S = 0.5
#: The bytes of a file in pieces; a caller that stops early must close it.
Pieces = Generator[bytes]


class StorageBackend(Storage):
    """A storage whose bytes can be read and written here: one end of a relayed copy."""

    def __init__(self) -> None:
        self._interrupted = False

    @classmethod
    def from_environment(cls) -> Self:
        """The backend for one thread, configured from the helper's environment."""
        return cls()

    @classmethod
    def missing_software(cls) -> str | None:
        """Software that this machine lacks for it, as a message for an operator; None for nothing."""
        return None

    def computes(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> bool:
        """Whether the server of a URL computes checksums of its files; if not, those of the passing bytes count."""
        return False

    def link_to(self, url: StorageUrl) -> str | None:
        """A link by which another server can read a file without a credential, for as long as this operation may take.

        Whoever has it can read the file: it must not appear in messages. None if the storage makes no links.
        """
        return None

    def fetch(self, link: str, source: StorageUrl, temporary: StorageUrl, arrived: ProgressCallback) -> bool:
        """Have the server of ``temporary`` read a file by its `link_to`; False if nothing has begun.

        Raises:
            StorageError: without the link in its message.
        """
        return False

    @abc.abstractmethod
    def read(self, url: StorageUrl) -> Pieces:
        """The bytes of a file."""

    @abc.abstractmethod
    def write(self, url: StorageUrl, pieces: Iterator[bytes], size: int) -> None:
        """Write a new file; errors of ``pieces`` are raised unchanged.

        ``url``: of the file, which must not exist. ``pieces``: its bytes. ``size``: how many are expected.
        """

    def transfer(
        self,
        source: StorageUrl,
        temporary: StorageUrl,
        size: int,
        checksum: ChecksumAlgorithm | None,
        arrived: ProgressCallback,
    ) -> str | None:
        return stream_copy(self, source, self, temporary, size, checksum, arrived)

    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        digest = running_checksum(algorithm)
        with contextlib.closing(self.read(url)) as pieces:
            for piece in pieces:
                self.check()
                digest.update(piece)
        return digest.hexdigest()

    def check(self) -> None:
        """Raise `StoppedError` or a timeout if the operation must end now."""
        lease.check()
        if self._interrupted:
            raise StoppedError
        if time.monotonic() > self.timeouts.until:
            raise StorageError("not finished in time", code=FailureCode.TIMEOUT, scope=FailureScope.TRANSFER)

    def interrupt(self) -> None:
        self._interrupted = True

    def resume(self) -> None:
        self._interrupted = False


def stream_copy(
    source_backend: StorageBackend,
    source: StorageUrl,
    backend: StorageBackend,
    temporary: StorageUrl,
    size: int,
    checksum: ChecksumAlgorithm | None,
    arrived: ProgressCallback,
) -> str | None:
    """Copy through this process; returns the checksum of the bytes read, if requested."""
    digest = None if checksum is None else running_checksum(checksum)
    flow = _MeteredStream(backend.check, arrived, digest, size)
    try:
        with contextlib.closing(source_backend.read(source)) as pieces:
            at_destination(backend.write, temporary, flow.through(pieces), size)
    except StorageError as error:
        # An error that `through` has not marked is of the destination.
        raise error.at(FailureScope.DESTINATION) from error.__cause__
    return None if digest is None else digest.hexdigest()


class _MeteredStream:
    """Byte stream that counts, checksums, reports progress and honours cancellation."""

    def __init__(
        self, check: Callable[[], None], arrived: ProgressCallback, digest: RunningChecksum | None, size: int
    ) -> None:
        self._digest = digest
        self._size = size
        self._check = check
        self._arrived = arrived

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
            if self._digest is not None:
                self._digest.update(piece)
            moved += len(piece)
            if moved > self._size:
                # Without this a server could fill the destination.
                raise StorageError(
                    f"the source had {self._size} bytes when it was listed and has sent more",
                    code=FailureCode.SIZE_CHANGED,
                    scope=FailureScope.SOURCE,
                )
            yield piece
            if time.monotonic() - told_at > _PROGRESS_S:
                told_at = time.monotonic()
                self._arrived(moved)


class WakeableBackend(StorageBackend):
    """A backend that waits for descriptors: an interruption makes one of them readable."""

    def __init__(self) -> None:
        super().__init__()
        #: Readable after `interrupt`.
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def interrupt(self) -> None:
        super().interrupt()
        os.eventfd_write(self._wake, 1)

    def resume(self) -> None:
        super().resume()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

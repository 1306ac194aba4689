"""GridFTP servers as a storage backend: one end of a copy from or to another protocol."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Self

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.gridftp import gsi
from pdm.workqueue.helpers.gridftp.connections import ChannelPool
from pdm.workqueue.helpers.gridftp.file_commands import computes_checksums
from pdm.workqueue.helpers.gridftp.storage import GridFtpStorage, command_path
from pdm.workqueue.helpers.gridftp.upload import Uploads
from pdm.workqueue.helpers.storage import ProgressCallback, StorageError
from pdm.workqueue.helpers.storage_backend import Pieces, StorageBackend

_LIBRARIES = ("libglobus_common.so.0", gsi.LIBRARY)
_guard = threading.Lock()
_loaded: list[gsi.Gsi] = []


def _library() -> gsi.Gsi:
    """The security library, one for all threads; tried again after a failure, because it may be installed since."""
    with _guard:
        if not _loaded:
            try:
                _loaded.append(gsi.Gsi())
            except (OSError, gsi.GsiError) as error:
                raise StorageError(
                    f"the Globus security library cannot be used ({error}): install the package {gsi.PACKAGE}",
                    code=FailureCode.DEPENDENCY_MISSING,
                    scope=FailureScope.SERVICE,
                ) from error
        return _loaded[0]


class GridFtpBackend(GridFtpStorage, StorageBackend):
    """The channels of one thread, one to each server, with data connections of our own."""

    def __init__(self, connections: ChannelPool) -> None:
        StorageBackend.__init__(self)
        GridFtpStorage.__init__(self, connections)
        self._uploads = Uploads(self._session)

    @classmethod
    def from_environment(cls) -> Self:
        return cls(ChannelPool(_library()))

    @classmethod
    def missing_software(cls) -> str | None:
        for name in _LIBRARIES:
            try:
                ctypes.CDLL(name)
            except OSError as error:
                return f"{error}: install the package {gsi.PACKAGE}"
        return None

    def computes(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> bool:
        return computes_checksums(algorithm, self._session.channel(url, self.timeouts))

    def read(self, url: StorageUrl) -> Pieces:
        return self._downloads.content(url, command_path(url), self.timeouts, self._log)

    def write(self, url: StorageUrl, pieces: Iterator[bytes], size: int) -> None:
        self._uploads.write(url, command_path(url), pieces, self.timeouts)

    def transfer(
        self,
        source: StorageUrl,
        temporary: StorageUrl,
        size: int,
        checksum: ChecksumAlgorithm | None,
        arrived: ProgressCallback,
    ) -> str | None:
        return GridFtpStorage.transfer(self, source, temporary, size, checksum, arrived)

    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        return GridFtpStorage.checksum(self, url, algorithm)

    def interrupt(self) -> None:
        StorageBackend.interrupt(self)
        GridFtpStorage.interrupt(self)

    def resume(self) -> None:
        StorageBackend.resume(self)
        GridFtpStorage.resume(self)

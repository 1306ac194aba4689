"""Both ends of a transfer by an FTS3, as our own clients see them: for the checks before it and the proof after it."""

from __future__ import annotations

from typing import cast

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.gridftp.gsi import LIBRARY, PACKAGE
from pdm.workqueue.helpers.main_relay import RelayStorage
from pdm.workqueue.helpers.storage import StorageBackend, StorageError
from pdm.workqueue.helpers.tools.native_clients import NativeClients


class EndsStorage(RelayStorage):
    """The storage of one thread: GridFTP besides the protocols of the relay; nothing is transferred by it."""

    def __init__(self, natives: NativeClients) -> None:
        super().__init__()
        self._natives = natives

    def _backend(self, url: StorageUrl) -> StorageBackend:
        if url.scheme not in JobProtocol.GRIDFTP.info.schemes:
            return super()._backend(url)
        if url.scheme not in self._backends:
            client = self._natives.made_for(url.scheme)
            if client is None:
                raise StorageError(
                    f"the Globus security library {LIBRARY} cannot be used: install the package {PACKAGE}",
                    code=FailureCode.DEPENDENCY_MISSING,
                    scope=FailureScope.SERVICE,
                )
            # It is no backend of the relay, but has all that is called here.
            self._backends[url.scheme] = cast(StorageBackend, client)
            if self._stopped:
                client.interrupt()
        backend = self._backends[url.scheme]
        backend.timeouts = self.timeouts
        return backend

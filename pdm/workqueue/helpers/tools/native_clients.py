"""Our own clients of storage protocols, which the tools helper uses to verify results of the tools.

They are used first. A server that one of them cannot talk to is left to the tools for some time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.webdav import WebdavBackend
from pdm.workqueue.helpers.backends.xrootd import XrootdBackend
from pdm.workqueue.helpers.gridftp.connections import ChannelPool
from pdm.workqueue.helpers.gridftp.gsi import Gsi, GsiError
from pdm.workqueue.helpers.gridftp.storage import GridFtpStorage
from pdm.workqueue.helpers.storage import Storage, StorageError

#: Seconds for which a server that our own client cannot talk to is left to the tools.
_REMEMBERED_S = 300.0
#: Codes of our own client about a file, a server or this service: a tool would report the same.
_ANSWERS = frozenset(
    {
        FailureCode.NOT_FOUND,
        FailureCode.EXISTS,
        FailureCode.PERMISSION_DENIED,
        FailureCode.IS_A_DIRECTORY,
        FailureCode.NOT_A_DIRECTORY,
        FailureCode.INVALID_NAME,
        FailureCode.NO_CHECKSUM,
        FailureCode.STALLED,
        FailureCode.TIMEOUT,
        FailureCode.CREDENTIAL_MISSING,
        FailureCode.CREDENTIAL_EXPIRED,
        FailureCode.BUSY,
        FailureCode.LOCKED,
    }
)


class NativeClients:
    """Our own clients, shared by all threads: the schemes they support, and the servers they cannot talk to."""

    def __init__(self) -> None:
        self._gsi: Gsi | None = None
        self._refused: dict[str, float] = {}

    def made_for(self, scheme: str) -> Storage | None:
        """A new client for a scheme; None if there is none."""
        if scheme == "gsiftp":
            try:
                self._gsi = self._gsi or Gsi()
            except (OSError, GsiError):
                # Its library is not installed: gfal verifies.
                return None
            return GridFtpStorage(ChannelPool(self._gsi))
        maker = _BACKENDS.get(scheme)
        return maker() if maker is not None else None

    def may_talk_to(self, url: StorageUrl) -> bool:
        return self._refused.get(url.address, 0.0) <= time.monotonic()

    def give_up(self, url: StorageUrl) -> None:
        """Leave a server to the tools for some time."""
        self._refused[url.address] = time.monotonic() + _REMEMBERED_S


#: Scheme → constructor of our own client for it, besides GridFTP's.
_BACKENDS: Mapping[str, Callable[[], Storage]] = {
    "https": WebdavBackend,
    "davs": WebdavBackend,
    "root": XrootdBackend,
    "roots": XrootdBackend,
}


def is_answer(error: StorageError) -> bool:
    """Whether the error of our own client is conclusive: a tool would not find out more."""
    return error.errno is not None or error.unreachable or error.scope is FailureScope.SERVICE or error.code in _ANSWERS

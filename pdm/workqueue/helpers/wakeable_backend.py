"""Storage backends that wait for file descriptors, and can be interrupted meanwhile."""

from __future__ import annotations

import contextlib
import os

from pdm.workqueue.helpers.storage import StorageBackend


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

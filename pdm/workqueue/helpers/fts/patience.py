"""Requests to an FTS3 that are repeated while it does not answer, and the delegation that they need."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.fts.rest import FtsClient, Identity
from pdm.workqueue.helpers.storage import StoppedError, StorageError

_T = TypeVar("_T")
#: Seconds between two checks of the delegation.
_DELEGATION_S = 600.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 10.0


class PatientClient:
    """An FTS3, as a batch asks it.

    Args:
        client: of the FTS3.
        batch: which asks; messages go to the log of its first open item.
        stall_s: seconds for which an FTS3 may be silent.
    """

    def __init__(self, client: FtsClient, batch: ActiveBatch, stall_s: float) -> None:
        self._client = client
        self._batch = batch
        self._stall_s = stall_s
        self._woken = threading.Event()
        self._logged_in_at = 0.0
        self.identity = Identity("", [])

    def wake(self) -> None:
        """End a `sleep`."""
        self._woken.set()

    def sleep(self, seconds: float) -> None:
        """Wait; raises `StoppedError` if the batch was cancelled."""
        self._woken.wait(seconds)
        if self._batch.stopped:
            raise StoppedError
        self._woken.clear()

    def ask(self, request: Callable[[], _T]) -> _T:
        """Ask again while the FTS3 does not answer, for as long as a server may be silent."""
        until, pause_s = time.monotonic() + self._stall_s, _FIRST_PAUSE_S
        while True:
            try:
                return request()
            except StorageError as error:
                if not error.unreachable or time.monotonic() + pause_s > until:
                    raise
                self._log(f"{error.message}: asking again")
            self.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def log_in(self) -> None:
        """Ask for the user's identity, and delegate the proxy if none is there that lives long."""
        self.ask(self._log_in)

    def keep_logged_in(self) -> None:
        """`log_in` if the last time is long ago."""
        if time.monotonic() - self._logged_in_at > _DELEGATION_S:
            self.log_in()

    def _log_in(self) -> None:
        self.identity = self._client.whoami()
        if self._client.delegate(self.identity):
            self._log(f"the proxy is delegated to {self._client.url}")
        self._logged_in_at = time.monotonic()

    def _log(self, text: str) -> None:
        for key in self._batch.open_keys()[:1]:
            self._batch.log(key, text)

"""Repeats requests that the service refuses for now, after the time that it names (``Retry-After``)."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from pdm.workqueue.client.errors import TemporaryRefusalError

#: A Retry-After is honoured up to the first, and all waits for one request up to the second.
_MAX_RETRY_PAUSE_S, _MAX_WAIT_S = 10.0, 60.0
#: If the service says "at once": doubles each time, up to the second number.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
#: Shorter waits are not worth a sentence.
_MENTIONED_WAIT_S = 1.0


class RefusalWaits:
    """The waits for one request; `on_wait` is called with a sentence before each."""

    def __init__(self, reactor: IReactorTime, on_wait: Callable[[str], object]) -> None:
        self._reactor = reactor
        self._on_wait = on_wait
        self._left_s = _MAX_WAIT_S
        self._least_s = _FIRST_PAUSE_S

    async def over(self, send: Callable[[], Awaitable[bytes]]) -> bytes:
        """The result of an idempotent request, which may be sent several times.

        Raises:
            TemporaryRefusalError: the service still refuses it, or does not say when to retry.
        """
        while True:
            try:
                return await send()
            except TemporaryRefusalError as error:
                asked_s = error.retry_after_s
                if asked_s is None or asked_s > _MAX_RETRY_PAUSE_S or asked_s >= self._left_s:
                    raise
                # Not all clients at the same time.
                pause_s = max(asked_s, self._least_s) * random.uniform(1.0, 1.2)  # noqa: S311
                self._left_s -= pause_s
                self._least_s = min(2 * self._least_s, _LONGEST_PAUSE_S)
                if pause_s >= _MENTIONED_WAIT_S:
                    why = error.title or error.what
                    self._on_wait(f"{why}: the request is sent again in {pause_s:.0f} s")
            await deferLater(self._reactor, pause_s)

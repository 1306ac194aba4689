"""Carries on what control channels have under way, until all of it is answered, one fails, or we are stopped."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from pdm.workqueue.agents.helpers.control_channel import ChannelError
from pdm.workqueue.agents.helpers.storage import StoppedError

#: How often channels that are silent are looked at.
_TICK_S = 1.0


class Channel(Protocol):
    """What a pipeline carries on: a control channel, or the data that belongs to one.

    Attributes:
        place: ``host:port`` of the server.
        heard_at: when it last said anything (`time.monotonic`).
    """

    place: str
    heard_at: float

    @property
    def waiting(self) -> int:
        """How much is still to come; 0 if nothing is."""

    @property
    def unsent(self) -> object:
        """True if `flush` has something to send."""

    def fileno(self) -> int: ...

    def flush(self) -> None:
        """Send what can be sent now; raises `ChannelError`."""

    def read(self) -> None:
        """Take what has arrived; raises `ChannelError`."""

    def dispose(self) -> None:
        """End it."""


class SilenceError(Exception):
    """A server has not answered in time."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(f"{channel.place} has not answered in time")
        self.channel = channel


class BrokenError(Exception):
    """A channel is of no use any more."""

    def __init__(self, channel: Channel, why: str) -> None:
        super().__init__(why)
        self.channel = channel


class Waker:
    """Wakes a pipeline from another thread."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, b".")

    def fileno(self) -> int:
        return self._reader

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._reader, 4096):
                pass


def carry_on(
    channels: Sequence[Channel],
    waker: Waker,
    stopped: Callable[[], bool],
    refill: Callable[[], None],
    patience_s: Callable[[], float],
) -> None:
    """Do all of `steps`."""
    for _ in steps(channels, waker, stopped, refill, patience_s):
        pass


def steps(
    channels: Sequence[Channel],
    waker: Waker,
    stopped: Callable[[], bool],
    refill: Callable[[], None],
    patience_s: Callable[[], float],
) -> Iterator[None]:
    """Exchange commands and replies until no channel waits for any.

    Args:
        channels: which ones.
        waker: is looked at, too, so that a stop is seen at once.
        stopped: whether to stop.
        refill: called before each look at the channels: sends more commands where there is room.
        patience_s: seconds a server may be silent while it owes a reply.

    Yields:
        After each look at the channels, so that what has arrived can be passed on.

    Raises:
        StoppedError: we were told to stop.
        SilenceError: a server owes a reply for too long.
        BrokenError: a channel has failed.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(waker, selectors.EVENT_READ)
        for channel in channels:
            selector.register(channel.fileno(), selectors.EVENT_READ, channel)
            channel.heard_at = time.monotonic()
        while True:
            if stopped():
                raise StoppedError
            refill()
            busy = False
            for channel in channels:
                busy = busy or channel.waiting > 0
                _attempt(channel, channel.flush)
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.unsent else 0)
                selector.modify(channel.fileno(), wanted, channel)
            if not busy:
                return
            for key, events in selector.select(_TICK_S):
                if key.data is None:
                    waker.clear()
                elif events & selectors.EVENT_READ:
                    _attempt(key.data, key.data.read)
            now = time.monotonic()
            for channel in channels:
                silent_s = now - channel.heard_at if channel.waiting else 0.0
                if silent_s > _TICK_S and silent_s > patience_s():
                    raise SilenceError(channel)
            yield


def _attempt(channel: Channel, action: Callable[[], None]) -> None:
    try:
        action()
    except ChannelError as error:
        raise BrokenError(channel, str(error)) from error

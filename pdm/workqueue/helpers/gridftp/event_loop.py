"""Event loop that drives pipelined commands and data connections until all commands are answered, or one fails."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from pdm.workqueue.helpers.gridftp.reply_reader import ChannelError
from pdm.workqueue.helpers.storage import StoppedError

#: Interval in seconds at which silent channels are checked.
_TICK_S = 1.0


class Channel(Protocol):
    """What a pipeline waits for: a control channel, or a data connection of one.

    Attributes:
        address: ``host:port`` of the server.
        heard_at: when data last arrived (`time.monotonic`).
    """

    address: str
    heard_at: float

    @property
    def waiting(self) -> int:
        """Number of replies still to arrive; 0 if none."""

    @property
    def unsent(self) -> object:
        """Whether `flush` has something to send."""

    @property
    def reads(self) -> bool:
        """Whether `read` may be called; False while received data must wait."""

    @property
    def holds(self) -> bool:
        """Whether `read` has something to do although nothing arrives: bytes that had to wait."""

    def fileno(self) -> int: ...

    def flush(self) -> None:
        """Send what can be sent without blocking; raises `ChannelError`."""

    def read(self) -> None:
        """Read what has arrived; raises `ChannelError`."""

    def dispose(self) -> None:
        """Close it."""


class SilenceError(Exception):
    """A server did not answer in time."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(f"{channel.address} has not answered in time")
        self.channel = channel


class BrokenError(Exception):
    """A channel cannot be used any more."""

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


def run_until_answered(
    channels: Sequence[Channel],
    waker: Waker,
    stopped: Callable[[], bool],
    refill: Callable[[], None],
    timeout_s: Callable[[], float],
) -> None:
    """Run all of `steps`."""
    for _ in steps(channels, waker, stopped, refill, timeout_s):
        pass


def steps(
    channels: Sequence[Channel],
    waker: Waker,
    stopped: Callable[[], bool],
    refill: Callable[[], None],
    timeout_s: Callable[[], float],
    has_more: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Exchange commands and replies until all are answered.

    Args:
        channels: the channels; data connections may be added meanwhile.
        waker: wakes the loop after a stop.
        stopped: whether to stop.
        refill: called before each poll: sends more commands if few are pending.
        timeout_s: seconds that a server may be silent while a reply is pending.
        has_more: whether ``refill`` can send more at once; called before each poll, which then does not wait.

    Yields:
        After each poll, so that the caller can pass on what has arrived.

    Raises:
        StoppedError: ``stopped`` returned True.
        SilenceError: a reply did not arrive in time.
        BrokenError: a channel has failed.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(waker, selectors.EVENT_READ)
        watched: dict[Channel, int] = {}
        for channel in channels:
            channel.heard_at = time.monotonic()
        while True:
            if stopped():
                raise StoppedError
            refill()
            busy = False
            for channel in channels:
                busy = busy or channel.waiting > 0
                _attempt(channel, channel.flush)
                wanted = selectors.EVENT_READ if channel.reads else 0
                if channel.unsent:
                    wanted |= selectors.EVENT_WRITE
                _watch(selector, watched, channel, wanted)
            if not busy:
                return
            holding = [channel for channel in channels if channel.holds]
            for key, events in selector.select(0.0 if holding or has_more() else _TICK_S):
                if key.data is None:
                    waker.clear()
                elif events & selectors.EVENT_READ and key.data not in holding:
                    _attempt(key.data, key.data.read)
            for channel in holding:
                _attempt(channel, channel.read)
            now = time.monotonic()
            for channel in channels:
                silent_s = now - channel.heard_at if channel.waiting else 0.0
                if silent_s > _TICK_S and silent_s > timeout_s():
                    raise SilenceError(channel)
            yield
            # The time that the caller has taken is not the servers' silence.
            taken_s = time.monotonic() - now
            for channel in channels:
                channel.heard_at += taken_s


def _attempt(channel: Channel, action: Callable[[], None]) -> None:
    try:
        action()
    except ChannelError as error:
        raise BrokenError(channel, str(error)) from error


def _watch(selector: selectors.BaseSelector, watched: dict[Channel, int], channel: Channel, wanted: int) -> None:
    """Wait for the wanted events of a channel; most rounds change nothing, and cost no system call."""
    events = watched.get(channel, 0)
    if events == wanted:
        return
    watched[channel] = wanted
    if not events:
        selector.register(channel.fileno(), wanted, channel)
    elif wanted:
        selector.modify(channel.fileno(), wanted, channel)
    else:
        selector.unregister(channel.fileno())

"""Pool of control connections, and the event loop that drives pipelined commands on them.

The pool keeps connections from batch to batch: one for each server, pairs for transfers between two servers. The loop
runs until all commands are answered, one fails, or the batch is cancelled.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import unquote_to_bytes

from pdm.workqueue.helpers.gridftp.control import LOGIN_S, ChannelError, ControlChannel, Reply, SilentServerError
from pdm.workqueue.helpers.gridftp.gsi import Gsi
from pdm.workqueue.helpers.storage import StoppedError

#: Seconds for which a server that does not fit is not tried again.
_UNFIT_S = 30.0
#: What listings and looks shall tell.
_FACTS = b"OPTS MLST Type;Size;Modify;UNIX.mode;UNIX.slink;X.count;"
_PASSIVE = re.compile(r"227 [^\n]{0,200}?((?:\d{1,3},){5}\d{1,3})")


class ChannelPool:
    """Opens, keeps and drops channels. Used by one thread; `interrupt` by any.

    Args:
        gsi: the library and the credential.

    Attributes:
        login_s: seconds that each step of a login may take.
    """

    def __init__(self, gsi: Gsi) -> None:
        self._gsi = gsi
        self.login_s = LOGIN_S
        self._single: dict[str, ControlChannel] = {}
        self._pairs: dict[tuple[str, str], tuple[ControlChannel, ControlChannel]] = {}
        self._unfit: dict[str, float] = {}
        self._guard = threading.Lock()
        self._opening: set[ControlChannel] = set()

    def single(self, address: str) -> ControlChannel:
        """A channel to a server, for all but transfers.

        Raises:
            ChannelError: there is none to be had.
        """
        # One that serves transfers does as well: batches come one after the other.
        for (source, destination), (at_source, at_destination) in self._pairs.items():
            for known, channel in ((source, at_source), (destination, at_destination)):
                if known == address and not channel.is_dead:
                    return channel
        kept = self._single.get(address)
        if kept is not None:
            if not kept.is_dead:
                return kept
            self.drop(kept)
        (opened,) = self._opened(address)
        self._single[address] = opened
        return opened

    def pair(self, source: str, destination: str) -> tuple[ControlChannel, ControlChannel]:
        """Channels to two servers that are ready to send files from the one to the other.

        Their data connection is kept: each RETR goes with the STOR that was sent at the same time.

        Raises:
            ChannelError: there are none to be had.
        """
        pair = self._pairs.get((source, destination))
        if pair is not None:
            if not any(channel.is_dead for channel in pair):
                return pair
            self.drop(*pair)
        at_source, at_destination = self._opened(source, destination)
        try:
            for channel in (at_source, at_destination):
                _accepted(channel, b"TYPE I")
                _accepted(channel, b"MODE E")
            _accepted(at_source, b"OPTS RETR Parallelism=1,1,1;")
            found = _PASSIVE.search(_accepted(at_destination, b"PASV").text)
            if found is None:
                raise ChannelError(f"{destination} gives no address for data")
            _accepted(at_source, b"PORT " + found.group(1).encode())
        except ChannelError:
            self._unfit[source] = self._unfit[destination] = time.monotonic() + _UNFIT_S
            at_source.dispose()
            at_destination.dispose()
            raise
        self._pairs[source, destination] = (at_source, at_destination)
        return at_source, at_destination

    def drop(self, *channels: ControlChannel) -> None:
        """End channels, and with each the other one of its pair."""
        for key, pair in list(self._pairs.items()):
            if any(channel in pair for channel in channels):
                del self._pairs[key]
                channels = (*channels, *pair)
        for address, channel in list(self._single.items()):
            if channel in channels:
                del self._single[address]
        for channel in set(channels):
            channel.dispose()

    def drop_all(self) -> None:
        """End all channels: what is under way on them is not known."""
        self.drop(*self._single.values(), *(channel for pair in self._pairs.values() for channel in pair))

    def interrupt(self) -> None:
        """End the logins that are under way."""
        with self._guard:
            for channel in self._opening:
                channel.close()

    def _opened(self, *addresses: str) -> list[ControlChannel]:
        """New channels, logged in side by side: a login is a tenth of a second of work for its server."""
        for address in addresses:
            if self._unfit.get(address, 0.0) > time.monotonic():
                raise ChannelError(f"{address} could not be used just now")
        channels = [ControlChannel(self._gsi, address, self.login_s) for address in addresses]
        errors: list[ChannelError] = []

        def open_one(channel: ControlChannel) -> None:
            try:
                channel.open()
                if "MLST" in channel.features:
                    _accepted(channel, _FACTS)
            except SilentServerError as error:
                # That is all that can be known of it: the careful way would find out no more.
                errors.insert(0, error)
            except ChannelError as error:
                self._unfit[channel.address] = time.monotonic() + _UNFIT_S
                errors.append(error)

        with self._guard:
            self._opening.update(channels)
        threads = [threading.Thread(target=open_one, args=(channel,), name="login") for channel in channels[1:]]
        for thread in threads:
            thread.start()
        open_one(channels[0])
        for thread in threads:
            thread.join()
        with self._guard:
            self._opening.clear()
        if errors:
            for channel in channels:
                channel.dispose()
            raise errors[0]
        return channels


def _accepted(channel: ControlChannel, command: bytes) -> Reply:
    reply = channel.ask(command)
    if not reply.good:
        raise ChannelError(f"{channel.address}: {command.decode('ascii')}: {reply.text}")
    return reply


def host_port(url: str) -> str:
    """``host:port`` of a storage URL."""
    return url.split("/", 3)[2].rpartition("@")[2]


def server_path(url: str) -> bytes:
    """The path of a storage URL as its server takes it; ``/~`` stands for the account's home."""
    path = unquote_to_bytes("/" + url.split("/", 3)[3])
    return path[1:] if path.startswith(b"/~") else path


def fits_on_command_line(path: bytes) -> bool:
    """Whether a path can stand in a command, which is one line."""
    return not any(byte in path for byte in (b"\n", b"\r", b"\0"))


def parent_path(path: bytes) -> bytes:
    """The folder that holds the thing at a path; of the root, that is the root."""
    head, _, _ = path.rstrip(b"/").rpartition(b"/")
    if head:
        return head
    return b"/" if path.startswith(b"/") else b"~"


#: How often channels that are silent are looked at.
_TICK_S = 1.0


class SilenceError(Exception):
    """A server has not answered in time."""

    def __init__(self, channel: ControlChannel) -> None:
        super().__init__(f"{channel.address} has not answered in time")
        self.channel = channel


class BrokenError(Exception):
    """A channel is of no use any more."""

    def __init__(self, channel: ControlChannel, why: str) -> None:
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
    channels: Sequence[ControlChannel],
    waker: Waker,
    stopped: Callable[[], bool],
    refill: Callable[[], None],
    timeout_s: Callable[[], float],
) -> None:
    """Exchange commands and replies until no channel waits for any.

    Args:
        channels: which ones.
        waker: is looked at, too, so that a stop is seen at once.
        stopped: whether to stop.
        refill: called before each look at the channels: sends more commands where there is room.
        timeout_s: seconds a server may be silent while it owes a reply.

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
                if silent_s > _TICK_S and silent_s > timeout_s():
                    raise SilenceError(channel)


def _attempt(channel: ControlChannel, action: Callable[[], None]) -> None:
    try:
        action()
    except ChannelError as error:
        raise BrokenError(channel, str(error)) from error

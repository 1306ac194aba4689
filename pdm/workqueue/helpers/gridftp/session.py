"""One command at a time at GridFTP servers, with timeouts; another thread can interrupt it.

Channels are kept from command to command. A server may close an idle one, so a command that finds its channel closed is
sent once more on a new one, if the channel was idle before.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeVar

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.gridftp import protection
from pdm.workqueue.helpers.gridftp.connections import ChannelPool, host_port
from pdm.workqueue.helpers.gridftp.control import LOGIN_S, ControlChannel
from pdm.workqueue.helpers.gridftp.data import DataConnection, StreamSink
from pdm.workqueue.helpers.gridftp.event_loop import BrokenError, Channel, SilenceError, Waker, steps
from pdm.workqueue.helpers.gridftp.protection import requires_encryption
from pdm.workqueue.helpers.gridftp.replies import ListingEntry, Reply, WrappedEntries, read_listing, refusal
from pdm.workqueue.helpers.gridftp.reply_reader import ChannelError
from pdm.workqueue.helpers.storage import StoppedError, StorageError, Timeouts

#: Idle seconds after which the server may have closed a channel.
_IDLE_S = 1.0
_LEAST_LOGIN_S = 0.001
_Channels = TypeVar("_Channels")
_Result = TypeVar("_Result")


class ControlSession:
    """Used by one thread; `interrupt` may be called from any thread.

    Args:
        connections: the channels of this thread.

    Attributes:
        connections: as given.
        interrupted: whether commands fail with `StoppedError`.
    """

    def __init__(self, connections: ChannelPool) -> None:
        self.connections = connections
        self.interrupted = False
        self._waker = Waker()

    def interrupt(self) -> None:
        """Fail the running command, and all that begin before `resume`, with `StoppedError`; does not block."""
        self.interrupted = True
        self.connections.interrupt()
        self._waker.wake()

    def resume(self) -> None:
        """Allow commands after `interrupt`."""
        self.interrupted = False

    # -- channels

    def channel(self, url: str, timeouts: Timeouts, *, beside: bool = False) -> ControlChannel:
        """A channel to the server of a URL; ``beside``: not one for transfers, because a transfer is running.

        Raises:
            StorageError: it cannot be opened.
            StoppedError: it was interrupted.
        """
        plain = url.startswith("ftp:")
        opens = self.connections.beside if beside else self.connections.single
        return self._opened(lambda: opens(host_port(url), again=True, plain=plain), timeouts)

    def live_channel(self, url: str, timeouts: Timeouts) -> ControlChannel:
        """Like `channel`; one that was idle is tried first, for several commands that cannot be sent again."""
        channel = self.channel(url, timeouts)
        if time.monotonic() - channel.heard_at > _IDLE_S:
            self.ask(url, b"NOOP", timeouts=timeouts)
            channel = self.channel(url, timeouts)
        return channel

    def pair(self, source: str, destination: str, timeouts: Timeouts) -> tuple[ControlChannel, ControlChannel]:
        """Channels for a large transfer between the servers of two URLs; raises `StorageError` with its scope."""
        at_source, at_destination = host_port(source), host_port(destination)

        def scope_of(error: ChannelError) -> FailureScope:
            return FailureScope.SOURCE if error.address == at_source else FailureScope.DESTINATION

        return self._opened(
            lambda: self.connections.pair(at_source, at_destination, large=True, again=True), timeouts, scope_of
        )

    def _opened(
        self,
        opens: Callable[[], _Channels],
        timeouts: Timeouts,
        scope_of: Callable[[ChannelError], FailureScope | None] = lambda error: None,
    ) -> _Channels:
        if self.interrupted:
            raise StoppedError
        left_s = timeouts.until - time.monotonic()
        self.connections.login_s = max(min(LOGIN_S, timeouts.stall_s, left_s), _LEAST_LOGIN_S)
        try:
            return opens()
        except ChannelError as error:
            if self.interrupted:
                raise StoppedError from None
            storage_error = error.storage_error(scope_of(error))
            if time.monotonic() >= timeouts.until:
                storage_error.code = FailureCode.TIMEOUT
            raise storage_error from error

    # -- commands

    def ask(self, url: str, *commands: bytes, timeouts: Timeouts, beside: bool = False) -> Reply:
        """Send commands to the server of a URL.

        Args:
            url: of the server.
            commands: without line ends.
            timeouts: for each reply, and for all of them.
            beside: whether a transfer is running.

        Returns:
            The first error reply, or the last reply.

        Raises:
            StorageError: a reply did not arrive.
            StoppedError: it was interrupted.
        """
        replies: list[Reply] = []

        def sent(channel: ControlChannel) -> Iterator[None]:
            for command in commands:
                channel.send(command, replies.append, many_lines=True)
            yield from self.steps((channel,), timeouts)
            if replies[-1].closes:
                self.connections.drop(channel)
                raise refusal(replies.pop())

        for _ in self.twice_if_closed(sent, lambda: self.channel(url, timeouts, beside=beside)):
            pass
        return next((reply for reply in replies if not reply.good), replies[-1])

    def twice_if_closed(
        self, use: Callable[[ControlChannel], Iterator[_Result]], opened: Callable[[], ControlChannel]
    ) -> Iterator[_Result]:
        """Use a channel; once more a new one, if it was idle and is found closed before it has given a result."""
        channel = opened()
        may_be_closed = time.monotonic() - channel.heard_at > _IDLE_S
        begun = False
        try:
            for result in use(channel):
                begun = begun or result is not None
                yield result
        except StorageError as error:
            if not error.lost or error.code is not None:
                raise
            if begun or not may_be_closed:
                error.code = FailureCode.CONNECTION
                raise
        else:
            return
        yield from use(opened())

    def steps(
        self,
        channels: Sequence[Channel],
        timeouts: Timeouts,
        check: Callable[[], None] = lambda: None,
        has_more: Callable[[], bool] = lambda: False,
        *,
        keep: bool = False,
    ) -> Iterator[None]:
        """Exchange commands and replies until all are answered.

        Args:
            channels: the channels.
            timeouts: for each reply, and for all of them.
            check: called at least once a second; may raise.
            has_more: whether ``check`` can send more at once.
            keep: whether to keep the channels after an error; then the caller drops them.

        Raises:
            StorageError: a reply did not arrive.
            StoppedError: it was interrupted.
        """

        def check_time() -> None:
            check()
            if time.monotonic() > timeouts.until:
                raise StorageError("not finished in time", code=FailureCode.TIMEOUT, lost=True)

        complete = False
        try:
            yield from steps(
                channels, self._waker, lambda: self.interrupted, check_time, lambda: timeouts.stall_s, has_more
            )
            complete = True
        except SilenceError as error:
            why = f"no answer of {error.channel.address} for {timeouts.stall_s:.0f} s"
            raise StorageError(why, code=FailureCode.STALLED, lost=True) from error
        except (BrokenError, ChannelError) as error:
            if self.interrupted:
                raise StoppedError from None
            raise StorageError(str(error), lost=True) from error
        finally:
            if not complete and not keep:
                self.connections.drop(*channels)

    def run(
        self,
        channels: Sequence[ControlChannel],
        timeouts: Timeouts,
        check: Callable[[], None] = lambda: None,
        *,
        keep: bool = False,
    ) -> None:
        """Run all of `steps`."""
        for _ in self.steps(channels, timeouts, check, keep=keep):
            pass

    # -- listings

    def listing(self, url: str, path: bytes, timeouts: Timeouts) -> Generator[ListingEntry, None, None]:
        """The entries of a directory, as they arrive; a caller that stops early must close it.

        Args:
            url: of the directory.
            path: of it, as its server expects it.
            timeouts: for each part, and for all of it.

        Raises:
            StorageError: the directory cannot be listed, or the listing is invalid.
            StoppedError: it was interrupted.
        """

        def listed(channel: ControlChannel) -> Iterator[ListingEntry | None]:
            if "MLSC" in channel.features:
                return self._wrapped_listing(channel, path, timeouts)
            # Channels for transfers have data connections between servers.
            return self._data_listing(self.channel(url, timeouts, beside=True), path, timeouts)

        for line in self.twice_if_closed(listed, lambda: self.channel(url, timeouts)):
            if line is not None:
                yield line

    def _wrapped_listing(
        self, channel: ControlChannel, path: bytes, timeouts: Timeouts
    ) -> Iterator[ListingEntry | None]:
        found: collections.deque[ListingEntry] = collections.deque()
        entries = WrappedEntries(found.append)
        replies: list[Reply] = []
        channel.send(b"MLSC " + path, replies.append, entries.take, many_lines=True)
        for _ in self.steps((channel,), timeouts, lambda: _raise(entries.storage_error)):
            while found:
                yield found.popleft()
        if not replies[0].good:
            raise refusal(replies[0])
        entries.end()
        _raise(entries.storage_error)
        yield from found

    def _data_listing(self, channel: ControlChannel, path: bytes, timeouts: Timeouts) -> Iterator[ListingEntry | None]:
        with contextlib.closing(self.received(channel, b"MLSD " + path, timeouts)) as pieces:
            yield from read_listing(pieces)

    # -- data connections in stream mode

    def passive(self, channel: ControlChannel, mode: bytes, timeouts: Timeouts) -> Reply:
        """Prepare a server to listen for data connections of ours; those before are closed.

        Args:
            channel: to the server.
            mode: transmission mode, ``S`` or ``E``.
            timeouts: for each reply.

        Returns:
            The reply with the address.
        """
        set_mode = () if channel.data_port.mode == mode else (b"MODE " + mode,)
        # In ASCII mode every LF of a name would become CR LF.
        replies = self.prepared(channel, (b"TYPE I", *set_mode, channel.data_port.passive_command), timeouts)
        refused = next((reply for reply in replies if not reply.good), None)
        if refused is not None:
            raise refusal(refused)
        channel.data_port.mode = mode
        channel.data_port.keep(None)
        return replies[-1]

    def prepared(self, channel: ControlChannel, commands: Sequence[bytes], timeouts: Timeouts) -> list[Reply]:
        """The replies to commands that prepare a data connection; once more if the server wants it encrypted."""

        def sent(*commands: bytes) -> list[Reply]:
            replies: list[Reply] = []
            for command in commands:
                channel.send(command, replies.append)
            self.run((channel,), timeouts)
            return replies

        replies = sent(*commands)
        if channel.data_port.encrypts or not any(map(requires_encryption, replies)):
            return replies
        if not all(reply.good for reply in sent(*protection.COMMANDS)):
            return replies
        channel.data_port.encrypts = True
        return sent(*commands)

    def received(self, channel: ControlChannel, command: bytes, timeouts: Timeouts) -> Generator[bytes, None, None]:
        """What the server sends over a data connection in stream mode, in reply to a command."""
        passive = self.passive(channel, b"S", timeouts)
        replies: list[Reply] = []
        sink = StreamSink()
        try:
            data = DataConnection.dial(channel, passive, sink)
        except ChannelError as error:
            self.connections.drop(channel)
            raise error.storage_error() from error

        def check() -> None:
            # The server is alive while data arrives on either connection.
            channel.heard_at = data.heard_at = max(channel.heard_at, data.heard_at)
            if replies and not replies[0].good:
                data.end()

        channel.send(command, replies.append, many_lines=True)
        try:
            for _ in self.steps((channel, data), timeouts, check):
                while sink.pieces:
                    yield sink.pieces.popleft()
            yield from sink.pieces
            if not replies[0].good:
                raise refusal(replies[0])
            if data.error is not None:
                raise data.error.storage_error()
        finally:
            data.dispose()


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error

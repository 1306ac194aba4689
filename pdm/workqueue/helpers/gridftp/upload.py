"""Bytes of files to GridFTP servers, over data connections of our own, which we make: this passes firewalls.

Block mode (MODE E) has several connections to a distant server, and keeps one for many small files. A server that does
not have it is written to in stream mode, one connection for each file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.gridftp.block_mode import data_header, end_header
from pdm.workqueue.helpers.gridftp.connections import streams_to
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.data import DataConnection, NoSink, PendingError
from pdm.workqueue.helpers.gridftp.event_loop import Channel
from pdm.workqueue.helpers.gridftp.replies import Reply, refusal
from pdm.workqueue.helpers.gridftp.reply_reader import ChannelError
from pdm.workqueue.helpers.gridftp.session import ControlSession
from pdm.workqueue.helpers.storage import StorageError, Timeouts

#: Largest block: a server that reads one cannot take bytes of another connection in the meantime.
_LARGEST_BLOCK = 1024 * 1024


class _Sender:
    """The data connections by which we send; kept with the control channel in block mode.

    Args:
        channel: control channel.
        passive: reply of the server with its address.
        mode: transmission mode.
        streams: number of connections.

    Raises:
        ChannelError: no connection can be made.
    """

    def __init__(self, channel: ControlChannel, passive: Reply, mode: bytes, streams: int) -> None:
        self.mode = mode
        self.connections: list[DataConnection] = []
        self._offset = 0
        try:
            for _ in range(streams):
                self.connections.append(DataConnection.dial(channel, passive, NoSink()))
        except ChannelError:
            self.close()
            raise

    @property
    def is_dead(self) -> bool:
        """Whether the server has closed a connection that was kept."""
        return any(connection.is_dead for connection in self.connections)

    @property
    def has_room(self) -> bool:
        """Whether bytes can be sent at once."""
        return any(connection.has_room for connection in self.connections)

    def begin(self) -> None:
        """Prepare for the next file."""
        self._offset = 0

    def send(self, piece: bytes) -> None:
        """Send the next bytes of the file."""
        if self.mode == b"S":
            self.connections[0].send(piece)
            return
        view = memoryview(piece)
        for start in range(0, len(view), _LARGEST_BLOCK):
            part = view[start : start + _LARGEST_BLOCK]
            connection = next((each for each in self.connections if each.has_room), self.connections[0])
            connection.send(data_header(self._offset, len(part)), part)
            self._offset += len(part)

    def end(self) -> None:
        """Send the end of the file."""
        if self.mode == b"S":
            self.connections[0].end_after_sending()
            return
        first, *others = self.connections
        first.send(end_header(len(self.connections)))
        for connection in others:
            connection.send(end_header())

    def close(self) -> None:
        for connection in self.connections:
            connection.dispose()


class Uploads:
    """Writes files; used by one thread.

    Args:
        session: with the servers.
    """

    def __init__(self, session: ControlSession) -> None:
        self._session = session
        #: Addresses of servers that have no block mode.
        self._without_blocks: set[str] = set()

    def write(self, url: str, path: bytes, pieces: Iterator[bytes], timeouts: Timeouts) -> None:
        """Write a file; errors of ``pieces`` are raised unchanged.

        Args:
            url: of the server.
            path: of the file, as its server expects it.
            pieces: its bytes.
            timeouts: for each part, and for all of it.

        Raises:
            StorageError: the server does not take it.
            StoppedError: it was interrupted.
        """

        def written(channel: ControlChannel) -> Iterator[bool]:
            sender = self._sender(channel, streams_to(channel), timeouts)
            upload = _Upload(self._session, channel, sender, timeouts)
            upload.begin(path)
            # Once bytes were taken from the source, it cannot be done again.
            yield True
            upload.finish(pieces)

        for _ in self._session.twice_if_closed(written, lambda: self._session.channel(url, timeouts, beside=True)):
            pass

    def group(self, channel: ControlChannel, files: Sequence[tuple[bytes, bytes]], timeouts: Timeouts) -> list[bool]:
        """Write small files by one data connection; True for those that the server has taken before the first failure.

        A file after a failure may have bytes of another one: it must be written again.

        Args:
            channel: to the server; closed after a failure.
            files: path and bytes of each.
            timeouts: for all of them.
        """
        sender = self._sender(channel, 1, timeouts)
        if sender.mode == b"S":
            return [False] * len(files)
        replies: list[Reply] = []
        for path, _ in files:
            channel.send(b"STOR " + path, replies.append, many_lines=True)
        exchange = _Exchange(self._session, channel, sender)

        sent = 0

        def is_over() -> bool:
            return any(not reply.good for reply in replies)

        def send() -> None:
            nonlocal sent
            content = files[sent][1]
            sender.begin()
            if content:
                sender.send(content)
            sender.end()
            sent += 1

        exchange.run(timeouts, is_over, send, lambda: sent < len(files))
        good = [reply.good for reply in replies]
        taken = good.index(False) if False in good else len(good)
        if taken < len(files):
            # The server may take the bytes of the file that it has refused for those of the next.
            self._session.connections.drop(channel)
        return [number < taken for number in range(len(files))]

    def _sender(self, channel: ControlChannel, streams: int, timeouts: Timeouts) -> _Sender:
        """Data connections to a server: those that are kept, or new ones."""
        kept = channel.data_port.kept
        if isinstance(kept, _Sender) and len(kept.connections) == streams:
            return kept
        mode, passive = self._prepared(channel, timeouts)
        try:
            sender = _Sender(channel, passive, mode, streams if mode == b"E" else 1)
        except ChannelError as error:
            self._session.connections.drop(channel)
            raise error.storage_error() from error
        channel.data_port.keep(sender)
        return sender

    def _prepared(self, channel: ControlChannel, timeouts: Timeouts) -> tuple[bytes, Reply]:
        """The transmission mode, and the server's reply with its address."""
        if channel.address not in self._without_blocks:
            try:
                return b"E", self._session.passive(channel, b"E", timeouts)
            except StorageError as error:
                if error.is_of_server:
                    raise
                self._without_blocks.add(channel.address)
        return b"S", self._session.passive(channel, b"S", timeouts)


class _Exchange:
    """Commands and bytes to one server, until something is so.

    Args:
        session: with the server.
        channel: to the server.
        sender: its data connections.
    """

    def __init__(self, session: ControlSession, channel: ControlChannel, sender: _Sender) -> None:
        self._session = session
        self._channel = channel
        self._sender = sender
        self._channels: list[Channel] = [channel, *sender.connections]
        self._error = PendingError()

    def run(
        self,
        timeouts: Timeouts,
        is_over: Callable[[], bool] = lambda: False,
        send: Callable[[], None] = lambda: None,
        has_more: Callable[[], bool] = lambda: False,
    ) -> None:
        """Exchange commands, replies and bytes; after an error all is closed.

        Args:
            timeouts: for each part, and for all of it.
            is_over: whether to end before all commands are answered.
            send: sends the next bytes; called when there is room.
            has_more: whether there are more.
        """

        def can_send() -> bool:
            return self._sender.has_room and has_more()

        def check() -> None:
            # The server is alive while bytes pass on any connection.
            heard_at = max(each.heard_at for each in self._channels)
            for each in self._channels:
                each.heard_at = heard_at
            self._error.check(self._sender.connections)
            while can_send():
                send()

        complete = False
        try:
            for _ in self._session.steps(self._channels, timeouts, check, can_send, keep=True):
                if is_over():
                    break
            complete = True
        finally:
            if not complete:
                self._session.connections.drop(self._channel)


class _Upload:
    """One file.

    Args:
        session: with the server.
        channel: to the server.
        sender: its data connections.
        timeouts: for each part, and for all of it.
    """

    def __init__(self, session: ControlSession, channel: ControlChannel, sender: _Sender, timeouts: Timeouts) -> None:
        self._session = session
        self._channel = channel
        self._sender = sender
        self._timeouts = timeouts
        self._exchange = _Exchange(session, channel, sender)
        self._replies: list[Reply] = []
        self._is_begun = False
        self._is_sent = False

    def begin(self, path: bytes) -> None:
        """Ask the server to take a file; returns when it is ready for the bytes, or raises `StorageError`."""

        def marked(reply: Reply) -> None:
            self._is_begun = True

        self._sender.begin()
        self._channel.send(b"STOR " + path, self._replies.append, None, marked, many_lines=True)
        self._exchange.run(self._timeouts, lambda: self._is_begun or bool(self._replies))
        self._check_reply()

    def finish(self, pieces: Iterator[bytes]) -> None:
        """Send the bytes, and wait for the server's reply."""

        def send() -> None:
            piece = next(pieces, None)
            if piece is None:
                self._sender.end()
                self._is_sent = True
            else:
                self._sender.send(piece)

        def is_over() -> bool:
            return self._is_sent or bool(self._replies)

        self._exchange.run(self._timeouts, is_over, send, lambda: not is_over())
        self._check_reply()
        # The server may reply after it has written all bytes to its disk.
        self._exchange.run(self._timeouts.with_slack())
        self._check_reply()
        if self._sender.mode == b"S":
            self._channel.data_port.keep(None)

    def _check_reply(self) -> None:
        """Raise `StorageError` if the server has refused the file, or says too early that it has all of it."""
        if not self._replies or (self._replies[0].good and self._is_sent):
            return
        self._session.connections.drop(self._channel)
        if not self._replies[0].good:
            raise refusal(self._replies[0])
        raise StorageError(
            f"the server ends the transfer before its end: {self._replies[0].text}", code=FailureCode.SERVER_ERROR
        )

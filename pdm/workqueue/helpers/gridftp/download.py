"""Bytes of files from GridFTP servers, over data connections of our own.

In stream mode we connect to the server: this passes firewalls, and one connection is enough for a near server. In block
mode (MODE E) the server connects to us: a distant server by several connections, and for many small files by one
connection that is kept. A server that cannot connect to us is read in stream mode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.gridftp.block_mode import MOST_CONNECTIONS, BlockFile, BlockSink
from pdm.workqueue.helpers.gridftp.connections import streams_to
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.data import DataConnection, DataListener, PendingError
from pdm.workqueue.helpers.gridftp.data_port import port_command
from pdm.workqueue.helpers.gridftp.event_loop import Channel
from pdm.workqueue.helpers.gridftp.replies import Reply, refusal
from pdm.workqueue.helpers.gridftp.reply_reader import ChannelError
from pdm.workqueue.helpers.gridftp.session import ControlSession
from pdm.workqueue.helpers.storage import StorageError, Timeouts

#: Seconds that a server has to connect to us, and for which it is not asked again after it could not.
_CONNECTS_WITHIN_S, _NOT_AGAIN_S = 10.0, 600.0


class NoBlockModeError(Exception):
    """A server cannot send in block mode, or cannot connect to us: nothing has arrived."""


class _Receiver:
    """The data connections by which a server sends in block mode; kept with its control channel.

    Args:
        channel: control channel.
        streams: number of connections that the server is asked for.

    Attributes:
        listener: accepts them.
        streams: as given.
        connections: those that were made.
    """

    def __init__(self, channel: ControlChannel, streams: int) -> None:
        self.streams = streams
        self.listener = DataListener(channel)
        self.connections: list[DataConnection] = []
        self._channel = channel
        self._files: Sequence[BlockFile] = ()
        self._error = PendingError()

    @property
    def is_dead(self) -> bool:
        """Whether the server has closed a connection that was kept."""
        return any(connection.is_dead for connection in self.connections)

    def begin(self, files: Sequence[BlockFile]) -> None:
        """Prepare for the next files."""
        self._files = files
        for connection in self.connections:
            _sink(connection).begin(files)

    def check(self, channels: list[Channel]) -> None:
        """Add the connections that the server has made to the channels of the event loop.

        Raises:
            StorageError: the files cannot become complete.
        """
        while self.listener.accepted:
            accepted = self.listener.accepted.pop()
            if len(self.connections) >= MOST_CONNECTIONS:
                accepted.close()
                continue
            first = sum(file.is_complete for file in self._files)
            connection = DataConnection(accepted, self._channel, BlockSink(self._files, first), accepted=True)
            self.connections.append(connection)
            channels.append(connection)
        self.listener.is_waiting = any(not file.is_complete for file in self._files)
        if self.listener.is_waiting:
            # Any machine may connect to the port, and fails to log in.
            self._error.check(each for each in self.connections if each.is_open)
            self._check_order()

    def _check_order(self) -> None:
        file = next(file for file in self._files if not file.is_complete)
        if file.has_ready:
            return
        sinks = [_sink(each) for each in self.connections if each.is_open and not each.ended]
        if len(sinks) >= (file.announced or self.streams) and all(each.is_paused or each.has_ended for each in sinks):
            raise StorageError(
                "the server's blocks are too far out of order to be held in memory", code=FailureCode.SERVER_ERROR
            )

    def settle(self) -> None:
        """All files are complete: remove the connections that cannot be used for more."""
        self.listener.is_waiting = False
        for connection in [each for each in self.connections if each.ended or _sink(each).closes or not each.is_open]:
            connection.dispose()
            self.connections.remove(connection)

    def close(self) -> None:
        self.listener.dispose()
        for connection in self.connections:
            connection.dispose()


def _sink(connection: DataConnection) -> BlockSink:
    assert isinstance(connection.sink, BlockSink)
    return connection.sink


class Downloads:
    """Reads files; used by one thread.

    Args:
        session: with the servers.
    """

    def __init__(self, session: ControlSession) -> None:
        self._session = session
        #: Address → when a server that could not connect to us is asked again (`time.monotonic`).
        self._without_blocks: dict[str, float] = {}

    def content(
        self, url: str, path: bytes, timeouts: Timeouts, log: Callable[[str], None]
    ) -> Generator[bytes, None, None]:
        """The bytes of a file, as they arrive; a caller that stops early must close it.

        Args:
            url: of the server.
            path: of the file, as its server expects it.
            timeouts: for each part, and for all of it.
            log: writes a line to the log of the file.

        Raises:
            StorageError: it cannot be read, or the data is not valid.
            StoppedError: it was interrupted.
        """

        def received(channel: ControlChannel) -> Iterator[bytes]:
            streams = streams_to(channel)
            if streams > 1 and self.uses_blocks(channel):
                try:
                    for _, piece in self.blocks(channel, [path], streams, timeouts):
                        if piece is not None:
                            yield piece
                except NoBlockModeError as error:
                    log(f"{error}; the file is read by one connection")
                    channel = self._session.channel(url, timeouts, beside=True)
                else:
                    return
            yield from self._session.received(channel, b"RETR " + path, timeouts)

        yield from self._session.twice_if_closed(received, lambda: self._session.channel(url, timeouts, beside=True))

    def uses_blocks(self, channel: ControlChannel) -> bool:
        """Whether block mode has not failed at a server lately."""
        return self._without_blocks.get(channel.address, 0.0) < time.monotonic()

    def blocks(
        self, channel: ControlChannel, paths: Sequence[bytes], streams: int, timeouts: Timeouts
    ) -> Generator[tuple[int, bytes | None], None, None]:
        """Files in block mode, one after the other.

        Args:
            channel: to the server; closed after any error.
            paths: of the files, as the server expects them.
            streams: number of data connections; 1 for several files.
            timeouts: for each part, and for all of it.

        Yields:
            Number of a file in ``paths`` and its next bytes; None for the bytes when it is complete.

        Raises:
            NoBlockModeError: nothing has arrived, and the server is not to be asked so again for a while.
            StorageError: the file after the last complete one cannot be read, or the data is not valid.
            StoppedError: it was interrupted.
        """
        receiver = self._receiver(channel, streams, timeouts)
        files = [BlockFile() for _ in paths]
        receiver.begin(files)
        replies: list[Reply] = []
        channels: list[Channel] = [channel, receiver.listener, *receiver.connections]
        connects_until = time.monotonic() + min(_CONNECTS_WITHIN_S, timeouts.stall_s / 2)
        for path in paths:
            channel.send(b"RETR " + path, replies.append, many_lines=True)

        def check() -> None:
            receiver.check(channels)
            # The server is alive while data arrives on any connection.
            heard_at = max(each.heard_at for each in channels)
            for each in channels:
                each.heard_at = heard_at
            failed = next((reply for reply in replies if not reply.good), None)
            if failed is not None:
                raise refusal(failed)
            if not receiver.connections and time.monotonic() > connects_until:
                raise self._no_blocks(channel, f"{channel.address} does not connect to us")

        number = 0
        complete = False
        try:
            for _ in self._session.steps(channels, timeouts, check, keep=True):
                while number < len(files):
                    while (piece := files[number].pop()) is not None:
                        yield number, piece
                    if not files[number].is_complete or len(replies) <= number or not replies[number].good:
                        break
                    yield number, None
                    number += 1
            complete = number == len(files)
        except StorageError as error:
            if receiver.connections or error.errno is not None or error.timed_out:
                raise
            raise self._no_blocks(channel, f"{channel.address} does not send in block mode: {error}") from error
        finally:
            if complete:
                receiver.settle()
            else:
                self._session.connections.drop(channel)

    def _receiver(self, channel: ControlChannel, streams: int, timeouts: Timeouts) -> _Receiver:
        """Data connections that a server makes to us: those that are kept, or new ones."""
        kept = channel.data_port.kept
        if isinstance(kept, _Receiver) and kept.streams == streams:
            return kept
        try:
            receiver = _Receiver(channel, streams)
        except ChannelError as error:
            raise self._no_blocks(channel, str(error)) from error
        commands = (
            *(b"TYPE I", b"MODE E", b"OPTS RETR Parallelism=%d,%d,%d;" % (streams, streams, streams)),
            port_command(channel.data_port.local_host, receiver.listener.port),
        )
        try:
            replies = self._session.prepared(channel, commands, timeouts)
        except BaseException:
            receiver.close()
            raise
        channel.data_port.mode = b"E" if replies[1].good else channel.data_port.mode
        channel.data_port.keep(receiver)
        refused = next((reply for reply in replies if not reply.good), None)
        if refused is not None:
            channel.data_port.keep(None)
            raise self._no_blocks(channel, f"{channel.address} does not send in block mode:\n{refused.text}")
        return receiver

    def _no_blocks(self, channel: ControlChannel, why: str) -> NoBlockModeError:
        self._without_blocks[channel.address] = time.monotonic() + _NOT_AGAIN_S
        return NoBlockModeError(why)

"""Data connections of our own to GridFTP servers, for listings and for the bytes of files.

If the control channel is authenticated, both ends of a data connection authenticate with the user's proxy (DCAU A of
GFD.20). What follows is neither encrypted nor protected, as between servers, unless the server requires it.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import os
import socket
import time
from collections.abc import Iterable
from typing import Protocol, Self

from pdm.workqueue.helpers.credentials import trusting
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.data_port import passive_address
from pdm.workqueue.helpers.gridftp.gsi import GsiError, SecurityContext
from pdm.workqueue.helpers.gridftp.protection import RECORD_HEADER, RecordReader, record_size, records
from pdm.workqueue.helpers.gridftp.replies import Reply
from pdm.workqueue.helpers.gridftp.reply_reader import ChannelError

#: Bytes of one receive call, and those received before others are looked at.
PIECE_SIZE, _MOST_AT_ONCE = 1024 * 1024, 4 * 1024 * 1024
#: Buffers of one send call.
_MOST_BUFFERS = 64
#: Seconds to wait for a server's reason.
_REASON_S = 1.0


class DataSink(Protocol):
    """Takes what arrives at a data connection."""

    @property
    def wanted(self) -> int:
        """Bytes that it takes now at most; 0 while received data must wait."""

    @property
    def is_waiting(self) -> bool:
        """Whether more must arrive."""

    def feed(self, piece: bytes) -> None:
        """Take bytes, at most as many as wanted; raises `StorageError` if they are not valid."""

    def end(self) -> None:
        """The server has closed the connection; raises `ConnectionError` if more was to come."""


class StreamSink:
    """Takes all bytes up to the end of the connection (stream mode).

    Attributes:
        pieces: what has arrived, which the reader removes.
    """

    def __init__(self) -> None:
        self.pieces: collections.deque[bytes] = collections.deque()
        self.is_waiting = True

    @property
    def wanted(self) -> int:
        return PIECE_SIZE if len(self.pieces) < _MOST_AT_ONCE // PIECE_SIZE and self.is_waiting else 0

    def feed(self, piece: bytes) -> None:
        self.pieces.append(piece)

    def end(self) -> None:
        self.is_waiting = False


class NoSink:
    """For a connection by which we send: it is read only to see that the server has closed it."""

    wanted = PIECE_SIZE
    is_waiting = False

    def feed(self, piece: bytes) -> None:
        """What a server sends there has no meaning."""

    def end(self) -> None:
        """The next send fails, if there is one."""


class DataConnection:
    """A data connection; the pipeline treats it as one more channel.

    Args:
        connection: not blocking; it may still be connecting.
        channel: control channel of the server.
        sink: takes what arrives.
        accepted: whether the server has connected to us.

    Attributes:
        address: ``host:port`` of the server.
        sink: as given.
        heard_at: when bytes last passed (`time.monotonic`).
        error: why the connection failed; an error on the server's control channel takes precedence.
        is_open: whether both ends have authenticated each other, if they do.
        ended: whether the server has closed it.
    """

    def __init__(
        self, connection: socket.socket, channel: ControlChannel, sink: DataSink, *, accepted: bool = False
    ) -> None:
        self.address = channel.address
        self.sink = sink
        self.heard_at = time.monotonic()
        self.error: ChannelError | None = None
        self.is_open = False
        self.ended = False
        self._socket = connection
        self._is_accepted = accepted
        self._is_connecting = not accepted
        # Of the login, and of the file.
        self._tokens = b""
        self._context: SecurityContext | None = None
        #: Of a connection that is encrypted.
        self._reader: RecordReader | None = None
        self._out: collections.deque[bytes | memoryview] = collections.deque()
        self._ends_after_sending = False
        self._record = bytearray()
        try:
            if channel.data_port.authenticates and channel.gsi is not None:
                encrypts = channel.data_port.encrypts
                self._context = SecurityContext(channel.gsi, None, accepts=accepted, plain_tls=encrypts)
                if encrypts:
                    self._reader = RecordReader(self._context)
                if not accepted:
                    self._step(None)
            else:
                self.is_open = True
        except GsiError as error:
            connection.close()
            raise ChannelError(f"{self.address}: the data connection: {error}", self.address) from error

    @classmethod
    def dial(cls, channel: ControlChannel, passive: Reply, sink: DataSink) -> Self:
        """A connection to where a server listens; it is made in the background.

        Args:
            channel: control channel.
            passive: reply to PASV or EPSV.
            sink: takes what arrives.

        Raises:
            ChannelError: there is no valid address in the reply, or no connection can be made.
        """
        listens_at = passive_address(
            passive, channel.data_port.peer_host, authenticated=channel.data_port.authenticates
        )
        if listens_at is None:
            text = f"{channel.address} returns no data address:\n{passive.text}"
            raise ChannelError(text, channel.address, refused=True)
        try:
            connection = socket.socket(socket.AF_INET6 if ":" in listens_at[0] else socket.AF_INET)
            connection.setblocking(False)
            _send_at_once(connection)
            result = connection.connect_ex(listens_at)
            if result not in (0, errno.EINPROGRESS):
                connection.close()
                raise OSError(result, os.strerror(result))
        except OSError as error:
            raise ChannelError(f"{channel.address}: the data connection: {error}", channel.address) from error
        return cls(connection, channel, sink)

    @property
    def waiting(self) -> int:
        if self.ended or self._is_accepted:
            # What is to come by connections that the server makes, its listener knows.
            return 0
        return 1 if not self.is_open or self._out or self.sink.is_waiting else 0

    @property
    def reads(self) -> bool:
        return not (self.ended or self._is_connecting) and (not self.is_open or self.sink.wanted > 0)

    @property
    def holds(self) -> bool:
        return self._reader is not None and self._reader.holds and self.reads

    @property
    def unsent(self) -> bool:
        """Whether `flush` has something to send, or the connection is not made yet."""
        if self.ended:
            return False
        return self._is_connecting or bool(self._tokens) or (self.is_open and bool(self._out))

    @property
    def has_room(self) -> bool:
        """Whether the last sent bytes are with the system."""
        return self.is_open and not self._out

    @property
    def is_dead(self) -> bool:
        """Whether an idle connection was closed, or has received what was not expected."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return self.ended or self.error is not None
        except OSError:
            pass
        return True

    def fileno(self) -> int:
        return self._socket.fileno()

    # -- sending

    def send(self, *buffers: bytes | memoryview) -> None:
        """Queue bytes."""
        if self._context is None or self._reader is None or not self.is_open:
            self._out.extend(buffers)
            return
        try:
            self._out.extend(records(self._context, buffers))
        except GsiError as error:
            self._broke(error)

    def flush(self) -> None:
        """Send what the connection takes without blocking."""
        try:
            if self._is_connecting and not self._is_connected():
                return
            while self._tokens:
                self._tokens = self._tokens[self._socket.send(self._tokens) :]
            while self._out and self.is_open:
                sent = self._socket.sendmsg(itertools.islice(self._out, _MOST_BUFFERS))
                self.heard_at = time.monotonic()
                self._remove(sent)
            if self._ends_after_sending and self.is_open:
                self._ends_after_sending = False
                self._socket.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError as error:
            self._broke(error)

    def _is_connected(self) -> bool:
        result = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if result:
            raise OSError(result, os.strerror(result))
        try:
            self._socket.getpeername()
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                return False
            raise
        self._is_connecting = False
        self.heard_at = time.monotonic()
        return True

    def _remove(self, sent: int) -> None:
        while sent:
            first = self._out.popleft()
            if sent < len(first):
                self._out.appendleft(memoryview(first)[sent:])
                return
            sent -= len(first)

    def end_after_sending(self) -> None:
        """Show the server the end of the bytes, once all are sent."""
        self._ends_after_sending = True

    # -- receiving

    def read(self) -> None:
        """Receive what has arrived and the sink takes; raises `StorageError` of the sink."""
        left = _MOST_AT_ONCE
        try:
            while left > 0 and self.reads:
                left -= self._read_some()
        except BlockingIOError:
            return
        except (OSError, GsiError) as error:
            self._broke(error)

    def _read_some(self) -> int:
        if self._reader is not None and self.is_open:
            return self._read_records(self._reader)
        piece = self._socket.recv(self.sink.wanted if self.is_open else self._record_wants())
        self.heard_at = time.monotonic()
        if not piece:
            self.ended = True
            if not self.is_open:
                raise ConnectionError("it was closed during the login")
            self.sink.end()
        elif self.is_open:
            self.sink.feed(piece)
        else:
            self._record += piece
            if self._record_wants() == 0:
                record = bytes(self._record)
                self._record.clear()
                self._step(record)
        return len(piece) or 1

    def _read_records(self, reader: RecordReader) -> int:
        """Pass on what is decrypted; receive more if there is no complete record."""
        if plain := reader.take(self.sink.wanted):
            self.sink.feed(plain)
            return len(plain)
        piece = self._socket.recv(PIECE_SIZE)
        self.heard_at = time.monotonic()
        if not piece:
            self.ended = True
            if reader.is_within_record:
                raise ConnectionError("the server has closed it within a record")
            self.sink.end()
        reader.add(piece)
        # Counted when it is passed on.
        return 0

    def _record_wants(self) -> int:
        """Number of bytes up to the end of the record; what follows the last one is not of the login."""
        if len(self._record) < RECORD_HEADER:
            return RECORD_HEADER - len(self._record)
        return record_size(self._record) - len(self._record)

    def _step(self, token: bytes | None) -> None:
        """Continue the login."""
        assert self._context is not None
        with trusting(self.address):
            answer, self.is_open = self._context.step(token)
        self._tokens += answer
        if self.is_open and self._out:
            # What was queued before the login was complete.
            queued = tuple(self._out)
            self._out.clear()
            self.send(*queued)

    # -- the end

    def _broke(self, error: Exception) -> None:
        self.error = ChannelError(f"{self.address}: the data connection: {error}", self.address)
        self._out.clear()
        self.ended = True

    def end(self) -> None:
        """The control channel has reported an error: nothing more is to come."""
        self.ended = True

    def dispose(self) -> None:
        """Close it."""
        self.ended = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._context is not None:
            self._context.close()
            self._context = None


class PendingError:
    """Waits for the reason that a server gives on its control channel, after a data connection has failed."""

    def __init__(self) -> None:
        self._since: float | None = None

    def check(self, connections: Iterable[DataConnection]) -> None:
        """Raise the error of a connection, if the server has not given a reason in time."""
        error = next((each.error for each in connections if each.error is not None), None)
        if error is None:
            return
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since > _REASON_S:
            raise error.storage_error()


class DataListener:
    """Accepts data connections of a server, which connects to us.

    Args:
        channel: control channel of the server.

    Attributes:
        address: ``host:port`` of the server.
        heard_at: when bytes last passed (`time.monotonic`).
        port: at which it listens.
        accepted: connections that were not looked at.
        is_waiting: whether something must still arrive by them.

    Raises:
        ChannelError: no port can be opened.
    """

    reads = True
    holds = False
    unsent = False

    def __init__(self, channel: ControlChannel) -> None:
        self.address = channel.address
        self.heard_at = time.monotonic()
        self.accepted: list[socket.socket] = []
        self.is_waiting = False
        # Without logins, any machine could send the bytes.
        self._only = None if channel.data_port.authenticates else channel.data_port.peer_host
        host = channel.data_port.local_host
        try:
            self._socket = socket.create_server(
                (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=16
            )
            self._socket.setblocking(False)
        except OSError as error:
            raise ChannelError(f"{self.address}: no port for data: {error}", self.address) from error
        self.port: int = self._socket.getsockname()[1]

    @property
    def waiting(self) -> int:
        return 1 if self.is_waiting else 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def flush(self) -> None:
        """There is nothing to send."""

    def read(self) -> None:
        """Accept what has connected."""
        try:
            connection, address = self._socket.accept()
        except OSError:
            # It has gone already.
            return
        if self._only not in (None, address[0]):
            connection.close()
            return
        connection.setblocking(False)
        _send_at_once(connection)
        self.accepted.append(connection)

    def dispose(self) -> None:
        """Close it."""
        for connection in self.accepted:
            connection.close()
        self._socket.close()


def _send_at_once(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

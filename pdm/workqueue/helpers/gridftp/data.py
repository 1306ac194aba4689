"""A data connection for listings (MLSD), for GridFTP servers that have no MLSC.

We connect to the server, so the connection passes firewalls between it and us. If the control channel is authenticated,
both ends of the data connection authenticate with the user's proxy (DCAU A of GFD.20); the data that follows is not
encrypted, as between servers.
"""

from __future__ import annotations

import collections
import contextlib
import socket
import time

from pdm.workqueue.helpers.credentials import trusting
from pdm.workqueue.helpers.gridftp.control import ChannelError
from pdm.workqueue.helpers.gridftp.gsi import Gsi, GsiError, SecurityContext
from pdm.workqueue.helpers.gridftp.replies import Reply

_PIECE = 256 * 1024
#: TLS record header: its type, two bytes of version, two of length.
_RECORD_HEADER = 5


class DataConnection:
    """A data connection that receives from a server; the pipeline treats it as one more channel.

    Args:
        gsi: of the control channel; None for plain FTP.
        address: ``host:port`` of the server.
        passive: its reply to PASV.
        connect_s: timeout of the connection, in seconds.

    Attributes:
        address: as given.
        pieces: received data, which the reader removes.
        heard_at: when data last arrived (`time.monotonic`).
        unsent: whether `flush` has something to send.
        error: why the connection failed; an error on the server's control channel takes precedence.

    Raises:
        ChannelError: the connection failed.
    """

    def __init__(self, gsi: Gsi | None, address: str, passive: Reply, connect_s: float) -> None:
        self.address = address
        self.pieces: collections.deque[bytes] = collections.deque()
        self.heard_at = time.monotonic()
        self.unsent = b""
        self.error: ChannelError | None = None
        self._ended = False
        self._context: SecurityContext | None = None
        # Part of an incomplete handshake record.
        self._record: bytes | None = None
        listens_at = passive.data_address
        if listens_at is None:
            raise ChannelError(f"{address} returns no data address:\n{passive.text}", address, refused=True)
        try:
            self._socket = socket.create_connection(listens_at[1], connect_s)
            if gsi is not None:
                self._context = SecurityContext(gsi, None)
                self._record = b""
                self._step(None)
        except (OSError, OverflowError, GsiError) as error:
            raise ChannelError(f"{address}: the data connection: {error}", address) from error
        self._socket.setblocking(False)

    @property
    def waiting(self) -> int:
        return 0 if self._ended else 1

    def fileno(self) -> int:
        return self._socket.fileno()

    def flush(self) -> None:
        """Send what the connection takes of the handshake without blocking."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self._socket.send(self.unsent) :]
        except BlockingIOError:
            return
        except OSError as error:
            self._broke(error)

    def read(self) -> None:
        """Read what has arrived."""
        try:
            piece = self._socket.recv(_PIECE)
            self.heard_at = time.monotonic()
            if not piece:
                self._ended = True
            elif self._record is None:
                self.pieces.append(piece)
            else:
                self._shake_hands(self._record + piece)
        except BlockingIOError:
            return
        except (OSError, GsiError) as error:
            self._broke(error)

    def _broke(self, error: Exception) -> None:
        self.error = ChannelError(f"{self.address}: the data connection: {error}", self.address)
        self._ended = True

    def end(self) -> None:
        """The control channel has reported the end of the data."""
        self._ended = True

    def dispose(self) -> None:
        """Close it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._context is not None:
            self._context.close()
            self._context = None

    def _shake_hands(self, arrived: bytes) -> None:
        while len(arrived) >= _RECORD_HEADER:
            length = _RECORD_HEADER + int.from_bytes(arrived[3:5], "big")
            if len(arrived) < length:
                break
            record, arrived = arrived[:length], arrived[length:]
            if self._step(record):
                self._record = None
                if arrived:
                    self.pieces.append(arrived)
                return
        self._record = arrived

    def _step(self, token: bytes | None) -> bool:
        """Continue the handshake; returns whether it is complete."""
        assert self._context is not None
        with trusting(self.address):
            answer, complete = self._context.step(token)
        self.unsent += answer
        return complete

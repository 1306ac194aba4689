"""Reads the replies of a GridFTP server from the bytes of its control connection, wrapped by GSI or plain."""

from __future__ import annotations

import binascii
import collections
from collections.abc import Callable, Iterator

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.gridftp.gsi import GsiError, SecurityContext
from pdm.workqueue.helpers.gridftp.replies import Reply
from pdm.workqueue.helpers.storage import StorageError

#: A longer line is no part of a reply: entries of listings, the longest lines, are wrapped one by one.
_LONGEST_LINE = 512 * 1024
#: Further lines of a reply, and the rest of longer ones, are dropped.
_MOST_LINES, _LONGEST_KEPT_LINE = 200, 64 * 1024
_WRAPPED = (b"631", b"632", b"633")


class ChannelError(Exception):
    """The connection cannot be used (any more); the message has the reason.

    Attributes:
        address: ``host:port``.
        unreachable: whether no server answered: the connection failed, or no greeting arrived.
        refused: whether the server, or the library, has refused the login.
    """

    def __init__(self, why: str, address: str = "", *, unreachable: bool = False, refused: bool = False) -> None:
        super().__init__(why)
        self.address = address
        self.unreachable = unreachable
        self.refused = refused

    def storage_error(self, scope: FailureScope | None = None) -> StorageError:
        """The error as `StorageError`."""
        return StorageError(
            str(self),
            code=FailureCode.CONNECTION if self.unreachable else None,
            scope=scope,
            lost=not self.refused,
            unreachable=self.unreachable,
        )


class SilentServerError(ChannelError):
    """The server accepts no connection, or sends nothing after it."""

    def __init__(self, address: str, login_s: float) -> None:
        super().__init__(f"{address} did not answer to a login for {login_s:g} s", address, unreachable=True)


#: Called with the lines between the first and the last of a reply, in the chunks that the server has sent.
Between = Callable[[bytes], None]


class ReplyReader:
    """Reads replies with bounded memory.

    Args:
        address: ``host:port`` of the server, for messages.

    Attributes:
        context: unwraps the lines after a login; None before it, and for plain FTP.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self.context: SecurityContext | None = None
        # Received lines, and the beginning of the next.
        self._arrived: collections.deque[bytes] = collections.deque()
        self._rest = b""
        # Lines of an incomplete reply.
        self._lines: list[bytes] = []

    def feed(self, piece: bytes) -> None:
        """Add received bytes; raises `ChannelError` for a line without an end."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self._arrived.extend(lines)
        if len(self._rest) > _LONGEST_LINE:
            raise ChannelError(f"{self._address}: a reply without an end", self._address)

    def replies(self, between: Callable[[], Between | None]) -> Iterator[Reply]:
        """The complete replies, each to be handled before the next is parsed.

        Args:
            between: returns the callback of the command whose reply is read; it gets at once what is between the first
                and the last line.

        Raises:
            ChannelError: these are no replies.
        """
        while self._arrived:
            line = self._arrived.popleft()
            # The wrapping shows which line is the last; the content of a line may be the name of a file.
            head = line[:4]
            piece = self._opened(line)
            if head[3:] == b" " and head[:3].isdigit():
                self._lines.append(piece)
                yield self._reply()
            else:
                self._more(piece, between())

    def _opened(self, line: bytes) -> bytes:
        if self.context is None or not line.startswith(_WRAPPED):
            return line + b"\n"
        try:
            return self.context.unwrap(binascii.a2b_base64(line[4:]))
        except (GsiError, binascii.Error) as error:
            raise ChannelError(f"{self._address}: {error}", self._address) from error

    def _more(self, piece: bytes, between: Between | None) -> None:
        if between is not None and self._lines and self._lines[0][:1] in b"12":
            between(piece)
        elif len(self._lines) < _MOST_LINES and len(piece) < _LONGEST_KEPT_LINE:
            self._lines.append(piece)

    def _reply(self) -> Reply:
        text = self._lines[0] if len(self._lines) == 1 else b"".join(self._lines)
        self._lines.clear()
        code = text[:3]
        if not (code.isdigit() and len(code) == 3):
            raise ChannelError(f"{self._address}: this is no reply: {text[:200]!r}", self._address)
        return Reply(int(code), text.decode("utf-8", "backslashreplace").replace("\r\n", "\n").strip())

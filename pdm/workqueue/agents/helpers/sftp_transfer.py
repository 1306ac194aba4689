"""The bytes of a file by SFTP: several requests under way at once, in both directions."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from pdm.workqueue.agents.helpers import sftp_session as sftp
from pdm.workqueue.agents.helpers.sftp_session import Reader, SftpSession, string
from pdm.workqueue.agents.helpers.side import Pieces
from pdm.workqueue.agents.helpers.storage import StorageError

#: What every server must take; more only where the server says so.
_SAFE_PIECE, _PIECE = 32 * 1024, 128 * 1024
#: A server that takes less is not asked for less.
_LEAST_PIECE = 512
#: Of a packet, what is no data: the handle most of all.
_HEADERS = 1024
#: Bytes under way: less than the window of an SSH channel, so that neither end ever waits for the other to read.
_WINDOW = 1024 * 1024


class PieceSizes(NamedTuple):
    """How many bytes one request may move.

    Attributes:
        reading: by READ.
        writing: by WRITE.
    """

    reading: int = _SAFE_PIECE
    writing: int = _SAFE_PIECE

    @classmethod
    def of(cls, limits: bytes) -> PieceSizes:
        """What an answer to ``limits@openssh.com`` allows; zero means that the server has no limit of its own.

        Args:
            limits: body of the answer.
        """
        reader = Reader(limits)
        packet, reading, writing = reader.long(), reader.long(), reader.long()
        most = min(packet - _HEADERS, _PIECE) if packet > _HEADERS else _SAFE_PIECE
        return cls(*(max(min(limit or _SAFE_PIECE, most), _LEAST_PIECE) for limit in (reading, writing)))


def write(session: SftpSession, handle: bytes, pieces: Iterator[bytes], most: int) -> None:
    """Write pieces to an open file, at most ``most`` bytes with a request; returns when all were acknowledged."""
    under_way: deque[tuple[int, int]] = deque()
    offset = waiting = 0
    opening = string(handle)
    try:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), most):
                part = view[start : start + most]
                place = struct.pack(">QI", offset, len(part))
                under_way.append((session.send(sftp.WRITE, opening, place, part), len(part)))
                offset += len(part)
                waiting += len(part)
                while waiting > _WINDOW:
                    request, count = under_way.popleft()
                    waiting -= count
                    session.receive(request)
        while under_way:
            session.receive(under_way.popleft()[0])
    finally:
        session.forget([request for request, _ in under_way])


class Reading:
    """A file that is being read, several requests ahead.

    Args:
        session: with the server.
        handle: of the open file.
        piece: bytes asked for with one request.
    """

    def __init__(self, session: SftpSession, handle: bytes, piece: int) -> None:
        self._session = session
        self._handle = string(handle)
        self._piece = piece
        self._asked: deque[tuple[int, int, int]] = deque()
        self._next = 0
        #: The first few requests of small files would be in vain: the window opens as bytes come.
        self._ahead = 2

    def pieces(self) -> Pieces:
        """All bytes of the file."""
        while True:
            while len(self._asked) < self._ahead:
                self._ask(self._next, self._piece)
                self._next += self._piece
            request, offset, wanted = self._asked.popleft()
            answer = self._session.receive(request)
            if answer.type == sftp.STATUS:
                return
            data = Reader(answer.body).string()
            if len(data) > wanted:
                raise StorageError("the server sent more bytes than it was asked for", code="BAD_LISTING")
            if not data:
                # No end of file, and no bytes: to ask again would bring the same for ever.
                return
            yield data
            if len(data) < wanted:
                # Less than asked for: it is the end, or the most that this server sends. The rest comes next.
                self._again(offset + len(data), max(len(data), _LEAST_PIECE))
            self._ahead = min(self._ahead + 1, max(_WINDOW // self._piece, 1))

    def _ask(self, offset: int, length: int) -> None:
        request = self._session.send(sftp.READ, self._handle, struct.pack(">QI", offset, length))
        self._asked.append((request, offset, length))

    def _again(self, offset: int, piece: int) -> None:
        self.end()
        self._next = offset
        self._piece = piece
        # Most often it is the end: one request finds out.
        self._ahead = 1

    def end(self) -> None:
        """Forget what was asked for."""
        if not self._session.closed:
            self._session.forget([request for request, _, _ in self._asked])
        self._asked.clear()

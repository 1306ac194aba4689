"""Extended block mode (MODE E of GFD.20): a file in blocks with offsets, over any number of data connections.

A server may be faulty or hostile: memory is bounded, and whatever does not add up is an error.
"""

from __future__ import annotations

import collections
import heapq
import struct
from collections.abc import Sequence

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.gridftp.data import PIECE_SIZE
from pdm.workqueue.helpers.storage import StorageError

_HEADER = struct.Struct(">BQQ")
#: Descriptor bits of a block: the number of ends is in its offset; its data may be wrong; its data is a restart marker;
#: it is the last one of its connection; the connection will be closed.
_EOF, _ERROR, _MARKER, _EOD, _CLOSE = 64, 32, 16, 8, 4
#: Maximum data connections of one file.
MOST_CONNECTIONS = 64
_LONGEST_MARKER = 64 * 1024
#: Bytes of blocks that wait for those before them, and bytes that a block costs besides its data.
_WINDOW, _OVERHEAD = 16 * 1024 * 1024, 1024
#: Bytes in order that the reader has not taken.
_MOST_READY = 4 * 1024 * 1024


def data_header(offset: int, length: int) -> bytes:
    """The header of a block of data."""
    return _HEADER.pack(0, length, offset)


def end_header(connections: int | None = None) -> bytes:
    """The block that ends a connection's part of the file; one of them has the number of connections."""
    return _HEADER.pack(_EOD, 0, 0) if connections is None else _HEADER.pack(_EOF | _EOD, 0, connections)


def _invalid(why: str) -> StorageError:
    return StorageError(f"the server's data is not valid: {why}", code=FailureCode.SERVER_ERROR)


class BlockFile:
    """A file that arrives in blocks, given out in order.

    Attributes:
        arrived: number of bytes that have arrived.
        announced: number of connections whose ends were announced; None until then.
        ends: number of ends that have arrived.
    """

    def __init__(self) -> None:
        self.arrived = 0
        self.announced: int | None = None
        self.ends = 0
        self._ready: collections.deque[bytes] = collections.deque()
        self._ready_size = 0
        self._end = 0
        self._later: dict[int, bytes] = {}
        self._offsets: list[int] = []
        self._later_size = 0

    @property
    def is_complete(self) -> bool:
        """Whether all ends have arrived."""
        return self.announced == self.ends

    @property
    def has_ready(self) -> bool:
        """Whether the next bytes have arrived."""
        return bool(self._ready)

    def room(self, offset: int) -> int:
        """Number of bytes at an offset that may be received now."""
        if offset <= self._end:
            return PIECE_SIZE if self._ready_size < _MOST_READY else 0
        if self._later_size >= _WINDOW:
            return 0
        return max(min(PIECE_SIZE, self._end + _WINDOW - offset), 0)

    def add(self, offset: int, piece: bytes) -> None:
        """Take the bytes at an offset; raises `StorageError`."""
        self.arrived += len(piece)
        if offset > self._end:
            if offset in self._later:
                raise _invalid(f"byte {offset} was sent twice")
            self._later[offset] = piece
            self._later_size += len(piece) + _OVERHEAD
            heapq.heappush(self._offsets, offset)
            return
        if offset < self._end:
            raise _invalid(f"byte {offset} was sent twice")
        self._append(piece)
        while self._offsets and self._offsets[0] <= self._end:
            offset = heapq.heappop(self._offsets)
            if offset < self._end:
                raise _invalid(f"byte {offset} was sent twice")
            piece = self._later.pop(offset)
            self._later_size -= len(piece) + _OVERHEAD
            self._append(piece)

    def _append(self, piece: bytes) -> None:
        self._ready.append(piece)
        self._ready_size += len(piece)
        self._end += len(piece)

    def pop(self) -> bytes | None:
        """The next bytes of the file; None if they have not arrived."""
        if not self._ready:
            return None
        piece = self._ready.popleft()
        self._ready_size -= len(piece)
        return piece

    def announce(self, connections: int) -> None:
        """The server has announced the number of ends; raises `StorageError`."""
        if not 0 < connections <= MOST_CONNECTIONS or self.announced not in (None, connections):
            raise _invalid(f"the end of {connections} connections is announced")
        self.announced = connections

    def end_one(self) -> None:
        """The part of one connection is complete; raises `StorageError` if it cannot be or leaves a gap."""
        self.ends += 1
        if self.announced is not None and self.ends > self.announced:
            raise _invalid(f"{self.ends} connections have ended, and {self.announced} were announced")
        if self.is_complete and self._later:
            raise _invalid(f"{self._offsets[0] - self._end} bytes after byte {self._end} were not sent")


class BlockSink:
    """Parses the blocks of one data connection.

    Args:
        files: those that arrive, one after the other; the owner replaces them before the next transfers.
        first: number of the file with which it begins.

    Attributes:
        closes: whether the server will close the connection.
    """

    #: The listener waits for all connections together.
    is_waiting = False

    def __init__(self, files: Sequence[BlockFile], first: int) -> None:
        self._files = files
        self._number = first
        self._header = bytearray()
        self._descriptor = 0
        self._offset = 0
        self._left = 0
        self.closes = False

    def begin(self, files: Sequence[BlockFile]) -> None:
        """Prepare for further files."""
        self._files, self._number = files, 0

    @property
    def _file(self) -> BlockFile | None:
        return self._files[self._number] if self._number < len(self._files) else None

    @property
    def is_paused(self) -> bool:
        """Whether the next bytes must wait until others have arrived or were taken."""
        return self._left > 0 and self.wanted == 0

    @property
    def has_ended(self) -> bool:
        """Whether all files have passed."""
        return self._file is None

    @property
    def wanted(self) -> int:
        file = self._file
        if file is None:
            return 0
        if not self._left:
            return _HEADER.size - len(self._header)
        if self._descriptor & _MARKER:
            return self._left
        return min(self._left, file.room(self._offset))

    def feed(self, piece: bytes) -> None:
        file = self._file
        assert file is not None
        if not self._left:
            self._header += piece
            if len(self._header) == _HEADER.size:
                self._open_block(file)
            return
        if not self._descriptor & _MARKER:
            file.add(self._offset, piece)
        self._offset += len(piece)
        self._left -= len(piece)
        if not self._left:
            self._end_block(file)

    def _open_block(self, file: BlockFile) -> None:
        self._descriptor, self._left, self._offset = _HEADER.unpack(self._header)
        self._header.clear()
        if self._descriptor & _ERROR:
            raise _invalid("the server marks a block as wrong")
        if self._descriptor & _MARKER and self._left > _LONGEST_MARKER:
            raise _invalid(f"a restart marker of {self._left} bytes")
        if self._descriptor & _EOF:
            file.announce(self._offset)
            if self._left:
                raise _invalid("the announcement of the end has data")
        if not self._left:
            self._end_block(file)

    def _end_block(self, file: BlockFile) -> None:
        self.closes = self.closes or bool(self._descriptor & _CLOSE)
        if self._descriptor & _EOD:
            self._number += 1
            file.end_one()

    def end(self) -> None:
        file = self._file
        if self._left or self._header:
            raise ConnectionError("the server has closed it within a block")
        if file is not None and not file.is_complete:
            raise ConnectionError("the server has closed it before its end")

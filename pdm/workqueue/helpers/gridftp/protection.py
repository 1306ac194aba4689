"""Encrypted data connections (PROT P of RFC 2228), for servers that make no others.

Which servers these are, nothing tells before: they refuse to name or to take a data address (534). Then the protection
is set, for the channel's further connections too. The bytes are messages of the security context with which both ends
have logged in: records of TLS.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pdm.workqueue.helpers.gridftp.gsi import SecurityContext
from pdm.workqueue.helpers.gridftp.replies import Reply

#: Bytes of a record at most, and of its header: a type, two bytes of version, two of length.
_RECORD = 16 * 1024
RECORD_HEADER = 5
#: What sets the protection; the size is that of our largest message, and no server checks it.
COMMANDS = (b"PBSZ 1048576", b"PROT P")
_REQUIRED = re.compile(r"53[46][ -][^\n]*Encryption is required")


def requires_encryption(reply: Reply) -> bool:
    """Whether a server refuses data connections that are not encrypted."""
    return _REQUIRED.match(reply.text) is not None


def record_size(head: bytes | bytearray) -> int:
    """Size of the TLS record that begins with these bytes; of a part of a header, more than there is."""
    return RECORD_HEADER + int.from_bytes(head[3:RECORD_HEADER], "big")


class RecordReader:
    """Decrypts what arrives at a data connection."""

    def __init__(self, context: SecurityContext) -> None:
        self._context = context
        self._arrived = bytearray()
        self._plain = b""

    @property
    def holds(self) -> bool:
        """Whether bytes have arrived that can be taken."""
        return bool(self._plain) or self._record_size > 0

    @property
    def _record_size(self) -> int:
        """Size of the next record; 0 if it is not complete."""
        size = record_size(self._arrived)
        return size if RECORD_HEADER < size <= len(self._arrived) else 0

    @property
    def is_within_record(self) -> bool:
        """Whether a part of a record has arrived."""
        return bool(self._arrived)

    def add(self, piece: bytes) -> None:
        """Take what has arrived."""
        self._arrived += piece

    def take(self, most: int) -> bytes:
        """The next bytes; empty if the next record is not complete.

        Raises:
            GsiError: a record was changed on its way.
        """
        while not self._plain:
            if not (size := self._record_size):
                return b""
            record = bytes(self._arrived[:size])
            del self._arrived[:size]
            self._plain = self._context.unwrap(record)
        taken, self._plain = self._plain[:most], self._plain[most:]
        return taken


def records(context: SecurityContext, buffers: Sequence[bytes | memoryview]) -> Iterator[bytes]:
    """Encrypt bytes; raises `GsiError`."""
    data = b"".join(buffers)
    for start in range(0, len(data), _RECORD):
        yield context.wrap(data[start : start + _RECORD], encrypted=True)

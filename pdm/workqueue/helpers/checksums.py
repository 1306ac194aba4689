"""Checksums of files: computed piece by piece, and read from what servers and tools print."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import zlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

from pdm.workqueue.domain.enums import ChecksumAlgorithm

#: Hexadecimal digits of a value.
DIGITS: Mapping[ChecksumAlgorithm, int] = MappingProxyType(
    {ChecksumAlgorithm.ADLER32: 8, ChecksumAlgorithm.MD5: 32, ChecksumAlgorithm.SHA256: 64}
)
#: Names of the algorithms in ``Want-Digest`` and ``Digest`` (RFC 3230).
HTTP_NAMES: Mapping[ChecksumAlgorithm, str] = MappingProxyType(
    {ChecksumAlgorithm.ADLER32: "adler32", ChecksumAlgorithm.MD5: "md5", ChecksumAlgorithm.SHA256: "sha-256"}
)
_HEX = re.compile(r"[0-9A-Fa-f]+", re.ASCII)


class RunningChecksum(Protocol):
    """The checksum of the bytes so far."""

    def update(self, piece: bytes | memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The checksum, in lower-case hexadecimal digits."""


class _Adler32:
    def __init__(self) -> None:
        self._value = 1

    def update(self, piece: bytes | memoryview, /) -> None:
        self._value = zlib.adler32(piece, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def running_checksum(algorithm: ChecksumAlgorithm) -> RunningChecksum:
    """A checksum of no bytes yet."""
    match algorithm:
        case ChecksumAlgorithm.ADLER32:
            return _Adler32()
        case ChecksumAlgorithm.MD5:
            # It finds damage; it is no protection against forgery.
            return hashlib.md5(usedforsecurity=False)
        case ChecksumAlgorithm.SHA256:
            return hashlib.sha256()


def checksum_of(algorithm: ChecksumAlgorithm, pieces: Iterable[bytes | memoryview]) -> str:
    """The checksum of all pieces, in lower-case hexadecimal digits."""
    checksum = running_checksum(algorithm)
    for piece in pieces:
        checksum.update(piece)
    return checksum.hexdigest()


def from_hexadecimal(algorithm: ChecksumAlgorithm, text: str) -> str | None:
    """The value that a server or tool prints, with all of its digits; None if it is not one of the algorithm.

    Leading zeros may be missing only from ADLER32, which some servers print as a number.
    """
    digits = DIGITS[algorithm]
    least = 1 if algorithm is ChecksumAlgorithm.ADLER32 else digits
    if not least <= len(text) <= digits or not _HEX.fullmatch(text):
        return None
    return text.lower().zfill(digits)


def from_http_digest(algorithm: ChecksumAlgorithm, header: str) -> str | None:
    """The value of an algorithm in a ``Digest`` header, in lower-case hexadecimal digits; None if there is none.

    RFC 3230 has ADLER32 in hexadecimal digits and the others in base64; some servers send digits of all.
    """
    for part in header.split(","):
        name, _, value = part.strip().partition("=")
        if name.lower() == HTTP_NAMES[algorithm]:
            return from_hexadecimal(algorithm, value) or from_base64(algorithm, value)
    return None


def from_base64(algorithm: ChecksumAlgorithm, text: str) -> str | None:
    """The value in base64 in lower-case hexadecimal digits; None if it is not one of the algorithm."""
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return value.hex() if len(value) * 2 == DIGITS[algorithm] else None

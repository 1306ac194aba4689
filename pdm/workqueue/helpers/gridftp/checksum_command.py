"""CKSM: checksums that GridFTP servers compute (GFD.47)."""

from __future__ import annotations

import re

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.helpers.checksums import from_hexadecimal
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.replies import Reply

#: Of as many bytes as a file has.
_WHOLE_FILE = -1
_VALUE = re.compile(r"213 ([0-9a-fA-F]+)\Z")
_SEPARATORS = re.compile(r"[^A-Za-z0-9]+")


def checksum_command(algorithm: ChecksumAlgorithm, path: bytes, length: int = _WHOLE_FILE) -> bytes:
    """The command for the checksum of the first ``length`` bytes of a file."""
    return b"CKSM %s 0 %d %s" % (algorithm.encode(), length, path)


def checksum_in(algorithm: ChecksumAlgorithm, reply: Reply) -> str | None:
    """The checksum in a reply, in lower-case hexadecimal digits; None if there is none of this algorithm."""
    found = _VALUE.match(reply.text)
    return from_hexadecimal(algorithm, found.group(1)) if found is not None else None


def computes_checksums(algorithm: ChecksumAlgorithm, *channels: ControlChannel) -> bool:
    """Whether servers compute an algorithm, by their lists of features: ``MD5:10;ADLER32:10`` or ``MD5,ADLER32``."""
    return all(algorithm in _SEPARATORS.split(channel.features.get("CKSM", "").upper()) for channel in channels)

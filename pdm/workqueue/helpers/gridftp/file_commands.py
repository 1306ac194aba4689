"""Commands about files at GridFTP servers: checksums (CKSM), times (MFMT), permissions (SITE CHMOD); also pipelined."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.checksums import from_hexadecimal
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.pipelined_files import PipelinedFile
from pdm.workqueue.helpers.gridftp.replies import Reply, file_stat_in
from pdm.workqueue.helpers.preserving import UNKNOWN, values_of
from pdm.workqueue.helpers.storage import FileStat, StorageError
from pdm.workqueue.wire.agent_requests import PreservedAttribute

#: The first second of the year 10000, which the format cannot express.
_END = 253_402_300_800


def mtime_command(path: bytes, mtime: int) -> bytes:
    """The command that sets the modification time, in seconds since 1970; raises `StorageError` if it cannot."""
    if not 0 <= mtime < _END:
        raise StorageError(f"GridFTP cannot express the modification time {mtime}", code=FailureCode.UNSUPPORTED)
    return b"MFMT %s %s" % (time.strftime("%Y%m%d%H%M%S", time.gmtime(mtime)).encode(), path)


def mode_command(path: bytes, mode: int) -> bytes:
    """The command that sets permission bits."""
    return b"SITE CHMOD %04o %s" % (mode, path)


class PipelinedAttributes:
    """Copies attributes of files between two servers, with commands among those of the transfers.

    Args:
        wanted: which attributes.
        source: channel to the source.
        destination: channel to the destination.
        log: called with the key of a file and a line about an attribute that could not be set.
    """

    def __init__(
        self,
        wanted: Collection[PreservedAttribute],
        source: ControlChannel,
        destination: ControlChannel,
        log: Callable[[int, str], None],
    ) -> None:
        self._wanted = wanted
        self._source = source
        self._destination = destination
        self._log = log

    def read(self, file: PipelinedFile) -> None:
        """Request the attributes of a source; sent before its RETR, so that they are never newer than the bytes."""

        def told(reply: Reply) -> None:
            there = file_stat_in(reply)
            file.attributes = there if there is not None and there.kind == "file" else FileStat("file")

        if self._wanted:
            self._source.send(b"MLST " + file.source, told, many_lines=True)

    def apply(self, file: PipelinedFile) -> None:
        """Set the attributes of the temporary file; sent before its rename."""
        if not self._wanted:
            return
        for name, value in values_of(file.attributes, self._wanted).items():
            if value is None:
                self._lacks(file, name, UNKNOWN)
                continue
            try:
                command = (mtime_command if name == "mtime" else mode_command)(file.temporary, value)
            except StorageError as error:
                self._lacks(file, name, error.message)
            else:
                self._destination.send(command, self._noting(file, name))

    def _noting(self, file: PipelinedFile, name: PreservedAttribute) -> Callable[[Reply], None]:
        def answered(reply: Reply) -> None:
            if not reply.good:
                self._lacks(file, name, reply.text)

        return answered

    def _lacks(self, file: PipelinedFile, name: PreservedAttribute, why: str) -> None:
        file.not_preserved.append(name)
        self._log(file.key, f"{name} is not preserved: {why}")


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

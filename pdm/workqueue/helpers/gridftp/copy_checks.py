"""Checks of both ends for pipelined copies: whether the destination is free, and whether the source was written to."""

from __future__ import annotations

import collections
import errno
import time
from collections.abc import Callable, Mapping, Sequence

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.helpers.copying import CHANGED
from pdm.workqueue.helpers.gridftp.connections import parent_path, server_path
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.file_commands import checksum_command, checksum_in, computes_checksums
from pdm.workqueue.helpers.gridftp.pipelined_files import (
    Leave,
    Passed,
    PipelinedFile,
    SharedListing,
    base_name,
    is_small_enough,
    list_entries,
    may_pay_off,
    remember_count,
)
from pdm.workqueue.helpers.gridftp.replies import (
    Reply,
    errno_of_reply,
    file_stat_in,
    time_in,
)
from pdm.workqueue.helpers.storage import FileStat, FileVersion

#: Entries of a source directory above which a command for each file costs less than listings during the transfers.
_MOST_ENTRIES_LISTED_AGAIN = 256


def ask_checksums(
    algorithm: ChecksumAlgorithm,
    at_source: ControlChannel,
    at_destination: ControlChannel,
    source: bytes,
    destination: bytes,
    answered: Callable[[str | None, Reply], None],
) -> None:
    """Request the checksum of a file from each of two servers; ``answered`` gets its digits or None, for each."""

    def told(reply: Reply) -> None:
        answered(checksum_in(algorithm, reply), reply)

    at_source.send(checksum_command(algorithm, source), told)
    at_destination.send(checksum_command(algorithm, destination), told)


class DestinationCheck:
    """Checks whether destinations are free, or have the file already.

    Args:
        channels: to source and destination.
        overwrite: of the request.
        algorithm: of the checksums that are compared.
        counts: numbers of entries of directories when they were last listed, by address and path; updated here.
        free: called with a file that may be copied.
        verify_by_listing: called with a directory that has hardly any other files, and those that may be copied to it.
        same: called with a file that is there already, after its checksum was noted.
        leave: called with a file that is left to the fallback.
    """

    def __init__(
        self,
        channels: tuple[ControlChannel, ControlChannel],
        overwrite: str,
        algorithm: ChecksumAlgorithm,
        counts: dict[tuple[str, bytes], int],
        free: Passed,
        verify_by_listing: Callable[[bytes, Sequence[PipelinedFile]], None],
        same: Passed,
        leave: Leave,
    ) -> None:
        self._channels = channels
        self._overwrite = overwrite
        self._algorithm = algorithm
        self._counts = counts
        self._free = free
        self._verify_by_listing = verify_by_listing
        self._same = same
        self._leave = leave

    def look(self, directory: bytes, files: Sequence[PipelinedFile], size: int) -> None:
        """Check destinations in a directory that already existed.

        Args:
            directory: its path.
            files: of the batch in it.
            size: bytes that the server reports for the directory itself.
        """
        at_destination = self._channels[1]
        key = at_destination.address, directory
        if "MLSC" not in at_destination.features or not may_pay_off(len(files), self._counts.get(key, 0), size):
            for file in files:
                self._look_at(file)
            return

        def listed(entries: Mapping[bytes, FileStat] | None, count: int) -> None:
            remember_count(self._counts, key, count)
            free: list[PipelinedFile] = []
            if entries is not None and len(entries) == count and is_small_enough(len(files), count):
                # The server may take names for the same that differ in case, or in the form of other letters.
                taken = {name.lower() for name in entries}
                names = [(file, base_name(file.destination)) for file in files if not file.item.stale]
                free = [file for file, name in names if name.isascii() and name.lower() not in taken]
            self._verify_by_listing(directory, free)
            may_be_copied = {file.key for file in free}
            for file in files:
                (self._free if file.key in may_be_copied else self._look_at)(file)

        list_entries(at_destination, directory, None, listed)

    def _look_at(self, file: PipelinedFile) -> None:
        at_destination = self._channels[1]
        for stale in file.item.stale:
            at_destination.send(b"DELE " + server_path(stale), lambda reply: None)
        at_destination.send(b"MLST " + file.destination, lambda reply: self._looked(file, reply))

    def _looked(self, file: PipelinedFile, reply: Reply) -> None:
        if not reply.good:
            if errno_of_reply(reply.text) == errno.ENOENT:
                self._free(file)
            else:
                self._leave(file, reply.text)
            return
        there = file_stat_in(reply)
        if there is None or there.kind != "file":
            self._leave(file, "something else is at the destination")
        elif self._overwrite == "always":
            self._free(file)
        elif there.size != file.size:
            self._is_another(file)
        else:
            self._compare(file)

    def _compare(self, file: PipelinedFile) -> None:
        sums: list[str | None] = []

        def summed(checksum: str | None, reply: Reply) -> None:
            sums.append(checksum)
            if len(sums) < len(self._channels):
                return
            if None in sums:
                self._leave(file, reply.text)
            elif len(set(sums)) == 1:
                file.checksum = checksum
                self._same(file)
            else:
                self._is_another(file)

        if not computes_checksums(self._algorithm, *self._channels):
            self._leave(file, f"a server offers no {self._algorithm}")
            return
        ask_checksums(self._algorithm, *self._channels, file.source, file.destination, summed)

    def _is_another(self, file: PipelinedFile) -> None:
        if self._overwrite == "different":
            self._free(file)
        else:
            self._leave(file, "another file is at the destination")


class SourceCheck:
    """Finds sources that were written to during their transfer, by their times before and after.

    Not necessary where checksums are compared: the source's is computed after its last byte was sent, so a copy that
    mixes two states of a file has another one.

    Args:
        channel: to the source.
        counts: numbers of entries of directories when they were last listed, by address and path; updated here.
        needs_second_look: called with a file whose mtime may not change when it is written to, after its RETR was sent.
        passed: called with a file that has passed a check.
        leave: called with a file that was written to, and is left to the fallback.
    """

    def __init__(
        self,
        channel: ControlChannel,
        counts: dict[tuple[str, bytes], int],
        needs_second_look: Passed,
        passed: Passed,
        leave: Leave,
    ) -> None:
        self._channel = channel
        self._counts = counts
        self._needs_second_look = needs_second_look
        self._passed = passed
        self._leave = leave
        self._knows_times = "MDTM" in channel.features
        self._listed_at = time.time()

    def list_directories(self, files: Sequence[PipelinedFile]) -> None:
        """Record the times of files in directories with enough files of the batch, by a listing of each directory."""
        if "MLSC" not in self._channel.features:
            return
        directories: dict[bytes, list[PipelinedFile]] = collections.defaultdict(list)
        for file in files:
            directories[parent_path(file.source)].append(file)
        for path, some in directories.items():
            if may_pay_off(len(some), self._counts.get((self._channel.address, path), 0)):
                self._list(path, some)

    def _list(self, path: bytes, files: Sequence[PipelinedFile]) -> None:
        names = {base_name(file.source) for file in files}
        after = SharedListing(self._channel, path, names, self._listed_again)

        def listed(entries: Mapping[bytes, FileStat] | None, count: int) -> None:
            remember_count(self._counts, (self._channel.address, path), count)
            if entries is None or not is_small_enough(len(files), count):
                return
            again = count <= _MOST_ENTRIES_LISTED_AGAIN or not self._knows_times
            for file in files:
                there = entries.get(base_name(file.source))
                # The time of a link may be its own, not that of its target.
                if there is not None and there.kind == "file" and there.mtime is not None and not file.over:
                    file.version = there.mtime
                    if again:
                        file.is_source_listed = True
                        file.wait_for(after)

        list_entries(self._channel, path, names, listed)

    def look_before(self, file: PipelinedFile) -> None:
        """Request the time of a source whose directory was not listed; sent before its RETR."""
        if file.version is None and self._knows_times:
            asked_at = time.time()
            file.unproven += 1
            self._channel.send(b"MDTM " + file.source, lambda reply: self._told(file, reply, asked_at))

    def look_after(self, file: PipelinedFile) -> None:
        """Request it again; sent after its RETR."""
        if isinstance(file.version, int) and FileVersion(0, file.version).may_hide_writes(self._listed_at):
            self._needs_second_look(file)
        if self._knows_times and not file.is_source_listed:
            file.unproven += 1
            self._channel.send(b"MDTM " + file.source, lambda reply: self._told_again(file, reply))

    def _told(self, file: PipelinedFile, reply: Reply, asked_at: float) -> None:
        file.version = reply.text
        if FileVersion(0, time_in(reply)).may_hide_writes(asked_at):
            self._needs_second_look(file)
        self._passed(file)

    def _told_again(self, file: PipelinedFile, reply: Reply) -> None:
        version = time_in(reply) if isinstance(file.version, int) else reply.text
        if not reply.good or version != file.version:
            self._leave(file, CHANGED)
        self._passed(file)

    def _listed_again(self, file: PipelinedFile, entries: Mapping[bytes, FileStat]) -> None:
        there = entries.get(base_name(file.source))
        if there is None or there.kind != "file" or there.mtime != file.version:
            self._leave(file, CHANGED)
        self._passed(file)

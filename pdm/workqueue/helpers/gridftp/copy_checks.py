"""Checks of both ends for pipelined copies: whether the destination is free, and whether the source was written to.

Checking one file takes a command, which costs the helper and the server as much as a tenth of a small file. One listing
of a directory checks all files in it, at a third of that cost for each entry.
"""

from __future__ import annotations

import collections
import errno
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.helpers.copying import CHANGED
from pdm.workqueue.helpers.gridftp.checksum_command import checksum_command, checksum_in, computes_checksums
from pdm.workqueue.helpers.gridftp.connections import parent_path, server_path
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.replies import (
    ListingEntry,
    Reply,
    WrappedEntries,
    errno_of_reply,
    file_stat_in,
    time_in,
)
from pdm.workqueue.helpers.storage import FileStat, FileVersion
from pdm.workqueue.wire.agent_requests import CopyItem, PreservedAttribute

#: Files for which one listing of their directory is worth its cost; in a large directory, one for each few entries.
_MIN_FILES_FOR_LISTING, _MAX_FILES_FOR_LISTING, _ENTRIES_FOR_A_FILE = 64, 128, 4
#: Entries of a source directory above which a command for each file costs less than listings during the transfers.
_MOST_ENTRIES_LISTED_AGAIN = 256
#: Files of one directory for which a listing before the copy is worth its cost: if its number of entries is known, and
#: if it is not.
_MIN_FILES_OF_KNOWN, _MIN_FILES = 4, 16
#: Entries of a directory for each file of the batch, above which two commands for each file cost less.
_MOST_ENTRIES_A_FILE = 3
#: Bytes that servers report as the size of a small directory, and more for each entry.
_SMALL_DIRECTORY, _BYTES_OF_ENTRY = 4096, 40
#: Listings that are tried of a directory in which others rename files.
_LISTINGS_OF_CHANGING = 5
#: Maximum directories whose numbers of entries are kept.
_MOST_COUNTS = 10_000
_NO_ATTRIBUTES = FileStat("file")


class PipelinedFile:
    """One file of a batch.

    Attributes:
        temporary: its current temporary name.
        used: temporary names that may exist.
        version: of the source before the transfer, as its server reported it.
        attributes: of the source, if they are preserved.
        not_preserved: names of those that could not be.
        checksum: checksum from one side, until the other side has reported its own.
        unproven: number of checks still pending.
        over: whether it has an outcome here, or was left to the fallback; later replies are ignored.
        listings: of directories at both ends that check it, together with others, after its transfer.
        is_listed: whether such a listing checks its size, and that its name is free.
        is_source_listed: whether such a listing checks that the source was not written to.
    """

    __slots__ = (
        *(
            "attributes",
            "checksum",
            "destination",
            "directory",
            "is_listed",
            "is_source_listed",
            "item",
            "key",
            "listings",
        ),
        *("not_preserved", "over"),
        *("size", "source", "temporary", "unproven", "used", "version"),
    )

    def __init__(self, item: CopyItem) -> None:
        self.item = item
        self.key = item.key
        self.size = item.size
        self.source = server_path(item.source)
        self.destination = server_path(item.destination)
        self.temporary = server_path(item.temporary)
        self.directory = parent_path(self.destination)
        self.used: list[bytes] = []
        self.over = False
        self.begin_anew()

    def begin_anew(self) -> None:
        """Reset what was learned on channels that are closed."""
        self.version: str | int | None = None
        self.checksum: str | None = None
        self.attributes = _NO_ATTRIBUTES
        self.not_preserved: list[PreservedAttribute] = []
        self.unproven = 0
        self.listings: list[SharedListing] = []
        self.is_listed = self.is_source_listed = False

    def wait_for(self, listing: SharedListing) -> None:
        """Let a listing check the file, too."""
        self.listings.append(listing)
        listing.to_come += 1


#: Called with a file and the reason why it is left to the fallback.
Leave = Callable[[PipelinedFile, str], None]
#: Called with a file that has passed a check.
Passed = Callable[[PipelinedFile], None]


class SharedListing:
    """One listing of a directory that checks many files: sizes, times, and whether names are free.

    Args:
        channel: to the server.
        path: of the directory.
        names: names of interest; None for all.
        check: called with a file and the entries by name, after a listing that the file has asked for.

    Attributes:
        to_come: number of files of the batch that have not asked yet.
    """

    def __init__(
        self,
        channel: ControlChannel,
        path: bytes,
        names: Collection[bytes] | None,
        check: Callable[[PipelinedFile, Mapping[bytes, FileStat]], None],
    ) -> None:
        self._channel = channel
        self._path = path
        self._names = names
        self._check = check
        self._asking: list[PipelinedFile] = []
        self._count = 0
        self.to_come = 0

    def ask(self, file: PipelinedFile) -> None:
        """Have a file checked by the next listing, which waits for others to ask, too."""
        self._asking.append(file)
        self.to_come -= 1

    def list_if_due(self, *, all_arrived: bool) -> bool:
        """List the directory if enough files ask, or no more will for now; returns whether it did."""
        # The last files of a directory are waited for: another listing of all its entries would be for them alone.
        enough = min(max(_MIN_FILES_FOR_LISTING, self._count // _ENTRIES_FOR_A_FILE), _MAX_FILES_FOR_LISTING)
        if self.to_come and not all_arrived and (len(self._asking) < enough or self.to_come < enough):
            return False
        asking, self._asking = self._asking, []
        self._list(asking, _LISTINGS_OF_CHANGING)
        return True

    def _list(self, asking: Sequence[PipelinedFile], tries: int) -> None:
        def listed(entries: Mapping[bytes, FileStat] | None, count: int) -> None:
            if entries is None and tries > 1:
                # Globus breaks off a listing when an entry goes meanwhile, as when another batch renames its files.
                self._list(asking, tries - 1)
                return
            self._count = count
            for file in asking:
                if not file.over:
                    self._check(file, entries or {})

        list_entries(self._channel, self._path, self._names, listed)


def list_entries(
    channel: ControlChannel,
    path: bytes,
    names: Collection[bytes] | None,
    listed: Callable[[Mapping[bytes, FileStat] | None, int], None],
) -> None:
    """List a directory.

    Args:
        channel: to a server that has MLSC.
        path: of the directory.
        names: names of interest; None for all.
        listed: called with the entries of interest by name, and the number of all, also of those that the server counts
            but does not name; with None if the listing is incomplete or invalid.
    """
    entries: dict[bytes, FileStat] = {}
    count = counted = 0

    def found(entry: ListingEntry) -> None:
        nonlocal count, counted
        count += 1
        counted = entry.counted or counted
        if names is None or entry.name in names:
            entries[entry.name] = entry.file_stat

    lines = WrappedEntries(found)

    def ended(reply: Reply) -> None:
        lines.end()
        listed(entries if reply.good and lines.storage_error is None else None, max(count, counted))

    channel.send(b"MLSC " + path, ended, lines.take)


def may_pay_off(files: int, count: int, size: int = 0) -> bool:
    """Whether a listing of a directory may cost less than commands for each file.

    Args:
        files: of the batch in the directory.
        count: its entries when it was last listed; 0 if they are not known.
        size: bytes that the server reports for the directory itself, which grow with its entries.
    """
    # It may have grown since.
    is_small = size <= _SMALL_DIRECTORY + _BYTES_OF_ENTRY * _MOST_ENTRIES_A_FILE * files
    return files >= (_MIN_FILES_OF_KNOWN if count else _MIN_FILES) and is_small and is_small_enough(files, count)


def is_small_enough(files: int, count: int) -> bool:
    """Whether a directory has few entries besides the files of the batch."""
    return count <= _MOST_ENTRIES_A_FILE * files


def remember_count(counts: dict[tuple[str, bytes], int], directory: tuple[str, bytes], count: int) -> None:
    """Store the number of entries of a directory."""
    if len(counts) >= _MOST_COUNTS:
        counts.clear()
    counts[directory] = count


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


def base_name(path: bytes) -> bytes:
    """The last component of a path."""
    return path.rpartition(b"/")[2]


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

"""Files of a pipelined copy, and the listings that each check many of them.

Checking one file takes a command, which costs the helper and the server as much as a tenth of a small file. One listing
of a directory checks all files in it, at a third of that cost for each entry.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from pdm.workqueue.helpers.gridftp.connections import parent_path, server_path
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.replies import (
    ListingEntry,
    Reply,
    WrappedEntries,
)
from pdm.workqueue.helpers.storage import FileStat
from pdm.workqueue.wire.agent_requests import CopyItem, PreservedAttribute

#: Files for which one listing of their directory is worth its cost; in a large directory, one for each few entries.
_MIN_FILES_FOR_LISTING, _MAX_FILES_FOR_LISTING, _ENTRIES_FOR_A_FILE = 64, 128, 4
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
        self.attributes = FileStat("file")
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


def base_name(path: bytes) -> bytes:
    """The last component of a path."""
    return path.rpartition(b"/")[2]

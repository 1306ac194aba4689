"""Pipelined copies: many files at once over two control connections, each verified.

Servers receive the commands for the next files while the last are being sent; the data connection persists. A reply can
be assigned to its file only until a transfer fails: after the first failure both connections are closed, and the
running transfers are repeated. Files that fail are left to the fallback (`pdm.workqueue.helpers.copying`), which finds
the reason. A file is reported only after it was verified and renamed.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.copying import temporary_name
from pdm.workqueue.helpers.gridftp.connections import ChannelPool, fits_on_command_line, host_port, server_path
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.copy_checks import DestinationCheck, SourceCheck, ask_checksums
from pdm.workqueue.helpers.gridftp.event_loop import BrokenError, SilenceError, Waker, run_until_answered
from pdm.workqueue.helpers.gridftp.file_commands import PipelinedAttributes, computes_checksums
from pdm.workqueue.helpers.gridftp.pipelined_files import PipelinedFile, SharedListing, base_name
from pdm.workqueue.helpers.gridftp.pipelined_operations import NEW, PipelinedDirectories
from pdm.workqueue.helpers.gridftp.replies import Reply, errno_of_reply
from pdm.workqueue.helpers.gridftp.reply_reader import ChannelError, SilentServerError
from pdm.workqueue.helpers.storage import FileStat, StoppedError, StorageError
from pdm.workqueue.wire.agent_requests import CopyItem, CopyRequest

#: Larger files are copied alone, with progress and a stall timeout of their own.
_LARGEST = 64 * 1024 * 1024
#: Files, and bytes, in flight; the files between servers without latency, and further ones for each second of round
#: trip: a file needs four round trips from its transfer to its name.
_MOST_FILES, _MOST_FILES_A_SECOND, _MOST_BYTES = 256, 8000, 256 * 1024 * 1024
#: Longer round trips mean a busy server, not a distant one.
_LONGEST_ROUND_TRIP_S = 0.25
#: Failed transfers after which the rest of a batch is left to the fallback: each costs two logins.
_MOST_FAILURES = 3
#: Temporary names of an attempt: one for each pair of channels that it opens, the last one for the fallback.
TEMPORARY_NAMES = _MOST_FAILURES + 1
#: A server whose session was cut may still open its file shortly after.
_SETTLE_S = 0.1
#: Seconds for the removal of temporary files after a cancel.
_CLEAN_UP_S = 3.0
_SIZE = re.compile(r"213 ([0-9]{1,19})\Z")


class _TransferError(Exception):
    """A transfer has failed, so later replies on the two channels cannot be matched."""

    def __init__(self, file: PipelinedFile, reply: Reply) -> None:
        super().__init__(reply.text)
        self.file = file


def copy(
    batch: ActiveBatch, request: CopyRequest, items: Iterable[CopyItem], connections: ChannelPool, waker: Waker
) -> list[CopyItem]:
    """Run the pipelined part of a ``copy`` request.

    Args:
        batch: of the request.
        request: the request.
        items: its items without an outcome.
        connections: to the servers.
        waker: wakes the loop when the batch is stopped.

    Returns:
        The items that are left to the fallback.
    """
    left: list[CopyItem] = []
    routes: dict[tuple[str, str], list[PipelinedFile]] = {}
    for item in items:
        file = PipelinedFile(item)
        stale = map(server_path, item.stale)
        if item.size <= _LARGEST and all(
            map(fits_on_command_line, (file.source, file.destination, file.temporary, *stale))
        ):
            routes.setdefault((host_port(item.source), host_port(item.destination)), []).append(file)
        else:
            left.append(item)
    for (source, destination), files in routes.items():
        left += _RouteCopy(batch, request, connections, waker, source, destination).run(files)
    return left


class _RouteCopy:
    """The files of a batch with the same two servers."""

    def __init__(
        self,
        batch: ActiveBatch,
        request: CopyRequest,
        connections: ChannelPool,
        waker: Waker,
        source: str,
        destination: str,
    ) -> None:
        self._batch = batch
        self._connections = connections
        self._waker = waker
        self._addresses = (source, destination)
        self._checksums = request.verify == "checksum"
        self._algorithm = request.checksum
        self._overwrite = request.overwrite
        self._preserve = request.preserve
        self._limits = request.limits
        self._open: dict[int, PipelinedFile] = {}
        #: Number of replaced pairs of channels: each pair has temporary names of its own.
        self._way = 0
        self._ready: collections.deque[PipelinedFile] = collections.deque()
        self._under_way: dict[int, PipelinedFile] = {}
        self._bytes = 0
        # Number of pending replies to RETR and STOR.
        self._moving = 0
        #: Listings that files wait for.
        self._asked: set[SharedListing] = set()
        self._left: list[CopyItem] = []
        self._source: ControlChannel
        self._destination: ControlChannel
        self._attributes: PipelinedAttributes
        #: Checks of the sources' times; None if checksums are compared.
        self._sources: SourceCheck | None = None
        self._most_files = _MOST_FILES

    def run(self, files: list[PipelinedFile]) -> list[CopyItem]:
        """Copy; returns the items that are left."""
        self._open = {file.key: file for file in files}
        failures = 0
        while self._open:
            try:
                self._source, self._destination = self._connections.pair(*self._addresses)
                round_trip_s = max(self._source.round_trip_s, self._destination.round_trip_s)
                self._most_files = _MOST_FILES + int(_MOST_FILES_A_SECOND * min(round_trip_s, _LONGEST_ROUND_TRIP_S))
                self._copy_all()
            except StoppedError:
                self._clean_up()
                return self._left
            except SilentServerError as error:
                for file in list(self._open.values()):
                    self._close(file)
                    is_source = error.address == self._addresses[0]
                    scope = FailureScope.SOURCE if is_source else FailureScope.DESTINATION
                    self._batch.failed(file.key, error.storage_error(scope), leftover=bool(file.used))
            except ChannelError as error:
                # No connection could be opened: the fallback finds the reason.
                self._give_up(str(error))
            except _TransferError as error:
                failures += 1
                self._leave(error.file, f"the transfer failed: {error}")
                self._start_over()
            except BrokenError as error:
                failures += 1
                self._tell(str(error))
                self._start_over()
            except SilenceError as error:
                failures += 1
                self._stalled(str(error))
                self._start_over()
            if failures >= _MOST_FAILURES:
                self._give_up(f"{failures} transfers of the batch failed")
        return self._left

    def _copy_all(self) -> None:
        """Copy all open files on one pair of channels."""
        channels = self._source, self._destination
        if self._checksums and not computes_checksums(self._algorithm, *channels):
            raise ChannelError(f"a server offers no {self._algorithm}")
        self._attributes = PipelinedAttributes(self._preserve, *channels, self._batch.log)
        files = list(self._open.values())
        for file in files:
            file.begin_anew()
        if not self._checksums:
            self._sources = SourceCheck(
                self._source, self._connections.entry_counts, self._needs_second_look, self._proven, self._leave
            )
            self._sources.list_directories(files)
        directories = PipelinedDirectories(self._destination, {file.directory for file in files})
        self._carry_on()
        self._asked.clear()
        check = DestinationCheck(
            channels,
            self._overwrite,
            self._algorithm,
            self._connections.entry_counts,
            self._ready.append,
            self._verify_by_listing,
            self._is_there,
            self._leave,
        )
        by_directory: dict[bytes, list[PipelinedFile]] = collections.defaultdict(list)
        for file in files:
            if not file.over:
                by_directory[file.directory].append(file)
        for directory, some in by_directory.items():
            self._look(directory, some, directories, check)
        self._carry_on()
        self._carry_on(self._refill)

    def _carry_on(self, refill: Callable[[], None] = lambda: None) -> None:
        run_until_answered(
            (self._source, self._destination), self._waker, lambda: self._batch.stopped, refill, self._timeout_s
        )

    def _timeout_s(self) -> float:
        largest = max((file.size for file in self._under_way.values()), default=0)
        return self._limits.stall_s + largest / self._limits.least_rate

    def _look(
        self,
        directory: bytes,
        files: list[PipelinedFile],
        directories: PipelinedDirectories,
        check: DestinationCheck,
    ) -> None:
        state = directories.states.get(directory)
        if state is None:
            for file in files:
                self._leave(file, f"the directory of {file.item.destination} cannot be used")
        elif state == NEW:
            self._verify_by_listing(directory, files)
            self._ready.extend(files)
        else:
            check.look(directory, files, directories.sizes.get(directory, 0))

    def _verify_by_listing(self, directory: bytes, files: Sequence[PipelinedFile]) -> None:
        """Let a listing of their directory, which has hardly any other files, check files after their transfer."""
        if "MLSC" in self._destination.features:
            listing = SharedListing(self._destination, directory, None, self._arrived)
            for file in files:
                file.wait_for(listing)
                file.is_listed = True

    # -- transfer and verification

    def _refill(self) -> None:
        for listing in [each for each in self._asked if each.list_if_due(all_arrived=not self._moving)]:
            self._asked.remove(listing)
        while self._ready and len(self._under_way) < self._most_files:
            if self._under_way and self._bytes + self._ready[0].size > _MOST_BYTES:
                return
            file = self._ready.popleft()
            if self._batch.is_ended(file.key) or not self._batch.started(file.key):
                self._close(file)
                self._batch.cancelled(file.key, leftover=bool(file.used))
            else:
                self._begin(file)

    def _begin(self, file: PipelinedFile) -> None:
        self._under_way[file.key] = file
        self._bytes += file.size
        for stale in file.used:
            self._destination.send(b"DELE " + stale, lambda reply: None)
        file.temporary = server_path(temporary_name(file.item.temporary, self._way))
        file.used.append(file.temporary)
        self._moving += 2
        file.unproven = 2 if file.is_listed else 3

        def transferred(reply: Reply) -> None:
            if not reply.good:
                raise _TransferError(file, reply)
            self._moving -= 1
            self._proven(file)

        def sized(reply: Reply) -> None:
            found = _SIZE.match(reply.text)
            if found is None or int(found.group(1)) != file.size:
                self._leave(file, f"the temporary file does not have {file.size} bytes: {reply.text}")
            self._proven(file)

        self._attributes.read(file)
        self._destination.send(b"STOR " + file.temporary, transferred)
        if self._sources is not None:
            self._sources.look_before(file)
        self._source.send(b"RETR " + file.source, transferred)
        if not file.is_listed:
            self._destination.send(b"SIZE " + file.temporary, sized)
        if self._sources is not None:
            self._sources.look_after(file)
        else:
            self._ask_sums(file)

    def _ask_sums(self, file: PipelinedFile) -> None:
        def summed(checksum: str | None, reply: Reply) -> None:
            if checksum is None or file.checksum not in (None, checksum):
                self._leave(file, f"the checksums are not known to be equal: {file.checksum}, {reply.text}")
            file.checksum = checksum
            self._proven(file)

        file.unproven += 2
        ask_checksums(self._algorithm, self._source, self._destination, file.source, file.temporary, summed)

    def _needs_second_look(self, file: PipelinedFile) -> None:
        """Compare checksums of a source that was written to recently: its mtime may not show a further write."""
        if computes_checksums(self._algorithm, self._source, self._destination):
            self._ask_sums(file)
        else:
            self._leave(file, "the source was written to recently")

    def _proven(self, file: PipelinedFile) -> None:
        """Count a passed check; after the last one the file is renamed."""
        file.unproven -= 1
        if file.unproven or file.over:
            return
        if file.listings:
            listings, file.listings = file.listings, []
            file.unproven = len(listings)
            for listing in listings:
                listing.ask(file)
                self._asked.add(listing)
        elif self._overwrite == "never" and not file.is_listed:
            # The server's rename replaces an existing file silently.
            self._destination.send(b"SIZE " + file.destination, lambda reply: self._rename_if_free(file, reply))
        else:
            self._rename(file)

    def _arrived(self, file: PipelinedFile, entries: Mapping[bytes, FileStat]) -> None:
        """Check a file against a listing of its directory: its size, and that its name is free."""
        there = entries.get(base_name(file.temporary))
        if there is None or there.kind != "file" or there.size != file.size:
            self._leave(file, f"the temporary file does not have {file.size} bytes: {there}")
        elif self._overwrite == "never" and base_name(file.destination) in entries:
            self._leave(file, "its destination exists by now")
        self._proven(file)

    def _rename_if_free(self, file: PipelinedFile, reply: Reply) -> None:
        if errno_of_reply(reply.text) == errno.ENOENT:
            self._rename(file)
        else:
            self._leave(file, f"its destination exists by now: {reply.text}")

    def _rename(self, file: PipelinedFile) -> None:
        def renamed(reply: Reply) -> None:
            if reply.good:
                self._done(file, file.size)
            else:
                self._leave(file, reply.text)

        self._attributes.apply(file)
        self._destination.send(b"RNFR " + file.temporary, lambda reply: None)
        self._destination.send(b"RNTO " + file.destination, renamed)

    # -- outcomes

    def _is_there(self, file: PipelinedFile) -> None:
        """The destination already has the file."""
        if self._preserve:
            self._leave(file, "it is already there, perhaps with other attributes")
            return
        if self._batch.started(file.key):
            what = f"the same size and {self._algorithm}:{file.checksum}"
            self._batch.log(file.key, f"already there: {file.item.destination} has {what}")
        self._done(file, 0, already_there=True)

    def _done(self, file: PipelinedFile, transferred: int, *, already_there: bool = False) -> None:
        self._close(file)
        asked = self._checksums or not transferred
        checksum = f"{self._algorithm}:{file.checksum}" if asked and file.checksum else None
        lacking = tuple(file.not_preserved)
        self._batch.done(file.key, file.size, transferred, checksum, already_there=already_there, not_preserved=lacking)

    def _leave(self, file: PipelinedFile, why: str) -> None:
        """Leave a file to the fallback."""
        if file.over:
            return
        self._close(file)
        if file.used:
            ways = [temporary_name(file.item.temporary, way) for way in range(self._way + 1)]
            file.item = msgspec.structs.replace(file.item, stale=[*file.item.stale, *ways])
        self._batch.log(file.key, f"left to the fallback: {why}")
        self._left.append(file.item)

    def _close(self, file: PipelinedFile) -> None:
        file.over = True
        for listing in file.listings:
            listing.to_come -= 1
        file.listings = []
        del self._open[file.key]
        if self._under_way.pop(file.key, None) is not None:
            self._bytes -= file.size

    def _give_up(self, why: str) -> None:
        for file in list(self._open.values()):
            self._leave(file, why)

    def _tell(self, why: str) -> None:
        """Write a progress line to the log of one of the files."""
        key = next(iter(self._under_way or self._open), None)
        if key is not None:
            self._batch.log(key, why)

    def _stalled(self, why: str) -> None:
        """Fail the first transfer in flight; the next try of the others shows whether they fail, too."""
        self._tell(why)
        file = next(iter(self._under_way.values()), None)
        if file is not None:
            self._close(file)
            self._batch.failed(file.key, StorageError(why, code=FailureCode.STALLED), leftover=True)

    def _start_over(self) -> None:
        """Close both channels. Files in flight stay open; one whose rename was not confirmed is found as existing."""
        self._connections.drop(self._source, self._destination)
        self._ready.clear()
        self._under_way.clear()
        self._bytes = self._moving = 0
        self._way += 1
        time.sleep(_SETTLE_S)

    def _clean_up(self) -> None:
        """After a cancel: remove temporary files on a new channel."""
        begun = [file for file in self._open.values() if file.used]
        self._left += [file.item for file in self._open.values() if not file.used]
        gone: set[bytes] = set()
        if begun:
            self._start_over()
            deadline = time.monotonic() + _CLEAN_UP_S
            # A temporary file that is not in `gone` afterwards is reported as a possible leftover.
            with contextlib.suppress(ChannelError, BrokenError, SilenceError, StoppedError):
                channel = self._connections.single(self._addresses[1])
                for temporary in itertools.chain.from_iterable(file.used for file in begun):
                    channel.send(b"DELE " + temporary, _noting(gone, temporary))
                run_until_answered(
                    (channel,), self._waker, lambda: time.monotonic() > deadline, lambda: None, lambda: 1.0
                )
        for file in begun:
            self._batch.cancelled(file.key, leftover=not gone.issuperset(file.used))


def _noting(gone: set[bytes], temporary: bytes) -> Callable[[Reply], None]:
    def answered(reply: Reply) -> None:
        if reply.good or errno_of_reply(reply.text) == errno.ENOENT:
            gone.add(temporary)

    return answered

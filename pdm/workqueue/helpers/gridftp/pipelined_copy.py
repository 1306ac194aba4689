"""Pipelined copies: many files at once over two control connections, each verified.

Servers receive the commands for the next files while the last are being sent; the data connection persists. A reply is
known to belong to a file only while nothing has failed: after the first failed transfer both connections are dropped,
and the transfers that were under way are repeated. Files that fail are left to the fallback
(`pdm.workqueue.helpers.copying`), which finds the reason. A file is reported only once it is verified and has
its final name.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.copying import CHANGED, temporary_name
from pdm.workqueue.helpers.gridftp.connections import (
    BrokenError,
    ChannelPool,
    SilenceError,
    Waker,
    fits_on_command_line,
    host_port,
    parent_path,
    run_until_answered,
    server_path,
)
from pdm.workqueue.helpers.gridftp.control import ChannelError, ControlChannel, SilentServerError
from pdm.workqueue.helpers.gridftp.pipelined_operations import NEW, NewDirectory, PipelinedDirectories
from pdm.workqueue.helpers.gridftp.replies import Reply, errno_of_reply, file_stat_in, may_hide_writes
from pdm.workqueue.helpers.storage import StoppedError, StorageError
from pdm.workqueue.wire.agent_messages import CopyItem, CopyRequest

#: Larger files go alone, with progress and their own watch.
_LARGEST = 64 * 1024 * 1024
#: Files, and bytes, that may be on their way at once.
_MOST_FILES, _MOST_BYTES = 128, 256 * 1024 * 1024
#: Failures of transfers after which the rest of a batch is left to the careful way: each costs two logins.
_MOST_FAILURES = 3
#: Every temporary name that an attempt may use: one each time both channels are opened, the last for the careful way.
TEMPORARY_NAMES = _MOST_FAILURES + 1
#: A server whose session was cut may open its file a moment later.
_SETTLE_S = 0.1
#: Seconds that removing what a cancelled batch left may take.
_CLEAN_UP_S = 3.0
_CKSM = b"CKSM ADLER32 0 -1 "
_CHECKSUM = re.compile(r"213 ([0-9a-fA-F]{1,8})\Z")
_SIZE = re.compile(r"213 ([0-9]{1,19})\Z")


class _PipelinedFile:
    """One file of the batch.

    Attributes:
        temporary: the name under which it arrives this time.
        used: the names under which something of it may be.
        version: what the source's server said of it before the transfer.
        checksum: what one side has told, until the other has told the same.
        unproven: answers still to come before it is proven.
        over: whether it has an outcome here, or was left to the careful way; later answers change nothing.
        folder_listing: shows its size, and that its name is free, with those of others; None if it is looked at alone.
    """

    __slots__ = (
        *("checksum", "destination", "folder", "folder_listing", "item", "key", "over", "size", "source"),
        *("temporary", "unproven", "used", "version"),
    )

    def __init__(self, item: CopyItem) -> None:
        self.item = item
        self.key = item.key
        self.size = item.size
        self.source = server_path(item.source)
        self.destination = server_path(item.destination)
        self.temporary = server_path(item.temporary)
        self.folder = parent_path(self.destination)
        self.used: list[bytes] = []
        self.version: str | None = None
        self.checksum: str | None = None
        self.unproven = 0
        self.over = False
        self.folder_listing: NewDirectory | None = None


class _TransferError(Exception):
    """A transfer has failed, and with it the pairing of the two channels."""

    def __init__(self, file: _PipelinedFile, reply: Reply) -> None:
        super().__init__(reply.text)
        self.file = file


def copy(
    batch: ActiveBatch, request: CopyRequest, items: Iterable[CopyItem], connections: ChannelPool, waker: Waker
) -> list[CopyItem]:
    """Carry out as much of a ``copy`` request as goes well.

    Args:
        batch: of the request.
        request: what is asked for.
        items: of the request that have no outcome so far.
        connections: to the servers.
        waker: is woken when the batch is stopped.

    Returns:
        The items that are left for the careful way.
    """
    left: list[CopyItem] = []
    routes: dict[tuple[str, str], list[_PipelinedFile]] = {}
    for item in items:
        file = _PipelinedFile(item)
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
    """The files of a batch that go from one server to another."""

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
        self._overwrite = request.overwrite
        self._limits = request.limits
        self._open: dict[int, _PipelinedFile] = {}
        #: How often both channels were given up: each time has temporary names of its own.
        self._way = 0
        self._ready: collections.deque[_PipelinedFile] = collections.deque()
        self._under_way: dict[int, _PipelinedFile] = {}
        self._bytes = 0
        # Answers to RETR and STOR that are still to come.
        self._moving = 0
        #: New folders about which files have asked.
        self._asked: set[NewDirectory] = set()
        self._left: list[CopyItem] = []
        self._source: ControlChannel
        self._destination: ControlChannel

    def run(self, files: list[_PipelinedFile]) -> list[CopyItem]:
        """Copy; returns the items that are left."""
        self._open = {file.key: file for file in files}
        failures = 0
        while self._open:
            try:
                self._source, self._destination = self._connections.pair(*self._addresses)
                self._copy_all()
            except StoppedError:
                self._clean_up()
                return self._left
            except SilentServerError as error:
                for file in list(self._open.values()):
                    self._close(file)
                    is_source = error.address == self._addresses[0]
                    scope = FailureScope.SOURCE if is_source else FailureScope.DESTINATION
                    self._batch.failed(file.key, error.storage_error(scope), residue=bool(file.used))
            except ChannelError as error:
                # There is no connection to be had: the careful way finds out why.
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
        """Do all that is open on one pair of channels."""
        files = list(self._open.values())
        if self._checksums and not self._can_sum():
            raise ChannelError("a server offers no ADLER32")
        folders = PipelinedDirectories(self._destination, {file.folder for file in files})
        self._carry_on()
        self._find_new_folders(files, folders)
        for file in files:
            self._look(file, folders)
        self._carry_on()
        self._carry_on(self._refill)

    def _find_new_folders(self, files: list[_PipelinedFile], folders: PipelinedDirectories) -> None:
        """Tell files whose folder the batch has made, and which holds little else than them."""
        self._asked.clear()
        listings: dict[bytes, NewDirectory] = {}
        for file in files:
            file.folder_listing = None
            if folders.states.get(file.folder) == NEW and "MLSC" in self._destination.features:
                listing = listings.setdefault(file.folder, NewDirectory(self._destination, file.folder))
                listing.to_come += 1
                file.folder_listing = listing

    def _can_sum(self) -> bool:
        return all("ADLER32" in channel.features.get("CKSM", "") for channel in (self._source, self._destination))

    def _carry_on(self, refill: Callable[[], None] = lambda: None) -> None:
        run_until_answered(
            (self._source, self._destination), self._waker, lambda: self._batch.stopped, refill, self._timeout_s
        )

    def _timeout_s(self) -> float:
        largest = max((file.size for file in self._under_way.values()), default=0)
        return self._limits.stall_s + largest / self._limits.least_rate

    # -- before a transfer: is something there?

    def _look(self, file: _PipelinedFile, folders: PipelinedDirectories) -> None:
        state = folders.states.get(file.folder)
        if state is None:
            self._leave(file, f"the folder of {file.item.destination} cannot be used")
        elif state == NEW:
            self._ready.append(file)
        else:
            for stale in file.item.stale:
                self._destination.send(b"DELE " + server_path(stale), lambda reply: None)
            self._destination.send(b"MLST " + file.destination, lambda reply: self._looked(file, reply))

    def _looked(self, file: _PipelinedFile, reply: Reply) -> None:
        if not reply.good:
            if errno_of_reply(reply.text) == errno.ENOENT:
                self._ready.append(file)
            else:
                self._leave(file, reply.text)
            return
        there = file_stat_in(reply)
        if there is None or there.kind != "file":
            self._leave(file, "something else is at the destination")
        elif self._overwrite == "always":
            self._ready.append(file)
        elif there.size != file.size:
            self._is_another(file)
        else:
            self._compare(file)

    def _compare(self, file: _PipelinedFile) -> None:
        sums: list[str | None] = []

        def summed(reply: Reply) -> None:
            sums.append(_sum_in(reply))
            if len(sums) < 2:
                return
            first, second = sums
            if first is None or second is None:
                self._leave(file, reply.text)
            elif first == second:
                file.checksum = first
                if self._batch.started(file.key):
                    self._batch.log(
                        file.key, f"already there: {file.item.destination} has the same size and ADLER32:{first}"
                    )
                self._done(file, 0, already_there=True)
            else:
                self._is_another(file)

        if not self._can_sum():
            self._leave(file, "a server offers no checksums")
            return
        self._source.send(_CKSM + file.source, summed)
        self._destination.send(_CKSM + file.destination, summed)

    def _is_another(self, file: _PipelinedFile) -> None:
        if self._overwrite == "different":
            self._ready.append(file)
        else:
            self._leave(file, "another file is at the destination")

    # -- the transfer and its proof

    def _refill(self) -> None:
        for listing in [each for each in self._asked if each.look_if_due(all_arrived=not self._moving)]:
            self._asked.remove(listing)
        while self._ready and len(self._under_way) < _MOST_FILES:
            if self._under_way and self._bytes + self._ready[0].size > _MOST_BYTES:
                return
            file = self._ready.popleft()
            if self._batch.is_ended(file.key) or not self._batch.started(file.key):
                self._close(file)
                self._batch.cancelled(file.key, residue=bool(file.used))
            else:
                self._begin(file)

    def _begin(self, file: _PipelinedFile) -> None:
        self._under_way[file.key] = file
        self._bytes += file.size
        for stale in file.used:
            self._destination.send(b"DELE " + stale, lambda reply: None)
        file.temporary = server_path(temporary_name(file.item.temporary, self._way))
        file.used.append(file.temporary)
        file.checksum = file.version = None
        self._moving += 2
        file.unproven = 2 if file.folder_listing else 3

        def transferred(reply: Reply) -> None:
            if not reply.good:
                raise _TransferError(file, reply)
            self._moving -= 1
            self._proven(file)

        def sized(reply: Reply) -> None:
            found = _SIZE.match(reply.text)
            if found is None or int(found.group(1)) != file.size:
                self._leave(file, f"what arrived has not {file.size} bytes: {reply.text}")
            self._proven(file)

        self._destination.send(b"STOR " + file.temporary, transferred)
        self._ask_version(file, self._versioned)
        self._source.send(b"RETR " + file.source, transferred)
        if file.folder_listing is None:
            self._destination.send(b"SIZE " + file.temporary, sized)
        if self._checksums:
            self._ask_sums(file)
        self._ask_version(file, self._versioned_again)

    def _ask_sums(self, file: _PipelinedFile) -> None:
        def summed(reply: Reply) -> None:
            checksum = _sum_in(reply)
            if checksum is None or file.checksum not in (None, checksum):
                self._leave(file, f"the checksums are not known to be equal: {file.checksum}, {reply.text}")
            file.checksum = checksum
            self._proven(file)

        file.unproven += 2
        self._source.send(_CKSM + file.source, summed)
        self._destination.send(_CKSM + file.temporary, summed)

    # -- whether the source was written to meanwhile

    def _ask_version(self, file: _PipelinedFile, answered: Callable[[_PipelinedFile, Reply], None]) -> None:
        # One short line for each, in the row of the others: the listing that gave the size has its time no more.
        if "MDTM" in self._source.features:
            file.unproven += 1
            self._source.send(b"MDTM " + file.source, lambda reply: answered(file, reply))

    def _versioned(self, file: _PipelinedFile, reply: Reply) -> None:
        file.version = reply.text
        if not self._checksums and may_hide_writes(reply.text):
            # Only checksums can tell a copy of it from a torn one.
            if self._can_sum():
                self._ask_sums(file)
            else:
                self._leave(file, "the source was written to just now")
        self._proven(file)

    def _versioned_again(self, file: _PipelinedFile, reply: Reply) -> None:
        if not reply.good or reply.text != file.version:
            self._leave(file, CHANGED)
        self._proven(file)

    def _proven(self, file: _PipelinedFile) -> None:
        """Count one more answer that is as it must be; with the last of them the file gets its name."""
        file.unproven -= 1
        if file.unproven or file.over:
            return
        if file.folder_listing is not None:
            self._show(file, file.folder_listing)
            return

        def nothing_there(reply: Reply) -> None:
            if errno_of_reply(reply.text) == errno.ENOENT:
                self._rename(file)
            else:
                self._leave(file, f"something has come to its destination: {reply.text}")

        if self._overwrite == "never":
            # The server's rename replaces what is there without a word.
            self._destination.send(b"SIZE " + file.destination, nothing_there)
        else:
            self._rename(file)

    def _show(self, file: _PipelinedFile, listing: NewDirectory) -> None:
        """Have a file proven by the listing of its folder, with others."""

        def shown(sizes: Mapping[bytes, int | None]) -> None:
            if file.over:
                return
            size = sizes.get(file.temporary.rpartition(b"/")[2])
            if size != file.size:
                self._leave(file, f"what arrived has not {file.size} bytes: {size}")
            elif self._overwrite == "never" and file.destination.rpartition(b"/")[2] in sizes:
                self._leave(file, "something has come to its destination")
            else:
                self._rename(file)

        file.folder_listing = None
        listing.ask(shown)
        self._asked.add(listing)

    def _rename(self, file: _PipelinedFile) -> None:
        def renamed(reply: Reply) -> None:
            if reply.good:
                self._done(file, file.size)
            else:
                self._leave(file, reply.text)

        self._destination.send(b"RNFR " + file.temporary, lambda reply: None)
        self._destination.send(b"RNTO " + file.destination, renamed)

    # -- outcomes

    def _done(self, file: _PipelinedFile, transferred: int, *, already_there: bool = False) -> None:
        self._close(file)
        asked = self._checksums or not transferred
        checksum = f"ADLER32:{file.checksum}" if asked and file.checksum else None
        self._batch.done(file.key, file.size, transferred, checksum, already_there=already_there)

    def _leave(self, file: _PipelinedFile, why: str) -> None:
        """Leave a file to the careful way."""
        if file.over:
            return
        self._close(file)
        if file.used:
            ways = [temporary_name(file.item.temporary, way) for way in range(self._way + 1)]
            file.item = msgspec.structs.replace(file.item, stale=[*file.item.stale, *ways])
        self._batch.log(file.key, f"to be done with care: {why}")
        self._left.append(file.item)

    def _close(self, file: _PipelinedFile) -> None:
        file.over = True
        if file.folder_listing is not None:
            file.folder_listing.to_come -= 1
        del self._open[file.key]
        if self._under_way.pop(file.key, None) is not None:
            self._bytes -= file.size

    def _give_up(self, why: str) -> None:
        for file in list(self._open.values()):
            self._leave(file, why)

    def _tell(self, why: str) -> None:
        """Give a sign of life, in the log of one of the files."""
        key = next(iter(self._under_way or self._open), None)
        if key is not None:
            self._batch.log(key, why)

    def _stalled(self, why: str) -> None:
        """Let the first of those under way fail; whether the others were at fault their next try shows."""
        self._tell(why)
        file = next(iter(self._under_way.values()), None)
        if file is not None:
            self._close(file)
            self._batch.failed(file.key, StorageError(why, code=FailureCode.STALLED), residue=True)

    def _start_over(self) -> None:
        """Give up both channels; what was on its way is open still, and what was renamed unheard shows as there."""
        self._connections.drop(self._source, self._destination)
        self._ready.clear()
        self._under_way.clear()
        self._bytes = self._moving = 0
        self._way += 1
        time.sleep(_SETTLE_S)

    def _clean_up(self) -> None:
        """After a cancel: remove what is under temporary names, on a new channel."""
        begun = [file for file in self._open.values() if file.used]
        self._left += [file.item for file in self._open.values() if not file.used]
        gone: set[bytes] = set()
        if begun:
            self._start_over()
            deadline = time.monotonic() + _CLEAN_UP_S
            # What is not in `gone` afterwards may have been left, and is told so.
            with contextlib.suppress(ChannelError, BrokenError, SilenceError, StoppedError):
                channel = self._connections.single(self._addresses[1])
                for temporary in itertools.chain.from_iterable(file.used for file in begun):
                    channel.send(b"DELE " + temporary, _noting(gone, temporary))
                run_until_answered(
                    (channel,), self._waker, lambda: time.monotonic() > deadline, lambda: None, lambda: 1.0
                )
        for file in begun:
            self._batch.cancelled(file.key, residue=not gone.issuperset(file.used))


def _noting(gone: set[bytes], temporary: bytes) -> Callable[[Reply], None]:
    def answered(reply: Reply) -> None:
        if reply.good or errno_of_reply(reply.text) == errno.ENOENT:
            gone.add(temporary)

    return answered


def _sum_in(reply: Reply) -> str | None:
    """The checksum that a CKSM tells, 8 hex digits; None if it tells none."""
    found = _CHECKSUM.match(reply.text)
    return found.group(1).lower().zfill(8) if found is not None else None

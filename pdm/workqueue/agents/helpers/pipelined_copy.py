"""Copies many files at once over two control channels, and proves each: the fast way, for all that goes well.

The servers are told of the next files while the last are on their way; the data connection stays. What a server says
about one file is known to be about that file only while nothing has failed: after the first failed transfer both
channels are given up, and what was on its way is done again. Whatever does not go well is left to the careful way
(`pdm.workqueue.agents.helpers.copying`), which finds out what is wrong. A file is reported only once it is proven and
has its final name.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pdm.workqueue.agents.helpers.channel import Batch
from pdm.workqueue.agents.helpers.connections import Connections, can_be_said, parent_of, path_of, place_of
from pdm.workqueue.agents.helpers.control_channel import ChannelError, ControlChannel, Reply, SilentServerError
from pdm.workqueue.agents.helpers.pipeline import BrokenError, SilenceError, Waker, carry_on
from pdm.workqueue.agents.helpers.pipelined_folders import NEW, Folders, NewFolder
from pdm.workqueue.agents.helpers.replies import errno_of_reply, thing_in
from pdm.workqueue.agents.helpers.storage import StoppedError, StorageError

#: Larger files go alone, with progress and their own watch.
_LARGEST = 64 * 1024 * 1024
#: Files, and bytes, that may be on their way at once.
_MOST_FILES, _MOST_BYTES = 128, 256 * 1024 * 1024
#: Failures of transfers after which the rest of a batch is left to the careful way: each costs two logins.
_MOST_FAILURES = 3
#: A server whose session was cut may open its file a moment later.
_SETTLE_S = 0.1
#: Seconds that removing what a cancelled batch left may take.
_CLEAN_UP_S = 3.0
_CKSM = b"CKSM ADLER32 0 -1 "
_CHECKSUM = re.compile(r"213 ([0-9a-fA-F]{1,8})\Z")
_SIZE = re.compile(r"213 ([0-9]{1,19})\Z")


class _File:
    """One file of the batch.

    Attributes:
        moving: whether something of it may be under the temporary name.
        checksum: what one side has told, until the other has told the same.
        unproven: answers still to come before it is proven.
        over: whether it has an outcome here, or was left to the careful way; later answers change nothing.
        folder_listing: shows its size, and that its name is free, with those of others; None if it is looked at alone.
    """

    __slots__ = (
        *("checksum", "destination", "folder", "folder_listing", "item", "key", "moving", "over", "size", "source"),
        *("temporary", "unproven"),
    )

    def __init__(self, item: dict[str, Any]) -> None:
        self.item = item
        self.key: int = item["key"]
        self.size: int = item["size"]
        self.source = path_of(item["source"])
        self.destination = path_of(item["destination"])
        self.temporary = path_of(item["temporary"])
        self.folder = parent_of(self.destination)
        self.moving = False
        self.checksum: str | None = None
        self.unproven = 0
        self.over = False
        self.folder_listing: NewFolder | None = None


class _TransferError(Exception):
    """A transfer has failed, and with it the pairing of the two channels."""

    def __init__(self, file: _File, reply: Reply) -> None:
        super().__init__(reply.text)
        self.file = file


def copy(batch: Batch, items: Iterable[dict[str, Any]], connections: Connections, waker: Waker) -> list[dict[str, Any]]:
    """Carry out as much of a ``copy`` request as goes well.

    Args:
        batch: of the request.
        items: of the request that have no outcome so far.
        connections: to the servers.
        waker: is woken when the batch is stopped.

    Returns:
        The items that are left for the careful way.
    """
    left: list[dict[str, Any]] = []
    routes: dict[tuple[str, str], list[_File]] = {}
    for item in items:
        file = _File(item)
        stale = map(path_of, item["stale"])
        if item["size"] <= _LARGEST and all(map(can_be_said, (file.source, file.destination, file.temporary, *stale))):
            routes.setdefault((place_of(item["source"]), place_of(item["destination"])), []).append(file)
        else:
            left.append(item)
    for (source, destination), files in routes.items():
        left += _Route(batch, connections, waker, source, destination).run(files)
    return left


class _Route:
    """The files of a batch that go from one server to another."""

    def __init__(self, batch: Batch, connections: Connections, waker: Waker, source: str, destination: str) -> None:
        self._batch = batch
        self._connections = connections
        self._waker = waker
        self._places = (source, destination)
        self._checksums = batch.request["verify"] == "checksum"
        self._overwrite: str = batch.request["overwrite"]
        self._limits: dict[str, Any] = batch.request["limits"]
        self._open: dict[int, _File] = {}
        self._ready: collections.deque[_File] = collections.deque()
        self._under_way: dict[int, _File] = {}
        self._bytes = 0
        # Answers to RETR and STOR that are still to come.
        self._moving = 0
        #: New folders about which files have asked.
        self._asked: set[NewFolder] = set()
        self._left: list[dict[str, Any]] = []
        self._source: ControlChannel
        self._destination: ControlChannel

    def run(self, files: list[_File]) -> list[dict[str, Any]]:
        """Copy; returns the items that are left."""
        self._open = {file.key: file for file in files}
        failures = 0
        while self._open:
            try:
                self._source, self._destination = self._connections.pair(*self._places)
                self._copy_all()
            except StoppedError:
                self._clean_up()
                return self._left
            except SilentServerError as error:
                for file in list(self._open.values()):
                    self._close(file)
                    scope = "source" if error.place == self._places[0] else "destination"
                    self._batch.failed(file.key, error.trouble(scope), residue=file.moving)
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
        folders = Folders(self._destination, {file.folder for file in files})
        self._carry_on()
        self._find_new_folders(files, folders)
        for file in files:
            self._look(file, folders)
        self._carry_on()
        self._carry_on(self._refill)

    def _find_new_folders(self, files: list[_File], folders: Folders) -> None:
        """Tell files whose folder the batch has made, and which holds little else than them."""
        self._asked.clear()
        listings: dict[bytes, NewFolder] = {}
        for file in files:
            file.folder_listing = None
            if folders.states.get(file.folder) == NEW and "MLSC" in self._destination.features:
                listing = listings.setdefault(file.folder, NewFolder(self._destination, file.folder))
                listing.to_come += 1
                file.folder_listing = listing

    def _can_sum(self) -> bool:
        return all("ADLER32" in channel.features.get("CKSM", "") for channel in (self._source, self._destination))

    def _carry_on(self, refill: Callable[[], None] = lambda: None) -> None:
        carry_on((self._source, self._destination), self._waker, lambda: self._batch.stopped, refill, self._patience_s)

    def _patience_s(self) -> float:
        largest = max((file.size for file in self._under_way.values()), default=0)
        return float(self._limits.get("stall_s", 120.0)) + largest / float(self._limits.get("least_rate", 500_000.0))

    # -- before a transfer: is something there?

    def _look(self, file: _File, folders: Folders) -> None:
        state = folders.states.get(file.folder)
        if state is None:
            self._leave(file, f"the folder of {file.item['destination']} cannot be used")
        elif state == NEW:
            self._ready.append(file)
        else:
            for stale in file.item["stale"]:
                self._destination.send(b"DELE " + path_of(stale), lambda reply: None)
            self._destination.send(b"MLST " + file.destination, lambda reply: self._looked(file, reply))

    def _looked(self, file: _File, reply: Reply) -> None:
        if not reply.good:
            if errno_of_reply(reply.text) == errno.ENOENT:
                self._ready.append(file)
            else:
                self._leave(file, reply.text)
            return
        there = thing_in(reply)
        if there is None or there.kind != "file":
            self._leave(file, "something else is at the destination")
        elif self._overwrite == "always":
            self._ready.append(file)
        elif there.size != file.size:
            self._is_another(file)
        else:
            self._compare(file)

    def _compare(self, file: _File) -> None:
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
                        file.key, f"already there: {file.item['destination']} has the same size and ADLER32:{first}"
                    )
                self._done(file, 0, already_there=True)
            else:
                self._is_another(file)

        if not self._can_sum():
            self._leave(file, "a server offers no checksums")
            return
        self._source.send(_CKSM + file.source, summed)
        self._destination.send(_CKSM + file.destination, summed)

    def _is_another(self, file: _File) -> None:
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
                self._batch.cancelled(file.key, residue=file.moving)
            else:
                self._begin(file)

    def _begin(self, file: _File) -> None:
        self._under_way[file.key] = file
        self._bytes += file.size
        file.moving = True
        file.checksum = None
        self._moving += 2
        file.unproven = (2 if file.folder_listing else 3) + (2 if self._checksums else 0)

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

        def summed(reply: Reply) -> None:
            checksum = _sum_in(reply)
            if checksum is None or file.checksum not in (None, checksum):
                self._leave(file, f"the checksums are not known to be equal: {file.checksum}, {reply.text}")
            file.checksum = checksum
            self._proven(file)

        self._destination.send(b"STOR " + file.temporary, transferred)
        self._source.send(b"RETR " + file.source, transferred)
        if file.folder_listing is None:
            self._destination.send(b"SIZE " + file.temporary, sized)
        if self._checksums:
            self._source.send(_CKSM + file.source, summed)
            self._destination.send(_CKSM + file.temporary, summed)

    def _proven(self, file: _File) -> None:
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

    def _show(self, file: _File, listing: NewFolder) -> None:
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

    def _rename(self, file: _File) -> None:
        def renamed(reply: Reply) -> None:
            if reply.good:
                self._done(file, file.size)
            else:
                self._leave(file, reply.text)

        self._destination.send(b"RNFR " + file.temporary, lambda reply: None)
        self._destination.send(b"RNTO " + file.destination, renamed)

    # -- outcomes

    def _done(self, file: _File, transferred: int, *, already_there: bool = False) -> None:
        self._close(file)
        checksum = f"ADLER32:{file.checksum}" if file.checksum else None
        self._batch.done(file.key, file.size, transferred, checksum, already_there=already_there)

    def _leave(self, file: _File, why: str) -> None:
        """Leave a file to the careful way."""
        if file.over:
            return
        self._close(file)
        if file.moving:
            file.item["stale"] = [*file.item["stale"], file.item["temporary"]]
        self._batch.log(file.key, f"to be done with care: {why}")
        self._left.append(file.item)

    def _close(self, file: _File) -> None:
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
            self._batch.failed(file.key, StorageError(why, code="STALLED"), residue=True)

    def _start_over(self) -> None:
        """Give up both channels; what was on its way is open still, and what was renamed unheard shows as there."""
        self._connections.drop(self._source, self._destination)
        self._ready.clear()
        self._under_way.clear()
        self._bytes = self._moving = 0
        time.sleep(_SETTLE_S)

    def _clean_up(self) -> None:
        """After a cancel: remove what is under temporary names, on a new channel."""
        begun = [file for file in self._open.values() if file.moving]
        self._left += [file.item for file in self._open.values() if not file.moving]
        gone: set[int] = set()
        if begun:
            self._start_over()
            deadline = time.monotonic() + _CLEAN_UP_S
            # Who is not in `gone` afterwards may have left something, and says so.
            with contextlib.suppress(ChannelError, BrokenError, SilenceError, StoppedError):
                channel = self._connections.single(self._places[1])
                for file in begun:
                    channel.send(b"DELE " + file.temporary, _noting(gone, file.key))
                carry_on((channel,), self._waker, lambda: time.monotonic() > deadline, lambda: None, lambda: 1.0)
        for file in begun:
            self._batch.cancelled(file.key, residue=file.key not in gone)


def _noting(gone: set[int], key: int) -> Callable[[Reply], None]:
    def answered(reply: Reply) -> None:
        if reply.good or errno_of_reply(reply.text) == errno.ENOENT:
            gone.add(key)

    return answered


def _sum_in(reply: Reply) -> str | None:
    """The checksum that a CKSM tells, 8 hex digits; None if it tells none."""
    found = _CHECKSUM.match(reply.text)
    return found.group(1).lower().zfill(8) if found is not None else None

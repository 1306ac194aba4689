"""Pipelined listings, removals and creation of directories over one control connection.

`PipelinedDirectories` creates the directories that copies are written to; `carry_out` runs remove and mkdir requests,
`list_tree` list requests. Items that fail are left to the fallback.
"""

from __future__ import annotations

import collections
import errno
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.gridftp.connections import (
    FACTS,
    FACTS_WITH_OWNERS,
    ChannelPool,
    fits_on_command_line,
    host_port,
    parent_path,
    server_path,
)
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.event_loop import BrokenError, SilenceError, Waker, run_until_answered
from pdm.workqueue.helpers.gridftp.replies import (
    ListingEntry,
    Reply,
    WrappedEntries,
    errno_of_reply,
    file_stat_in,
    size_of_directory_in,
)
from pdm.workqueue.helpers.gridftp.reply_reader import ChannelError, SilentServerError
from pdm.workqueue.helpers.listing import DirectoryEntries, EntryReporter, directory_url, is_listed, report_alone
from pdm.workqueue.helpers.operations import check_unchanged_since_listing, must_recheck
from pdm.workqueue.helpers.storage import StoppedError, StorageError
from pdm.workqueue.wire.agent_requests import ListRequest, MkdirRequest, PathItem, RemoveRequest

#: States of a usable directory.
NEW, THERE = "new", "there"


class PipelinedDirectories:
    """Makes missing destination directories.

    Attributes:
        states: whether each usable directory is new, or existed before.
        sizes: bytes that the server reports for each directory that existed before.
    """

    def __init__(self, channel: ControlChannel, directories: set[bytes]) -> None:
        self._channel = channel
        self.states: dict[bytes, str] = {}
        self.sizes: dict[bytes, int] = {}
        #: Callbacks for when a directory exists.
        self._then: dict[bytes, list[Callable[[], None]]] = {}
        for directory in sorted(directories):
            self._make(directory, lambda: None)

    def _make(self, directory: bytes, then: Callable[[], None]) -> None:
        if directory in self.states:
            then()
        elif directory in self._then:
            self._then[directory].append(then)
        else:
            self._then[directory] = [then]
            self._ask(directory, may_lack_parent=True)

    def _ask(self, directory: bytes, *, may_lack_parent: bool) -> None:
        def made(reply: Reply) -> None:
            number = None if reply.good else errno_of_reply(reply.text)
            if reply.good:
                self._is(directory, NEW)
            elif number == errno.EEXIST:
                self._channel.send(b"MLST " + directory, looked)
            elif number == errno.ENOENT and may_lack_parent and parent_path(directory) != directory:
                self._make(parent_path(directory), lambda: self._ask(directory, may_lack_parent=False))

        def looked(reply: Reply) -> None:
            there = file_stat_in(reply)
            if there is not None and "directory" in (there.kind, there.target_kind):
                self.sizes[directory] = size_of_directory_in(reply)
                self._is(directory, THERE)

        if directory in (b"/", b"~"):
            self._is(directory, THERE)
        else:
            self._channel.send(b"MKD " + directory, made)

    def _is(self, directory: bytes, state: str) -> None:
        self.states[directory] = state
        for then in self._then[directory]:
            then()
        self._then[directory].clear()


#: Maximum commands in flight.
_MOST_UNDER_WAY = 256


def carry_out(
    batch: ActiveBatch, request: RemoveRequest | MkdirRequest, connections: ChannelPool, waker: Waker
) -> list[PathItem]:
    """Run the pipelined part of a ``remove`` or ``mkdir`` request.

    Args:
        batch: of the request.
        request: the request; its items have no outcome.
        connections: to the servers.
        waker: wakes the loop when the batch is stopped.

    Returns:
        The items that are left to the fallback; those that may be done already have ``again`` set.
    """
    left: list[PathItem] = []
    addresses: dict[str, list[PathItem]] = {}
    for item in request.items:
        if fits_on_command_line(server_path(item.url)):
            addresses.setdefault(host_port(item.url), []).append(item)
        else:
            left.append(item)
    for address, some in addresses.items():
        left += _PipelinedItems(batch, request, some).on(connections, address, waker)
    return left


class _PipelinedItems:
    def __init__(self, batch: ActiveBatch, request: RemoveRequest | MkdirRequest, items: Iterable[PathItem]) -> None:
        self._batch = batch
        self._removes = isinstance(request, RemoveRequest)
        self._waiting = collections.deque(items)
        self._under_way: collections.deque[PathItem] = collections.deque()
        #: Items that are checked before they are removed, by key.
        self._looked_at: dict[int, PathItem] = {}
        self._left: list[PathItem] = []

    def on(self, connections: ChannelPool, address: str, waker: Waker) -> list[PathItem]:
        stall_s = self._batch.request.limits.stall_s
        try:
            channel = connections.single(address)
        except SilentServerError as error:
            for item in self._waiting:
                self._batch.failed(item.key, error.storage_error(item.scope))
            return []
        except ChannelError:
            return list(self._waiting)
        try:
            run_until_answered(
                (channel,), waker, lambda: self._batch.stopped, lambda: self._refill(channel), lambda: stall_s
            )
        except (ChannelError, BrokenError, SilenceError, StoppedError):
            connections.drop(channel)
            self._under_way = collections.deque(replace(item, again=True) for item in self._under_way)
        return [*self._left, *self._looked_at.values(), *self._under_way, *self._waiting]

    def _refill(self, channel: ControlChannel) -> None:
        while self._waiting and len(self._under_way) + len(self._looked_at) < _MOST_UNDER_WAY:
            item = self._waiting.popleft()
            if not self._batch.started(item.key):
                continue
            if self._removes and must_recheck(item):
                self._look(channel, item)
            else:
                self._carry_out(channel, item)

    def _look(self, channel: ControlChannel, item: PathItem) -> None:
        self._looked_at[item.key] = item

        def looked(reply: Reply) -> None:
            del self._looked_at[item.key]
            there = file_stat_in(reply)
            try:
                if there is None:
                    raise StorageError(reply.text)
                check_unchanged_since_listing(item, there)
            except StorageError:
                # The fallback finds and reports the reason.
                self._left.append(item)
            else:
                self._carry_out(channel, item)

        channel.send(b"MLST " + server_path(item.url), looked)

    def _carry_out(self, channel: ControlChannel, item: PathItem) -> None:
        self._under_way.append(item)
        channel.send(self._command(item) + server_path(item.url), self._answered)

    def _command(self, item: PathItem) -> bytes:
        if not self._removes:
            return b"MKD "
        return b"RMD " if item.directory else b"DELE "

    def _answered(self, reply: Reply) -> None:
        item = self._under_way.popleft()
        if reply.good:
            self._batch.done(item.key)
        else:
            self._left.append(item)


#: Maximum listings in flight: at a near server, and at a distant one.
_MOST_DIRECTORIES, _MOST_DIRECTORIES_FAR_AWAY, _FAR_AWAY_S = 16, 256, 0.005


def list_tree(batch: ActiveBatch, request: ListRequest, connections: ChannelPool, waker: Waker) -> list[str] | None:
    """Run the pipelined part of a ``list`` request.

    Args:
        batch: of the request.
        request: the request.
        connections: to the server.
        waker: wakes the loop when the batch is stopped.

    Returns:
        Directories that are left to the fallback, percent-encoded, relative to the URL; None for the whole tree.

    Raises:
        StoppedError: the batch was stopped.
        StorageError: the tree cannot be listed.
    """
    url = request.url
    root = server_path(StorageUrl(url).without_slash)
    if not fits_on_command_line(root):
        return None
    try:
        channel = connections.single(host_port(url))
    except SilentServerError as error:
        raise error.storage_error(batch.listed_scope) from None
    except ChannelError:
        return None
    if "MLSC" not in channel.features:
        return None
    tree = _PipelinedListing(batch, request, channel)
    try:
        looks: list[Reply] = []
        if request.owners:
            channel.send(FACTS_WITH_OWNERS, lambda _: None)
        channel.send(b"MLST " + root, looks.append)
        tree.carry_on(waker)
        there = file_stat_in(looks[0])
        is_tree = looks[0].good and there is not None and is_listed(request, there)
        if there is not None and is_tree:
            batch.root(request.key, there.target)
            tree.begin("")
            tree.carry_on(waker)
        if request.owners:
            # The channel is kept for copies, too, which need no names.
            channel.send(FACTS, lambda _: None)
            tree.carry_on(waker)
    except (ChannelError, BrokenError, SilenceError) as error:
        connections.drop(channel)
        return tree.broken(str(error))
    except BaseException:
        connections.drop(channel)
        raise
    if there is not None and there.kind == "file":
        # Nothing else is to be found out about it.
        report_alone(batch, request, there)
        return []
    return tree.left if is_tree else None


class _PipelinedListing:
    """The directories of a listing.

    Attributes:
        left: directories for the fallback.
    """

    def __init__(self, batch: ActiveBatch, request: ListRequest, channel: ControlChannel) -> None:
        self._batch = batch
        self._request = request
        self._channel = channel
        self._reporter = EntryReporter(batch, request)
        self._waiting: list[str] = []
        self._begun = False
        is_far = _FAR_AWAY_S < channel.round_trip_s < float("inf")
        self._most_directories = _MOST_DIRECTORIES_FAR_AWAY if is_far else _MOST_DIRECTORIES
        self._under_way: collections.OrderedDict[str, _PipelinedDirectory] = collections.OrderedDict()
        self.left: list[str] = []

    def carry_on(self, waker: Waker) -> None:
        stall_s = self._request.limits.stall_s
        run_until_answered((self._channel,), waker, lambda: self._batch.stopped, self._refill, lambda: stall_s)
        self._reporter.flush()

    def begin(self, path: str) -> None:
        """Request the listing of a directory."""
        self._begun = True
        name = server_path(directory_url(self._request.url, path))
        if not fits_on_command_line(name):
            self.left.append(path)
            return
        directory = _PipelinedDirectory(self._reporter, path)
        self._under_way[path] = directory
        self._channel.send(b"MLSC " + name, lambda reply: self._ended(directory, reply), directory.take)

    def _refill(self) -> None:
        while self._waiting and len(self._under_way) < self._most_directories:
            self.begin(self._waiting.pop())

    def _ended(self, directory: _PipelinedDirectory, reply: Reply) -> None:
        del self._under_way[directory.path]
        if reply.good:
            directory.end()
        else:
            directory.storage_error = StorageError(reply.text, errno=errno_of_reply(reply.text))
        if directory.storage_error is not None:
            if not directory.path:
                # An error at the root fails the whole listing.
                raise directory.storage_error
            self._batch.unreadable(self._request.key, directory.path, directory.storage_error)
        self._waiting += directory.entries.directories
        directory.entries.check_room(len(self._waiting))

    def broken(self, why: str) -> list[str] | None:
        """The directories left to list when the channel is lost, None for all; those reported in part have failed."""
        if not self._begun:
            # Not even the root was requested.
            return None
        self._reporter.flush()
        for path, directory in self._under_way.items():
            if directory.entries.told:
                storage_error = StorageError(why, lost=True)
                if not path:
                    raise storage_error
                self._batch.unreadable(self._request.key, path, storage_error)
            elif not path:
                # An error at the root fails the whole listing: the fallback starts again at the root.
                return None
            else:
                self.left.append(path)
        return self.left + self._waiting


class _PipelinedDirectory:
    """A directory that is being listed.

    Attributes:
        path: percent-encoded, relative to the listed URL.
        storage_error: why it cannot be listed.
    """

    def __init__(self, reporter: EntryReporter, path: str) -> None:
        self.path = path
        self.entries = DirectoryEntries(reporter, path)
        self.storage_error: StorageError | None = None
        self._lines = WrappedEntries(self._found)
        self.take = self._lines.take
        self._seen = 0
        self._counted = 0

    def end(self) -> None:
        """The listing is complete."""
        self._lines.end()
        self.storage_error = self._lines.storage_error
        self.entries.end(max(self._counted - self._seen, 0))

    def _found(self, line: ListingEntry) -> None:
        self._seen += 1
        if line.role:
            self._counted = line.counted or self._counted
        else:
            self.entries.add(line.name, line.file_stat)

"""Pipelined recursive listings over one control connection (MLSC), for servers that support it.

A listing comes over the control connection, each entry wrapped by itself, so a name may hold any byte that does not end
a command, and no data connection is needed. Directories whose names do not fit on a command line are left to the
fallback.
"""

from __future__ import annotations

import collections

from pdm.workqueue.domain.failures import FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.gridftp.connections import (
    BrokenError,
    ChannelPool,
    SilenceError,
    Waker,
    fits_on_command_line,
    host_port,
    run_until_answered,
    server_path,
)
from pdm.workqueue.helpers.gridftp.control import ChannelError, ControlChannel, SilentServerError
from pdm.workqueue.helpers.gridftp.replies import ListingEntry, Reply, WrappedEntries, errno_of_reply, file_stat_in
from pdm.workqueue.helpers.listing import DirectoryEntries, EntryReporter, directory_url, is_listed
from pdm.workqueue.helpers.storage import StorageError
from pdm.workqueue.wire.agent_messages import ListRequest

#: Folders whose listings may be under way at once.
_MOST_FOLDERS = 16


def list_tree(batch: ActiveBatch, request: ListRequest, connections: ChannelPool, waker: Waker) -> list[str] | None:
    """Carry out as much of a ``list`` request as goes well.

    Args:
        batch: of the request.
        request: what is asked for.
        connections: to the server.
        waker: is woken when the batch is stopped.

    Returns:
        Folders that are left for the careful way, percent-encoded, relative to the URL; None if all of it is.

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
        raise error.storage_error(FailureScope.SOURCE) from None
    except ChannelError:
        return None
    if "MLSC" not in channel.features:
        return None
    tree = _PipelinedListing(batch, request, channel)
    try:
        looks: list[Reply] = []
        channel.send(b"MLST " + root, looks.append)
        tree.carry_on(waker)
        there = file_stat_in(looks[0])
        if not looks[0].good or there is None or not is_listed(request, there):
            return None
        batch.root(request.key, there.target)
        tree.begin("")
        tree.carry_on(waker)
    except (ChannelError, BrokenError, SilenceError) as error:
        connections.drop(channel)
        return tree.broken(str(error))
    except BaseException:
        connections.drop(channel)
        raise
    return tree.left


class _PipelinedListing:
    """The folders of a listing.

    Attributes:
        left: folders for the careful way.
    """

    def __init__(self, batch: ActiveBatch, request: ListRequest, channel: ControlChannel) -> None:
        self._batch = batch
        self._request = request
        self._channel = channel
        self._reporter = EntryReporter(batch, request)
        self._waiting: list[str] = []
        self._begun = False
        self._under_way: collections.OrderedDict[str, _PipelinedDirectory] = collections.OrderedDict()
        self.left: list[str] = []

    def carry_on(self, waker: Waker) -> None:
        stall_s = self._request.limits.stall_s
        run_until_answered((self._channel,), waker, lambda: self._batch.stopped, self._refill, lambda: stall_s)
        self._reporter.flush()

    def begin(self, path: str) -> None:
        """Ask for the listing of a folder."""
        self._begun = True
        name = server_path(directory_url(self._request.url, path))
        if not fits_on_command_line(name):
            self.left.append(path)
            return
        folder = _PipelinedDirectory(self._reporter, path)
        self._under_way[path] = folder
        self._channel.send(b"MLSC " + name, lambda reply: self._ended(folder, reply), folder.take)

    def _refill(self) -> None:
        while self._waiting and len(self._under_way) < _MOST_FOLDERS:
            self.begin(self._waiting.pop())

    def _ended(self, folder: _PipelinedDirectory, reply: Reply) -> None:
        del self._under_way[folder.path]
        if reply.good:
            folder.end()
        else:
            folder.storage_error = StorageError(reply.text, errno=errno_of_reply(reply.text))
        if folder.storage_error is not None:
            folder.storage_error.at(FailureScope.SOURCE)
            if not folder.path:
                # The trouble of the root is that of the whole listing.
                raise folder.storage_error
            self._batch.unreadable(self._request.key, folder.path, folder.storage_error)
        self._waiting += folder.entries.folders
        folder.entries.check_room(len(self._waiting))

    def broken(self, why: str) -> list[str] | None:
        """The folders that are left once the channel is gone, None for all; of some a part may have been told."""
        if not self._begun:
            # Not even the root was asked for: no folder is left, for none is known.
            return None
        self._reporter.flush()
        for path, folder in self._under_way.items():
            if folder.entries.told:
                storage_error = StorageError(why, lost=True, scope=FailureScope.SOURCE)
                if not path:
                    raise storage_error
                self._batch.unreadable(self._request.key, path, storage_error)
            elif not path:
                # Its trouble, if it goes on, is to be that of the whole listing.
                return None
            else:
                self.left.append(path)
        return self.left + self._waiting


class _PipelinedDirectory:
    """One folder that is being listed.

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
        """All of it is there."""
        self._lines.end()
        self.storage_error = self._lines.storage_error
        self.entries.end(max(self._counted - self._seen, 0))

    def _found(self, line: ListingEntry) -> None:
        self._seen += 1
        if line.role:
            self._counted = line.counted or self._counted
        else:
            self.entries.add(line.name, line.file_stat)

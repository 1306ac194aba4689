"""Lists trees over one control channel, many folders at once (MLSC): the fast way, for servers that can.

A listing comes over the control channel, each entry wrapped by itself, so a name may hold anything but what ends a
command, and no data connection is needed. Folders that cannot be named in a command are left to the careful way.
"""

from __future__ import annotations

import collections
from typing import Any

from pdm.workqueue.agents.helpers.channel import Batch
from pdm.workqueue.agents.helpers.connections import Connections, can_be_said, path_of, place_of
from pdm.workqueue.agents.helpers.control_channel import ChannelError, ControlChannel, Reply, SilentServerError
from pdm.workqueue.agents.helpers.listing import Entries, Teller, folder_url, is_deeper, is_listed
from pdm.workqueue.agents.helpers.mlsx import Line, WrappedEntries
from pdm.workqueue.agents.helpers.pipeline import BrokenError, SilenceError, Waker, carry_on
from pdm.workqueue.agents.helpers.replies import errno_of_reply, thing_in
from pdm.workqueue.agents.helpers.storage import StorageError, bare_url

#: Folders whose listings may be under way at once.
_MOST_FOLDERS = 16


def list_tree(batch: Batch, connections: Connections, waker: Waker) -> list[str] | None:
    """Carry out as much of a ``list`` request as goes well.

    Args:
        batch: of the request.
        connections: to the server.
        waker: is woken when the batch is stopped.

    Returns:
        Folders that are left for the careful way, percent-encoded, relative to the URL; None if all of it is.

    Raises:
        StoppedError: the batch was stopped.
        StorageError: the tree cannot be listed.
    """
    url: str = batch.request["url"]
    root = path_of(bare_url(url))
    if not can_be_said(root):
        return None
    try:
        channel = connections.single(place_of(url))
    except SilentServerError as error:
        raise error.trouble("source") from None
    except ChannelError:
        return None
    if "MLSC" not in channel.features:
        return None
    tree = _Tree(batch, channel)
    try:
        looks: list[Reply] = []
        channel.send(b"MLST " + root, looks.append)
        tree.carry_on(waker)
        there = thing_in(looks[0])
        if not looks[0].good or there is None or not is_listed(batch.request, there):
            return None
        batch.root(batch.request["key"], there.target)
        tree.begin("")
        tree.carry_on(waker)
    except (ChannelError, BrokenError, SilenceError) as error:
        connections.drop(channel)
        return tree.broken(str(error))
    except BaseException:
        connections.drop(channel)
        raise
    return tree.left


class _Tree:
    """The folders of a listing.

    Attributes:
        left: folders for the careful way.
    """

    def __init__(self, batch: Batch, channel: ControlChannel) -> None:
        self._batch = batch
        self._channel = channel
        self._teller = Teller(batch)
        self._waiting: list[str] = []
        self._begun = False
        self._under_way: collections.OrderedDict[str, _Folder] = collections.OrderedDict()
        self.left: list[str] = []

    def carry_on(self, waker: Waker) -> None:
        limits: dict[str, Any] = self._batch.request["limits"]
        stall_s = float(limits.get("stall_s", 120.0))
        carry_on((self._channel,), waker, lambda: self._batch.stopped, self._refill, lambda: stall_s)
        self._teller.flush()

    def begin(self, path: str) -> None:
        """Ask for the listing of a folder."""
        self._begun = True
        name = path_of(folder_url(self._batch.request["url"], path))
        if not can_be_said(name):
            self.left.append(path)
            return
        folder = _Folder(self._batch, self._teller, path)
        self._under_way[path] = folder
        self._channel.send(b"MLSC " + name, lambda reply: self._ended(folder, reply), folder.take)

    def _refill(self) -> None:
        while self._waiting and len(self._under_way) < _MOST_FOLDERS:
            self.begin(self._waiting.pop())

    def _ended(self, folder: _Folder, reply: Reply) -> None:
        del self._under_way[folder.path]
        if reply.good:
            folder.end()
        else:
            folder.trouble = StorageError(reply.text, errno=errno_of_reply(reply.text))
        if folder.trouble is not None:
            folder.trouble.at("source")
            if not folder.path:
                # The trouble of the root is that of the whole listing.
                raise folder.trouble
            self._batch.unreadable(self._batch.request["key"], folder.path, folder.trouble)
        self._waiting += folder.entries.folders
        folder.entries.check_room(len(self._waiting))

    def broken(self, why: str) -> list[str] | None:
        """The folders that are left once the channel is gone, None for all; of some a part may have been told."""
        if not self._begun:
            # Not even the root was asked for: no folder is left, for none is known.
            return None
        self._teller.flush()
        for path, folder in self._under_way.items():
            if folder.entries.told:
                trouble = StorageError(why, lost=True, scope="source")
                if not path:
                    raise trouble
                self._batch.unreadable(self._batch.request["key"], path, trouble)
            elif not path:
                # Its trouble, if it goes on, is to be that of the whole listing.
                return None
            else:
                self.left.append(path)
        return self.left + self._waiting


class _Folder:
    """One folder that is being listed.

    Attributes:
        path: percent-encoded, relative to the listed URL.
        trouble: why it cannot be listed.
    """

    def __init__(self, batch: Batch, teller: Teller, path: str) -> None:
        self.path = path
        self.entries = Entries(batch, teller, path, deeper=is_deeper(batch.request["depth"], path))
        self.trouble: StorageError | None = None
        self._lines = WrappedEntries(self._found)
        self.take = self._lines.take
        self._seen = 0
        self._counted = 0

    def end(self) -> None:
        """All of it is there."""
        self._lines.end()
        self.trouble = self._lines.trouble
        self.entries.end(max(self._counted - self._seen, 0))

    def _found(self, line: Line) -> None:
        self._seen += 1
        if line.role:
            self._counted = line.counted or self._counted
        else:
            self.entries.add(line.name, line.thing)

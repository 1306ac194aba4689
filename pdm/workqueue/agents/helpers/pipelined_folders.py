"""The folders that pipelined copies arrive in: made where they are missing, and looked into."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from pdm.workqueue.agents.helpers.connections import parent_of
from pdm.workqueue.agents.helpers.control_channel import ControlChannel, Reply
from pdm.workqueue.agents.helpers.mlsx import Line, WrappedEntries
from pdm.workqueue.agents.helpers.replies import errno_of_reply, thing_in

#: So many files together are worth a listing of their folder.
_WORTH_A_LISTING = 64
#: States of a folder that can be used.
NEW, THERE = "new", "there"


class Folders:
    """Makes the folders that files arrive in, where they are missing.

    Attributes:
        states: whether each folder is new, or was there; those that cannot be used are not in it.
    """

    def __init__(self, channel: ControlChannel, folders: set[bytes]) -> None:
        self._channel = channel
        self.states: dict[bytes, str] = {}
        #: What is to be done once a folder is there.
        self._then: dict[bytes, list[Callable[[], None]]] = {}
        for folder in sorted(folders):
            self._make(folder, lambda: None)

    def _make(self, folder: bytes, then: Callable[[], None]) -> None:
        if folder in self.states:
            then()
        elif folder in self._then:
            self._then[folder].append(then)
        else:
            self._then[folder] = [then]
            self._ask(folder, may_lack_parent=True)

    def _ask(self, folder: bytes, *, may_lack_parent: bool) -> None:
        def made(reply: Reply) -> None:
            number = None if reply.good else errno_of_reply(reply.text)
            if reply.good:
                self._is(folder, NEW)
            elif number == errno.EEXIST:
                self._channel.send(b"MLST " + folder, looked)
            elif number == errno.ENOENT and may_lack_parent and parent_of(folder) != folder:
                self._make(parent_of(folder), lambda: self._ask(folder, may_lack_parent=False))

        def looked(reply: Reply) -> None:
            there = thing_in(reply)
            if there is not None and "directory" in (there.kind, there.target_kind):
                self._is(folder, THERE)

        if folder in (b"/", b"~"):
            self._is(folder, THERE)
        else:
            self._channel.send(b"MKD " + folder, made)

    def _is(self, folder: bytes, state: str) -> None:
        self.states[folder] = state
        for then in self._then[folder]:
            then()
        self._then[folder].clear()


class NewFolder:
    """A folder that the batch has made: one listing of it shows the sizes of many files, and which names are free.

    That a name is free is an error of five lines otherwise, and each size a command.

    Args:
        channel: to the server.
        path: of the folder.

    Attributes:
        to_come: files of the batch that will ask, but have not yet.
    """

    def __init__(self, channel: ControlChannel, path: bytes) -> None:
        self._channel = channel
        self._path = path
        self._asking: list[Callable[[Mapping[bytes, int | None]], None]] = []
        self.to_come = 0

    def ask(self, shown: Callable[[Mapping[bytes, int | None]], None]) -> None:
        """Ask what is in it.

        Args:
            shown: gets name and size (None for what has none) of all that is, once others ask, too.
        """
        self._asking.append(shown)
        self.to_come -= 1

    def look_if_due(self, *, all_arrived: bool) -> bool:
        """List it, if enough ask, or no more will for now; whether it did."""
        if len(self._asking) < _WORTH_A_LISTING and self.to_come and not all_arrived:
            return False
        asking, self._asking = self._asking, []
        self._list(asking)
        return True

    def _list(self, asking: list[Callable[[Mapping[bytes, int | None]], None]]) -> None:
        sizes: dict[bytes, int | None] = {}

        def found(line: Line) -> None:
            sizes[line.name] = line.thing.size if line.thing.kind == "file" else None

        lines = WrappedEntries(found)

        def ended(reply: Reply) -> None:
            lines.end()
            # Of a listing that is not whole nothing is believed: then no file has the size that it should.
            known = sizes if reply.good and lines.trouble is None else {}
            for shown in asking:
                shown(known)

        self._channel.send(b"MLSC " + self._path, ended, lines.take)

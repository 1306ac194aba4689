"""The folders that pipelined copies arrive in: made where they are missing."""

from __future__ import annotations

import errno
from collections.abc import Callable

from pdm.workqueue.agents.helpers.connections import parent_of
from pdm.workqueue.agents.helpers.control_channel import ControlChannel, Reply
from pdm.workqueue.agents.helpers.replies import errno_of_reply, thing_in

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

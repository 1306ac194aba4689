"""Listings over a control channel that is closed at any time: no directory that was not read is reported as empty."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pdm.workqueue.helpers.gridftp import pipelined_operations
from pdm.workqueue.helpers.gridftp.event_loop import Waker
from pdm.workqueue.wire.agent_events import RawEntry
from pdm.workqueue.wire.agent_requests import ListRequest, TimeLimits
from tests.helpers.test_control import Server

_LOOK = (
    ("632-", b"250-status of /d\r\n"),
    ("632-", b" Type=dir;Modify=20260101000000;Size=4096;UNIX.mode=0755; /d\r\n"),
    ("632 ", b"250 End.\r\n"),
)
_FILE = (
    ("632-", b"250-status of /d\r\n"),
    ("632-", b" Type=file;Modify=20260101000000;Size=7;UNIX.mode=0644; /d\r\n"),
    ("632 ", b"250 End.\r\n"),
)
_LISTING = (
    ("632-", b"250-Contents of /d\r\n"),
    ("632-", b" Type=dir;Modify=20260101000000;Size=4096;UNIX.mode=0755; sub\r\n"),
    ("632-", b" Type=file;Modify=20260101000000;Size=7;UNIX.mode=0644; file\r\n"),
    ("632 ", b"250 End.\r\n"),
)


class Asked:
    """A request to list a tree, and what was told of it."""

    stopped = False

    def __init__(self) -> None:
        self.request = ListRequest(1, 1, "gsiftp://server:2811/d", None, TimeLimits())
        self.told: list[str] = []

    def root(self, key: int, path: bytes | None) -> None:
        assert path is None

    def entries(self, key: int, rows: list[RawEntry]) -> None:
        self.told += [row.path for row in rows]


class OneChannel:
    """Stands for the connections of a helper."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def single(self, address: str) -> Any:
        return self._server.channel

    def drop(self, channel: Any) -> None:
        channel.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    made.channel.features["MLSC"] = ""
    yield made
    made.end()


@pytest.mark.parametrize(
    ("said", "left", "told"),
    [
        # Before anything is known of the root, all of it is left.
        ((), None, []),
        ((_LOOK,), None, []),
        ((_LOOK, _LISTING), ["sub"], ["file", "sub"]),
    ],
)
def test_what_is_left_when_the_server_dies(
    server: Server, said: tuple[tuple[tuple[str, bytes], ...], ...], left: list[str] | None, told: list[str]
) -> None:
    def serve() -> None:
        for answer in said:
            server.socket.recv(4096)
            server.say(*answer)
        server.socket.recv(4096)
        server.socket.shutdown(socket.SHUT_RDWR)

    serving = threading.Thread(target=serve)
    serving.start()
    asked: Any = Asked()
    connections: Any = OneChannel(server)
    assert pipelined_operations.list_tree(asked, asked.request, connections, Waker()) == left
    serving.join()
    assert sorted(asked.told) == told


def test_a_file_is_known_by_one_answer(server: Server) -> None:
    def serve() -> None:
        server.socket.recv(4096)
        server.say(*_FILE)

    serving = threading.Thread(target=serve)
    serving.start()
    asked: Any = Asked()
    connections: Any = OneChannel(server)
    assert pipelined_operations.list_tree(asked, asked.request, connections, Waker()) == []
    serving.join()
    assert asked.told == [""]

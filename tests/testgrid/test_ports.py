"""Ports of servers are theirs from the choice on, and a server counts as up only if it is the one that answers."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from pdm.testgrid import GridError
from pdm.testgrid.ports import reserve_port
from pdm.testgrid.storage_servers import ServerProcess


def test_a_reserved_port_is_given_to_no_other_program_and_its_server_can_come_and_go() -> None:
    port = reserve_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        # As the kernel asks before it gives a port to a connection or a listener that wants any.
        other.bind(("127.0.0.1", port))
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        with socket.create_server(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
            pass


class Failing(ServerProcess):
    def command(self) -> Sequence[str]:
        return ["/bin/sh", "-c", "echo the port is taken; sleep 0.1; exit 1"]


def test_another_server_on_the_port_is_not_taken_for_the_own_one(tmp_path: Path) -> None:
    server = Failing(tmp_path, "failing")
    with socket.create_server(("127.0.0.1", 0)) as another:
        server.port = another.getsockname()[1]
        with pytest.raises(GridError, match="the port is taken"):
            server.start()
    assert server.pid is None

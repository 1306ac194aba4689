"""Messages to systemd, as its socket receives them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from pdm.workqueue.services import ServiceManager


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        yield receiver


def received(systemd: socket.socket) -> list[str]:
    lines: list[str] = []
    while True:
        try:
            lines += systemd.recv(4096).decode().splitlines()
        except BlockingIOError:
            return lines


def test_the_watchdog_is_fed_by_the_reactor(systemd: socket.socket, tmp_path: Path) -> None:
    clock, environ = Clock(), {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "30000000", "A": "b"}
    manager = ServiceManager(clock, environ, 7)
    assert environ == {"A": "b"}
    manager.start()
    assert received(systemd) == ["WATCHDOG=1", "EXTEND_TIMEOUT_USEC=60000000"]
    state = ["serves"]
    manager.ready(lambda: state[0])
    assert received(systemd) == ["READY=1", "STATUS=serves"]
    clock.advance(10)
    assert received(systemd) == ["WATCHDOG=1"]
    state[0] = "database:\nis away"
    clock.advance(10)
    assert received(systemd) == ["STATUS=database: is away", "WATCHDOG=1"]
    manager.stopping()
    assert received(systemd) == ["STOPPING=1", "STATUS=stopping"]
    clock.advance(10)
    assert received(systemd) == ["WATCHDOG=1", "EXTEND_TIMEOUT_USEC=60000000"]
    manager.stop()
    assert clock.getDelayedCalls() == []


def test_a_watchdog_for_another_process_is_not_fed(systemd: socket.socket, tmp_path: Path) -> None:
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "8"}
    manager = ServiceManager(Clock(), environ, 7)
    manager.start()
    assert received(systemd) == ["EXTEND_TIMEOUT_USEC=60000000"]


def test_without_systemd_nothing_is_sent_or_planned() -> None:
    clock = Clock()
    manager = ServiceManager(clock, {}, 7)
    manager.start()
    manager.ready(lambda: "serves")
    manager.stopping()
    assert clock.getDelayedCalls() == []

"""The proxy delays what passes, and changes nothing else."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from delaying_proxy import delayed

_ROUND_TRIP_MS = 60
_LATEST_S = 5.0


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets, and ends with its client."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client:
            while piece := client.recv(65536):
                client.sendall(piece)

    def accept() -> None:
        with ThreadPoolExecutor() as sessions:
            while True:
                try:
                    sessions.submit(serve, listener.accept()[0])
                except OSError:
                    return

    thread = threading.Thread(target=accept)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def _answer(client: socket.socket, sent: bytes) -> float:
    """Seconds until what was sent has come back."""
    began = time.monotonic()
    client.sendall(sent)
    came = b""
    while len(came) < len(sent):
        came += client.recv(65536)
    assert came == sent
    return time.monotonic() - began


def test_a_connection_and_each_answer_take_a_round_trip(echo: int) -> None:
    with delayed(_ROUND_TRIP_MS, [echo]) as (port,), socket.create_connection(("127.0.0.1", port)) as client:
        first, second = _answer(client, b"one"), _answer(client, b"two")

    assert first >= 2 * _ROUND_TRIP_MS / 1000
    assert _ROUND_TRIP_MS / 1000 <= second < _LATEST_S


def test_all_bytes_pass_and_the_end_after_them(echo: int) -> None:
    sent = os.urandom(40_000_000)
    came = bytearray()
    with delayed(10, [echo]) as (port,), socket.create_connection(("127.0.0.1", port)) as client:

        def read() -> None:
            while piece := client.recv(1024 * 1024):
                came.extend(piece)

        reader = threading.Thread(target=read)
        reader.start()
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        reader.join()

    assert bytes(came) == sent


def test_without_a_delay_there_is_no_proxy(echo: int) -> None:
    with delayed(0, [echo]) as ports:
        assert ports == [echo]

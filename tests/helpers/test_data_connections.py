"""Data connections to servers that do what no honest one would: memory is bounded, and no wrong byte passes."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.gridftp_groups import GroupedGridFtpBackend
from pdm.workqueue.helpers.gridftp import download, upload
from pdm.workqueue.helpers.gridftp.connections import ChannelPool
from pdm.workqueue.helpers.gridftp.data_port import passive_address, port_command
from pdm.workqueue.helpers.gridftp.gsi import Gsi
from pdm.workqueue.helpers.gridftp.replies import Reply
from pdm.workqueue.helpers.storage import StorageError, Timeouts
from tests.helpers.ftp_server import END_OF_FILE, Connect, FtpServer, sends

_MIB = 1024 * 1024
_STALL_S = 2.0


@pytest.fixture
def server() -> Iterator[FtpServer]:
    with FtpServer() as running:
        yield running


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[GroupedGridFtpBackend]:
    """A backend for servers without logins, to which each server is far away."""
    monkeypatch.setattr(download, "streams_to", lambda channel: 4)
    monkeypatch.setattr(upload, "streams_to", lambda channel: 1)
    pool = ChannelPool(cast(Gsi, None))
    made = GroupedGridFtpBackend(pool)
    made.timeouts = Timeouts(_STALL_S, 0.0, time.monotonic() + 20.0)
    yield made
    pool.drop_all()


def url_of(server: FtpServer, name: str = "file") -> StorageUrl:
    return StorageUrl(f"{server.url}/{name}")


def block(offset: int, data: bytes = b"", descriptor: int = 0, count: int | None = None) -> bytes:
    return struct.pack(">BQQ", descriptor, len(data) if count is None else count, offset) + data


def end(connections: int | None = None) -> bytes:
    return block(0, descriptor=8) if connections is None else block(connections, descriptor=64 | 8)


def blocks(*streams: bytes, closes: bool = False) -> Callable[[Connect], None]:
    """Sends some bytes by each of several connections, which stay open unless it closes them."""

    def send(connect: Connect) -> None:
        connections = [connect() for _ in streams]
        for connection, data in zip(connections, streams, strict=True):
            connection.sendall(data)
        if closes:
            for connection in connections:
                connection.close()

    return send


def test_blocks_may_come_in_any_order_by_several_connections(server: FtpServer, backend: GroupedGridFtpBackend) -> None:
    server.senders[b"/file"] = blocks(
        block(6, b"lo ") + block(0, b"he") + end(), block(9, b"world") + block(2, b"llll") + end(2)
    )
    assert b"".join(backend.read(url_of(server))) == b"hellll" + b"lo world"
    server.senders[b"/none"] = blocks(end(1))
    assert b"".join(backend.read(url_of(server, "none"))) == b""


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        ([block(0, b"abc") + block(2, b"cd") + end(1)], "sent twice"),
        ([block(5, b"abc") + block(5, b"abc") + end(1)], "sent twice"),
        ([block(0, b"abcd") + block(10, b"abc") + block(4, b"x" * 8) + end(1)], "sent twice"),
        ([block(0, b"abc") + block(5, b"abc") + end(1)], "were not sent"),
        ([block(0, b"abc") + end(0)], "the end of 0 connections"),
        ([block(0, b"abc") + end(10**9)], "the end of 1000000000 connections"),
        ([block(0, b"abc") + end(), end(1)], "2 connections have ended"),
        ([block(0, b"abc") + block(1, descriptor=64) + block(2, descriptor=64)], "the end of 2 connections"),
        ([block(0, b"abc", descriptor=32) + end(1)], "marks a block as wrong"),
        ([block(0, descriptor=16, count=10**9)], "restart marker"),
        ([block(1, b"x", descriptor=64)], "has data"),
        ([block(2**63, b"x", count=2**62), *[block(2**62, b"x")] * 3], "too far out of order"),
        ([block(10, b"x" * _MIB * 20), *[block(_MIB * 99, b"x")] * 3], "too far out of order"),
    ],
)
def test_blocks_that_do_not_add_up_are_refused(
    server: FtpServer, backend: GroupedGridFtpBackend, streams: list[bytes], said: str
) -> None:
    server.senders[b"/file"] = blocks(*streams)
    with pytest.raises(StorageError, match=said) as raised:
        for _ in backend.read(url_of(server)):
            pass
    assert raised.value.code == FailureCode.SERVER_ERROR


def test_an_end_that_never_comes_is_a_stall(server: FtpServer, backend: GroupedGridFtpBackend) -> None:
    server.senders[b"/file"] = blocks(block(0, b"abc") + end(3), end())
    with pytest.raises(StorageError) as raised:
        list(backend.read(url_of(server)))
    assert raised.value.code == FailureCode.STALLED


def test_a_connection_that_is_closed_in_a_block_is_lost(server: FtpServer, backend: GroupedGridFtpBackend) -> None:
    server.senders[b"/file"] = blocks(block(0, b"abc", count=100), closes=True)
    with pytest.raises(StorageError, match="within a block") as raised:
        list(backend.read(url_of(server)))
    assert raised.value.is_of_server


def test_a_server_that_does_not_connect_to_us_is_read_in_stream_mode(
    server: FtpServer, backend: GroupedGridFtpBackend
) -> None:
    server.contents[b"/file"] = b"content"
    calls = []

    def none(connect: Connect) -> None:
        calls.append(1)
        # The second time it is asked in stream mode.
        del server.senders[b"/file"]
        time.sleep(_STALL_S)

    server.senders[b"/file"] = none
    logged: list[str] = []
    backend.log_to(logged.append)
    assert b"".join(backend.read(url_of(server))) == b"content"
    assert calls == [1] and "does not connect to us" in logged[0]


def test_a_server_without_block_mode_is_read_and_written_in_stream_mode(
    server: FtpServer, backend: GroupedGridFtpBackend
) -> None:
    server.replies[b"MODE"] = b"504 not this mode"
    server.contents[b"/file"] = b"content"
    assert b"".join(backend.read(url_of(server))) == b"content"
    backend.write(url_of(server, "new"), iter([b"con", b"tent"]), 7)
    assert server.stored[b"/new"] == [b"content"]


def test_bytes_are_written_in_blocks(server: FtpServer, backend: GroupedGridFtpBackend) -> None:
    backend.write(url_of(server, "new"), iter([b"con", b"tent"]), 7)
    assert server.stored[b"/new"] == [block(0, b"con") + block(3, b"tent") + END_OF_FILE]


def test_a_server_that_has_enough_too_early_has_not_taken_the_file(
    server: FtpServer, backend: GroupedGridFtpBackend
) -> None:
    server.replies[b"STOR"] = b"226 thank you"
    with pytest.raises(StorageError, match="before its end"):
        backend.write(url_of(server, "new"), iter([b"content"]), 7)


def test_a_server_that_takes_nothing_is_a_stall(server: FtpServer, backend: GroupedGridFtpBackend) -> None:
    server.replies[b"STOR"] = b"150 go on"
    with pytest.raises(StorageError) as raised:
        backend.write(url_of(server, "new"), iter([b"x" * _MIB] * 100), 100 * _MIB)
    assert raised.value.code == FailureCode.STALLED


def test_another_machine_is_not_connected_to_without_logins(server: FtpServer, backend: GroupedGridFtpBackend) -> None:
    server.replies[b"MODE"] = b"504 not this mode"
    server.passive_host = b"192,0,2,1"
    server.listings[b"/file"] = sends(b"")
    server.contents[b"/file"] = b"content"
    assert b"".join(backend.read(url_of(server))) == b"content"


@pytest.mark.parametrize(
    ("text", "peer", "found"),
    [
        ("227 at (192,0,2,7,1,2)", "192.0.2.7", ("192.0.2.7", 258)),
        # A data node.
        ("227 at (9,9,9,9,1,2)", "8.8.8.8", ("9.9.9.9", 258)),
        ("227 at (10,0,0,2,1,2)", "10.0.0.1", ("10.0.0.2", 258)),
        # A translated address, and those of others.
        ("227 at (10,0,0,2,1,2)", "8.8.8.8", ("8.8.8.8", 258)),
        ("227 at (127,0,0,1,1,2)", "8.8.8.8", ("8.8.8.8", 258)),
        ("227 at (169,254,169,254,1,2)", "10.0.0.1", ("10.0.0.1", 258)),
        ("227 at (0,0,0,0,1,2)", "8.8.8.8", ("8.8.8.8", 258)),
        ("227 at (224,0,0,1,1,2)", "8.8.8.8", ("8.8.8.8", 258)),
        ("229 at (|||258|)", "2001:db8::1", ("2001:db8::1", 258)),
        ("229 at (|2|::1|258|)", "2001:db8::1", ("2001:db8::1", 258)),
        ("227 at (8,8,8,8,0,0)", "8.8.8.8", None),
        ("227 at (999,8,8,8,1,2)", "8.8.8.8", None),
        ("229 at (|||99999|)", "8.8.8.8", None),
        ("200 nothing", "8.8.8.8", None),
    ],
)
def test_addresses_of_data_connections(text: str, peer: str, found: tuple[str, int] | None) -> None:
    assert passive_address(Reply(int(text[:3]), text), peer, authenticated=True) == found


def test_our_own_addresses() -> None:
    assert port_command("10.0.0.1", 258) == b"PORT 10,0,0,1,1,2"
    assert port_command("::ffff:10.0.0.1", 258) == b"PORT 10,0,0,1,1,2"
    assert port_command("2001:db8::1", 258) == b"EPRT |2|2001:db8::1|258|"

"""Replies of servers that are broken or hostile, on a control channel without its grid security."""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.event_loop import BrokenError, SilenceError, Waker, run_until_answered
from pdm.workqueue.helpers.gridftp.replies import Reply
from pdm.workqueue.helpers.gridftp.reply_reader import ChannelError
from pdm.workqueue.helpers.storage import StoppedError


class PlainContext:
    """Wraps nothing."""

    def wrap(self, data: bytes) -> bytes:
        return data

    def unwrap(self, data: bytes) -> bytes:
        return data

    def close(self) -> None:
        """There is nothing to free."""


class Server:
    """The other end of a channel that is logged in."""

    def __init__(self) -> None:
        ours, self.socket = socket.socketpair()
        ours.setblocking(False)
        self.channel = ControlChannel(None, "server:2811")
        inside: Any = self.channel
        inside._socket = ours
        inside._reader.context = PlainContext()

    def say(self, *pieces: tuple[str, bytes]) -> None:
        """Send wrapped pieces, each with the code of its wrapping."""
        for code, piece in pieces:
            self.socket.sendall(code.encode() + base64.b64encode(piece) + b"\r\n")

    def end(self) -> None:
        self.channel.close()
        self.socket.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.end()


def test_replies_go_to_their_commands_in_order_however_they_arrive(server: Server) -> None:
    replies: list[tuple[str, int]] = []
    listed: dict[str, list[bytes]] = {"a": [], "b": []}

    def noting(name: str) -> Callable[[Reply], None]:
        return lambda reply: replies.append((name, reply.code))

    for name in ("a", "b"):
        server.channel.send(b"MLSC x", noting(name), listed[name].append)
    server.channel.send(b"NOOP", noting("c"))
    # All in one piece of the network.
    server.say(
        ("632-", b"150-Contents\r\n"),
        ("632-", b" one\r\n"),
        ("632 ", b"150 End.\r\n"),
        ("632-", b"250-Contents\r\n"),
        ("632-", b" two\r\n"),
        ("632-", b"250 End.\r\n"),
        ("632 ", b"250 End.\r\n"),
        ("632-", b"550-GlobusError: v=1 c=PATH_NOT_FOUND\r\n"),
        ("632-", b"550-GridFTP-Errno: 2\r\n"),
        ("632 ", b"550 End.\r\n"),
        ("632 ", b"200 fine\r\n"),
    )
    server.channel.read()
    assert replies == [("a", 250), ("b", 550), ("c", 200)]
    assert listed == {"a": [b" one\r\n", b" two\r\n", b"250 End.\r\n"], "b": []}
    assert server.channel.waiting == 0


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"632 !!!\r\n", "server:2811"),
        (b"632 " + base64.b64encode(b"what?\r\n") + b"\r\n", "this is no reply"),
        (b"632 " + base64.b64encode(b"200 fine\r\n") + b"\r\n", "unexpected reply"),
        (b"x" * (1024 * 1024), "without an end"),
    ],
)
def test_what_is_no_reply_ends_the_channel(server: Server, sent: bytes, words: str) -> None:
    server.socket.setblocking(False)

    def exchange() -> None:
        rest = sent
        while True:
            if rest:
                rest = rest[server.socket.send(rest) :]
            server.channel.read()

    with pytest.raises(ChannelError, match=words):
        exchange()


def test_a_command_is_one_line(server: Server) -> None:
    for path in (b"new\nline", b"cr\rx", b"nul\0"):
        with pytest.raises(ValueError, match="one line"):
            server.channel.send(b"DELE " + path, lambda reply: None)
    assert not server.channel.unsent


def test_a_long_reply_is_kept_only_in_part(server: Server) -> None:
    replies: list[Reply] = []
    server.channel.send(b"SIZE x", replies.append)
    server.socket.setblocking(False)
    for _ in range(3000):
        server.say(("632-", b"550-" + b"x" * 400 + b"\r\n"))
        server.channel.read()
    server.say(("632 ", b"550 End.\r\n"))
    server.channel.read()
    assert len(replies[0].text) < 100_000


def test_a_pipeline_ends_when_a_server_leaves_falls_silent_or_we_are_stopped(server: Server) -> None:
    waker = Waker()

    def run(*, patience_s: float = 30.0, stopped: bool = False) -> None:
        server.channel.send(b"NOOP", lambda reply: None)
        run_until_answered((server.channel,), waker, lambda: stopped, lambda: None, lambda: patience_s)

    with pytest.raises(StoppedError):
        run(stopped=True)
    with pytest.raises(SilenceError, match="has not answered"):
        run(patience_s=0.0)
    server.socket.close()
    with pytest.raises(BrokenError):
        run()

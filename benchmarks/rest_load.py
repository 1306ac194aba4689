"""A lean load generator: kept TLS connections in one thread, each with one request under way.

It writes prepared bytes, and looks at answers no further than to know their status and their end: it must cost less
than what it measures.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from attrs import define, field, frozen
from figures import BenchmarkError

_PIECE = 65536
_CONNECT_S = 30.0


@frozen
class Loaded:
    """What a load came to."""

    requests: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


@define
class Answers:
    """Cuts a stream of bytes into answers; there is never more than one under way."""

    _received: bytearray = field(factory=bytearray)
    # How long the answer is: 0 until its head is there, None if it comes in chunks.
    _length: int | None = 0
    _body_at: int = 0

    def feed(self, data: bytes) -> bool:
        """Take what has come; whether the answer is complete.

        Raises:
            BenchmarkError: its status is not 200.
        """
        self._received += data
        if not self._body_at:
            at = self._received.find(b"\r\n\r\n")
            if at < 0:
                return False
            self._read_head(bytes(self._received[:at]).lower(), at + 4)
        if self._length is None:
            complete = self._received.endswith(b"\r\n0\r\n\r\n") or self._received[self._body_at :] == b"0\r\n\r\n"
        else:
            complete = len(self._received) >= self._length
        if complete:
            self._received.clear()
            self._length = self._body_at = 0
        return complete

    def _read_head(self, head: bytes, body_at: int) -> None:
        if head[8:13] != b" 200 ":
            raise BenchmarkError(f"not answered with 200: {head[:200]!r} {bytes(self._received[body_at:])[:300]!r}")
        self._body_at = body_at
        _, named, rest = head.partition(b"\r\ncontent-length:")
        self._length = body_at + int(rest.split(b"\r\n", 1)[0]) if named else None


def connect(url: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    """A TLS connection."""
    parts = urlsplit(url)
    plain = socket.create_connection((parts.hostname or "", parts.port or 443), _CONNECT_S)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(plain, server_hostname=parts.hostname)


class Connections:
    """Some kept connections to one server.

    Args:
        url: of the server.
        context: makes us a user.
        count: how many.
    """

    def __init__(self, url: str, context: ssl.SSLContext, count: int) -> None:
        self._stack = contextlib.ExitStack()
        self._sockets = [self._stack.enter_context(connect(url, context)) for _ in range(count)]
        for one in self._sockets:
            one.setblocking(False)

    def __enter__(self) -> Connections:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def load(self, request: Callable[[], bytes], seconds: float = 0.0, requests: int = 0) -> Loaded:
        """Send requests, each connection its next when it has its answer.

        Args:
            request: makes the bytes of the next one; of a few hundred, so that a socket takes them at once.
            seconds: no new one is sent after this time; 0 for no such bound.
            requests: as many in all; 0 for no such bound.
        """
        sent = done = 0
        began = time.perf_counter()
        end = began + seconds if seconds else float("inf")
        most = requests or float("inf")
        with selectors.DefaultSelector() as selector:
            for one in self._sockets:
                if sent < most:
                    selector.register(one, selectors.EVENT_READ, Answers())
                    one.sendall(request())
                    sent += 1
            while done < sent:
                ready = selector.select(_CONNECT_S)
                if not ready:
                    raise BenchmarkError(f"no answer for {_CONNECT_S:g} s")
                for key, _ in ready:
                    answered = key.fileobj
                    assert isinstance(answered, ssl.SSLSocket)
                    if _complete(answered, key.data):
                        done += 1
                        if sent < most and time.perf_counter() < end:
                            answered.sendall(request())
                            sent += 1
        return Loaded(done, time.perf_counter() - began)


def _complete(one: ssl.SSLSocket, answers: Answers) -> bool:
    while True:
        try:
            data = one.recv(_PIECE)
        except (ssl.SSLWantReadError, BlockingIOError):
            return False
        if not data:
            raise BenchmarkError("the server closed a kept connection")
        if answers.feed(data):
            return True


def get(host: str, path: str) -> bytes:
    """The bytes of a GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def post(host: str, path: str, body: bytes, *headers: str) -> bytes:
    """The bytes of a POST request with a JSON body."""
    more = "".join(f"{header}\r\n" for header in headers)
    return (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"{more}\r\n"
    ).encode() + body

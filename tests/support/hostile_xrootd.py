"""A server for XRootD's protocol without logins, whose answers the test provides."""

from __future__ import annotations

import socket
import socketserver
import struct
from collections.abc import Callable, Mapping

from tests.support.loopback import LoopbackServer

PROTOCOL, LOGIN, OPEN, STAT, DIRLIST, PING = 3006, 3007, 3010, 3017, 3004, 3011
OK, ERROR, REDIRECT = 0, 4003, 4004
#: A request's path → status and body.
Answer = Callable[[bytes], tuple[int, bytes]]
_REQUEST = struct.Struct(">2sH16sI")
_HAND_SHAKE = 20


def elsewhere(url: bytes) -> tuple[int, bytes]:
    """A redirect to a URL."""
    return REDIRECT, struct.pack(">i", -1) + url


def status(kind: int, size: int) -> tuple[int, bytes]:
    """The body of a stat: 2 is a directory, 0 a file."""
    return OK, b"1 %d %d 1000000000\0" % (size, kind | 16)


def error(number: int) -> tuple[int, bytes]:
    """An error response."""
    return ERROR, struct.pack(">I", number) + b"refused\0"


class HostileXrootd(LoopbackServer):
    """``root://localhost:PORT``.

    Args:
        answers: by number of the request.
    """

    def __init__(self, answers: Mapping[int, Answer]) -> None:
        self._answers = answers
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                outer._serve(self.request)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        super().__init__(server, "root")

    def _serve(self, connection: socket.socket) -> None:
        pipe = connection.makefile("rwb", buffering=0)
        pipe.read(_HAND_SHAKE)
        pipe.write(struct.pack(">2sHIII", b"\0\0", OK, 8, 0x511, 1))
        while head := pipe.read(_REQUEST.size):
            stream, number, _, length = _REQUEST.unpack(head)
            body = pipe.read(length) if length else b""
            if number == PROTOCOL:
                code, said = OK, struct.pack(">II", 0x511, 1)
            elif number == LOGIN:
                code, said = OK, bytes(16)
            elif number in self._answers:
                code, said = self._answers[number](body or b"")
            else:
                code, said = error(3013)
            pipe.write(stream + struct.pack(">HI", code, len(said)) + said)

"""A TLS server with faults on demand, which the real service cannot be made to have."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from attrs import define, field

#: What to do with one request: gets the connection after the request was read, says whether to keep it.
Behaviour = Callable[[ssl.SSLSocket], bool]


@define
class Seen:
    """A request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int


def answer(status: str, body: bytes = b"", content_type: str = "application/json", **headers: str) -> Behaviour:
    """A whole answer; underscores in the names of headers are dashes."""

    def behave(connection: ssl.SSLSocket) -> bool:
        more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        connection.sendall(head.encode() + body)
        return True

    return behave


def cut(sent: bytes = b"") -> Behaviour:
    """The connection ends after these bytes."""

    def behave(connection: ssl.SSLSocket) -> bool:
        connection.sendall(sent)
        return False

    return behave


@define(eq=False)
class FaultServer:
    """Listens on a free port of the loopback; each request meets the next behaviour, the last one again and again.

    Attributes:
        seen: the requests so far.
        released: set when the test ends; a silent behaviour waits for it.
    """

    context: ssl.SSLContext
    behaviours: list[Behaviour] = field(factory=list)
    seen: list[Seen] = field(factory=list)
    released: threading.Event = field(factory=threading.Event)
    _listener: socket.socket = field(init=False)
    _connections: int = 0

    def __attrs_post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @classmethod
    def create(cls, certificate: Path, key: Path, trust: Path | None = None) -> FaultServer:
        """With these PEM files; where `trust` is given, only clients whose certificate it vouches for get in."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        if trust is not None:
            context.load_verify_locations(trust)
            context.verify_mode = ssl.CERT_REQUIRED
        return cls(context)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._listener.getsockname()[1]}"

    def silent(self, _connection: ssl.SSLSocket) -> bool:
        """No answer."""
        self.released.wait(30)
        return False

    def close(self) -> None:
        self.released.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = self._listener.accept()
                self._connections += 1
                threading.Thread(target=self._serve, args=(plain, self._connections), daemon=True).start()

    def _serve(self, plain: socket.socket, number: int) -> None:
        with (
            plain,
            contextlib.suppress(OSError),
            self.context.wrap_socket(plain, server_side=True) as connection,
            connection.makefile("rb") as stream,
        ):
            while line := stream.readline().decode():
                headers = {}
                while header := stream.readline().decode().strip():
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                method, path, _ = line.split(" ", 2)
                body = stream.read(int(headers.get("content-length", 0)))
                self.seen.append(Seen(method, path, headers, body, number))
                behave = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
                if not behave(connection):
                    return

"""A TCP proxy for a PostgreSQL server that loses responses, delays requests, or stops forwarding, on demand."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

#: Major version of the protocol.
_PROTOCOL = 3


class PostgresqlProxy:
    """Forwards the connections of one test.

    Attributes:
        url: of the database behind it.
        cut_commits: number of further COMMITs whose response is lost: the server commits, the connection is closed.
        only_after: a COMMIT counts only if its connection has sent these bytes since the last one.
        delay_s: seconds that each piece of a client takes on its way.
        frozen: nothing is forwarded in either direction; the connections stay open.
        lost: number of lost responses.
        port: where it listens, on loopback.
    """

    def __init__(self, url: sa.URL) -> None:
        self._target = str(Path(str(url.query["host"])) / ".s.PGSQL.5432")
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, self.port = self._listener.getsockname()
        self.url = url.set(host=host, port=self.port, query={}).render_as_string(hide_password=False)
        self.cut_commits = 0
        self.only_after = b""
        self.lost = 0
        self.delay_s = 0.0
        self._moving = threading.Event()
        self._moving.set()
        self._closed = False
        self._connections = self._swallowed = 0
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def frozen(self) -> bool:
        return not self._moving.is_set()

    @frozen.setter
    def frozen(self, value: bool) -> None:
        if value:
            self._moving.clear()
        else:
            self._moving.set()

    def swallow_open(self) -> None:
        """Forward nothing of the connections that are open now, like a firewall that has forgotten them."""
        self._swallowed = self._connections

    def close(self) -> None:
        self._closed = True
        self._moving.set()
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
            self._open |= {client, server}
            threading.Thread(target=self._carry, args=(client, server), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        sent, statements = b"", _Statements()
        self._connections += 1
        number = self._connections
        with client, server, contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
            for one in (client, server):
                selector.register(one, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    source = client if key.fileobj is client else server
                    data = source.recv(65536)
                    self._moving.wait()
                    if data and number <= self._swallowed:
                        continue
                    if not data:
                        return
                    if source is server:
                        client.sendall(data)
                        continue
                    time.sleep(self.delay_s)
                    server.sendall(data)
                    for text in statements.said(data):
                        if text.upper() != b"COMMIT":
                            sent += text
                            continue
                        if self.cut_commits and self.only_after in sent:
                            self.cut_commits -= 1
                            server.recv(65536)
                            self.lost += 1
                            return
                        sent = b""


class _Statements:
    """Statements of a client of the frontend protocol as text, prepared ones included."""

    def __init__(self) -> None:
        self._buffer = b""
        self._started = False
        self._prepared: dict[bytes, bytes] = {}

    def said(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while True:
            # A message: its letter (none before the session has begun), its length, its content.
            head = 5 if self._started else 4
            if len(self._buffer) < head:
                return
            end = head - 4 + int.from_bytes(self._buffer[head - 4 : head])
            if len(self._buffer) < end:
                return
            letter, content = self._buffer[: head - 4], self._buffer[head:end]
            self._buffer = self._buffer[end:]
            if not self._started:
                # Requests for TLS or GSSAPI come first.
                self._started = int.from_bytes(content[:4]) >> 16 == _PROTOCOL
            elif letter == b"Q":
                yield content.rstrip(b"\0")
            elif letter == b"P":
                name, text, _ = content.split(b"\0", 2)
                self._prepared[name] = text
            elif letter == b"B":
                yield self._prepared.get(content.split(b"\0", 2)[1], b"")


@contextlib.contextmanager
def postgresql_proxy(url: sa.URL) -> Iterator[PostgresqlProxy]:
    """A proxy for the server of a URL, which listens on a Unix socket."""
    proxy = PostgresqlProxy(url)
    try:
        yield proxy
    finally:
        proxy.close()

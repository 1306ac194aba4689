"""A small FTP server that says whatever a test wants: what no honest server would."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Self

#: Writes a listing to the data connection.
Listing = Callable[[socket.socket], None]
#: Connects to where the client listens.
Connect = Callable[[], socket.socket]


#: Of a file over one connection, in block mode.
END_OF_FILE = bytes([64 | 8]) + (0).to_bytes(8, "big") + (1).to_bytes(8, "big")


class FtpServer:
    """Serves anonymous FTP on a free port of loopback.

    Attributes:
        facts: of what is asked for by MLST, by path; everything else is a directory.
        listings: what MLSD sends, by path; a path that is not here is not found.
        contents: what RETR sends, by path.
        senders: what RETR does in block mode, by path: gets a function that connects to the client.
        stored: what STOR has received, by path: all bytes of each connection.
        passive_host: the address in replies to PASV.
        replies: full replies to commands, by the command's first word, instead of the usual.
        commands: what was received.
    """

    def __init__(self) -> None:
        self.facts: dict[bytes, bytes] = {}
        self.listings: dict[bytes, Listing] = {}
        self.contents: dict[bytes, bytes] = {}
        self.senders: dict[bytes, Callable[[Connect], None]] = {}
        self.stored: dict[bytes, list[bytes]] = {}
        self.passive_host = b"127,0,0,1"
        self.replies: dict[bytes, bytes] = {}
        self.commands: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def url(self) -> str:
        return f"ftp://localhost:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection.makefile("rwb", buffering=0) as control:
            passive: socket.socket | None = None
            client = ("127.0.0.1", 0)
            control.write(b"220 hello\r\n")
            for line in iter(control.readline, b""):
                command, _, argument = line.strip(b"\r\n").partition(b" ")
                self.commands.append(line)
                if command in self.replies:
                    control.write(self.replies[command] + b"\r\n")
                elif command == b"USER":
                    control.write(b"230 come in\r\n")
                elif command == b"FEAT":
                    control.write(b"211-these\r\n MLST Type*;Size*;\r\n211 end\r\n")
                elif command == b"MLST":
                    facts = self.facts.get(argument, b"Type=dir;")
                    control.write(b"250-this\r\n " + facts + b" " + argument + b"\r\n250 end\r\n")
                elif command == b"PASV":
                    passive = socket.create_server(("127.0.0.1", 0))
                    self._connections.append(passive)
                    port = passive.getsockname()[1]
                    control.write(b"227 there (%b,%d,%d)\r\n" % (self.passive_host, *divmod(port, 256)))
                elif command == b"PORT":
                    high, low = argument.split(b",")[-2:]
                    client = ("127.0.0.1", int(high) * 256 + int(low))
                    control.write(b"200 well\r\n")
                elif command == b"RETR" and argument in self.senders:
                    control.write(b"150 here it comes\r\n")
                    with contextlib.suppress(OSError):
                        self.senders[argument](lambda to=client: self._connected(to))  # type: ignore[misc]
                    control.write(b"226 that was it\r\n")
                elif command == b"STOR" and passive is not None:
                    control.write(b"150 go on\r\n")
                    self.stored[argument] = self._received(passive)
                    control.write(b"226 that was it\r\n")
                elif command == b"MLSD" and passive is None:
                    # It is as if a firewall kept this server from connecting to its client.
                    control.write(b"425 no connection\r\n")
                elif command == b"MLSD" and passive is not None:
                    self._send(control.write, passive, self.listings.get(argument))
                    passive = None
                elif command == b"RETR" and passive is not None:
                    content = self.contents.get(argument)
                    self._send(control.write, passive, None if content is None else sends(content))
                    passive = None
                else:
                    control.write(b"200 very well\r\n")

    def _connected(self, client: tuple[str, int]) -> socket.socket:
        connection = socket.create_connection(client)
        self._connections.append(connection)
        return connection

    def _received(self, passive: socket.socket) -> list[bytes]:
        """All bytes of one connection: until it is closed, or up to the end of the first file in block mode."""
        data, _ = passive.accept()
        self._connections.append(data)
        received = b""
        while (piece := data.recv(65536)) and not (received := received + piece).endswith(END_OF_FILE):
            pass
        return [received]

    def _send(self, reply: Callable[[bytes], int | None], passive: socket.socket, listing: Listing | None) -> None:
        with passive:
            if listing is None:
                reply(b"550 no such file or directory\r\n")
                return
            reply(b"150 here it comes\r\n")
            data, _ = passive.accept()
        self._connections.append(data)
        with contextlib.suppress(OSError), data:
            listing(data)
        reply(b"226 that was it\r\n")


def sends(*pieces: bytes) -> Listing:
    """A listing that sends these bytes."""

    def listing(data: socket.socket) -> None:
        for piece in pieces:
            data.sendall(piece)

    return listing


def endless(piece: bytes) -> Listing:
    """A listing that sends the same line until the client disconnects."""

    def listing(data: socket.socket) -> None:
        while True:
            data.sendall(piece)

    return listing


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never says a word; gives its ``host:port``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"localhost:{listener.getsockname()[1]}"

"""A TCP proxy on loopback that delays what passes, as a long line does: in a process of its own.

A connection takes one round trip until its first byte is on its way, and each byte half a round trip from then on. The
line has no bound of its own but the memory for what is on it.

Run by itself: ``delaying_proxy.py ROUND_TRIP_MS PORT ...``; prints a port for each, and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence

from figures import BenchmarkError

_PIECE = 256 * 1024
#: Bytes on the line in one direction: a gigabyte a second at a round trip of 30 ms.
_MOST = 16 * 1024 * 1024
_HOST = "127.0.0.1"


@contextlib.contextmanager
def delayed(round_trip_ms: int, ports: Sequence[int]) -> Iterator[list[int]]:
    """Ports of loopback that lead to others, with a delay; the same ports where there is none."""
    if not round_trip_ms:
        yield list(ports)
        return
    command = [sys.executable, __file__, str(round_trip_ms), *map(str, ports)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018
        line = process.stdout.readline()
        if not line:
            raise BenchmarkError("the delaying proxy did not start")
        try:
            yield [int(port) for port in line.split()]
        finally:
            process.stdin.close()


class _Line:
    """One direction of a connection: what was read from ``source`` and is on its way to ``target``."""

    def __init__(self, source: socket.socket, target: socket.socket, open_at: float) -> None:
        self.source = source
        self.target = target
        self.open_at = open_at
        #: When each piece arrives, and what it is; an empty one is the end.
        self.pieces: deque[tuple[float, bytes]] = deque()
        self.bytes = 0
        self.is_reading = True
        self.is_full = False


class _Proxy:
    def __init__(self, round_trip_s: float, ports: Sequence[int]) -> None:
        self._half_s = round_trip_s / 2
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._listeners: dict[socket.socket, int] = {}
        for port in ports:
            listener = socket.create_server((_HOST, 0), backlog=256)
            listener.setblocking(False)
            self._listeners[listener] = port
            self._selector.register(listener, selectors.EVENT_READ)
        #: Socket → the line that it is read for, and the one that is written to it.
        self._lines: dict[socket.socket, tuple[_Line, _Line]] = {}
        #: When a line has something to deliver.
        self._due: list[tuple[float, int, _Line]] = []
        self._numbers = itertools.count()

    @property
    def own_ports(self) -> list[int]:
        return [listener.getsockname()[1] for listener in self._listeners]

    def serve(self) -> None:
        while True:
            wait_s = max(self._due[0][0] - time.monotonic(), 0.0) if self._due else None
            for key, events in self._selector.select(wait_s):
                if key.fileobj is sys.stdin:
                    return
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj in self._listeners:
                    self._accept(key.fileobj)
                    continue
                if events & selectors.EVENT_READ and key.fileobj in self._lines:
                    self._read(self._lines[key.fileobj][0])
                if events & selectors.EVENT_WRITE and key.fileobj in self._lines:
                    self._deliver(self._lines[key.fileobj][1])
            while self._due and self._due[0][0] <= time.monotonic():
                line = heapq.heappop(self._due)[2]
                if line.target in self._lines:
                    self._deliver(line)

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        try:
            server = socket.create_connection((_HOST, self._listeners[listener]))
        except OSError:
            client.close()
            return
        open_at = time.monotonic() + 2 * self._half_s
        there, back = _Line(client, server, open_at), _Line(server, client, open_at)
        for sock, lines in ((client, (there, back)), (server, (back, there))):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._lines[sock] = lines
            self._selector.register(sock, selectors.EVENT_READ)

    def _read(self, line: _Line) -> None:
        try:
            piece = line.source.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        due = max(time.monotonic(), line.open_at) + self._half_s
        line.pieces.append((due, piece))
        line.bytes += len(piece)
        line.is_reading = bool(piece)
        heapq.heappush(self._due, (due, next(self._numbers), line))
        self._watch(line.source)

    def _deliver(self, line: _Line) -> None:
        """Write what has arrived."""
        line.is_full = False
        while line.pieces and line.pieces[0][0] <= time.monotonic():
            due, piece = line.pieces.popleft()
            try:
                if not piece:
                    line.target.shutdown(socket.SHUT_WR)
                    self._end_if_over(line)
                    return
                sent = line.target.send(piece)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._close(line)
                return
            line.bytes -= sent
            if sent < len(piece):
                line.pieces.appendleft((due, piece[sent:]))
                line.is_full = True
                break
        self._watch(line.source)
        self._watch(line.target)

    def _watch(self, sock: socket.socket) -> None:
        """Wait for what can be done at a socket now."""
        if sock not in self._lines:
            return
        source_of, target_of = self._lines[sock]
        events = selectors.EVENT_READ if source_of.is_reading and source_of.bytes < _MOST else 0
        events |= selectors.EVENT_WRITE if target_of.is_full else 0
        is_watched = sock in self._selector.get_map()
        if events and is_watched:
            self._selector.modify(sock, events)
        elif events:
            self._selector.register(sock, events)
        elif is_watched:
            self._selector.unregister(sock)

    def _end_if_over(self, line: _Line) -> None:
        back = self._lines[line.source][1]
        if not back.is_reading and not back.pieces:
            self._close(line)

    def _close(self, line: _Line) -> None:
        for sock in (line.source, line.target):
            if sock in self._selector.get_map():
                self._selector.unregister(sock)
            self._lines.pop(sock, None)
            sock.close()


def main() -> None:
    proxy = _Proxy(int(sys.argv[1]) / 1000, [int(port) for port in sys.argv[2:]])
    print(*proxy.own_ports, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        proxy.serve()


if __name__ == "__main__":
    main()

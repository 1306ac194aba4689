"""Listeners to the stream of events; a process of its own for `sse_listeners`.

Arguments: URL, PEM of the authority, certificate and key of the user, how many. Prints a line when all streams have
begun; for each line of its input, the number of events that were received since; ends with its input.
"""

from __future__ import annotations

import asyncio
import resource
import ssl
import sys
from urllib.parse import urlsplit

from caller import API

#: Connections that are opened at the same time.
_AT_ONCE = 20
#: Bytes that wait in this process for one listener.
_BUFFER = 16384


class Listeners:
    """Streams that are read and counted."""

    def __init__(self, url: str, context: ssl.SSLContext) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 443
        self._context = context
        self._opening = asyncio.Semaphore(_AT_ONCE)
        self._reading: set[asyncio.Task[None]] = set()
        self.events = 0

    async def listen(self) -> None:
        """Begin one stream, and read it from then on."""
        async with self._opening:
            reader, writer = await asyncio.open_connection(
                self._host, self._port, ssl=self._context, server_hostname=self._host, limit=_BUFFER
            )
            head = f"GET {API}/events HTTP/1.1\r\nHost: {self._host}\r\nAccept: text/event-stream\r\n\r\n"
            writer.write(head.encode())
            received = await reader.readuntil(b"id: ")
            if b" 200 " not in received.split(b"\r\n", 1)[0]:
                sys.exit(f"not answered with 200: {received[:300]!r}")
        task = asyncio.create_task(self._read(reader, writer))
        self._reading.add(task)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_BUFFER):
            self.events += data.count(b"\nevent: job\n")
        writer.close()
        sys.exit("the daemon has ended a stream")


async def hold(url: str, context: ssl.SSLContext, count: int) -> None:
    """Listen until the input ends."""
    listeners = Listeners(url, context)
    await asyncio.gather(*(listeners.listen() for _ in range(count)))
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(listeners.events, flush=True)
        listeners.events = 0


def main() -> None:
    url, authority, certificate, key, count = sys.argv[1:]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    context = ssl.create_default_context(cafile=authority)
    context.load_cert_chain(certificate, key)
    asyncio.run(hold(url, context, int(count)))


if __name__ == "__main__":
    main()

"""REST requests per second over mutual TLS with kept connections: ``POST /list`` and ``GET /jobs/N``.

The client is a bare asyncio one in this process: it writes prepared bytes and reads whole answers. The jobs it submits
are of protocol DUMMY on a daemon that may run one batch at a time, so that the submissions are what is measured.

Run: ``.venv/bin/python benchmarks/rest_rates.py``
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import uuid
from urllib.parse import urlsplit

from rig import arguments, client_of, cpu_seconds, report, rig

from pdm.testgrid.service import TestService

API = "/workqueue/api/v1.0"


def context_of(service: TestService, user: str) -> ssl.SSLContext:
    certificate, key = service.credentials(user)
    context = ssl.create_default_context(cafile=str(service.directory / "certificates" / "ca.crt"))
    context.load_cert_chain(certificate, key)
    return context


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of one answer with a content length or in chunks."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in lines[1:] if b": " in line)
    if headers.get(b"transfer-encoding") == b"chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    else:
        body = await reader.readexactly(int(headers[b"content-length"]))
    return int(lines[0].split()[1]), body


async def load(url: str, context: ssl.SSLContext, connections: int, seconds: float, method: str, path: str) -> float:
    """Requests per second over ``connections`` kept connections."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 443
    opened = [await asyncio.open_connection(host, port, ssl=context) for _ in range(connections)]
    done = 0
    end = time.perf_counter() + seconds

    def request() -> bytes:
        body = b""
        extra = ""
        if method == "POST":
            body = json.dumps({"src_siteid": 1, "src_filepath": "/x", "protocol": "DUMMY"}).encode()
            extra = (
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nIdempotency-Key: {uuid.uuid4()}\r\n"
            )
        return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{extra}\r\n".encode() + body

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal done
        while time.perf_counter() < end:
            writer.write(request())
            status, body = await answer(reader)
            assert status == 200, (status, body)
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(one(reader, writer) for reader, writer in opened))
    rate = done / (time.perf_counter() - began)
    for _, writer in opened:
        writer.close()
    return rate


def main() -> None:
    options = arguments(__doc__ or "", connections=16, seconds=5)
    settings = {"agents": {"max_agents": "2"}}
    with rig(with_grid=False, **settings) as (service, _), client_of(service, "admin") as client:
        assert service.process is not None
        assert service.url is not None
        job = client.list(1, "/x", protocol="DUMMY")
        client.wait(job.id)
        context = context_of(service, "admin")
        figures: dict[str, object] = {"connections": options.connections}
        for method, path in (("GET", f"{API}/jobs/{job.id}"), ("POST", f"{API}/list")):
            cpu = cpu_seconds(service.process.pid)
            began = time.perf_counter()
            rate = asyncio.run(load(service.url, context, options.connections, options.seconds, method, path))
            elapsed = time.perf_counter() - began
            name = "GET /jobs/N" if method == "GET" else "POST /list"
            figures[f"{name} per second"] = rate
            figures[f"{name} daemon CPU (ms each)"] = (cpu_seconds(service.process.pid) - cpu) / (rate * elapsed) * 1000
        report("rest rates", figures)


if __name__ == "__main__":
    main()

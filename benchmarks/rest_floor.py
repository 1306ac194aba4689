"""The floors of the REST figures: bare Klein routes over mutual TLS that do the least such a route can do.

``GET /jobs/N`` knows who calls (read once from the certificate of a connection, then kept with it) and gives out a
prepared job of the usual size. ``POST /list`` decodes its body, inserts one row into an SQLite database (write-ahead
log, ``synchronous=FULL``, one commit a request) in a thread, and gives the job out with the number of the row.

Nothing of the service is used, so the floor stays where it is when the service changes. The thread pool is of the size
of Twisted's own, with one connection a thread, which gave more inserts a second than one thread alone.

Run beside a daemon, with the certificates of its instance (`serving` does the same from Python)::

    .venv/bin/python benchmarks/rest_floor.py --certificates DIR/certificates --database FILE
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

_READY = "floor ready "
_JOB: dict[str, Any] = {
    "id": 1,
    "user_id": 1,
    "src_siteid": 1,
    "src_filepath": "/x",
    "type": "LIST",
    "status": "SUBMITTED",
    "extra_opts": {},
    "priority": 5,
    "protocol": "DUMMY",
    "log_uid": "0" * 32,
    "timestamp": "2026-01-01T00:00:00Z",
    "finished_at": None,
    "label": None,
    "max_tries": 2,
    "cancel_requested": False,
    "num_elements": 1,
    "num_new": 0,
    "num_submitted": 1,
    "num_running": 0,
    "num_done": 0,
    "num_failed": 0,
    "num_cancelled": 0,
    "held": 0,
    "skipped": 0,
    "bytes_total": 0,
    "bytes_done": 0,
}


@frozen
class Floor:
    """A running floor.

    Attributes:
        url: where it serves; ``/jobs/N`` and ``/list`` are right below.
        pid: of its process.
    """

    url: str
    pid: int


@contextlib.contextmanager
def serving(certificates: Path, database: Path) -> Iterator[Floor]:
    """A floor in a process of its own; gone afterwards.

    Args:
        certificates: directory with ``host.crt``, ``host.key`` and ``ca.crt``, as ``pdm admin init`` makes it.
        database: file that is made for the inserts.
    """
    command = [sys.executable, __file__, "--certificates", str(certificates), "--database", str(database)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith(_READY):
                raise RuntimeError("the floor did not start")
            yield Floor(line.removeprefix(_READY).strip(), process.pid)
        finally:
            process.terminate()


def serve(certificates: Path, database: Path) -> None:
    """Serve until terminated; prints one line once it does."""
    # Here: who only imports `serving` needs no reactor.
    from klein import Klein
    from twisted.internet import reactor as _reactor
    from twisted.internet.ssl import Certificate, PrivateCertificate
    from twisted.internet.threads import deferToThreadPool
    from twisted.python.threadpool import ThreadPool
    from twisted.web.server import Request, Site

    reactor: Any = _reactor

    class SilentSite(Site):
        noisy = False

        def log(self, request: object) -> None:
            """No line for each request: the least a route can do."""

    klein = Klein()
    pool = ThreadPool(5, 10)
    _opened(database).close()
    of_thread = threading.local()
    prepared = json.dumps(_JOB).encode()

    def insert(subject: str, site: int, path: str) -> int:
        if not hasattr(of_thread, "connection"):
            of_thread.connection = _opened(database)
        cursor = of_thread.connection.execute(
            "INSERT INTO jobs (subject, site, path) VALUES (?, ?, ?)", (subject, site, path)
        )
        return cursor.lastrowid or 0

    def caller(request: Request) -> str:
        transport: Any = request.channel.transport
        known: str | None = getattr(transport, "floor_subject", None)
        if known is None:
            certificate = transport.getHandle().get_peer_certificate(as_cryptography=True)
            known = transport.floor_subject = certificate.subject.rfc4514_string()
        return known

    @klein.route("/jobs/<int:number>", methods=["GET"])
    def get_job(request: Request, number: int) -> bytes:
        assert caller(request)
        request.setHeader(b"Content-Type", b"application/json")
        return prepared

    @klein.route("/list", methods=["POST"])
    async def submit_list(request: Request) -> bytes:
        subject = caller(request)
        assert request.content is not None
        asked = json.loads(request.content.read())
        number = await deferToThreadPool(reactor, pool, insert, subject, asked["src_siteid"], asked["src_filepath"])
        request.setHeader(b"Content-Type", b"application/json")
        return json.dumps(_JOB | {"id": number, "src_filepath": asked["src_filepath"]}).encode()

    host = PrivateCertificate.loadPEM(
        (certificates / "host.crt").read_bytes() + (certificates / "host.key").read_bytes()
    )
    options = host.options(Certificate.loadPEM((certificates / "ca.crt").read_bytes()))
    site: Any = SilentSite
    port = reactor.listenSSL(0, site(klein.resource()), options, interface="127.0.0.1")
    pool.start()
    reactor.addSystemEventTrigger("after", "shutdown", pool.stop)
    print(f"{_READY}https://localhost:{port.getHost().port}", flush=True)
    reactor.run()


def _opened(database: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(database, isolation_level=None, timeout=30)
    connection.execute("PRAGMA journal_mode=wal")
    connection.execute("PRAGMA synchronous=full")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS jobs (id INTEGER PRIMARY KEY AUTOINCREMENT, subject TEXT, site INTEGER, path TEXT)"
    )
    return connection


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--certificates", type=Path, required=True)
    parser.add_argument("--database", type=Path, required=True)
    options = parser.parse_args()
    serve(options.certificates, options.database)


if __name__ == "__main__":
    main()

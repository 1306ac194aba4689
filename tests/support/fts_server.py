"""A small FTS3 for tests: its REST API as far as the service uses it, over files of the test grid; and its faults."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from attrs import define, field

from pdm.testgrid import TestGrid
from pdm.workqueue.certificates.delegation import new_request

_VO = uuid.uuid5(uuid.UUID("01874efb-4735-4595-bc9c-591aef8240c9"), "tests")
_ALLOW_PROXIES = 0x40
_FINAL = ("FINISHED", "FAILED", "CANCELED")


@define(eq=False)
class FakeFts:
    """Its state.

    Attributes:
        faults: what it does wrong: ``error`` (500), ``hang``, ``garbage``, ``forget`` (404 for all jobs), ``lie``
            (FINISHED without a copy), ``odd`` (states that nobody knows), ``drop`` (takes a job and closes the
            connection), ``ids`` (random ids), ``restless`` (another state in each answer, for ever).
        reasons: end of a source's name → reason with which it fails.
        refused: end of the names of sources that make it refuse a job.
        paused: while it is set, nothing is transferred.
        submitted: sources of all files that it has taken.
        requests: method and path.
        proxies: that it was given.
    """

    grid: TestGrid
    url: str = ""
    faults: set[str] = field(factory=set)
    reasons: dict[str, str] = field(factory=dict)
    refused: str = "\0"
    paused: threading.Event = field(factory=threading.Event)
    submitted: list[str] = field(factory=list)
    requests: list[str] = field(factory=list)
    proxies: list[bytes] = field(factory=list)
    jobs: dict[str, list[dict[str, Any]]] = field(factory=dict)
    lock: threading.Lock = field(factory=threading.Lock)

    def submit(self, body: dict[str, Any]) -> tuple[int, object]:
        number = str(uuid.uuid4() if "ids" in self.faults else uuid.uuid5(_VO, body["params"]["sid"]))
        files = [
            {
                "file_id": at,
                "file_state": "SUBMITTED",
                "source_surl": each["sources"][0],
                "dest_surl": each["destinations"][0],
                "reason": None,
            }
            for at, each in enumerate(body["files"], start=1 + len(self.submitted))
        ]
        if any(file["source_surl"].endswith(self.refused) for file in files):
            return 400, {"status": "400 Bad Request", "message": "Invalid value within the request"}
        with self.lock:
            if number in self.jobs:
                return 409, {"status": "409 Conflict", "message": "The sid provided by the user is duplicated"}
            self.jobs[number] = files
            self.submitted += [file["source_surl"] for file in files]
        threading.Thread(target=self._transfer, args=(files,), daemon=True).start()
        return 200, {"job_id": number}

    def _transfer(self, files: list[dict[str, Any]]) -> None:
        for file in files:
            while self.paused.is_set() and file["file_state"] == "SUBMITTED":
                time.sleep(0.02)
            if file["file_state"] != "SUBMITTED":
                continue
            file["file_state"] = "TELEPORTING" if "odd" in self.faults else "ACTIVE"
            reason = next((text for end, text in self.reasons.items() if file["source_surl"].endswith(end)), None)
            if reason is None and "lie" not in self.faults:
                target = _path(file["dest_surl"])
                shutil.copyfile(_path(file["source_surl"]), target)
                self.grid.give(target)
            file["reason"] = reason
            file["file_state"] = "FINISHED" if reason is None else "FAILED"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        parts = urlsplit(path).path.strip("/").split("/")
        if parts == ["whoami"]:
            return 200, {"delegation_id": "d1", "vos": ["tests"], "vos_id": [str(_VO)], "user_dn": "/CN=alice"}
        if parts[0] == "delegation":
            if method == "PUT":
                self.proxies.append(body)
                return 201, None
            if parts[-1] == "request":
                return 200, new_request("/CN=alice")[1]
            ends = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + 36000))
            return 200, {"termination_time": ends} if self.proxies else None
        if method == "POST":
            return self.submit(json.loads(body))
        files = None if "forget" in self.faults else self.jobs.get(parts[1])
        if files is None:
            return 404, {"status": "404 Not Found", "message": f"No job with the id {parts[1]}"}
        if method == "DELETE":
            numbers = parts[3].split(",") if len(parts) > 3 else None
            for file in files:
                if file["file_state"] not in _FINAL and (numbers is None or str(file["file_id"]) in numbers):
                    file["file_state"] = "CANCELED"
            return 200, {"job_id": parts[1], "job_state": "CANCELED"}
        if "restless" in self.faults:
            state = ("ACTIVE", "READY")[len(self.requests) % 2]
            files = [{**file, "file_state": state} for file in files]
        return 200, {"job_id": parts[1], "files": files}


def _path(url: str) -> Path:
    return Path("/" + unquote(urlsplit(url).path).lstrip("/"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        with contextlib.suppress(OSError):
            super().handle_one_request()

    def _serve(self) -> None:
        fts = cast(_Server, self.server).fts
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fts.requests.append(f"{self.command} {self.path}")
        if "hang" in fts.faults:
            time.sleep(9)
        if "error" in fts.faults:
            status, answer = 500, b"<html>Internal Server Error</html>"
        else:
            status, found = fts.answer(self.command, self.path, body)
            answer = found if isinstance(found, bytes) else json.dumps(found).encode()
            if "drop" in fts.faults and self.command == "POST":
                fts.faults.discard("drop")
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if "garbage" in fts.faults and "?files=" in self.path:
                answer = b'{"files": [{"file_id": ' + b"[" * 5000
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = _serve  # noqa: N815  # names of http.server

    def log_message(self, *_args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    fts: FakeFts

    def handle_error(self, *_args: Any) -> None:
        pass


@contextlib.contextmanager
def fake_fts(grid: TestGrid) -> Iterator[FakeFts]:
    """Serve it, with the host certificate of the grid, for the users of the grid."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    host = grid.credentials.host
    context.load_cert_chain(host.certificate, host.key)
    context.load_verify_locations(capath=str(grid.credentials.trust))
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= _ALLOW_PROXIES
    server = _Server(("localhost", 0), _Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.fts = FakeFts(grid, f"https://localhost:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.fts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A listener that resumes loses no event by the death of the daemon, and gets none twice."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pdm.testgrid.service import TestService, set_keys

_PDM = [sys.executable, "-m", "pdm.workqueue.cli"]
_JOBS = 10
_LISTENERS = 50
#: Seconds until the daemon has ended, at most; without listeners it takes about one.
_PROMPT_S = 5.0


def _events(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def _submit(service: TestService) -> None:
    for _ in range(_JOBS):
        done = service.pdm("admin", "mkdir", "-p", "1:/events", "--no-wait")
        assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_a_killed_daemon_loses_no_event(tmp_path: Path) -> None:
    service = TestService(tmp_path / "instance")
    service.init()
    with service.running():
        # The listener looks for the next daemon where the first one was.
        set_keys(service.directory / "workqueue.conf", {"server": {"port": (service.url or "").rpartition(":")[2]}})
        _submit(service)
        with (tmp_path / "seen").open("wb") as seen:
            listener = subprocess.Popen(
                [*_PDM, "-F", "json", "events", "-f", "-n", "1000"], env=service.environment("admin"), stdout=seen
            )
        try:
            for _ in range(2):
                _submit(service)
                service.kill()
                service.start()
            _submit(service)
            assert service.pdm("admin", "wait", *map(str, range(1, 4 * _JOBS + 1))).returncode == 0
            stored = _events(service.pdm("admin", "-F", "json", "events", "-n", "1000").stdout)
            last = json.dumps(stored[-1]["id"])
            while f'"id":{last},' not in (tmp_path / "seen").read_text():
                assert listener.poll() is None
                try:
                    listener.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            listener.terminate()
            listener.wait(20)
    ended = {event["job"] for event in stored if event["data"].get("status") == "DONE"}
    assert len(ended) == 4 * _JOBS
    assert _events((tmp_path / "seen").read_text()) == stored


def _ask(service: TestService, context: ssl.SSLContext, path: str, accept: str) -> ssl.SSLSocket:
    parts = urlsplit(service.url or "")
    plain = socket.create_connection((parts.hostname or "", parts.port or 0), 30)
    connection = context.wrap_socket(plain, server_hostname="localhost")
    connection.sendall(
        f"GET /workqueue/api/v1.0{path} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n\r\n".encode()
    )
    return connection


def _submit_hanging(service: TestService, context: ssl.SSLContext) -> int:
    parts = urlsplit(service.url or "")
    with contextlib.closing(http.client.HTTPSConnection("localhost", parts.port, context=context)) as connection:
        body = {"src_siteid": 1, "src_filepath": "/x", "protocol": "DUMMY", "extra_opts": {"dummy": {"hang": True}}}
        connection.request("POST", "/workqueue/api/v1.0/list", json.dumps(body), {"Content-Type": "application/json"})
        number: int = json.load(connection.getresponse())["id"]
        return number


def _rest(connection: ssl.SSLSocket) -> bytes:
    received = b""
    with contextlib.suppress(ssl.SSLEOFError, ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


@pytest.mark.full
def test_listeners_and_waiting_requests_do_not_delay_the_stop(tmp_path: Path) -> None:
    """Streams end with the reason, though some listeners do not read; those that wait get an answer, or are cut off."""
    service = TestService(tmp_path / "instance")
    service.init()
    with service.running(), contextlib.ExitStack() as stack:
        context = ssl.create_default_context(cafile=str(service.directory / "certificates" / "ca.crt"))
        context.load_cert_chain(*service.credentials("admin"))
        job = _submit_hanging(service, context)
        streams = [
            stack.enter_context(_ask(service, context, "/events", "text/event-stream")) for _ in range(_LISTENERS)
        ]
        for stream in streams:
            assert stream.recv(65536).startswith(b"HTTP/1.1 200 ")
        path = f"/jobs/{job}?wait=60"
        waiting = [stack.enter_context(_ask(service, context, path, "application/json")) for _ in range(_LISTENERS)]
        time.sleep(1)
        began = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began < _PROMPT_S
        ends = [_rest(stream) for stream in streams]
        assert all(b": the service is stopping\n\n" in end for end in ends), ends
        answers = {_rest(each)[:12] for each in waiting}
        assert answers <= {b"", b"HTTP/1.1 200", b"HTTP/1.1 503"}, answers
    assert "Traceback" not in service.log_path.read_text()

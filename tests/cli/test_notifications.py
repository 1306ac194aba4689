"""``pdm webhook`` against a real daemon and a receiver of its messages."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from standardwebhooks import Webhook

from pdm.testgrid.service import TestService
from tests.support.commands import pdm

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def received() -> Queue[Any]:
    """Messages, as headers and body."""
    return Queue()


@pytest.fixture(scope="module")
def receiver(received: Queue[Any]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, receiver: str) -> Iterator[TestService]:
    """A daemon that may send to this machine."""
    service = TestService(Path(tmp_path_factory.mktemp("told")) / "instance")
    service.init(
        webhooks={"plain_http": "yes", "allowed": "127.0.0.1"},
    )
    with service.running():
        yield service


def test_a_webhook_is_added_listed_shown_tested_and_removed(
    told: TestService, receiver: str, received: Queue[Any]
) -> None:
    added = pdm(told, "webhook", "add", receiver)
    secret = added.stdout.strip()
    assert secret.startswith("whsec_") and "'pdm webhook test 1'" in added.stderr
    assert receiver in pdm(told, "webhook", "list").stdout
    assert [each["url"] for each in json.loads(pdm(told, "webhook", "list", "-F", "json").stdout)] == [receiver]
    assert "accepted (204)" in pdm(told, "webhook", "test", "1").stderr
    headers, body = received.get(timeout=10)
    Webhook(secret).verify(body, {name.lower(): value for name, value in headers.items()})
    shown = pdm(told, "webhook", "show", "1").stdout
    assert shown.startswith("webhook 1  ") and f"url      {receiver}" in shown and secret not in shown
    pdm(told, "mkdir", "local-a:/made")
    headers, body = received.get(timeout=20)
    Webhook(secret).verify(body, {name.lower(): value for name, value in headers.items()})
    assert "webhook 1 removed" in pdm(told, "webhook", "remove", "1").stderr
    assert json.loads(pdm(told, "webhook", "list", "-F", "json").stdout) == []
    pdm(told, "webhook", "show", "1", code=3)

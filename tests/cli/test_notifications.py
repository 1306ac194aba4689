"""``pdm webhook`` and ``pdm mail`` against a real daemon, a receiver of its messages and a mail server."""

from __future__ import annotations

import email
import email.policy
import json
import re
import threading
from collections.abc import Iterator
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from standardwebhooks import Webhook

from pdm.testgrid.ports import reserve_port
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


class Mailbox:
    """Puts each mail into a queue: its recipients and its text."""

    def __init__(self) -> None:
        self.mails: Queue[tuple[list[str], str]] = Queue()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        message = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(message, EmailMessage)
        self.mails.put((envelope.rcpt_tos, f"{message['Subject']}\n{message.get_content()}"))
        return "250 OK"


@pytest.fixture(scope="module")
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, receiver: str, mailbox: Mailbox) -> Iterator[TestService]:
    """A daemon that may send to this machine, and mail through it."""
    service = TestService(Path(tmp_path_factory.mktemp("told")) / "instance")
    port = reserve_port()
    service.init(
        webhooks={"plain_http": "yes", "allowed": "127.0.0.1"},
        mail={"smarthost": "127.0.0.1", "port": str(port), "sender": "pdm@example.org", "tls": "none"},
    )
    smarthost = Controller(mailbox, hostname="127.0.0.1", port=port)
    smarthost.start()
    with service.running():
        yield service
    smarthost.stop()


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


def test_mail_is_set_confirmed_shown_and_stopped(told: TestService, mailbox: Mailbox) -> None:
    assert "no mail: 'pdm mail set ADDRESS'" in pdm(told, "mail", "show").stdout
    asked = pdm(told, "mail", "set", "me@example.org", "--notify", "ended")
    assert "a code was sent to me@example.org: 'pdm mail confirm CODE'" in asked.stderr
    recipients, text = mailbox.mails.get(timeout=20)
    code = re.search(r"pdm mail confirm (\w+)", text)
    assert recipients == ["me@example.org"] and code is not None
    pdm(told, "mail", "confirm", "0" * 10, code=2)
    confirmed = pdm(told, "mail", "confirm", code[1]).stdout
    assert "me@example.org" in confirmed and "notify   ended, a mail each job" in confirmed
    assert "no more mail is sent" in pdm(told, "mail", "stop").stderr
    assert "no mail" in pdm(told, "mail", "show").stdout

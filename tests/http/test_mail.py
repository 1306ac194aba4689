"""Mail to users, through a real SMTP server with STARTTLS and a log-in."""

from __future__ import annotations

import email
import email.policy
import re
import socket
import ssl
from collections.abc import Iterator
from datetime import timedelta
from email.message import EmailMessage
from typing import Any

import pytest
import pytest_twisted
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from twisted.internet.task import deferLater

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.notifications import check_address
from pdm.workqueue.store import mail
from tests.http.service import Certificates, Service, reactor, running
from tests.store.stores import MISSING


class Mailbox:
    """Takes mail, or refuses it with a reply."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.recipients: list[str] = []
        self.refusal: str | None = None

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        if self.refusal is not None:
            return self.refusal
        parsed = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(parsed, EmailMessage)
        self.mails.append(parsed)
        self.recipients += envelope.rcpt_tos
        return "250 OK"


def _check_login(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
    return AuthResult(success=(data.login, data.password) == (b"pdm", b"secret"))


@pytest.fixture(scope="module")
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture(scope="module")
def service(
    certificates: Certificates, tmp_path_factory: pytest.TempPathFactory, mailbox: Mailbox
) -> Iterator[Service]:
    """A service with a smarthost that wants TLS and a log-in."""
    directory = tmp_path_factory.mktemp("service")
    certificates.host.write_bundle(directory / "smtp.pem")
    (directory / "password").write_text("secret\n")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(directory / "smtp.pem")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    smarthost = Controller(
        mailbox,
        hostname="127.0.0.1",
        port=port,
        tls_context=tls,
        require_starttls=True,
        auth_required=True,
        authenticator=_check_login,
    )
    smarthost.start()
    configuration = (
        f"\n[mail]\nsmarthost = localhost\nport = {port}\nsender = pdm@example.org\nca = trust\nuser = pdm\n"
        "password_file = password\n"
    )
    yield from running(Service(directory, certificates, configuration=configuration))
    smarthost.stop()


async def mailed(service: Service, mailbox: Mailbox, count: int) -> list[EmailMessage]:
    for _ in range(200):
        service.assembly.notifications.mail.timer.wake()
        if len(mailbox.mails) >= count:
            break
        await deferLater(reactor, 0.05)
    assert len(mailbox.mails) == count
    return mailbox.mails


async def subscribed(service: Service, mailbox: Mailbox, user: str, *notify: str, per: str = "job") -> None:
    """Confirm an address by the code that was mailed to it."""
    mailbox.mails.clear()
    address = f"{user}@example.org"
    body = {"address": address, "notify": list(notify), "per": per}
    answer = await service.call(user, "PUT", "/mail", body)
    assert (answer.status, answer.json["confirmed"]) == (200, False), answer.body
    (message,) = await mailed(service, mailbox, 1)
    assert message["To"] == address
    assert message["From"] == "pdm@example.org"
    code = re.search(r"pdm mail confirm (\w+)", message.get_content())
    assert code is not None
    wrong = await service.call(user, "POST", "/mail/confirm", {"code": "0" * 10})
    assert (wrong.status, wrong.problem) == (400, "invalid-input $.code")
    answer = await service.call(user, "POST", "/mail/confirm", {"code": code[1]})
    assert (answer.status, answer.json["confirmed"]) == (200, True), answer.body
    mailbox.mails.clear()


def skip(service: Service, seconds: float) -> None:
    service.skip[0] += timedelta(seconds=seconds)
    service.assembly.notifications.mail.timer.wake()


async def entered(service: Service, user: str, count: int) -> None:
    """Wait until a number of notices of a user wait."""
    user_id = await service.user_id(user)
    for _ in range(200):
        if (await service.database.read("count", mail.waiting, [user_id])).get(user_id, 0) >= count:
            return
        await deferLater(reactor, 0.03)
    raise AssertionError("nothing waits")


@pytest_twisted.ensureDeferred
async def test_a_job_that_fails_is_one_mail(service: Service, mailbox: Mailbox) -> None:
    await subscribed(service, mailbox, "anna", "failed", "held")
    await service.copied("anna", "fine")
    job = await service.submit("anna", max_tries=1)
    (token,) = await service.claim(job["id"])
    await service.settle(token, JobStatus.FAILED, MISSING)
    await entered(service, "anna", 1)
    skip(service, 400)
    (message,) = await mailed(service, mailbox, 1)
    assert message["Subject"] == f"PDM Workqueue: job {job['id']} FAILED"
    assert f"pdm errors {job['id']}" in message.get_content()
    assert message["Auto-Submitted"] == "auto-generated"
    shown = (await service.call("anna", "GET", "/mail")).json
    assert (shown["error"], shown["sent_at"] is not None) == (None, True)


@pytest_twisted.ensureDeferred
async def test_many_jobs_are_one_mail(service: Service, mailbox: Mailbox) -> None:
    await subscribed(service, mailbox, "bert", "ended", per="day")
    for _ in range(3):
        await service.copied("bert", "a", "b")
    await entered(service, "bert", 3)
    assert not mailbox.mails
    skip(service, 86400)
    (message,) = await mailed(service, mailbox, 1)
    assert message["Subject"] == "PDM Workqueue: 3 jobs"
    assert message.get_content().count("DONE") == 3


@pytest_twisted.ensureDeferred
async def test_a_job_may_choose_what_is_mailed_of_it(service: Service, mailbox: Mailbox) -> None:
    await subscribed(service, mailbox, "nora", "failed")
    told = {}
    for options in ({}, {"notify": ["ended", "held"]}):
        told = await service.submit("nora", extra_opts=options)
        assert told["extra_opts"] == options
        (token,) = await service.claim(told["id"])
        await service.settle(token, JobStatus.DONE)
    await entered(service, "nora", 1)
    skip(service, 400)
    (message,) = await mailed(service, mailbox, 1)
    assert message["Subject"] == f"PDM Workqueue: job {told['id']} DONE"
    # Without a confirmed address nothing could be sent.
    body = {"src_siteid": 1, "src_filepath": "/d", "protocol": "DUMMY", "extra_opts": {"notify": ["failed"]}}
    refused = await service.call("otto", "POST", "/mkdir", body)
    assert (refused.status, refused.problem) == (400, "invalid-input $.extra_opts.notify")
    assert "pdm mail set ADDRESS" in refused.json["detail"]


@pytest_twisted.ensureDeferred
async def test_what_is_refused_for_now_is_sent_later(service: Service, mailbox: Mailbox) -> None:
    await subscribed(service, mailbox, "cleo", "ended")
    mailbox.refusal = "451 come back later"
    await service.copied("cleo", "a")
    await entered(service, "cleo", 1)
    skip(service, 400)
    for _ in range(100):
        shown = (await service.call("cleo", "GET", "/mail")).json
        if shown["error"]:
            break
        await deferLater(reactor, 0.05)
    assert shown["error"].startswith("451 come back later")
    mailbox.refusal = None
    skip(service, 200)
    await mailed(service, mailbox, 1)


@pytest_twisted.ensureDeferred
async def test_no_mail_without_a_confirmed_address(service: Service, mailbox: Mailbox) -> None:
    body = {"address": "dora@example.org", "notify": ["ended"]}
    mailbox.mails.clear()
    for _ in range(5):
        assert (await service.call("dora", "PUT", "/mail", body)).status == 200
    await mailed(service, mailbox, max(1, len(mailbox.mails)))
    # No more codes for a day: mail cannot be made to flood an address.
    answer = await service.call("dora", "PUT", "/mail", body)
    assert (answer.status, answer.problem) == (409, "conflict")
    assert (await service.call("dora", "DELETE", "/mail")).status == 204
    answer = await service.call("dora", "PUT", "/mail", body)
    assert answer.status == 409
    assert (await service.call("dora", "GET", "/mail")).json["address"] is None


@pytest.mark.parametrize(
    "address",
    [
        *("a", "a@b", "a@b.c", "a b@example.org", "a@example.org\r\nBcc: b@example.org", "a@example.org,b@example.org"),
        *("<a@example.org>", "ä@example.org", "@example.org", "a@-example.org", "a" * 65 + "@example.org", "a@[::1]"),
        *('"a"@example.org', "a@example.org\n", ".a@example.org", "a@" + "b." * 130 + "org"),
    ],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match="mail address"):
        check_address(address)


@pytest_twisted.ensureDeferred
async def test_without_a_smarthost_there_is_no_mail(own_service: Service) -> None:
    answer = await own_service.call("emil", "PUT", "/mail", {"address": "emil@example.org"})
    assert (answer.status, answer.problem) == (409, "conflict")
    answer = await own_service.call("emil", "PUT", "/mail", {"address": "a@example.org\nBcc: b@example.org"})
    assert answer.status in (400, 409)

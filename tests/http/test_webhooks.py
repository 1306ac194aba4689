"""Webhooks over REST: events of real jobs at a real receiver, which is down, answers errors, hangs or comes back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_twisted
from msgspec import structs
from standardwebhooks.webhooks import Webhook
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from pdm.workqueue.config.reader import read_settings
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.notifications import MOST_WEBHOOKS
from pdm.workqueue.execution.notifications import Notifications
from pdm.workqueue.policies import notifications
from pdm.workqueue.store import webhooks
from tests.http.service import Certificates, Service, reactor, running
from tests.store.stores import MISSING
from tests.support.receivers import Message, Receiver

_CONFIGURATION = """
[webhooks]
allowed = 127.0.0.1
ca = trust
timeout = 1s
"""


@pytest.fixture(scope="module")
def service(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that may send to loopback."""
    yield from running(Service(tmp_path_factory.mktemp("service"), certificates, configuration=_CONFIGURATION))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    pytest_twisted.blockon(Deferred.fromCoroutine(receiver.close()))


def url_of(service: Service, receiver: Receiver) -> str:
    return f"https://localhost:{receiver.listen(service.certificates.host)}/hook"


async def added(service: Service, user: str, url: str, **more: Any) -> dict[str, Any]:
    answer = await service.call(user, "POST", "/webhooks", {"url": url, "kinds": ["job", "failure"]} | more)
    assert answer.status == 201, answer.body
    return answer.json


async def shown(service: Service, user: str, number: int) -> dict[str, Any]:
    return (await service.call(user, "GET", f"/webhooks/{number}")).json


async def until(condition: Any, what: str) -> None:
    for _ in range(200):
        if condition():
            return
        await deferLater(reactor, 0.03)
    raise AssertionError(f"{what} did not happen")


async def settled(service: Service, user: str, number: int, count: int) -> dict[str, Any]:
    """A webhook when a number of its deliveries have been tried."""
    for _ in range(200):
        found = await shown(service, user, number)
        if len([each for each in found["deliveries"] if each["attempts"]]) >= count:
            return found
        await deferLater(reactor, 0.03)
    raise AssertionError(found)


def skip(service: Service, seconds: float) -> None:
    service.skip[0] += timedelta(seconds=seconds)
    service.assembly.notifications.webhooks.timer.wake()


@pytest_twisted.ensureDeferred
async def test_events_of_a_job_arrive_in_order_and_signed(service: Service, receiver: Receiver) -> None:
    webhook = await added(service, "listener", url_of(service, receiver))
    assert webhook["secret"].startswith("whsec_")
    job_id = await service.copied("listener", "a")
    await service.submit("somebody else")
    await until(lambda: len(receiver.messages) >= 3, "delivery")
    statuses = [message.json["data"]["status"] for message in receiver.messages]
    assert statuses == ["SUBMITTED", "RUNNING", "DONE"]
    verifier = Webhook(webhook["secret"])
    for message in receiver.messages:
        verified = verifier.verify(message.body, message.headers)
        assert verified["type"] == "job"
        assert verified["data"]["job"] == job_id
    assert len({message.headers["webhook-id"] for message in receiver.messages}) == 3
    found = await settled(service, "listener", webhook["id"], 3)
    assert "secret" not in found
    assert [(each["state"], each["status"]) for each in found["deliveries"]] == [("DELIVERED", 204)] * 3
    assert (found["waiting"], found["failing_since"]) == (0, None)


@pytest_twisted.ensureDeferred
async def test_only_what_was_asked_for(service: Service, receiver: Receiver) -> None:
    url = url_of(service, receiver)
    job = await service.submit("chooser")
    other = await service.submit("chooser")
    await added(service, "chooser", url, kinds=["job"], job=job["id"])
    await added(service, "chooser", url, kinds=["failure"])
    for each in (other, job):
        assert (await service.call("chooser", "DELETE", f"/jobs/{each['id']}")).status == 200
    await until(lambda: receiver.messages, "delivery")
    await deferLater(reactor, 0.3)
    assert [(each.json["data"]["job"], each.json["data"]["status"]) for each in receiver.messages] == [
        (job["id"], "CANCELLED")
    ]


@pytest_twisted.ensureDeferred
async def test_a_stuck_event_holds_back_its_job_only(service: Service, receiver: Receiver) -> None:
    webhook = await added(service, "stuck", url_of(service, receiver), kinds=["job"])
    first = await service.submit("stuck")
    stuck = first["id"]

    def answer(message: Message) -> int:
        return 500 if message.json["data"]["job"] == stuck else 204

    receiver.answer = answer
    await service.call("stuck", "DELETE", f"/jobs/{stuck}")
    second = await service.submit("stuck")
    await service.call("stuck", "DELETE", f"/jobs/{second['id']}")
    await until(lambda: len(_of(receiver, second["id"])) == 2, "delivery of the other job")
    assert {each.json["data"]["status"] for each in _of(receiver, stuck)} == {"SUBMITTED"}
    found = await settled(service, "stuck", webhook["id"], 3)
    waiting = [each for each in found["deliveries"] if each["state"] == "WAITING"]
    assert {(each["job"], each["attempts"] > 0) for each in waiting} == {(stuck, True), (stuck, False)}
    assert found["failing_since"] is None  # the other job's events were accepted since
    receiver.answer = lambda _: 200
    skip(service, 20)
    await until(lambda: _of(receiver, stuck)[-1].json["data"]["status"] == "CANCELLED", "delivery in order")
    messages = _of(receiver, stuck)
    # The same message, at every try.
    assert len({each.headers["webhook-id"] for each in messages if each.json["data"]["status"] == "SUBMITTED"}) == 1


def _of(receiver: Receiver, job_id: int) -> list[Message]:
    return [each for each in receiver.messages if each.json["data"]["job"] == job_id]


@pytest_twisted.ensureDeferred
async def test_what_is_never_accepted_is_given_up_after_a_day(service: Service, receiver: Receiver) -> None:
    receiver.answer = lambda _: 500
    webhook = await added(service, "unlucky", url_of(service, receiver), kinds=["job"])
    await service.submit("unlucky")
    await settled(service, "unlucky", webhook["id"], 1)
    for hours in range(1, 40):  # noqa: B007 - used below
        skip(service, 3700)
        await deferLater(reactor, 0.1)
        (delivery,) = (await shown(service, "unlucky", webhook["id"]))["deliveries"]
        if delivery["state"] != "WAITING":
            break
    assert delivery["state"] == "GIVEN_UP"
    assert (delivery["status"], delivery["error"]) == (500, "it answered 500, not a success")
    assert 20 <= hours <= 27, "a day, in steps of an hour and a bit"
    found = await shown(service, "unlucky", webhook["id"])
    assert (found["disabled_at"], found["waiting"]) == (None, 0)
    # After three days without a success it is disabled; an accepted test enables it.
    skip(service, 2.5 * 86400)
    await service.submit("unlucky")
    await until_disabled(service, "unlucky", webhook["id"])
    failed = await service.call("unlucky", "POST", f"/webhooks/{webhook['id']}/test")
    assert (failed.json["accepted"], failed.json["status"], failed.json["enabled"]) == (False, 500, False)
    receiver.answer = lambda _: 200
    test = await service.call("unlucky", "POST", f"/webhooks/{webhook['id']}/test")
    assert (test.json["accepted"], test.json["enabled"]) == (True, True)
    assert receiver.messages[-1].json["type"] == "test"
    before = len(receiver.messages)
    await service.submit("unlucky")
    await until(lambda: len(receiver.messages) > before, "delivery after it was enabled")


async def until_disabled(service: Service, user: str, number: int) -> dict[str, Any]:
    for _ in range(100):
        found = await shown(service, user, number)
        if found["disabled_at"]:
            assert found["disabled_why"]
            return found
        await deferLater(reactor, 0.05)
    raise AssertionError(found)


@pytest_twisted.ensureDeferred
async def test_gone_is_the_end(service: Service, receiver: Receiver) -> None:
    receiver.answer = lambda _: 410
    webhook = await added(service, "gone", url_of(service, receiver))
    await service.submit("gone")
    found = await until_disabled(service, "gone", webhook["id"])
    assert "410" in found["disabled_why"]


@pytest_twisted.ensureDeferred
async def test_a_receiver_that_was_away_gets_all(service: Service, receiver: Receiver) -> None:
    port = receiver.listen(service.certificates.host)
    await receiver.close()
    webhook = await added(service, "away", f"https://localhost:{port}/", kinds=["job"])
    job_id = await service.copied("away", "a")
    found = await settled(service, "away", webhook["id"], 1)
    assert found["deliveries"][-1]["error"] == "it refused the connection"
    assert found["waiting"] == 3
    receiver.listen(service.certificates.host, port)
    skip(service, 30)
    await until(lambda: len(receiver.messages) == 3, "delivery")
    assert [each.json["data"]["status"] for each in _of(receiver, job_id)] == ["SUBMITTED", "RUNNING", "DONE"]


@pytest_twisted.ensureDeferred
async def test_one_that_hangs_delays_no_other(service: Service, receiver: Receiver) -> None:
    receiver.answer = lambda message: "hang"
    slow = [await added(service, "slow", url_of(service, receiver), kinds=["job"]) for _ in range(5)]
    quick = Receiver()
    await added(service, "quick", url_of(service, quick), kinds=["job"])
    await service.submit("slow")
    await until(lambda: receiver.messages, "a receiver that hangs")
    await service.submit("quick")
    await until(lambda: quick.messages, "delivery beside it")
    # Two webhooks of a user at a time.
    assert len(receiver.messages) <= 2
    await quick.close()
    for webhook in slow:
        await service.call("slow", "DELETE", f"/webhooks/{webhook['id']}")


@pytest_twisted.ensureDeferred
async def test_what_is_refused(service: Service) -> None:
    for body, problem in (
        ({"url": "http://example.org/", "kinds": ["job"]}, "invalid-input $.url"),
        ({"url": "https://u:p@example.org/", "kinds": ["job"]}, "invalid-input $.url"),
        ({"url": "https://169.254.169.254/", "kinds": ["job"]}, "invalid-input $.url"),
        ({"url": "https://[::1]/", "kinds": ["job"]}, "invalid-input $.url"),
        ({"url": "https://example.org/", "kinds": ["progress"]}, "invalid-input $.kinds[0]"),
        ({"url": "https://example.org/", "kinds": []}, "invalid-input $.kinds"),
        ({"url": "https://example.org/", "kinds": ["job"], "job": 999_999}, "job-not-found"),
    ):
        answer = await service.call("refused", "POST", "/webhooks", body)
        assert (answer.status in (400, 404), answer.problem) == (True, problem), body
        assert b"u:p" not in answer.body
    job = await service.submit("somebody else")
    answer = await service.call(
        "refused", "POST", "/webhooks", {"url": "https://example.org/", "kinds": ["job"], "job": job["id"]}
    )
    assert answer.status == 404


@pytest_twisted.ensureDeferred
async def test_a_repeated_request_makes_one_webhook(service: Service) -> None:
    body = {"url": "https://example.org/", "kinds": ["job"]}
    first = await service.call("repeater", "POST", "/webhooks", body, Idempotency_Key="w1")
    again = await service.call("repeater", "POST", "/webhooks", body, Idempotency_Key="w1")
    assert first.json == again.json
    other = await service.call("repeater", "POST", "/webhooks", body | {"kinds": ["held"]}, Idempotency_Key="w1")
    assert (other.status, other.problem) == (422, "idempotency-key-used Idempotency-Key")
    for _ in range(MOST_WEBHOOKS - 1):
        await added(service, "repeater", "https://example.org/")
    answer = await service.call("repeater", "POST", "/webhooks", body)
    assert (answer.status, answer.problem) == (409, "conflict")
    assert len((await service.call("repeater", "GET", "/webhooks")).json) == MOST_WEBHOOKS


@pytest_twisted.ensureDeferred
async def test_secrets_are_encrypted_in_the_database(service: Service) -> None:
    webhook = await added(service, "secretive", "https://example.org/")
    record = await service.database.read("fetch", webhooks.fetch, webhook["id"], None)
    assert record is not None
    signer = Webhook(webhook["secret"])
    assert signer._whsecret not in record.secret
    content = b"".join(path.read_bytes() for path in service.directory.rglob("workqueue.sqlite*"))
    assert signer._whsecret not in content
    assert webhook["secret"].encode() not in content


@pytest_twisted.ensureDeferred
async def test_a_restart_loses_no_event(own_service: Service, receiver: Receiver) -> None:
    """What is queued, and what was written while nothing was entered, is sent by the parts that start next."""
    stopped = own_service.assembly.notifications
    settings = own_service.context.settings
    options = read_settings(
        own_service.directory / "workqueue.conf",
        {"webhooks.allowed": "127.0.0.1", "webhooks.ca": "trust", "webhooks.timeout": "1s"},
    ).webhooks
    await stopped.stop()

    async def started() -> Notifications:
        found = notifications(
            reactor=reactor,
            settings=structs.replace(settings, webhooks=options),
            database=own_service.database,
            clock=own_service.now,
            vault=own_service.context.vault,
            incarnation="worker",
            file_sites=lambda: (),
        )
        own_service.context.notifications = found
        found.start()
        return found

    first = await started()
    receiver.answer = lambda _: 503
    webhook = await added(own_service, "patient", url_of(own_service, receiver), kinds=["job"])
    job = await own_service.submit("patient")
    await settled(own_service, "patient", webhook["id"], 1)
    await first.stop()
    await own_service.call("patient", "DELETE", f"/jobs/{job['id']}")
    receiver.answer = lambda _: 200
    receiver.messages.clear()
    own_service.skip[0] += timedelta(seconds=20)
    second = await started()
    await until(lambda: len(receiver.messages) == 2, "delivery after the restart")
    assert [each.json["data"]["status"] for each in receiver.messages] == ["SUBMITTED", "CANCELLED"]
    await second.stop()
    own_service.context.notifications = stopped


@pytest_twisted.ensureDeferred
async def test_failures_are_sent(service: Service, receiver: Receiver) -> None:
    await added(service, "failing", url_of(service, receiver), kinds=["failure"])
    job = await service.submit("failing", max_tries=1)
    (token,) = await service.claim(job["id"])
    await service.settle(token, JobStatus.FAILED, MISSING)
    await until(lambda: receiver.messages, "delivery")
    assert receiver.messages[0].json["data"]["code"] == "NOT_FOUND"

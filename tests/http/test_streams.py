"""Long answers at the pace of the client, clients that go away, and faults of the service itself."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.logger import LogEvent, formatEvent
from twisted.python.failure import Failure
from twisted.web.client import ResponseFailed

from pdm.workqueue.certificates.pem import to_pem
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.jobs import NewElement
from pdm.workqueue.http import request, transactions
from pdm.workqueue.http.request import ApiRequest
from pdm.workqueue.store import jobs
from tests.http.service import ROOT, IdleClaimer, Service

_ELEMENTS = 6_000


@contextmanager
def _connection(service: Service, user: str, request: bytes) -> Iterator[ssl.SSLSocket]:
    """A connection on which a request was sent; blocks."""
    bundle = service.directory / f"raw-{user}.pem"
    service.certificates.of(user).write_bundle(bundle)
    context = ssl.create_default_context(cadata=to_pem(service.certificates.authority.certificate).decode())
    context.load_cert_chain(bundle)
    with socket.create_connection(("localhost", service.port), timeout=30) as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        with context.wrap_socket(plain, server_hostname="localhost") as secure:
            secure.sendall(request)
            yield secure


def _get(path: str) -> bytes:
    return f"GET {ROOT}{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


def _unchunked(answer: bytes) -> bytes:
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    parts: list[bytes] = []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if int(size, 16) == 0:
            return b"".join(parts)
        parts.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Deferred[None]:
    """Fires when the next request has ended, however."""
    fired: Deferred[None] = Deferred()
    log_end = ApiRequest._log_end

    def observe(request: ApiRequest, result: Failure | None) -> None:
        log_end(request, result)
        if not fired.called:
            fired.callback(None)

    monkeypatch.setattr(ApiRequest, "_log_end", observe)
    return fired


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> Deferred[None]:
    """Fires when an answer first has to wait for its client."""
    fired: Deferred[None] = Deferred()
    pause = request.FlowControl.pauseProducing

    def observe(flow: Any) -> None:
        pause(flow)
        if not fired.called:
            fired.callback(None)

    monkeypatch.setattr(request.FlowControl, "pauseProducing", observe)
    return fired


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the pages of elements that were read so far."""
    sizes: list[int] = []
    read = jobs.page_elements

    def observe(*args: Any) -> Any:
        page = read(*args)
        sizes.append(len(page))
        return page

    monkeypatch.setattr(jobs, "page_elements", observe)
    return sizes


@pytest.fixture(scope="module")
def large(service: Service) -> int:
    """The number of a job with so many elements that no buffer holds their answer."""

    async def make() -> int:
        job = await service.submit("reader", "/copy")
        (listing,) = await service.claim(job["id"])
        name = "/".join(["n" * 200] * 3)
        for start in range(0, _ELEMENTS, 2000):
            files = (f"{number}/{name}" for number in range(start, start + 2000))
            await service.extend(listing, *(NewElement(JobType.COPY, f"s/{each}", f"d/{each}") for each in files))
        await service.settle(listing)
        return int(job["id"])

    return pytest_twisted.blockon(Deferred.fromCoroutine(make()))


@pytest_twisted.ensureDeferred
async def test_a_slow_client_is_waited_for(
    service: Service, large: int, paused: Deferred[None], pages: list[int]
) -> None:
    go_on = threading.Event()

    def read_slowly() -> bytes:
        with _connection(service, "reader", _get(f"/jobs/{large}/elements")) as connection:
            assert go_on.wait(30)
            received = bytearray()
            while part := connection.recv(1 << 20):
                received += part
            return bytes(received)

    reading = deferToThread(read_slowly)
    await paused
    # What is not asked for is not read from the database either.
    assert sum(pages) < _ELEMENTS
    go_on.set()
    elements = json.loads(_unchunked(await reading))
    assert [element["id"] for element in elements] == list(range(_ELEMENTS + 1))
    assert max(pages) == transactions.PAGE_SIZE


@pytest_twisted.ensureDeferred
async def test_a_client_that_goes_away_ends_its_answer(
    service: Service, large: int, paused: Deferred[None], ended: Deferred[None], pages: list[int]
) -> None:
    leave = threading.Event()

    def begin_and_leave() -> None:
        with _connection(service, "reader", _get(f"/jobs/{large}/elements")):
            assert leave.wait(30)

    reading = deferToThread(begin_and_leave)
    await paused
    leave.set()
    await reading
    await ended
    assert sum(pages) < _ELEMENTS


@pytest_twisted.ensureDeferred
async def test_head_of_a_long_answer_reads_only_its_beginning(service: Service, large: int, pages: list[int]) -> None:
    answer = await service.call("reader", "HEAD", f"/jobs/{large}/elements")
    assert (answer.status, answer.body) == (200, b"")
    assert sum(pages) < _ELEMENTS


@pytest_twisted.ensureDeferred
async def test_a_fault_in_the_middle_cuts_the_answer(
    service: Service, large: int, monkeypatch: pytest.MonkeyPatch, lost_errors: list[LogEvent]
) -> None:
    read = jobs.page_elements

    def fail_late(session: Any, job_id: int, wanted: jobs.ElementFilter) -> Any:
        if (wanted.after or 0) > _ELEMENTS // 2:
            raise ZeroDivisionError
        return read(session, job_id, wanted)

    monkeypatch.setattr(jobs, "page_elements", fail_late)
    with pytest.raises(ResponseFailed):
        await service.call("reader", "GET", f"/jobs/{large}/elements")
    (event,) = lost_errors
    assert formatEvent(event).startswith("incident ")
    lost_errors.clear()


@pytest_twisted.ensureDeferred
async def test_what_was_committed_has_its_effect_though_the_client_has_left(
    own_service: Service, ended: Deferred[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claimer is woken for a job whose client did not wait for the answer."""
    begun, left = threading.Event(), threading.Event()
    submit = jobs.submit

    def submit_late(*args: Any) -> Any:
        begun.set()
        assert left.wait(30)
        return submit(*args)

    monkeypatch.setattr(jobs, "submit", submit_late)
    woken: Deferred[None] = Deferred()
    monkeypatch.setattr(IdleClaimer, "wake", lambda _: woken.callback(None))
    body = b'{"src_siteid": 1, "src_filepath": "a", "protocol": "DUMMY"}'
    head = f"POST {ROOT}/list HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    def send_and_leave() -> None:
        with _connection(own_service, "leaving", head + body):
            assert begun.wait(30)

    await deferToThread(send_and_leave)
    await ended
    left.set()
    await woken
    assert len((await own_service.call("leaving", "GET", "/jobs")).json) == 1


@pytest_twisted.ensureDeferred
async def test_a_bug_is_a_500_with_an_incident(
    service: Service, monkeypatch: pytest.MonkeyPatch, lost_errors: list[LogEvent]
) -> None:
    def bug(*args: Any) -> None:
        raise ZeroDivisionError("the secret of the house")

    monkeypatch.setattr(jobs, "fetch", bug)
    monkeypatch.setattr(jobs, "page", bug)
    # An unknown number: a cached job would be answered without the database.
    for path in ("/jobs/999999", "/jobs"):
        answer = await service.call("unlucky", "GET", path)
        assert (answer.status, answer.problem) == (500, "internal-fault")
        incident = answer.json["incident"]
        assert incident in answer.json["detail"]
        assert b"secret" not in answer.body
        (event,) = lost_errors
        assert incident in formatEvent(event)
        assert event["log_failure"].check(ZeroDivisionError)
        lost_errors.clear()


@pytest_twisted.ensureDeferred
async def test_a_failed_submission_is_a_500_and_stores_nothing(
    own_service: Service, monkeypatch: pytest.MonkeyPatch, lost_errors: list[LogEvent]
) -> None:
    submit = jobs.submit

    def submit_and_fail(*args: Any) -> None:
        submit(*args)
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(jobs, "submit", submit_and_fail)
        body = {"src_siteid": 1, "src_filepath": "a", "protocol": "DUMMY"}
        answer = await own_service.call("unlucky", "POST", "/list", body)
        assert (answer.status, answer.problem) == (500, "internal-fault")
    lost_errors.clear()
    assert (await own_service.call("unlucky", "GET", "/jobs")).json == []
    assert own_service.events["wake"] == 0


@pytest_twisted.ensureDeferred
async def test_a_service_that_stops_says_so(own_service: Service) -> None:
    await own_service.call("late", "GET", "/whoami")
    await own_service.database.stop()
    for method, path in (("GET", "/jobs"), ("GET", "/jobs/1"), ("DELETE", "/jobs/1")):
        answer = await own_service.call("late", method, path)
        assert (answer.status, answer.problem, answer.header("Retry-After")) == (503, "stopping", "10")
    assert (await own_service.call(None, "GET", "/health")).status == 200


@pytest_twisted.ensureDeferred
async def test_a_client_that_asks_and_asks_and_never_reads_is_waited_for(
    service: Service, large: int, paused: Deferred[None], pages: list[int]
) -> None:
    """Answers that are sent whole wait, too: not one more is made until the client has taken those before."""
    count, size = 40, 400
    path = f"/jobs/{large}/elements?limit={size}"
    request = f"GET {ROOT}{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    go_on = threading.Event()

    def ask_then_read() -> bytes:
        with _connection(service, "reader", request * (count - 1) + _get(path)) as connection:
            assert go_on.wait(30)
            received = bytearray()
            while part := connection.recv(1 << 20):
                received += part
            return bytes(received)

    reading = deferToThread(ask_then_read)
    await paused
    assert sum(pages) < count * size
    go_on.set()
    answers = await reading
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == count
    assert sum(pages) == count * size

"""What the client makes of a service that misbehaves; over real TLS, against a server that does so on demand."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError

from pdm.workqueue.client import errors
from pdm.workqueue.client.errors import (
    CertificateRefusedError,
    ConflictError,
    ConnectionBrokenError,
    CredentialError,
    DelegationNeededError,
    ForbiddenError,
    InvalidRequestError,
    NoAnswerError,
    NotAuthenticatedError,
    NotFoundError,
    OutputNotReadyError,
    ServerFaultError,
    TemporaryRefusalError,
    UnexpectedAnswerError,
    UnreachableError,
    WorkqueueClientError,
)
from pdm.workqueue.WorkqueueClient import WorkqueueClient
from tests.client.fault_server import FaultServer, answer, cut
from tests.client.samples import job_view

ensure = pytest_twisted.ensureDeferred
Make = Callable[..., WorkqueueClient]
JOB = msgspec.json.encode(job_view())


def problem(word: str, **more: object) -> bytes:
    return msgspec.json.encode(
        {"type": f"urn:pdm:workqueue:problem:{word}", "title": "A title", "detail": "what is wrong", **more}
    )


@ensure
async def test_a_lost_submission_is_sent_again_with_the_same_key(server: FaultServer, client_of: Make) -> None:
    server.behaviours[:] = [cut(), cut(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"), answer("200 OK", JOB)]
    job = await client_of(server.url).copy(1, "/a", 2, "/b")
    assert job.id == 7
    assert [seen.path for seen in server.seen] == ["/workqueue/api/v1.0/copy"] * 3
    keys = {seen.headers["idempotency-key"] for seen in server.seen}
    assert len(keys) == 1
    assert len(keys.pop()) == 36
    assert len({seen.body for seen in server.seen}) == 1


@ensure
async def test_each_submission_has_its_own_key_by_default(server: FaultServer, client_of: Make) -> None:
    server.behaviours[:] = [answer("200 OK", JOB)]
    client = client_of(server.url)
    await client.list(1, "/a", depth=1, label="x", options={"dummy": {"size": 1}})
    await client.list(1, "/a")
    await client.list(1, "/a", idempotency_key="mine")
    keys = [seen.headers["idempotency-key"] for seen in server.seen]
    assert keys[0] != keys[1]
    assert keys[2] == "mine"
    assert msgspec.json.decode(server.seen[0].body) == {
        "src_siteid": 1,
        "src_filepath": "/a",
        "label": "x",
        "extra_opts": {"dummy": {"size": 1}, "depth": 1},
    }
    assert len({seen.connection for seen in server.seen}) == 1, "the connection was not kept"


@ensure
async def test_a_service_that_keeps_cutting_is_given_up(server: FaultServer, client_of: Make) -> None:
    server.behaviours[:] = [cut()]
    client = client_of(server.url)
    client._connection._pauses_s = (0.01, 0.01)
    with pytest.raises(ConnectionBrokenError, match="broke"):
        await client.job(7)
    assert len(server.seen) == 3


@ensure
async def test_silence_ends_after_the_timeout_and_is_not_repeated(server: FaultServer, client_of: Make) -> None:
    server.behaviours[:] = [server.silent]
    with pytest.raises(NoAnswerError, match=r"did not answer within 0\.5 s"):
        await client_of(server.url, timeout_s=0.5).job(7)
    assert len(server.seen) == 1


@ensure
async def test_a_submission_that_is_not_answered_is_sent_once_more_with_its_key(
    server: FaultServer, client_of: Make
) -> None:
    """It may have been registered: who types the command again would have two."""
    server.behaviours[:] = [server.silent, answer("200 OK", JOB)]
    job = await client_of(server.url, timeout_s=0.5).copy(1, "/a", 2, "/b")
    assert job.id
    first, second = (seen.headers["idempotency-key"] for seen in server.seen)
    assert first == second
    server.seen.clear()
    server.behaviours[:] = [server.silent]
    with pytest.raises(NoAnswerError, match="may have been executed"):
        await client_of(server.url, timeout_s=0.5).copy(1, "/a", 2, "/b")
    assert len(server.seen) == 2


@ensure
async def test_the_timeout_is_about_silence_and_not_about_the_whole(server: FaultServer, client_of: Make) -> None:
    def slowly(connection: socket.socket) -> bool:
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(JOB)}\r\n\r\n".encode())
        for start in range(0, len(JOB), 40):
            time.sleep(0.2)
            connection.sendall(JOB[start : start + 40])
        return True

    assert len(JOB) / 40 * 0.2 > 2.0
    server.behaviours[:] = [slowly]
    assert (await client_of(server.url, timeout_s=2.0).job(7)).id == 7


@ensure
async def test_a_temporary_refusal_is_waited_for(server: FaultServer, client_of: Make) -> None:
    server.behaviours[:] = [answer("503 Unavailable", problem("stopping"), Retry_After="0"), answer("200 OK", JOB)]
    assert (await client_of(server.url).copy(1, "/a", 2, "/b")).id == 7
    server.behaviours[:] = [answer("503 Unavailable", problem("stopping"), Retry_After="3600")]
    with pytest.raises(TemporaryRefusalError) as caught:
        await client_of(server.url).job(7)
    assert caught.value.retry_after_s == 3600


@ensure
async def test_the_waits_of_an_outage_are_mentioned_and_end(
    server: FaultServer, client_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = answer("503 Unavailable", problem("database-unavailable"), Retry_After="1")
    sentences: list[str] = []
    client = client_of(server.url, on_wait=sentences.append)
    server.behaviours[:] = [refused, answer("200 OK", JOB)]
    assert (await client.copy(1, "/a", 2, "/b")).id == 7
    first, second = (seen.headers["idempotency-key"] for seen in server.seen)
    assert first == second
    assert sentences == ["A title: the request is sent again in 1 s"]
    # Not for ever.
    monkeypatch.setattr(errors, "_MAX_WAIT_S", 2.0)
    server.behaviours[:] = [refused]
    server.seen.clear()
    with pytest.raises(TemporaryRefusalError):
        await client.job(7)
    assert len(server.seen) == 2


@ensure
async def test_events_of_a_service_that_has_gone_away_since_it_answered(server: FaultServer, client_of: Make) -> None:
    event = b'{"id":9,"kind":"job","job":7,"time":"2026-01-01T00:00:00.000Z","data":{"status":"DONE"}}'
    stream = answer("200 OK", b"event: job\nid: 9\ndata: " + event + b"\n\n", "text/event-stream")
    server.behaviours[:] = [answer("200 OK", JOB), cut(), cut(), stream]
    client = client_of(server.url)
    assert (await client.job(7)).id == 7
    events = client.events(after=8)
    assert (await events.__anext__()).id == 9
    await events.aclose()


@ensure
async def test_a_download_that_is_refused_for_the_moment_is_asked_for_again(
    server: FaultServer, client_of: Make
) -> None:
    server.behaviours[:] = [
        answer("503 Unavailable", problem("database-unavailable"), Retry_After="0"),
        answer("200 OK", b"content"),
    ]
    received: list[bytes] = []
    await client_of(server.url).receipt(7, received.append)
    assert received == [b"content"]


@pytest.mark.parametrize(
    ("status", "word", "expected"),
    [
        ("400 Bad", "invalid-input", InvalidRequestError),
        ("400 Bad", "output-not-ready", OutputNotReadyError),
        ("401 No", "certificate-needed", NotAuthenticatedError),
        ("403 No", "forbidden", ForbiddenError),
        ("404 No", "job-not-found", NotFoundError),
        ("409 No", "conflict", ConflictError),
        ("409 No", "delegation-needed", DelegationNeededError),
        ("413 Big", "body-too-large", InvalidRequestError),
        ("422 No", "idempotency-key-used", ConflictError),
        ("500 Oh", "internal-fault", ServerFaultError),
    ],
)
@ensure
async def test_refusals_have_their_class_and_words(
    server: FaultServer, client_of: Make, status: str, word: str, expected: type[WorkqueueClientError]
) -> None:
    body = problem(word, pointer="$.src_siteid", request_id="r17")
    server.behaviours[:] = [answer(status, body, "application/problem+json")]
    with pytest.raises(expected) as caught:
        await client_of(server.url).copy(1, "/a", 2, "/b")
    assert type(caught.value) is expected
    error: Any = caught.value
    assert (error.word, error.pointer, error.request_id) == (word, "$.src_siteid", "r17")
    assert error.what == "$.src_siteid: what is wrong"
    assert len(server.seen) == 1
    if status.startswith("5"):
        assert "r17" in error.advice


@pytest.mark.parametrize(
    "strange",
    [
        answer("200 OK", b"<html>hello</html>", "text/html"),
        answer("200 OK", b"\xff\xfe", "application/json"),
        answer("200 OK", b"[]"),
        answer("404 Not Found", b"<html>nothing here</html>", "text/html"),
        answer("302 Found", b"", Location="https://elsewhere/"),
    ],
)
@ensure
async def test_another_program_at_that_port_is_recognised(
    server: FaultServer, client_of: Make, strange: Callable[[object], bool]
) -> None:
    server.behaviours[:] = [strange]
    with pytest.raises(UnexpectedAnswerError, match="PDM_URL"):
        await client_of(server.url).job(7)
    assert len(server.seen) == 1


@ensure
async def test_a_closed_port_is_reported_at_once(client_of: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UnreachableError, match=rf"127\.0\.0\.1:{port} cannot be reached \(Connection was refused"):
        await client_of(f"https://127.0.0.1:{port}").job(7)


@ensure
async def test_an_unknown_authority_of_the_client_is_explained(server: FaultServer, client_of: Make) -> None:
    with pytest.raises(CertificateRefusedError, match="the service refused your certificate"):
        await client_of(server.url, "eve").job(7)


@ensure
async def test_a_missing_certificate_is_explained(server: FaultServer, client_of: Make) -> None:
    with pytest.raises(CertificateRefusedError, match="wants a certificate and got none"):
        await client_of(server.url, None).job(7)


@ensure
async def test_an_unknown_authority_of_the_server_is_explained(server: FaultServer, client_of: Make, pki: Path) -> None:
    with pytest.raises(CertificateRefusedError) as caught:
        await client_of(server.url, ca=pki / "other" / "ca.crt").copy(1, "/a", 2, "/b")
    where = f"the authorities in {pki / 'other' / 'ca.crt'}"
    assert f"is not trusted: it was issued by /DC=org/DC=test/CN=CA, which is not among {where}" in caught.value.what
    assert "PDM_CA" in caught.value.advice
    assert server.seen == []


@ensure
async def test_a_service_with_another_name_is_explained(pki: Path, client_of: Make) -> None:
    stranger = FaultServer.create(pki / "stranger.crt", pki / "stranger.key")
    try:
        with pytest.raises(CertificateRefusedError) as caught:
            await client_of(stranger.url).job(7)
        assert "is for another host: elsewhere.example.org (issued by /DC=org/DC=test/CN=CA)" in caught.value.what
        assert "PDM_URL" in caught.value.advice
    finally:
        stranger.close()


@ensure
async def test_cancelling_ends_the_request(server: FaultServer, client_of: Make) -> None:
    server.behaviours[:] = [server.silent]
    asked = client_of(server.url).job(7)
    await client_of(server.url).pause(0.2)
    asked.cancel()
    with pytest.raises(CancelledError):
        await asked


def test_a_certificate_that_is_not_there_is_named(client_of: Make, pki: Path) -> None:
    with pytest.raises(CredentialError, match=r"nobody\.crt"):
        client_of("https://127.0.0.1:1", "nobody")


@ensure
async def test_without_a_certificate_nothing_can_be_delegated(client_of: Make) -> None:
    with pytest.raises(CredentialError, match="no certificate to delegate with"):
        await client_of("https://127.0.0.1:1", None).delegate()


@ensure
async def test_large_lists_are_read_page_by_page(server: FaultServer, client_of: Make) -> None:
    pages = [[job_view(id=1 + i) for i in range(500)], [job_view(id=501 + i) for i in range(3)]]
    server.behaviours[:] = [answer("200 OK", msgspec.json.encode(page)) for page in pages]
    found = [job.id async for job in client_of(server.url).iterate_jobs(label="a b&c", status="done")]
    assert found == list(range(1, 504))
    assert [seen.path.partition("?")[2] for seen in server.seen] == [
        "limit=500&label=a+b%26c&status=done",
        "limit=500&label=a+b%26c&status=done&after=500",
    ]

"""Bodies over the limit are refused before they are read, however they come."""

from __future__ import annotations

import json

import pytest_twisted
from twisted.internet.threads import deferToThread

from tests.http.service import ROOT, Service
from tests.http.test_surface import raw_exchange

_LIMIT = 1024**2
_HEAD = f"POST {ROOT}/list HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()


def _assert_refused(answer: bytes) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nConnection: close" in head
    problem = json.loads(body)
    assert problem["type"].endswith(":body-too-large")
    assert str(_LIMIT) in problem["detail"]


@pytest_twisted.ensureDeferred
async def test_by_its_announced_length(service: Service) -> None:
    """Nothing of the body is sent, and the answer comes all the same."""
    for more in (b"", b"Expect: 100-continue\r\n"):
        head = _HEAD + b"Content-Length: 999999999999\r\n" + more + b"\r\n"
        _assert_refused(await deferToThread(raw_exchange, service, head, user="alice"))


@pytest_twisted.ensureDeferred
async def test_without_a_certificate_a_long_one_is_not_read(service: Service) -> None:
    head = _HEAD + b"Content-Length: 20000\r\n\r\n"
    answer = await deferToThread(raw_exchange, service, head)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"].endswith(":certificate-needed")


@pytest_twisted.ensureDeferred
async def test_by_what_comes_in_chunks(service: Service) -> None:
    chunk = b"40000\r\n" + b" " * 0x40000 + b"\r\n"
    head = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    sent = (head, chunk, chunk, chunk, chunk, b"1\r\n \r\n")
    _assert_refused(await deferToThread(raw_exchange, service, *sent, user="alice"))


@pytest_twisted.ensureDeferred
async def test_exactly_the_limit_is_read(service: Service) -> None:
    body = json.dumps({"src_siteid": 1, "src_filepath": "a", "protocol": "DUMMY"}).encode().ljust(_LIMIT)
    assert (await service.call("limit", "POST", "/list", raw=body)).status == 200
    assert (await service.call("limit", "POST", "/list", raw=body + b" ")).status == 413
    assert (await service.call("limit", "PUT", "/delegation/x/credential", raw=body + b" ")).status == 413


@pytest_twisted.ensureDeferred
async def test_two_lengths_are_no_request(service: Service) -> None:
    head = _HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert (await deferToThread(raw_exchange, service, head)).startswith(b"HTTP/1.1 400 ")

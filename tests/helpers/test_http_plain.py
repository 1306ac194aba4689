"""Plain HTTP exchanges give what h11 gives; what h11 decides otherwise is not plain."""

from __future__ import annotations

import h11
import pytest

from pdm.workqueue.helpers.backends.http_plain import encoded_request, parsed_response

_LENGTH = b"Content-Length: 3\r\n"


def by_h11(data: bytes, method: str) -> tuple[int, list[tuple[bytes, bytes]], bytes, bytes]:
    """Status, headers, reason and body of a response."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/f", headers=[(b"Host", b"localhost")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    head = connection.next_event()
    assert isinstance(head, h11.Response)
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    return head.status_code, list(head.headers), head.reason, body


@pytest.mark.parametrize(
    ("method", "data"),
    [
        ("GET", b"HTTP/1.1 200 OK\r\n" + _LENGTH + b"\r\nabc"),
        ("GET", b"HTTP/1.1 200 \r\nServer:  a b\t\r\nCONTENT-length:3 \r\nX:\r\n\r\nabc"),
        ("GET", b"HTTP/1.1 404 Not Found\r\nConnection: Keep-Alive\r\nContent-Length: 0\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\n" + _LENGTH + b"\r\n"),
        ("PUT", b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n"),
        ("GET", b"HTTP/1.1 200 \xe9t\xe9\r\nX: \xff\r\n" + _LENGTH + b"\r\nabc"),
    ],
)
def test_a_plain_response_is_what_h11_reads(method: str, data: bytes) -> None:
    found = parsed_response(data, method)
    assert found is not None
    assert (found.head.status, list(found.head.headers), found.head.reason, found.data) == by_h11(data, method)
    assert len(found.data) == found.length
    assert not found.has_more


def test_a_part_of_a_body_and_bytes_behind_it_are_told() -> None:
    data = b"HTTP/1.1 200 OK\r\n" + _LENGTH + b"\r\n"
    part, more = parsed_response(data + b"a", "GET"), parsed_response(data + b"abcHTTP", "GET")
    assert part is not None
    assert more is not None
    assert (part.length, part.data, part.has_more) == (3, b"a", False)
    assert (more.length, more.data, more.has_more) == (3, b"abc", True)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3, 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length : 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: \0\r\nContent-Length: 3\r\n\r\nabc",
    ],
)
def test_what_is_not_plain_is_left_to_h11(data: bytes) -> None:
    assert parsed_response(data, "GET") is None


def test_a_request_is_encoded_if_no_part_of_it_makes_another_header() -> None:
    headers = [(b"Host", b"localhost"), (b"Destination", b"https://b/\xc3\xa4 b?pdm=1")]
    assert encoded_request("MOVE", "/f%20g", headers) == (
        b"MOVE /f%20g HTTP/1.1\r\nHost: localhost\r\nDestination: https://b/\xc3\xa4 b?pdm=1\r\n\r\n"
    )
    for target, value in (
        ("/f", b"a\r\nX: y"),
        ("/f", b"a\nX: y"),
        ("/f g", b"a"),
        ("/f\r\nX: y", b"a"),
        ("/f", b"\0"),
    ):
        assert encoded_request("GET", target, [(b"Host", value)]) is None

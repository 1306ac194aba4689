"""Plain exchanges of HTTP/1.1: a request that is sent at once, and a response whose body has a ``Content-Length``.

Nearly all exchanges are plain, and h11 takes 0.1 ms for each, more than TLS and the system calls. What is not plain,
or not valid, is None here and left to h11, which decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import NamedTuple

_VALUE = rb"[\t\x20-\x7e\x80-\xff]*"
_FIELDS = rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:" + _VALUE + rb"\r\n)+"
_REQUEST = re.compile(rb"[A-Z]+ /[\x21-\x7e]* HTTP/1\.1\r\n" + _FIELDS + rb"\r\n")
_RESPONSE = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2})(?: (" + _VALUE + rb"))?\r\n(" + _FIELDS + rb")\r\n")
_LENGTH = re.compile(rb"[0-9]{1,18}")
#: Statuses of responses without a body, whatever their length is.
_WITHOUT_BODY = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)


class ResponseHead(NamedTuple):
    """The head of a response.

    Attributes:
        status: of HTTP.
        headers: names, in lower case, and values.
        reason: its reason phrase.
    """

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    reason: bytes


class PlainResponse(NamedTuple):
    """The first bytes of a response with a complete head.

    Attributes:
        head: of the response.
        length: bytes of the body.
        data: those that have arrived.
        has_more: whether other bytes follow the body.
    """

    head: ResponseHead
    length: int
    data: bytes
    has_more: bool


def encoded_request(method: str, target: str, headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The head of a request; None if it is not valid.

    Args:
        method: of HTTP.
        target: path and query, percent-encoded.
        headers: names and values.
    """
    lines = [f"{method} {target} HTTP/1.1".encode(), *(name + b": " + value for name, value in headers), b"", b""]
    head = b"\r\n".join(lines)
    # A value with an end of line would be another header.
    is_valid = _REQUEST.fullmatch(head) is not None and head.count(b"\r\n") == len(lines) - 1
    return head if is_valid else None


def parsed_response(data: bytes, method: str) -> PlainResponse | None:
    """The response to a request, from the first bytes received; None if its head is incomplete, or is not plain.

    Args:
        data: the bytes.
        method: of the request.
    """
    match = _RESPONSE.match(data)
    if match is None:
        return None
    status = int(match[1])
    headers = []
    lengths = []
    for line in match[3].split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        headers.append((name, value))
        if name == b"content-length":
            lengths.append(value)
        elif name == b"transfer-encoding" or (name == b"connection" and value.lower() != b"keep-alive"):
            return None
    length = 0
    if method != "HEAD" and status not in _WITHOUT_BODY:
        if len(lengths) != 1 or _LENGTH.fullmatch(lengths[0]) is None:
            return None
        length = int(lengths[0])
    begin = match.end()
    head = ResponseHead(status, headers, match[2] or b"")
    return PlainResponse(head, length, data[begin : begin + length], len(data) > begin + length)

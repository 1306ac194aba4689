"""The load generator knows the end of an answer, whatever the pieces in which it comes."""

from __future__ import annotations

import pytest
from elements_answer import _joined
from figures import BenchmarkError
from rest_load import Answers, get, post

_WITH_LENGTH = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 5\r\n\r\n12345"
_IN_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
_EMPTY_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"


@pytest.mark.parametrize("answer", [_WITH_LENGTH, _IN_CHUNKS, _EMPTY_CHUNKS])
@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
def test_two_answers_on_one_connection(answer: bytes, piece: int) -> None:
    answers = Answers()
    for _ in range(2):
        ends = [answers.feed(answer[at : at + piece]) for at in range(0, len(answer), piece)]
        assert ends == [False] * (len(ends) - 1) + [True]


def test_an_error_is_no_answer() -> None:
    with pytest.raises(BenchmarkError, match="503"):
        Answers().feed(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")


def test_requests() -> None:
    assert get("h", "/jobs/1") == b"GET /jobs/1 HTTP/1.1\r\nHost: h\r\n\r\n"
    assert post("h", "/list", b"{}", "A: b").endswith(b"Content-Length: 2\r\nA: b\r\n\r\n{}")


def test_chunks_are_joined_and_a_cut_is_noticed() -> None:
    body = _IN_CHUNKS.partition(b"\r\n\r\n")[2]

    assert _joined(body) == b"abcde"
    with pytest.raises(BenchmarkError):
        _joined(body[:-6])

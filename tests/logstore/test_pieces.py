"""Logs read piece by piece, while they are written."""

from __future__ import annotations

from typing import Any

import pytest

from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.reader import LogMissingError, LogPiece, LogTail

Logs = Any  # the classes of conftest.py, which tests cannot import
MakeLogs = Any


def piece(logs: Logs, offset: int, most: int = 10_000, **where: Any) -> LogPiece:
    found = logs.reactor.wait(logs.store.read_piece(logs.ref, offset, most, **where))
    assert isinstance(found, LogPiece)
    return found


def test_a_log_is_read_as_it_is_written(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    begin = piece(logs, 0)
    assert begin.text is not None
    assert begin.text.endswith("Z first\n")
    assert begin.is_last
    assert piece(logs, begin.end) == LogPiece("", begin.end, is_last=True)
    logs.store.write(logs.ref, "größe\nthird")
    more = piece(logs, begin.end)
    assert [line.partition("Z ")[2] for line in (more.text or "").splitlines()] == ["größe", "third"]
    logs.close("last")
    end = piece(logs, more.end)
    assert (begin.text + (more.text or "") + (end.text or "")) == logs.text()


def test_pieces_are_bounded_and_made_of_whole_lines(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    for number in range(50):
        logs.store.write(logs.ref, f"line {number} größe")
    logs.close()
    texts, offset, is_last = [], 0, False
    while not is_last:
        found = piece(logs, offset, 200)
        assert found.text is not None
        assert found.text.endswith("\n")
        assert len(found.text.encode()) <= 200
        texts.append(found.text)
        offset, is_last = found.end, found.is_last
    assert "".join(texts) == logs.text()
    assert len(texts) > 10


def test_a_log_longer_than_its_bounds_is_read_in_the_order_of_its_file(make_logs: MakeLogs) -> None:
    logs = make_logs(head_bytes=300, tail_bytes=200)
    logs.store.open(logs.ref, "first")
    texts: list[str] = []
    offset = 0
    for number in range(100):
        logs.store.write(logs.ref, f"line {number}")
        found = piece(logs, offset)
        texts.append(found.text or "")
        offset = found.end
    logs.close()
    texts.append(piece(logs, offset).text or "")
    assert "".join(texts) == logs.text()
    assert "left out" in texts[-1]


def test_an_offset_out_of_the_air_is_taken_back_to_the_end(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    size = piece(logs, 0).end
    assert piece(logs, 10**12) == LogPiece("", size, is_last=True)


def test_a_line_longer_than_a_piece_is_whole(logs: Logs) -> None:
    logs.store.open(logs.ref, "x" * 500)
    logs.store.write(logs.ref, "next")
    found = piece(logs, 0, 100)
    assert (found.text or "").endswith("x\n")
    assert not found.is_last
    assert (piece(logs, found.end, 100).text or "").endswith("Z next\n")


def test_there_is_no_piece_of_no_log(logs: Logs) -> None:
    with pytest.raises(LogMissingError, match="element 7, attempt 1 is not on disk"):
        piece(logs, 0)
    logs.store.open(logs.ref, "first")
    logs.close()
    logs.file.unlink()
    with pytest.raises(LogMissingError):
        piece(logs, 0)
    logs.reactor.wait(logs.store.stop())
    with pytest.raises(LogMissingError, match="stopped"):
        logs.reactor.wait(logs.store.read_piece(LogRef("abcdef0123", 7, 1), 0, 10))


def tail(logs: Logs, most: int) -> LogTail:
    found = logs.reactor.wait(logs.store.read_tail(logs.ref, most))
    assert isinstance(found, LogTail)
    return found


def test_the_end_of_a_log_is_followed_by_its_next_piece(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    for number in range(100):
        logs.store.write(logs.ref, f"line {number}")
    logs.flush()
    whole = tail(logs, 100_000)
    assert whole.text.count("\n") == 101
    assert not whole.is_cut
    end = tail(logs, 200)
    assert end.is_cut
    assert whole.text.endswith(end.text)
    assert 0 < len(end.text) <= 200
    logs.store.write(logs.ref, "more")
    logs.flush()
    assert [line.partition("Z ")[2] for line in (piece(logs, end.end).text or "").splitlines()] == ["more"]


def test_the_end_of_a_log_is_found_before_the_lines_of_others(logs: Logs) -> None:
    logs.store.open(logs.ref, "of this attempt")
    logs.flush()
    other = LogRef(logs.ref.log_uid, 8, 1)
    logs.store.open(other, "first")
    for number in range(200):
        logs.store.write(other, f"line {number}")
    logs.store.write(logs.ref, "the last one")
    logs.flush()
    end = tail(logs, 1000)
    assert "of this attempt" in end.text
    assert "the last one" in end.text
    assert "line 7" not in end.text

"""Logs whose place in the file is not known, or not true any more: crashes, other hands, earlier versions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import gatherResults

from pdm.workqueue.domain.jobs import LogSpan
from pdm.workqueue.logstore import reader
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.reader import LogMissingError, LogPiece, own_lines, whole_lines

Logs = Any  # the classes of conftest.py, which tests cannot import
MakeLogs = Any

STAMP = "2027-01-15T08:00:00.250Z"


def put(logs: Logs, *lines: str, end: str = "\n") -> None:
    """Lines as an earlier life of the daemon has written them."""
    logs.file.parent.mkdir(parents=True, exist_ok=True)
    with logs.file.open("a") as file:
        file.write("\n".join(f"{STAMP} {line}" for line in lines) + end)


def texts(log: str | None) -> list[str]:
    return [line.partition("Z ")[2] for line in (log or "").splitlines()]


def piece(logs: Logs, offset: int, **where: Any) -> LogPiece:
    found = logs.reactor.wait(logs.store.read_piece(logs.ref, offset, 10_000, **where))
    assert isinstance(found, LogPiece)
    return found


def test_what_a_killed_daemon_left_is_found_up_to_the_half_line_at_its_end(logs: Logs) -> None:
    put(logs, "7.1 first", "71.1 other", "7.1 second", "7.11 other", "17.1 other", "7.1 thi", end="")
    assert texts(logs.read()) == ["first", "second", "thi"]
    logs.ref = LogRef("abcdef0123", 71, 1)
    assert texts(logs.read()) == ["other"]
    logs.ref = LogRef("abcdef0123", 1, 1)
    with pytest.raises(LogMissingError, match="element 1, attempt 1 is not on disk"):
        logs.read()


@pytest.mark.parametrize("half", ["7.1 half", "7.1", "7", ""])
def test_the_next_line_after_half_a_line_is_one_of_its_own(logs: Logs, half: str) -> None:
    put(logs, "7.1 first", half, end="")
    logs.ref = LogRef("abcdef0123", 7, 2)
    logs.store.open(logs.ref, "again")
    closed = logs.close()
    assert texts(logs.read(span=closed.span)) == texts(logs.read()) == ["again", "end"]
    logs.ref = LogRef("abcdef0123", 7, 1)
    assert texts(logs.read()) == ["first", "half"][: 1 + (half == "7.1 half")]


def test_which_attempts_had_begun_is_seen_in_the_file(logs: Logs) -> None:
    put(logs, "7.1 first", "7.2 says 9.1 not 8.1", "8.2 first", "10.1 fir", end="")
    logs.old_file.parent.mkdir()
    (logs.old_file.parent / "attempt4.log").write_text("")
    asked = {LogRef("abcdef0123", element, attempt) for element in (7, 8, 9, 10) for attempt in (1, 2, 3, 4)}
    asked.add(LogRef("nowhere0", 7, 1))
    found = {(ref.element_id, ref.attempt) for ref in logs.store.begun(asked)}
    assert found == {(7, 1), (7, 2), (8, 2), (10, 1), (7, 4)}


def test_all_may_have_begun_where_the_file_cannot_be_read(logs: Logs, lost_errors: list[Any]) -> None:
    logs.file.mkdir(parents=True)
    refs = {logs.ref, LogRef("abcdef0123", 8, 1)}
    assert logs.store.begun(refs) == refs
    assert "Is a directory" in str(lost_errors.pop())


def test_logs_of_earlier_versions_are_read(logs: Logs) -> None:
    logs.old_file.parent.mkdir(parents=True)
    logs.old_file.write_text(f"{STAMP} first\n{STAMP} größe\n{STAMP} ha")
    put(logs, "7.2 of a later attempt")
    assert logs.read() == logs.old_file.read_text()
    begin = piece(logs, 0)
    assert texts(begin.text) == ["first", "größe"]
    assert begin.end == len(f"{STAMP} first\n{STAMP} größe\n".encode())
    logs.ref = LogRef("abcdef0123", 7, 2)
    assert texts(logs.read()) == ["of a later attempt"]


def test_a_file_that_was_emptied_has_no_log_where_it_was(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    span = logs.close().span
    os.truncate(logs.file, 0)
    with pytest.raises(LogMissingError):
        logs.read(span=span)
    assert piece(logs, 0, span=span).text is None
    put(logs, *(f"8.1 another {number}" for number in range(20)))
    with pytest.raises(LogMissingError):
        logs.read(span=LogSpan(3, span.length))
    with pytest.raises(LogMissingError):
        logs.read(span=LogSpan(2**62, 2**40))


@pytest.mark.parametrize("how", ["unlink", "rename", "truncate"])
def test_a_file_that_goes_while_it_is_written_takes_only_what_it_had(logs: Logs, how: str) -> None:
    other = LogRef("abcdef0123", 8, 1)
    logs.store.open(other, "other")
    logs.store.open(logs.ref, "first")
    logs.flush()
    {"unlink": logs.file.unlink, "rename": lambda: logs.file.rename(logs.file.with_name("old"))}.get(
        how, lambda: os.truncate(logs.file, 0)
    )()
    logs.store.write(other, "x" * 500)
    logs.flush()
    logs.store.write(logs.ref, "second")
    assert texts(logs.read()) == ["second"]
    closed = logs.close()
    assert closed.complete
    assert texts(logs.read(span=closed.span)) == ["second", "end"]
    assert closed.span.offset > 500


def test_a_link_in_place_of_the_file_is_not_read(logs: Logs, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(f"{STAMP} 7.1 of another\n")
    logs.file.parent.mkdir(parents=True)
    logs.file.symlink_to(other)
    with pytest.raises(LogMissingError, match="cannot be read: Too many levels of symbolic links"):
        logs.read()
    with pytest.raises(LogMissingError):
        piece(logs, 0)
    logs.file.unlink()
    logs.old_file.parent.mkdir()
    logs.old_file.symlink_to(other)
    with pytest.raises(LogMissingError):
        logs.read()


def test_an_offset_in_the_middle_of_a_line_reads_from_the_next(logs: Logs) -> None:
    """Whatever the rest of the line looks like."""
    put(logs, f"8.1 {STAMP} 7.1 forged", "7.1 true")
    offset = len(f"{STAMP} 8.1 ")
    assert texts(piece(logs, offset).text) == texts(piece(logs, 0).text) == ["true"]
    assert texts(piece(logs, 0, span=LogSpan(offset, 200)).text) == ["true"]


def test_what_runs_in_another_daemon_is_followed(make_logs: MakeLogs) -> None:
    here, there = make_logs(worker="here"), make_logs(worker="there")
    there.store.open(LogRef("abcdef0123", 8, 1), "another")
    there.flush()
    nothing = piece(here, 0, worker="there")
    assert (nothing.text, nothing.is_last) == (None, True)
    there.store.open(there.ref, "first")
    there.flush()
    first = piece(here, nothing.end, worker="there")
    assert texts(first.text) == ["first"]
    assert piece(here, first.end, worker="there") == LogPiece("", first.end, is_last=True)
    with (there.directory / "ab" / "abcdef0123" / "log-there").open("a") as file:
        file.write(f"{STAMP} 7.1 half")
        file.flush()
        assert piece(here, first.end, worker="there") == LogPiece("", first.end, is_last=True)
        file.write(" and half\n")
    assert texts(piece(here, first.end, worker="there").text) == ["half and half"]


def test_one_write_for_all_that_have_ended(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write opens the file: as few as there are passes, not as many as there are attempts."""
    writes = []
    write = os.write

    def counted(fd: int, data: Any) -> int:
        writes.append(fd)
        return write(fd, data)

    monkeypatch.setattr(os, "write", counted)
    refs = [LogRef("abcdef0123", element, 1) for element in range(1000)]
    for ref in refs:
        logs.store.open(ref, "first")
    closed = logs.reactor.wait(gatherResults([logs.store.close(ref, "last") for ref in refs]))
    assert all(log.complete for log in closed)
    assert len(writes) < 200
    assert sum(line.endswith(b" last\n") for line in logs.file.read_bytes().splitlines(keepends=True)) == 1000


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.tuples(st.sampled_from(["7.1", "71.1", "7.11", "17.1"]), st.text("7.1 Z", max_size=40))),
    chunk=st.integers(1, 300),
    begin=st.integers(0, 400),
    half=st.integers(0, 60),
)
def test_lines_are_found_wherever_the_pieces_of_a_file_end(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str]], chunk: int, begin: int, half: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces"
    data = "".join(f"{STAMP} {key} {text}\n" for key, text in lines).encode()
    data = data[: max(len(data) - half, 0)]
    path.write_bytes(data)
    first = 0 if begin == 0 else data.find(b"\n", begin - 1) + 1
    expected = [] if begin and not first else data[first:].splitlines(keepends=True)
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(reader, "_CHUNK_BYTES", chunk)
        found = list(whole_lines(file.fileno(), begin, len(data)))
    assert b"".join(some for some, _ in found) == b"".join(expected)
    for some, position in found:
        assert data[position : position + len(some)] == some
    own = [line for some, _ in found for line, _ in own_lines(some, b" 7.1 ")]
    assert own == [line.replace(b" 7.1 ", b" ", 1) for line in expected if line[24:29] == b" 7.1 "]

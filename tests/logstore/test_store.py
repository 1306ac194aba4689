"""Logs of attempts on real files: what is written, where, when, and what is kept out."""

from __future__ import annotations

import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import gatherResults

from pdm.workqueue.logstore import store
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.reader import LogMissingError
from pdm.workqueue.logstore.store import LogStore

Logs = Any  # the class of conftest.py, which tests cannot import


def test_a_log_from_first_to_last_line(logs: Logs) -> None:
    logs.store.open(logs.ref, "host=h element=7")
    logs.clock.seconds += 0.5
    logs.store.write(logs.ref, "one\ntwo\n")
    assert logs.close("outcome=DONE rc=0").complete
    assert logs.file.read_text() == (
        "2027-01-15T08:00:00.250Z 7.1 host=h element=7\n"
        "2027-01-15T08:00:00.750Z 7.1 one\n"
        "2027-01-15T08:00:00.750Z 7.1 two\n"
        "2027-01-15T08:00:00.750Z 7.1 outcome=DONE rc=0\n"
    )


def test_modes(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    logs.close()
    assert stat.S_IMODE(logs.file.stat().st_mode) == 0o640
    directory = logs.file.parent
    while directory != logs.directory.parent:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o750, directory
        directory = directory.parent


def test_all_attempts_of_a_job_write_one_file_and_each_stands_in_one_piece(logs: Logs) -> None:
    refs = [LogRef("abcdef0123", element, attempt) for element in (0, 1) for attempt in (1, 2)]
    for ref in refs:
        logs.store.open(ref, str(ref))
    closed = logs.reactor.wait(gatherResults([logs.store.close(ref, "end") for ref in refs]))
    data = logs.file.read_bytes()
    assert [path for path in logs.directory.rglob("*") if path.is_file()] == [logs.file]
    assert sum(log.span.length for log in closed) == len(data)
    for ref, log in zip(refs, closed, strict=True):
        first, last = data[log.span.offset : log.span.offset + log.span.length].decode().splitlines()
        assert first.endswith(f" {ref.element_id}.{ref.attempt} {ref}")
        assert last.endswith(f" {ref.element_id}.{ref.attempt} end")


def test_a_log_is_read_where_others_write_between_its_lines(logs: Logs) -> None:
    other = LogRef("abcdef0123", 71, 1)
    logs.store.open(other, "the other")
    logs.store.open(logs.ref, "first")
    for number in range(5):
        logs.store.write(logs.ref, f"line {number}")
        logs.store.write(other, f"7.1 line {number} 7.1 2027-01-15T08:00:00.250Z 7.1 forged")
        logs.flush()
    closed = logs.close()
    expected = ["first", *(f"line {number}" for number in range(5)), "end"]
    for where in ({"span": closed.span}, {}, {"worker": "whoever", "span": closed.span}):
        assert [line.partition("Z ")[2] for line in logs.read(**where).splitlines()] == expected
    assert closed.span.offset > 0


def test_daemons_that_share_a_database_write_a_file_each(make_logs: Any) -> None:
    one, other = make_logs(worker="host:01"), make_logs(worker="other/../host:02")
    for logs, attempt in ((one, 1), (other, 2)):
        logs.ref = LogRef("abcdef0123", 7, attempt)
        logs.store.open(logs.ref, f"attempt {attempt}")
        logs.close()
    names = {path.name for path in one.directory.rglob("*") if path.is_file()}
    assert names == {"log-host-01", "log-other-..-host-02"}
    assert "attempt 1" in other.reactor.wait(other.store.read(one.ref, "host:01"))
    with pytest.raises(LogMissingError):
        other.reactor.wait(other.store.read(one.ref))


def test_where_daemons_cannot_share_a_database_the_name_of_the_daemon_is_of_no_matter(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    logs.close()
    assert "first" in logs.read(worker="an earlier name")


def test_a_running_log_shows_without_being_asked(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    logs.reactor.run_handed()
    until = time.monotonic() + 20
    while not (logs.file.exists() and logs.lines()) and time.monotonic() < until:
        time.sleep(0.005)
    assert logs.lines() == ["first"]
    logs.store.write(logs.ref, "second")
    logs.reactor.run_handed()
    while len(logs.lines()) < 2 and time.monotonic() < until:
        time.sleep(0.005)
    assert logs.lines() == ["first", "second"]


def test_flush_brings_all_to_disk(logs: Logs) -> None:
    refs = [LogRef("abcdef0123", element, 1) for element in range(300)]
    for ref in refs:
        logs.store.open(ref, "first")
    logs.flush()
    assert len(logs.file.read_bytes().splitlines()) == 300


def test_a_closed_log_is_complete_when_the_answer_comes(logs: Logs) -> None:
    refs = [LogRef(f"uid{number:04}", number, 1) for number in range(500)]
    seen: list[bool] = []
    answers = []
    for ref in refs:
        logs.store.open(ref, "first")
        logs.store.write(ref, "line")
        answer = logs.store.close(ref, "last")
        path = logs.directory / "ui" / ref.log_uid / "log"
        answer.addCallback(
            lambda closed, path=path: seen.append(closed.complete and path.read_text().endswith(".1 last\n"))
        )
        answers.append(answer)
    logs.reactor.wait(gatherResults(answers))
    assert seen == [True] * 500
    assert logs.store.errors == 0


def test_control_characters_are_spelled_out(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    logs.store.write(logs.ref, "a\x1b[2Jb\x00c\td\x85e\u2028f\u202eg\r\nnext \ud800 é")
    logs.close()
    assert logs.lines() == ["first", r"a\x1b[2Jb\x00c\td\x85e\u2028f\u202eg", "next \\ud800 é", "end"]


def test_a_line_cannot_be_forged(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    logs.store.write(logs.ref, "name\x0b2027-01-15T08:00:00.250Z outcome=DONE")
    logs.close("outcome=FAILED")
    assert len(logs.file.read_bytes().splitlines()) == 3


def test_a_long_line_is_cut(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    logs.store.write(logs.ref, "x" * 10_000_000)
    logs.close()
    assert logs.lines()[1] == "x" * 8192 + "... (9991808 characters left out)"


KEY = ["-----BEGIN RSA PRIVATE KEY-----", "MIIEsecret", "AAsecret", "-----END RSA PRIVATE KEY-----"]


@pytest.mark.parametrize("pieces", [["\n".join(KEY)], KEY, ["\n".join(KEY[:2]), *KEY[2:]], ["\\n".join(KEY)]])
def test_private_keys_stay_out(logs: Logs, pieces: list[str]) -> None:
    logs.store.open(logs.ref, "first")
    for piece in pieces:
        logs.store.write(logs.ref, piece)
    logs.store.write(logs.ref, "after")
    logs.close()
    text = logs.file.read_text()
    assert "secret" not in text
    assert logs.lines() == ["first", "[private key left out]", "after", "end"]


def test_a_key_without_end_does_not_hide_the_rest(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    logs.store.write(logs.ref, KEY[0])
    logs.store.write(logs.ref, "\n".join(f"line {number}" for number in range(200)))
    logs.close()
    assert "line 199" in logs.file.read_text()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://user:secret@h/p?x", "GET https://user:***@h/p?x"),
        ("Authorization: Bearer secret.token-1_x", "Authorization: Bearer ***"),
        ("mail a@b and gsiftp://h:2811/p", "mail a@b and gsiftp://h:2811/p"),
    ],
)
def test_other_secrets(logs: Logs, text: str, shown: str) -> None:
    logs.store.open(logs.ref, "first")
    logs.store.write(logs.ref, text)
    logs.close()
    assert logs.lines()[1] == shown


def test_reading(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    logs.store.write(logs.ref, "é")
    assert logs.reactor.wait(logs.store.read(logs.ref)).endswith("Z é\n")
    logs.close("last")
    text = logs.reactor.wait(logs.store.read(logs.ref))
    assert text == logs.text()
    assert text.endswith("Z last\n")


def test_reading_what_is_not_there(logs: Logs) -> None:
    with pytest.raises(LogMissingError, match="the log of element 7, attempt 1 is not on disk"):
        logs.reactor.wait(logs.store.read(logs.ref))
    logs.store.open(logs.ref, "first")
    logs.close()
    logs.file.unlink()
    with pytest.raises(LogMissingError):
        logs.reactor.wait(logs.store.read(logs.ref))


def test_reading_what_cannot_be_read(logs: Logs) -> None:
    logs.file.mkdir(parents=True)
    with pytest.raises(LogMissingError, match="cannot be read: Is a directory"):
        logs.reactor.wait(logs.store.read(logs.ref))


@pytest.mark.parametrize("length", [30, 300, 30_000])
def test_reading_is_bounded(make_logs: Any, length: int) -> None:
    """For files of any length, by any writer."""
    logs = make_logs(head_bytes=1000, tail_bytes=100)
    logs.file.parent.mkdir(parents=True)
    lines = [b"2027-01-15T08:00:00.250Z 7.1 %d %b\n" % (n, b"x" * length) for n in range(5_000_000 // length)]
    logs.file.write_bytes(b"".join(lines))
    text = logs.read()
    assert len(text) < 650_000
    assert text.startswith("2027-01-15T08:00:00.250Z 0 xxx")
    shown = text.splitlines()
    assert shown[-1] == lines[-1].decode().replace(" 7.1 ", " ").strip()
    assert any(line.endswith("bytes in the middle are not shown") for line in shown[-5:])


def test_what_is_not_utf8_is_read_all_the_same(logs: Logs) -> None:
    logs.file.parent.mkdir(parents=True)
    logs.file.write_bytes(b"2027-01-15T08:00:00.250Z 7.1 a\xff\n")
    assert logs.read() == "2027-01-15T08:00:00.250Z a\ufffd\n"


def test_lines_after_the_last_are_dropped(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    assert logs.close().complete
    logs.store.write(logs.ref, "late")
    assert not logs.close("again").complete
    assert logs.lines() == ["first", "end"]


def test_stop_ends_what_is_open(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    logs.reactor.wait(logs.store.stop())
    assert logs.lines() == ["first", "[log] ends here: the daemon stopped"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("log")]


def test_after_the_stop(logs: Logs) -> None:
    logs.reactor.wait(logs.store.stop())
    logs.store.open(logs.ref, "first")
    logs.store.write(logs.ref, "line")
    assert not logs.close().complete
    with pytest.raises(LogMissingError, match="stopped"):
        logs.reactor.wait(logs.store.read(logs.ref))
    logs.flush()
    logs.reactor.wait(logs.store.stop())
    assert not logs.file.exists()


def test_stop_before_the_start(logs: Logs, tmp_path: Path) -> None:
    store = LogStore(logs.reactor, tmp_path / "other")
    logs.reactor.wait(store.stop())


def test_a_second_life_appends(make_logs: Any) -> None:
    for number in range(2):
        logs = make_logs()
        logs.store.open(logs.ref, f"life {number}")
        logs.close()
    assert logs.lines() == ["life 0", "end", "life 1", "end"]


@pytest.mark.parametrize("uid", ["", "abc", "../../etc", "a/b/c/d", "a" * 65, "ab\ncd", "....", "abcd\0"])
def test_a_forged_uid_leads_nowhere(uid: str) -> None:
    with pytest.raises(ValueError, match="log_uid"):
        LogRef(uid, 0, 1)


def test_forged_numbers_lead_nowhere() -> None:
    with pytest.raises(ValueError, match="element_id"):
        LogRef("abcdef", -1, 1)
    with pytest.raises(ValueError, match="attempt"):
        LogRef("abcdef", 0, 0)


def test_a_disk_that_hangs_does_not_fill_the_memory(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread is held up; what would wait beyond the bound is counted, and the log says so."""
    monkeypatch.setattr(store, "MOST_WAITING", 1000)
    release, held = threading.Event(), threading.Event()

    def hang() -> None:
        held.set()
        release.wait(30)

    logs.store._writer.put([hang])
    assert held.wait(30)
    logs.store.open(logs.ref, "first")
    for _ in range(100):
        logs.store.write(logs.ref, "x" * 99)
    release.set()
    assert not logs.close().complete
    lines = logs.lines()
    kept = lines.count("x" * 99)
    assert 10 <= kept <= 12
    assert lines[-2:] == [f"[log] {100 - kept} lines went missing: the disk did not keep up", "end"]

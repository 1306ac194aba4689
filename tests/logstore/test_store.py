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
from pdm.workqueue.logstore.store import LogMissingError, LogStore

Logs = Any  # the class of conftest.py, which tests cannot import


def test_a_log_from_first_to_last_line(logs: Logs) -> None:
    logs.store.open(logs.ref, "host=h element=7")
    logs.clock.seconds += 0.5
    logs.store.write(logs.ref, "one\ntwo\n")
    assert logs.close("outcome=DONE rc=0")
    assert logs.file.read_text() == (
        "2027-01-15T08:00:00.250Z host=h element=7\n"
        "2027-01-15T08:00:00.750Z one\n"
        "2027-01-15T08:00:00.750Z two\n"
        "2027-01-15T08:00:00.750Z outcome=DONE rc=0\n"
    )


def test_modes(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    logs.close()
    assert stat.S_IMODE(logs.file.stat().st_mode) == 0o640
    directory = logs.file.parent
    while directory != logs.directory.parent:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o750, directory
        directory = directory.parent


def test_attempts_and_elements_have_their_own_files(logs: Logs) -> None:
    refs = [LogRef("abcdef0123", element, attempt) for element in (0, 1) for attempt in (1, 2)]
    for ref in refs:
        logs.store.open(ref, str(ref))
    logs.reactor.wait(gatherResults([logs.store.close(ref, "end") for ref in refs]))
    for ref in refs:
        text = (logs.directory / "ab" / "abcdef0123" / str(ref.element_id) / f"attempt{ref.attempt}.log").read_text()
        assert str(ref) in text
        assert len(text.splitlines()) == 2


def test_a_running_log_shows_without_being_asked(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    until = time.monotonic() + 20
    while not logs.file.exists() and time.monotonic() < until:
        time.sleep(0.005)
    assert logs.lines() == ["first"]
    logs.store.write(logs.ref, "second")
    while len(logs.lines()) < 2 and time.monotonic() < until:
        time.sleep(0.005)
    assert logs.lines() == ["first", "second"]


def test_flush_brings_all_to_disk(logs: Logs) -> None:
    refs = [LogRef("abcdef0123", element, 1) for element in range(300)]
    for ref in refs:
        logs.store.open(ref, "first")
    logs.flush()
    assert len(list(logs.directory.glob("ab/*/*/attempt1.log"))) == 300


def test_a_closed_log_is_complete_when_the_answer_comes(logs: Logs) -> None:
    refs = [LogRef(f"uid{number:04}", number, 1) for number in range(500)]
    seen: list[bool] = []
    answers = []
    for ref in refs:
        logs.store.open(ref, "first")
        logs.store.write(ref, "line")
        answer = logs.store.close(ref, "last")
        path = ref.path(logs.directory)
        answer.addCallback(lambda complete, path=path: seen.append(complete and path.read_text().endswith("Z last\n")))
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
    assert text == logs.file.read_text()
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


def test_reading_is_bounded(make_logs: Any) -> None:
    logs = make_logs(head_bytes=1000, tail_bytes=100)
    logs.file.parent.mkdir(parents=True)
    logs.file.write_bytes(b"a" * 1000 + b"b" * 5_000_000 + b"c" * 100)
    text = logs.reactor.wait(logs.store.read(logs.ref))
    assert len(text) < 600_000
    assert text.startswith("a" * 1000)
    assert text.endswith("not shown\n" + "c" * 100)


def test_what_is_not_utf8_is_read_all_the_same(logs: Logs) -> None:
    logs.file.parent.mkdir(parents=True)
    logs.file.write_bytes(b"a\xff\n")
    assert logs.reactor.wait(logs.store.read(logs.ref)) == "a\ufffd\n"


def test_lines_after_the_last_are_dropped(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    assert logs.close()
    logs.store.write(logs.ref, "late")
    assert not logs.close("again")
    assert logs.lines() == ["first", "end"]


def test_stop_ends_what_is_open(logs: Logs) -> None:
    logs.store.open(logs.ref, "first")
    logs.reactor.wait(logs.store.stop())
    assert logs.lines() == ["first", "[log] ends here: the daemon stopped"]
    assert not [thread for thread in threading.enumerate() if thread.name == "logstore"]


def test_after_the_stop(logs: Logs) -> None:
    logs.reactor.wait(logs.store.stop())
    logs.store.open(logs.ref, "first")
    logs.store.write(logs.ref, "line")
    assert not logs.close()
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

    logs.store._writer.put(hang)
    assert held.wait(30)
    logs.store.open(logs.ref, "first")
    for _ in range(100):
        logs.store.write(logs.ref, "x" * 99)
    release.set()
    assert not logs.close()
    lines = logs.lines()
    kept = lines.count("x" * 99)
    assert 10 <= kept <= 12
    assert lines[-2:] == [f"[log] {100 - kept} lines went missing: the disk did not keep up", "end"]

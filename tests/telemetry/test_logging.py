"""The daemon's own log: its lines, their fields, what must not be in them."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, LogBeginner, LogEvent, Logger, LogLevel, LogPublisher, globalLogPublisher
from twisted.python.failure import Failure

from pdm.workqueue.config.settings import LogSettings
from pdm.workqueue.telemetry.logging import (
    FIELDS,
    LineObserver,
    bounded,
    capture_stdlib,
    escaped,
    json_observer,
    log_context,
    log_incident,
    log_observer,
    observer,
    redacted,
)


class Log:
    """A log of its own, with what was written to it."""

    def __init__(self, format: str = "text", level: str = "debug") -> None:  # noqa: A002
        self.written: list[str] = []
        self.logger = Logger("test", observer=LineObserver(self.written.append, format, level))  # type: ignore[arg-type]

    def text(self) -> str:
        return "".join(self.written)

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def json_log() -> Log:
    return Log("json")


def _failure(error: Exception) -> Failure:
    try:
        raise error
    except Exception:
        return Failure()


EVENT = {
    "log_level": LogLevel.info,
    "log_format": "{count} sites read",
    "count": 2,
    "log_namespace": "test",
    "log_time": 1_800_000_000.25,
}


def test_a_text_line(log: Log) -> None:
    log.logger.observer(EVENT)
    assert log.text() == "2027-01-15T08:00:00.250Z info  test 2 sites read\n"


def test_a_json_line(json_log: Log) -> None:
    json_log.logger.observer(EVENT)
    assert json_log.objects() == [
        {"time": "2027-01-15T08:00:00.250Z", "level": "info", "logger": "test", "event": "2 sites read"}
    ]


def test_fields_of_the_context(log: Log, json_log: Log) -> None:
    for each in (log, json_log):
        with log_context(request_id="r1"), log_context(job=12, element=3, attempt=1):
            each.logger.info("inside")
        with log_context(job=12, element=None):
            each.logger.info("event fields win", job=13)
        each.logger.info("outside")
    lines = log.text().splitlines()
    assert " [request_id=r1 job=12 element=3 attempt=1] inside" in lines[0]
    assert " [job=13] event" in lines[1]
    assert lines[2].endswith("test outside")
    first, second, third = json_log.objects()
    assert {name: first[name] for name in FIELDS if name in first} == {
        "request_id": "r1",
        "job": 12,
        "element": 3,
        "attempt": 1,
    }
    assert second["job"] == 13
    assert not set(FIELDS) & set(third)


def test_what_the_words_of_a_line_say_are_fields_of_json(log: Log, json_log: Log) -> None:
    for each in (log, json_log):
        each.logger.info("{method} {path} {ms} ms", method="GET", path="/jobs" * 1000, status=404, ms=1.5, other=1)
    assert "[" not in log.text()
    (line,) = json_log.objects()
    assert (line["method"], line["status"], line["ms"]) == ("GET", 404, 1.5)
    assert len(line["path"]) < 2100
    assert "other" not in line


def test_a_field_with_blanks_is_quoted(log: Log) -> None:
    log.logger.info("x", subject="/CN=One Two", job=1)
    assert '[job=1 subject="/CN=One Two"] x' in log.text()


def test_each_coroutine_has_its_own_context(log: Log) -> None:
    gate: Deferred[None] = Deferred()

    async def work(job: int) -> None:
        with log_context(job=job):
            # The other one runs while this one waits.
            await gate
            log.logger.info("of {number}", number=job)

    for job in (1, 2):
        Deferred.fromCoroutine(work(job))
    gate.callback(None)
    assert [line.split("[")[1] for line in log.text().splitlines()] == ["job=1] of 1", "job=2] of 2"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_breaks_a_line(form: str) -> None:
    log = Log(form)
    with log_context(subject="/CN=a\n2027-01-15T08:00:00.250Z forged", peer="\x1b[2J"):
        log.logger.info("{name}", name="a\r\n\u2028b\x1b\ud800")
    assert len(log.text().splitlines()) == 1
    assert "\x1b" not in log.text()
    log.text().encode("utf-8")


def test_a_traceback_has_the_fields_on_each_line(log: Log) -> None:
    with log_context(job=5):
        log.logger.failure("it failed", _failure(RuntimeError("bad\nTraceback: forged")))
    lines = log.text().splitlines()
    assert lines[0].endswith("[job=5] it failed")
    assert all("critical test [job=5] " in line for line in lines)
    assert any(line.endswith("| builtins.RuntimeError: bad") for line in lines)
    assert any("test_logging.py" in line for line in lines)


def test_a_traceback_in_json_is_in_its_object(json_log: Log) -> None:
    json_log.logger.failure("it failed", _failure(RuntimeError("bad")))
    (line,) = json_log.objects()
    assert line["event"] == "it failed"
    assert line["traceback"].endswith("builtins.RuntimeError: bad")


@pytest.mark.parametrize("form", ["text", "json"])
def test_secrets_stay_out(form: str) -> None:
    log = Log(form)
    key = "-----BEGIN PRIVATE KEY-----\nMIIsecret\n-----END PRIVATE KEY-----"
    with log_context(subject=key):
        log.logger.info(
            "{text}", text=f"key {key} url postgresql://pdm:secret@h/db Authorization: Bearer secret-secret"
        )
        log.logger.failure("f", _failure(RuntimeError(key)))
    assert "secret" not in log.text()
    assert "postgresql://pdm:***@h/db" in log.text()


def test_levels() -> None:
    log = Log(level="warn")
    log.logger.info("no")
    log.logger.debug("no")
    log.logger.emit(LogLevel.warn, "yes")
    log.logger.error("yes")
    log.logger.critical("yes")
    assert len(log.written) == 3


def test_an_incident_is_named_in_the_line(log: Log) -> None:
    incident = log_incident(log.logger, _failure(KeyError("x")), request_id="r9")
    assert len(incident) == 8
    first = log.text().splitlines()[0]
    assert f"[request_id=r9 incident={incident}] incident {incident}: KeyError" in first
    assert log_incident(log.logger, _failure(KeyError("x"))) != incident


def test_a_huge_event_is_cut(log: Log) -> None:
    log.logger.info("{text}", text="x" * 10_000_000)
    assert len(log.text()) < 70_000


def test_a_format_that_fails_is_a_line_too(log: Log) -> None:
    log.logger.info("{missing.attribute}")
    assert len(log.text().splitlines()) == 1


def test_old_style_messages(log: Log) -> None:
    log.logger.observer({"log_level": None, "log_format": "old", "log_time": 0.0, "log_namespace": "x"})
    assert log.text() == "1970-01-01T00:00:00.000Z info  x old\n"


def test_a_log_file_may_be_rotated_away(tmp_path: Path) -> None:
    file = tmp_path / "daemon.log"
    logger = Logger("test", observer=log_observer(LogSettings(file=file, format="json")))
    logger.info("one")
    file.rename(tmp_path / "daemon.log.1")
    logger.info("two")
    file.unlink()
    logger.info("three")
    logger.debug("not at this level")
    assert [json.loads(line)["event"] for line in (tmp_path / "daemon.log.1").read_text().splitlines()] == ["one"]
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["three"]


def test_a_log_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        log_observer(LogSettings(file=tmp_path / "missing" / "daemon.log"))


def test_a_lost_directory_stops_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    logger = Logger("test", observer=log_observer(LogSettings(file=directory / "daemon.log")))
    (directory / "daemon.log").unlink()
    directory.rmdir()
    logger.info("still told")
    assert capfd.readouterr().err.endswith("still told\n")
    directory.mkdir()
    logger.info("back")
    assert (directory / "daemon.log").read_text().endswith("back\n")


@pytest.mark.parametrize("make", [observer, json_observer, lambda: log_observer(LogSettings())])
def test_standard_error(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = StringIO()
    monkeypatch.setattr("sys.__stderr__", stream)
    Logger("test", observer=make()).info("told")
    assert "told" in stream.getvalue()
    monkeypatch.setattr("sys.__stderr__", None)
    Logger("test", observer=make()).info("a daemon without standard error lives on")


@pytest.fixture
def published() -> Iterator[list[LogEvent]]:
    events: list[LogEvent] = []
    observer = cast(ILogObserver, events.append)
    globalLogPublisher.addObserver(observer)
    yield events
    globalLogPublisher.removeObserver(observer)


def test_the_standard_library_logs_here(published: list[LogEvent], lost_errors: list[LogEvent]) -> None:
    undo = capture_stdlib("info")
    try:
        stdlib = logging.getLogger("alembic.test")
        stdlib.info("run %s {not a field}", "one")
        stdlib.debug("not at this level")
        # Not by the logger: pytest's own handler raises for what does not fit.
        ours = logging.getLogger().handlers[-1]
        ours.handle(logging.LogRecord("alembic.test", logging.ERROR, "", 0, "bad %d", ("arguments",), None))
        try:
            raise RuntimeError("bad")
        except RuntimeError:
            stdlib.exception("failed")
    finally:
        undo()
    mine = [event for event in published if event["log_namespace"] == "alembic.test"]
    written: list[str] = []
    for event in mine:
        LineObserver(written.append)(event)
    text = "".join(written)
    assert "info  alembic.test run one {not a field}" in text
    assert "error alembic.test bad %d" in text
    assert "error alembic.test failed" in text
    assert "RuntimeError: bad" in text
    assert "not at this level" not in text
    lost_errors.clear()
    count = len(published)
    logging.getLogger("alembic.test").error("after the end")
    assert len(published) == count


def test_warnings_log_here_once_logging_has_begun() -> None:
    publisher = LogPublisher()
    written: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        LogBeginner(publisher, StringIO(), __import__("sys"), warnings).beginLoggingTo(
            [LineObserver(written.append)], redirectStandardIO=False
        )
        warnings.warn("old news", DeprecationWarning, stacklevel=1)
    (line,) = [line for line in written if "old news" in line]
    assert "DeprecationWarning" in line


# -- text made safe for a log


@given(st.text(st.characters(codec=None), max_size=50))
def test_an_escaped_text_is_one_printable_utf8_line(text: str) -> None:
    line = escaped(text)
    line.encode("utf-8")
    assert len(line.splitlines()) <= 1
    assert not any(ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in line)


def test_what_is_printable_stays() -> None:
    assert escaped("Zürich \\ 'x' \uef80") == "Zürich \\ 'x' \uef80"


def test_a_key_that_is_cut_off_is_still_a_key() -> None:
    assert redacted("a -----BEGIN PRIVATE KEY-----\nMIIsecret") == "a [private key left out]"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Invalid refresh token: eyJhbGciOiJub25lIn0.eyJqdGkiOiI0NzExIn0.", "Invalid refresh token: ***"),
        ("{'Authorization': 'Bearer abcdefgh12'}", "{'Authorization': 'Bearer ***'}"),
        ("SignedHeaders=host, Signature=0123456789abcdef", "SignedHeaders=host, Signature=***"),
        ("https://h/k?X-Amz-Signature=0123456789abcdef&x=1", "https://h/k?X-Amz-Signature=***&x=1"),
        ("?X-Amz-Security-Token=FwoGZXIvYXdzE%2F%2F&x", "?X-Amz-Security-Token=***&x"),
    ],
)
def test_tokens_and_signatures_are_left_out(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "text", ["-----BEGIN CERTIFICATE-----", "the PRIVATE KEY", "bearer of news", "x@y://z:1", "eyJ.a", "Signature=?"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_a_hostile_text_costs_little() -> None:
    """Quadratic patterns would take minutes here."""
    text = "://" * 200_000 + "@" + "PRIVATE KEY" + "-----BEGIN " * 100_000 + "bearer " * 100_000
    text += "eyJ" * 100_000 + "Signature=" * 100_000
    assert redacted(text).startswith("://")


def test_bounds() -> None:
    assert bounded("abc", 3) == "abc"
    assert bounded("abcd", 3) == "abc... (1 characters left out)"

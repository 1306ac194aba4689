"""The daemon's log: one event per line, as text or JSON, with escaping, redaction and rotation.

Fields that identify the subject of an event (request, job, element, attempt) are kept in a context variable: every
event that is logged inside `log_context` carries them. Warnings and the standard library's ``logging`` go to the same
log once `capture_stdlib` was called.
"""

from __future__ import annotations

import contextlib
import json
import logging as stdlib_logging
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from twisted.logger import ILogObserver, Logger, LogLevel, eventAsText, formatEvent
from twisted.python.failure import Failure
from zope.interface import implementer

from pdm.workqueue.config.settings import LogSettings
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import JobRecord

#: Long text is cut before the patterns below are applied, so that hostile input costs little.
LONGEST_TEXT = 64 * 1024

# A key that is cut off before its END is still a key, hence the second alternative.
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL
)
_PASSWORD_IN_URL = re.compile(r"(://[^/\s:@]{0,256}):[^/\s@]{1,1024}@")
_BEARER = re.compile(r"(?i)\b(bearer|authz=bearer%20)[ ]?[A-Za-z0-9._~+/=-]{8,}")

# The parts of a JSON web token begin with "{" in base64url.
_JSON_WEB_TOKEN = re.compile(r"\beyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){1,4}")
_SIGNATURE = re.compile(r"\b((?:X-Amz-)?(?:Signature|Security-Token|Credential))=[A-Za-z0-9%/+=_-]{8,}")

#: Characters that could move a terminal's cursor, end a line or turn its direction.
_CONTROL = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROL} | {
    0x09: "\\t",
    0x0A: "\\n",
    0x0D: "\\r",
}


def redacted(text: str) -> str:
    """The text without private keys, passwords in URLs, bearer tokens, and signatures of S3 requests."""
    if "PRIVATE KEY" in text:
        text = _PRIVATE_KEY.sub("[private key left out]", text)
    if "@" in text and "://" in text:
        text = _PASSWORD_IN_URL.sub(r"\1:***@", text)
    if "earer" in text or "EARER" in text:
        text = _BEARER.sub(r"\1 ***", text)
    if "eyJ" in text:
        text = _JSON_WEB_TOKEN.sub("***", text)
    if "Signature=" in text or "Credential=" in text or "Token=" in text:
        text = _SIGNATURE.sub(r"\1=***", text)
    return text


def escaped(text: str) -> str:
    """The text as one line that can be shown anywhere: control characters and line ends are spelled out."""
    if text.isprintable():
        return text
    # Half a surrogate pair has no UTF-8 form; spelled out, it cannot fail later where the line is written.
    return text.translate(_ESCAPES).encode("utf-8", "backslashreplace").decode("utf-8")


def bounded(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text, cut after ``longest`` characters with a note of how many went."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]}... ({len(text) - longest} characters left out)"


class LogFile:
    """Appends to a file; opens a new one when the old was renamed or removed (logrotate without ``copytruncate``).

    Args:
        path: of the file; its directory must be there.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._fd, self._identity = self._opened()

    def _opened(self) -> tuple[int, tuple[int, int]]:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        status = os.fstat(fd)
        return fd, (status.st_dev, status.st_ino)

    def write(self, lines: str) -> None:
        """Append whole lines.

        Never raises for a full disk or a lost directory: a log that cannot be written must not stop the service.
        """
        data = lines.encode("utf-8", "backslashreplace")
        with self._lock:
            try:
                status = os.stat(self._path)  # noqa: PTH116 - at a third of the price, for every line
                rotated = (status.st_dev, status.st_ino) != self._identity
            except OSError:
                rotated = True
            try:
                if rotated:
                    fresh = self._opened()
                    os.close(self._fd)
                    self._fd, self._identity = fresh
                os.write(self._fd, data)
            except OSError:
                # Standard error is the last place left; where that is closed too, the line is lost.
                _to_stderr(data)


def _to_stderr(data: bytes) -> None:
    try:
        os.write(2, data)
    except OSError:
        return


#: The fields that an event may carry, in the order in which a line shows them.
FIELDS = ("request_id", "incident", "job", "element", "attempt", "site", "worker", "agent", "peer", "subject")
#: Those that JSON has besides; a line of text says them in its words.
JSON_FIELDS = (
    *("method", "path", "status", "ms"),
    *("user", "type", "outcome", "elements", "done", "failed", "cancelled", "bytes", "seconds"),
)
#: A field is cut after so many characters.
_LONGEST_FIELD = 2000

LogFormat = Literal["text", "json"]
LevelName = Literal["debug", "info", "warn", "error"]

_fields: ContextVar[Mapping[str, Any]] = ContextVar("log_fields", default=MappingProxyType({}))


class log_context:  # noqa: N801 - used like a function; a class, for every request passes here
    """Put fields on every event logged inside a ``with``; they add to those of the context around.

    What ``as`` gives is the mapping of the fields: one that becomes known inside may be added.

    Args:
        fields: names out of `FIELDS` with short values; None leaves one out.
    """

    __slots__ = ("_around", "_own")

    def __init__(self, **fields: Any) -> None:
        self._own = fields

    def __enter__(self) -> dict[str, Any]:
        self._around = _fields.get()
        inside = {**self._around, **self._own}
        _fields.set(inside)
        return inside

    def __exit__(self, *exception: object) -> None:
        # Not by a token: a coroutine may be left in another copy of the context than it was entered in.
        _fields.set(self._around)


def log_incident(log: Logger, failure: Failure, **fields: Any) -> str:
    """Log an internal fault with its traceback, under an incident id that the user is given.

    Args:
        log: whose fault it is.

    Returns:
        The incident's short id; the same as in the line.
    """
    incident = secrets.token_hex(4)
    log.failure("incident {incident}: {kind}", failure, incident=incident, kind=type(failure.value).__name__, **fields)
    return incident


@implementer(ILogObserver)
class LineObserver:
    """Writes each event as one line (text: and one more for each line of a traceback).

    Args:
        write: takes whole lines; may be called from any thread.
        node: name of the daemon, a field of each line of JSON; None for no such field.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        format: LogFormat = "text",  # noqa: A002 - the word of the configuration
        level: LevelName = "info",
        node: str | None = None,
    ) -> None:
        self._write = write
        self._render = partial(_json_lines, node) if format == "json" else _text_lines
        self._least = LogLevel.levelWithName(level)

    def __call__(self, event: dict[str, Any]) -> None:
        level = event.get("log_level") or LogLevel.info
        if level >= self._least:
            self._write(self._render(event, level.name))


def _time(event: Mapping[str, Any]) -> str:
    seconds, microseconds = divmod(round(float(event.get("log_time", 0.0)) * 1_000_000), 1_000_000)
    return f"{_second(seconds)}.{microseconds // 1000:03d}Z"


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    """Many lines are written in one second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _event_fields(event: Mapping[str, Any]) -> dict[str, Any]:
    context = _fields.get()
    found = {name: event.get(name, context.get(name)) for name in FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def _json_field(value: object) -> object:
    return value if isinstance(value, int | float) else redacted(bounded(str(value), _LONGEST_FIELD))


def _message(event: dict[str, Any]) -> str:
    return redacted(bounded(_formatted(event)))


def _formatted(event: dict[str, Any]) -> str:
    """As `formatEvent`, at a tenth of the cost where the format calls nothing."""
    pattern = event.get("log_format")
    if isinstance(pattern, str) and "(" not in pattern:
        with contextlib.suppress(Exception):
            return pattern.format_map(event)
    return formatEvent(event) or ""


def _traceback(event: dict[str, Any]) -> str:
    if "log_failure" not in event:
        return ""
    return redacted(bounded(eventAsText(event, includeTimestamp=False, includeSystem=False)[len(formatEvent(event)) :]))


def _text_lines(event: dict[str, Any], level: str) -> str:
    marks = " ".join(f"{name}={_mark(value)}" for name, value in _event_fields(event).items())
    head = f"{_time(event)} {level:<5} {event.get('log_namespace', '-')}"
    head = f"{head} [{marks}]" if marks else head
    lines = [f"{head} {escaped(_message(event))}\n"]
    # Each line of a traceback has the head too: a search for a request's id finds all of it, and the text of an
    # exception cannot forge a line.
    lines += [f"{head} | {escaped(line)}\n" for line in _traceback(event).splitlines() if line.strip()]
    return "".join(lines)


def _mark(value: object) -> str:
    text = escaped(redacted(str(value)))
    return f'"{text}"' if " " in text else text


def _json_lines(node: str | None, event: dict[str, Any], level: str) -> str:
    more = {name: event[name] for name in JSON_FIELDS if event.get(name) is not None}
    fields = {name: _json_field(value) for name, value in (_event_fields(event) | more).items()}
    line = {
        "time": _time(event),
        **({} if node is None else {"node": node}),
        "level": level,
        "logger": event.get("log_namespace", "-"),
        "event": _message(event),
        **fields,
    }
    traceback = _traceback(event)
    if traceback:
        line["traceback"] = traceback.strip()
    # ASCII: half a surrogate pair or a control character in a name cannot break the line.
    return json.dumps(line, ensure_ascii=True) + "\n"


def log_observer(settings: LogSettings, node: str | None = None) -> LineObserver:
    """The observer that the configuration asks for: to a file that may be rotated, or to standard error.

    Raises:
        OSError: the file cannot be opened.
    """
    write = _write_stderr if settings.file is None else LogFile(settings.file).write
    return LineObserver(write, settings.format, settings.level, node)


def _write_stderr(lines: str) -> None:
    # The true one: twistd turns sys.stderr into log events, which would come back here.
    if sys.__stderr__ is not None:
        sys.__stderr__.write(lines)
        sys.__stderr__.flush()


def observer() -> LineObserver:
    """Text lines on standard error, for ``twistd --logger=pdm.workqueue.telemetry.logging.observer``."""
    return LineObserver(_write_stderr)


def json_observer() -> LineObserver:
    """JSON lines on standard error, for ``twistd --logger=pdm.workqueue.telemetry.logging.json_observer``."""
    return LineObserver(_write_stderr, "json")


class _Forwarder(stdlib_logging.Handler):
    """Hands records of the standard library's ``logging`` to Twisted's log."""

    def emit(self, record: stdlib_logging.LogRecord) -> None:
        log = Logger(namespace=record.name)
        failure = None
        if record.exc_info and record.exc_info[1] is not None:
            failure = Failure(record.exc_info[1], record.exc_info[0], record.exc_info[2])
        try:
            text = record.getMessage()
        except (TypeError, ValueError):
            text = str(record.msg)
        extra = {"log_failure": failure} if failure else {}
        log.emit(_level_of(record.levelno), "{text}", text=text, **extra)


def _level_of(number: int) -> Any:
    if number >= stdlib_logging.ERROR:
        return LogLevel.error
    if number >= stdlib_logging.WARNING:
        return LogLevel.warn
    return LogLevel.info if number >= stdlib_logging.INFO else LogLevel.debug


def capture_stdlib(level: LevelName = "info") -> Callable[[], None]:
    """Send what libraries log by ``logging`` (alembic, SQLAlchemy) to the daemon's log.

    Python warnings need nothing: Twisted takes them over when its logging begins.

    Returns:
        What undoes it.
    """
    root = stdlib_logging.getLogger()
    handler = _Forwarder()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level.upper() if level != "warn" else "WARNING")

    def undo() -> None:
        root.removeHandler(handler)
        root.setLevel(before)

    return undo


_log = Logger()


def log_submitted(job: JobRecord) -> None:
    """A job was registered: by whom, and what it asks for. Paths are in the logs of its attempts."""
    where = f"{job.src_siteid}" if job.dst_siteid is None else f"{job.src_siteid} -> {job.dst_siteid}"
    _log.info(
        "job {job} of user {user} submitted: {type} by {protocol}, site {where}, {elements} elements,"
        " priority {priority}",
        **_job_fields(job),
        elements=job.counters.elements,
        protocol=job.protocol.name,
        where=where,
        priority=job.priority,
    )


def log_ended(job: JobRecord) -> None:
    """A job has become final: how, with how many elements and bytes, after how long; what failed is a warning."""
    counters = job.counters
    seconds = (job.finished_at - job.timestamp).total_seconds() if job.finished_at is not None else 0.0
    write = _log.warn if job.status is JobStatus.FAILED else _log.info
    write(
        "job {job} of user {user} ended {outcome}: {type}, {done} of {elements} elements done, {failed} failed,"
        " {cancelled} cancelled, {bytes} bytes in {seconds:.1f} s",
        **_job_fields(job),
        outcome=job.status.name,
        elements=counters.elements,
        done=counters.done,
        failed=counters.failed,
        cancelled=counters.cancelled,
        bytes=job.bytes_done,
        seconds=round(seconds, 3),
    )


def _job_fields(job: JobRecord) -> dict[str, Any]:
    return {"job": job.id, "user": job.user_id, "type": job.type.name}

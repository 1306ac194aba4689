"""The thread that writes logs, and the append-only log file of one job.

The file is opened for each write: no descriptor is kept for a job, and a file that an operator removed, renamed or
truncated is noticed, because its size differs from the end of the last write.

Each pass runs all operations queued since the last one. Closed logs are written at the end of the pass, those of one
job together; other lines within 50 ms. So a short attempt is one contiguous piece, many of them cost one open, one
write and one close, and a long one is visible while it runs.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from twisted.internet.defer import Deferred

from pdm.workqueue.domain.jobs import LogSpan
from pdm.workqueue.logstore.attempt_log import AttemptLog, LogRef, TimestampFormatter, directory_of
from pdm.workqueue.logstore.reader import Answer, Region
from pdm.workqueue.telemetry.logging import bounded, escaped, redacted

# Readable, too: the last byte shows whether the last line is complete.
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_MODE, _DIRECTORY_MODE = 0o640, 0o750


class OpenLog:
    """The log of a running attempt, and where it is in the file of its job.

    Attributes:
        span: its part of the file; None while nothing is written.
    """

    def __init__(self, file: JobFile, log: AttemptLog) -> None:
        self.file = file
        self.log = log
        self.span: LogSpan | None = None
        #: Lines of a private key that were omitted so far; 0 outside of a key.
        self.hidden_lines = 0
        self._replaced = file.replaced

    def place(self, begin: int, end: int) -> None:
        """Record that lines were written, from ``begin`` to ``end``."""
        if self.span is None or self._replaced != self.file.replaced:
            # Earlier lines are in a file that was removed or truncated.
            self.span = LogSpan(begin, end - begin)
            self._replaced = self.file.replaced
        else:
            self.span = LogSpan(self.span.offset, end - self.span.offset)


class JobFile:
    """A log file that is being written. Used by one thread only.

    Attributes:
        open_logs: number of attempts that write into it.
        replaced: how often the file was found replaced or truncated.
    """

    def __init__(self, directory: str, log_uid: str, name: str) -> None:
        self._directory = directory_of(directory, log_uid)
        self.path = f"{self._directory}/{name}"
        self.log_uid = log_uid
        self.open_logs = 0
        self.replaced = 0
        self._end: int | None = None
        self._torn = False

    def append(self, logs: Sequence[OpenLog]) -> tuple[int, str] | None:
        """Append the due lines of some logs in one write; directories are made if missing.

        Returns:
            None, or the number of logs whose lines could not be written, and the reason. Those lines are lost; the next
            lines of the same log say so.
        """
        pieces = [log.log.take() for log in logs]
        begin = written = 0
        try:
            fd = self._opened()
            try:
                begin = os.lseek(fd, 0, os.SEEK_END)
                if begin != self._end:
                    self._take_end(fd, begin)
                if self._torn:
                    # A line that was cut off stays a line of its own.
                    os.write(fd, b"\n")
                    self._torn = False
                    self._end = begin = begin + 1
                rest = memoryview(b"".join(pieces))
                while rest:
                    count = os.write(fd, rest)
                    written += count
                    rest = rest[count:]
            finally:
                os.close(fd)
        except OSError as error:
            return self._cut_off(logs, pieces, begin, written, error.strerror or type(error).__name__)
        self._end = begin
        for log, piece in zip(logs, pieces, strict=True):
            self._end += len(piece)
            log.place(self._end - len(piece), self._end)
        return None

    def _take_end(self, fd: int, end: int) -> None:
        """Check the end of a file that another process has written: a killed daemon may have left half a line."""
        if self._end is not None:
            self.replaced += 1
        self._end = end
        self._torn = end > 0 and os.pread(fd, 1, end - 1) != b"\n"

    def _cut_off(
        self, logs: Sequence[OpenLog], pieces: Sequence[bytes], begin: int, written: int, why: str
    ) -> tuple[int, str]:
        failed = 0
        for log, piece in zip(logs, pieces, strict=True):
            there = min(len(piece), written)
            if there:
                log.place(begin, begin + there)
                self._end = begin + there
                self._torn = not piece.endswith(b"\n", 0, there)
            if there < len(piece):
                log.log.lose(piece[there:], why)
                failed += 1
            begin += there
            written -= there
        return failed, why

    def _opened(self) -> int:
        if self._end is None:
            # The directory of a new job does not exist yet: making it first saves an open that fails.
            _make_directories(self._directory)
        try:
            return os.open(self.path, _FLAGS, _MODE)
        except FileNotFoundError:
            _make_directories(self._directory)
            return os.open(self.path, _FLAGS, _MODE)


def _make_directories(directory: str) -> None:
    """Make a directory and its parents with mode 0750 each; ``os.makedirs`` would set the mode of the last one only."""
    try:
        os.mkdir(directory, _DIRECTORY_MODE)  # noqa: PTH102 - called for each job; a Path costs more than the mkdir
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_directories(os.path.dirname(directory))  # noqa: PTH120 - as above
        os.mkdir(directory, _DIRECTORY_MODE)  # noqa: PTH102 - as above


#: How long lines may wait to be written together.
_FLUSH_S = 0.05
#: Operations run before answers are delivered: limits how long the first answer waits for the last.
_MOST_AT_ONCE = 512
_LONGEST_LINE = 8 * 1024
_COMPLAINT_PAUSE_S = 10.0
#: No private key is longer: a BEGIN without END hides no more lines than this.
_LONGEST_KEY_LINES = 100

Operation = Callable[[], None]


class ClosedLog(NamedTuple):
    """How the log of an attempt ended.

    Attributes:
        complete: whether all of it is on disk.
        span: where it is in the file of its job; None if nothing of it is on disk.
    """

    complete: bool
    span: LogSpan | None


class LogWriter:
    """Runs operations one after the other on its own thread.

    Args:
        name: name of the file that it writes in the directory of each job.
        report: called on the thread with answers, and an error message for the daemon's log or None.
    """

    def __init__(
        self,
        directory: str,
        name: str,
        head_bytes: int,
        tail_bytes: int,
        report: Callable[[list[Answer], str | None], None],
    ) -> None:
        self._directory = directory
        self._name = name
        self._head_bytes = head_bytes
        self._tail_bytes = tail_bytes
        self._report = report
        self._queue: queue.SimpleQueue[Sequence[Operation]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="logstore", daemon=True)
        #: Files with open logs, by `log_uid`.
        self._files: dict[str, JobFile] = {}
        self._open: dict[LogRef, OpenLog] = {}
        #: Open logs with lines that are due.
        self._dirty: dict[LogRef, OpenLog] = {}
        self._closing: list[tuple[OpenLog, bool, Callable[[ClosedLog], object]]] = []
        self._due_at = 0.0
        self._answers: list[Answer] = []
        self._finished = False
        self._stamps = TimestampFormatter()
        self._complaint = self._unwritten = ""
        self._complain_at = 0.0
        #: Number of logs in failed writes, added up. Written by the thread, read by any thread.
        self.errors = 0
        #: Number of characters received. Written by the thread, read by any thread.
        self.taken = 0

    def start(self) -> None:
        self._thread.start()

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    def join(self) -> None:
        """Wait for the thread to end, after `finish`."""
        self._thread.join()

    def put(self, operations: Sequence[Operation]) -> None:
        """Queue operations; thread-safe."""
        self._queue.put(operations)

    # The methods below run on the thread.

    def begin(self, ref: LogRef, text: str, at: float) -> None:
        """Open a log with its first line."""
        if ref not in self._open:
            file = self._files.get(ref.log_uid)
            if file is None:
                file = self._files[ref.log_uid] = JobFile(self._directory, ref.log_uid, self._name)
            file.open_logs += 1
            log = AttemptLog(f"{ref.key} ".encode(), self._head_bytes, self._tail_bytes)
            self._open[ref] = OpenLog(file, log)
        self.add(ref, text, at)

    def add(self, ref: LogRef, text: str, at: float) -> None:
        """Add lines to an open log; ignored if it is not open."""
        self.taken += len(text)
        opened = self._open.get(ref)
        if opened is None:
            return
        stamp = self._stamps.stamp(at)
        for line in _lines(opened, text):
            opened.log.add(line, stamp, at)
        if opened.log.is_due:
            if not self._dirty:
                self._due_at = time.monotonic() + _FLUSH_S
            self._dirty[ref] = opened

    def end(self, ref: LogRef, text: str, at: float, missing: int, answer: Callable[[ClosedLog], object]) -> None:
        """Add the last line and close; ``answer`` is called on the reactor's thread, once all is on disk."""
        opened = self._open.pop(ref, None)
        if opened is None:
            self._answers.append((answer, ClosedLog(False, None)))
            return
        self._dirty.pop(ref, None)
        self._closing.append((opened, not missing, answer))
        stamp = self._stamps.stamp(at)
        if missing:
            opened.log.add_last(b"[log] %d lines went missing: the disk did not keep up\n" % missing, stamp)
        for line in _lines(opened, text):
            opened.log.add_last(line, stamp)

    def locate(self, ref: LogRef, then: Callable[[Region | None], None]) -> None:
        """Call a function with the part of the file that has the log so far; with None if the log is not open."""
        self._guarded(self._write_closing)
        opened = self._open.get(ref)
        if opened is None:
            then(None)
            return
        if self._dirty.pop(ref, None) is not None:
            self._guarded(partial(self._write, [opened]))
        begin, end = (0, 0) if opened.span is None else (opened.span.offset, opened.span.offset + opened.span.length)
        then(Region(begin, end, opened.log.waiting_tail()))

    def flush(self, answer: Deferred[None]) -> None:
        """Write all waiting lines."""
        self._write_closing()
        self._write_dirty()
        self._answers.append((answer.callback, None))

    def finish(self, at: float, answer: Deferred[None]) -> None:
        """Close all open logs, then end the thread."""
        for ref in list(self._open):
            self.end(ref, "[log] ends here: the daemon stopped", at, 0, lambda closed: None)
        self._write_closing()
        self._finished = True
        self._answers.append((answer.callback, None))

    def _run(self) -> None:
        while not self._finished:
            for operation in self._next_operations():
                self._guarded(operation)
            self._guarded(self._write_closing)
            if self._dirty and time.monotonic() >= self._due_at:
                self._guarded(self._write_dirty)
            self._give_answers()

    def _next_operations(self) -> list[Operation]:
        wait = max(0.0, self._due_at - time.monotonic()) if self._dirty else None
        operations: list[Operation] = []
        try:
            operations += self._queue.get(timeout=wait)
            while len(operations) < _MOST_AT_ONCE:
                operations += self._queue.get_nowait()
        except queue.Empty:
            pass
        return operations

    def _guarded(self, operation: Operation) -> None:
        try:
            operation()
        except Exception as error:  # the thread must outlive any fault, else every attempt would wait for ever
            self.errors += 1
            self._complaint = f"a fault of the log store: {type(error).__name__}: {error}"

    def _write_closing(self) -> None:
        closing, self._closing = self._closing, []
        written = False
        try:
            self._write(opened for opened, _, _ in closing)
            written = True
        finally:
            # The attempts are settled only after this answer: send it in any case.
            for opened, has_all, answer in closing:
                complete = written and has_all and opened.log.complete
                self._answers.append((answer, ClosedLog(complete, opened.span)))
                opened.file.open_logs -= 1
                if not opened.file.open_logs:
                    del self._files[opened.file.log_uid]

    def _write_dirty(self) -> None:
        dirty, self._dirty = self._dirty, {}
        self._write(dirty.values())

    def _write(self, logs: Iterable[OpenLog]) -> None:
        """Write due lines, with one write for each job."""
        by_file: dict[JobFile, list[OpenLog]] = {}
        for opened in logs:
            by_file.setdefault(opened.file, []).append(opened)
        if by_file:
            # A complaint that waits is void once all can be written.
            self._unwritten = ""
        for file, together in by_file.items():
            fault = file.append(together)
            if fault is not None:
                failed, why = fault
                self.errors += failed
                self._unwritten = f"the log {file.path} could not be written: {why}; failed writes: {self.errors}"

    def _give_answers(self) -> None:
        complaint = None
        if (self._complaint or self._unwritten) and time.monotonic() >= self._complain_at:
            # A full disk fails thousands of writes a second: log an error at intervals only.
            complaint = self._complaint or self._unwritten
            self._complaint = self._unwritten = ""
            self._complain_at = time.monotonic() + _COMPLAINT_PAUSE_S
        if self._answers or complaint:
            answers, self._answers = self._answers, []
            self._report(answers, complaint)


def _lines(opened: OpenLog, text: str) -> list[bytes]:
    """The text as escaped lines without secrets, each with its line end."""
    if "\n" not in text:
        return _line(opened, text)
    return [line for piece in text.removesuffix("\n").split("\n") for line in _line(opened, piece)]


def _line(opened: OpenLog, line: str) -> list[bytes]:
    # A private key spans several lines: omit all from BEGIN to END.
    if opened.hidden_lines:
        over = "-----END " in line or opened.hidden_lines >= _LONGEST_KEY_LINES
        opened.hidden_lines = 0 if over else opened.hidden_lines + 1
        return []
    if "PRIVATE KEY-----" in line and "-----END " not in line:
        opened.hidden_lines = 1
    safe = escaped(redacted(bounded(line.rstrip("\r"), _LONGEST_LINE)))
    return [safe.encode("utf-8", "backslashreplace") + b"\n"]

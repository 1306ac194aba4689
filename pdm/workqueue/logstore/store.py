"""Storage of attempt logs: called on the reactor without blocking, written by one thread.

Each attempt has one file, ``<logs>/<log_uid[:2]>/<log_uid>/<element>/attempt<K>.log``, with the UTC time on each line.
The thread takes everything that was queued since its last pass. A log that is closed is written at once, others within
50 ms: a short attempt costs one open, one write and one close, and a long one is visible while it runs. "On disk" means
handed to the operating system: it survives the death of the daemon, not a loss of power.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from attrs import frozen
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger
from twisted.python.failure import Failure

from pdm.workqueue.logstore.attempt_log import AttemptLog, LogRef, TimestampFormatter
from pdm.workqueue.telemetry.logging import bounded, escaped, redacted

#: How long lines may wait for others before they are written.
_FLUSH_S = 0.05
#: Operations run before answers are delivered: limits how long the first answer waits for the last.
_MOST_AT_ONCE = 256
_LONGEST_LINE = 8 * 1024
_COMPLAINT_PAUSE_S = 10.0
#: A private key is never longer; a BEGIN without END hides no more lines than this.
_LONGEST_KEY_LINES = 100
#: Lines of life and last lines come on top of head and tail.
_READ_MARGIN_BYTES = 512 * 1024

#: A Deferred and what it is to fire with (a `Failure` fails it).
Answer = tuple[Deferred[Any], object]
Operation = Callable[[], None]


class LogMissingError(Exception):
    """The log of an attempt is not on disk."""


@frozen
class LogPiece:
    """A piece of a log.

    Attributes:
        text: whole lines; None where there is no log.
        end: where it ends, in bytes, and so where the next one begins.
        is_last: whether nothing follows by now.
    """

    text: str | None
    end: int
    is_last: bool


class LogWriter:
    """Runs operations one after the other on its own thread.

    Args:
        report: called on the thread with answers, and with a complaint for the daemon's log or None.
    """

    def __init__(
        self, directory: Path, head_bytes: int, tail_bytes: int, report: Callable[[list[Answer], str | None], None]
    ) -> None:
        self._directory = directory
        self._place = str(directory)
        self._head_bytes = head_bytes
        self._tail_bytes = tail_bytes
        self._report = report
        self._queue: queue.SimpleQueue[Operation] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="logstore", daemon=True)
        self._open: dict[LogRef, _OpenLog] = {}
        self._dirty: set[LogRef] = set()
        self._due_at = 0.0
        self._answers: list[Answer] = []
        self._finished = False
        self._stamps = TimestampFormatter()
        self._complaint = ""
        self._complain_at = 0.0
        #: Writes that failed, ever. Written by the thread, read by anyone.
        self.errors = 0
        #: Characters of lines taken in, ever. Written by the thread, read by anyone.
        self.taken = 0

    def start(self) -> None:
        self._thread.start()

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    def join(self) -> None:
        """Wait for the thread, after it was asked to finish."""
        self._thread.join()

    def put(self, operation: Operation) -> None:
        """Queue an operation; thread-safe."""
        self._queue.put(operation)

    # The methods below run on the thread.

    def begin(self, ref: LogRef, text: str, at: float) -> None:
        """Open a log with its first line."""
        self._open[ref] = _OpenLog(AttemptLog(ref.path_text(self._place), self._head_bytes, self._tail_bytes))
        self.add(ref, text, at)

    def add(self, ref: LogRef, text: str, at: float) -> None:
        """Add lines; a log that is not open (any more) takes none."""
        self.taken += len(text)
        log = self._open.get(ref)
        if log is None:
            return
        stamp = self._stamps.stamp(at)
        for line in log.lines(text):
            log.file.add(stamp + line, stamp, at)
        if log.file.dirty:
            if not self._dirty:
                self._due_at = time.monotonic() + _FLUSH_S
            self._dirty.add(ref)

    def end(self, ref: LogRef, text: str, at: float, missing: int, answer: Deferred[bool]) -> None:
        """Add the last line and close; the answer is whether all of the log is on disk."""
        log = self._open.pop(ref, None)
        if log is None:
            self._answers.append((answer, False))
            return
        complete = False
        try:
            self._dirty.discard(ref)
            stamp = self._stamps.stamp(at)
            if missing:
                log.file.add_last(stamp + b"[log] %d lines went missing: the disk did not keep up\n" % missing)
            for line in log.lines(text):
                log.file.add_last(stamp + line)
            self._write(ref, log.file)
            complete = log.file.complete and not missing
        finally:
            # Whatever happens here, who waits to settle the attempt gets an answer.
            self._answers.append((answer, complete))

    def read(self, ref: LogRef, answer: Deferred[str]) -> None:
        """Answer with the text of a log, of a running one too; `LogMissingError` if there is none."""
        log = self._written(ref)
        try:
            data = self._read(ref.path(self._directory))
        except OSError as error:
            self._answers.append((answer, _missing(ref, error)))
            return
        tail = b"" if log is None else log.file.waiting_tail()
        self._answers.append((answer, (data + tail).decode("utf-8", "replace")))

    def read_piece(self, ref: LogRef, offset: int, most: int, answer: Deferred[LogPiece]) -> None:
        """Answer with a `LogPiece`; `LogMissingError` if there is no such log."""
        self._written(ref)
        try:
            with ref.path(self._directory).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                # An offset after the end is moved to the end.
                begin = file.seek(min(offset, size))
                data = file.read(most)
        except OSError as error:
            self._answers.append((answer, _missing(ref, error)))
            return
        is_last = begin + len(data) >= size
        if not is_last:
            # A piece ends with a line, unless there is none in it.
            data = data[: data.rfind(b"\n") + 1] or data
        self._answers.append((answer, LogPiece(data.decode("utf-8", "replace"), begin + len(data), is_last)))

    def _written(self, ref: LogRef) -> _OpenLog | None:
        """The log if it is open, with all that was due in its file."""
        log = self._open.get(ref)
        if log is not None and log.file.dirty:
            self._dirty.discard(ref)
            self._write(ref, log.file)
        return log

    def flush(self, answer: Deferred[None]) -> None:
        """Write out all that waits."""
        self._write_dirty()
        self._answers.append((answer, None))

    def finish(self, at: float, answer: Deferred[None]) -> None:
        """Close what is open, then end the thread."""
        for ref in list(self._open):
            self.end(ref, "[log] ends here: the daemon stopped", at, 0, Deferred())
        self._finished = True
        self._answers.append((answer, None))

    def _run(self) -> None:
        while not self._finished:
            for operation in self._next_operations():
                try:
                    operation()
                except Exception as error:  # the thread must outlive any fault, else every attempt would wait for ever
                    self._fault(error)
            if self._dirty and time.monotonic() >= self._due_at:
                self._write_dirty()
            self._give_answers()

    def _next_operations(self) -> list[Operation]:
        wait = max(0.0, self._due_at - time.monotonic()) if self._dirty else None
        operations = []
        try:
            operations.append(self._queue.get(timeout=wait))
            while len(operations) < _MOST_AT_ONCE:
                operations.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return operations

    def _fault(self, error: Exception) -> None:
        self.errors += 1
        self._complaint = f"a fault of the log store: {type(error).__name__}: {error}"

    def _write_dirty(self) -> None:
        for ref in self._dirty:
            log = self._open.get(ref)
            if log is not None:
                self._write(ref, log.file)
        self._dirty.clear()

    def _write(self, ref: LogRef, file: AttemptLog) -> None:
        error = file.write()
        if error is not None:
            self.errors += 1
            self._complaint = (
                f"the log {ref.path(self._directory)} could not be written: {error.strerror};"
                f" failed writes: {self.errors}"
            )

    def _read(self, path: Path) -> bytes:
        most = self._head_bytes + _READ_MARGIN_BYTES
        with path.open("rb") as file:
            data = file.read(most)
            size = file.seek(0, 2)
            if size <= most + self._tail_bytes:
                file.seek(len(data))
                return data + file.read()
            file.seek(size - self._tail_bytes)
            note = b"\n[log] %d bytes in the middle are not shown\n" % (size - most - self._tail_bytes)
            return data + note + file.read(self._tail_bytes)

    def _give_answers(self) -> None:
        complaint = None
        if self._complaint and time.monotonic() >= self._complain_at:
            # A full disk fails thousands of writes a second: one line now and then is enough.
            complaint, self._complaint = self._complaint, ""
            self._complain_at = time.monotonic() + _COMPLAINT_PAUSE_S
        if self._answers or complaint:
            answers, self._answers = self._answers, []
            self._report(answers, complaint)


def _missing(ref: LogRef, error: OSError) -> Failure:
    what = "is not on disk" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    return Failure(LogMissingError(f"the log of element {ref.element_id}, attempt {ref.attempt} {what}"))


class _OpenLog:
    """A log and what must be remembered between its lines."""

    def __init__(self, file: AttemptLog) -> None:
        self.file = file
        self._hidden_lines = 0

    def lines(self, text: str) -> list[bytes]:
        """The text as lines that are safe, without secrets, each with its line end."""
        if "\n" not in text:
            return self._line(text)
        return [line for piece in text.removesuffix("\n").split("\n") for line in self._line(piece)]

    def _line(self, line: str) -> list[bytes]:
        # A private key comes line by line: from BEGIN to END nothing is shown.
        if self._hidden_lines:
            over = "-----END " in line or self._hidden_lines >= _LONGEST_KEY_LINES
            self._hidden_lines = 0 if over else self._hidden_lines + 1
            return []
        if "PRIVATE KEY-----" in line and "-----END " not in line:
            self._hidden_lines = 1
        safe = escaped(redacted(bounded(line.rstrip("\r"), _LONGEST_LINE)))
        return [safe.encode("utf-8", "backslashreplace") + b"\n"]


#: Most characters that wait for a disk that hangs; what comes beyond is counted and left out.
MOST_WAITING = 64 * 1024**2
#: A disk with less room than this is full.
_MIN_FREE_BYTES = 256 * 1024


class LogStore:
    """The logs of all attempts.

    All methods are called on the reactor's thread; none of them waits, none fails because of the disk.

    Args:
        directory: of all logs; made, mode 0750, if it is missing.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IReactorFromThreads,
        directory: Path,
        head_bytes: int = 1024**2,
        tail_bytes: int = 64 * 1024,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._reactor = reactor
        self._directory = directory
        self._now = now
        self._writer = LogWriter(directory, head_bytes, tail_bytes, self._report)
        self._put = 0
        self._missing: dict[LogRef, int] = {}
        self._stopped = False

    @property
    def errors(self) -> int:
        """How many writes have failed since the start."""
        return self._writer.errors

    def check(self) -> None:
        """Check that files can be written; blocks.

        Raises:
            OSError: it does not.
        """
        with tempfile.TemporaryFile(dir=self._directory) as file:
            file.write(bytes(_MIN_FREE_BYTES))
            file.flush()

    def start(self) -> None:
        """Begin to write.

        Raises:
            OSError: the directory cannot be made.
        """
        self._directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._writer.start()

    async def stop(self) -> None:
        """Write all that waits, close every log, end the thread."""
        if self._stopped:
            return
        self._stopped = True
        if not self._writer.started:
            return
        ended: Deferred[None] = Deferred()
        self._writer.put(partial(self._writer.finish, self._now(), ended))
        await ended
        self._writer.join()

    def open(self, ref: LogRef, first_line: str) -> None:
        """Begin the log of an attempt."""
        self._put_text(partial(self._writer.begin, ref, first_line, self._now()), first_line)

    def write(self, ref: LogRef, text: str) -> None:
        """Add lines to a log that is open; control characters are spelled out, secrets left out."""
        if self._put - self._writer.taken > MOST_WAITING:
            self._missing[ref] = self._missing.get(ref, 0) + 1
            return
        self._put_text(partial(self._writer.add, ref, text, self._now()), text)

    def close(self, ref: LogRef, last_line: str) -> Deferred[bool]:
        """Add the last line and end the log.

        Returns:
            Fires when all is on disk, with True; or with False when something could not be written (the daemon's log
            says why). Never fails, so that a full disk holds up no verdict.
        """
        if self._stopped:
            return succeed(False)
        answer: Deferred[bool] = Deferred()
        missing = self._missing.pop(ref, 0)
        self._writer.put(partial(self._writer.end, ref, last_line, self._now(), missing, answer))
        return answer

    def is_begun(self, ref: LogRef) -> bool:
        """Whether there is a log on disk; any thread may ask."""
        return Path(ref.path_text(str(self._directory))).exists()

    def read(self, ref: LogRef) -> Deferred[str]:
        """The text of a log that was written so far.

        Returns:
            Fires with the text, bounded like the log; fails with `LogMissingError` when it is not on disk.
        """
        answer: Deferred[str] = Deferred()
        if self._stopped:
            answer.errback(LogMissingError("the log store has stopped"))
        else:
            self._writer.put(partial(self._writer.read, ref, answer))
        return answer

    def read_piece(self, ref: LogRef, offset: int, most: int) -> Deferred[LogPiece]:
        """A piece of a log that may still be written, as it is in its file: later text is never before it.

        Returns:
            Fires with the piece; fails with `LogMissingError` when there is no such log.
        """
        answer: Deferred[LogPiece] = Deferred()
        if self._stopped:
            answer.errback(LogMissingError("the log store has stopped"))
        else:
            self._writer.put(partial(self._writer.read_piece, ref, offset, most, answer))
        return answer

    async def flush(self) -> None:
        """Wait until all lines so far are on disk."""
        if not self._stopped:
            answer: Deferred[None] = Deferred()
            self._writer.put(partial(self._writer.flush, answer))
            await answer

    def _put_text(self, operation: Callable[[], None], text: str) -> None:
        if not self._stopped:
            self._put += len(text)
            self._writer.put(operation)

    def _report(self, answers: list[Answer], complaint: str | None) -> None:
        self._reactor.callFromThread(self._give, answers, complaint)

    def _give(self, answers: list[Answer], complaint: str | None) -> None:
        if complaint is not None:
            self._log.error("{complaint}", complaint=complaint)
        for deferred, value in answers:
            deferred.callback(value)

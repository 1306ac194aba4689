"""Storage of attempt logs: methods do not block the reactor; one thread writes and removes, others read.

All attempts of a job write into one file, ``<logs>/<log_uid[:2]>/<log_uid>/log``; where daemons share a database, into
one file for each daemon (`log_name`). Each line is the UTC time, ``ELEMENT.ATTEMPT``, and the text. "On disk" means
written to the operating system: it survives a crash of the daemon, not a loss of power.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger

from pdm.workqueue.domain.jobs import LogSpan
from pdm.workqueue.logstore.attempt_log import LogRef, directory_of, log_name
from pdm.workqueue.logstore.reader import Answer, LogMissingError, LogPiece, LogReader, LogTail, Region, begun_attempts
from pdm.workqueue.logstore.writer import ClosedLog, LogWriter, Operation

_POSITIONS = "removed.json"
_LONGEST_FILE = 4096

#: A time, and the number of a job.
Place = tuple[datetime, int]


@frozen(kw_only=True)
class RemovedLogs:
    """Up to where the logs below a directory were removed; stored there, as each daemon may have its own.

    Attributes:
        purged: the last purged job whose logs were removed, in the order in which they were purged.
        ended: the last job whose logs were removed because of its age, in the order of their ends.
    """

    purged: Place | None = None
    ended: Place | None = None

    @classmethod
    def read(cls, directory: Path) -> RemovedLogs:
        """The stored places; none if there is no valid file: then removal begins again, which is harmless."""
        try:
            with (directory / _POSITIONS).open(encoding="ascii") as file:
                known = json.loads(file.read(_LONGEST_FILE))
            places = {name: (datetime.fromisoformat(at), int(number)) for name, (at, number) in known.items()}
            return cls(purged=places.get("purged"), ended=places.get("ended"))
        except (OSError, ValueError, TypeError, AttributeError):
            return cls()

    def write(self, directory: Path) -> None:
        """Store the places.

        Raises:
            OSError: the directory cannot be written.
        """
        places = {"purged": self.purged, "ended": self.ended}
        text = json.dumps({name: (at[0].isoformat(), at[1]) for name, at in places.items() if at is not None})
        fd, temporary = tempfile.mkstemp(dir=directory, prefix=".removed-")
        try:
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(text)
            Path(temporary).replace(directory / _POSITIONS)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise


def _log_directory(directory: Path, log_uid: str) -> str:
    # Checks that it is the name of a directory, not a path out of it.
    return directory_of(str(directory), LogRef(log_uid, 0, 1).log_uid)


def remove_logs(directory: Path, log_uids: Iterable[str]) -> int:
    """Remove the logs of some jobs; returns how many had any.

    Raises:
        OSError: some cannot be removed.
    """
    removed = 0
    for log_uid in log_uids:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(_log_directory(directory, log_uid))
            removed += 1
    return removed


def measure_logs(directory: Path, log_uids: Iterable[str]) -> tuple[int, int]:
    """How many files the logs of some jobs are, and their bytes."""
    files = size = 0
    for log_uid in log_uids:
        for place, _, names in os.walk(_log_directory(directory, log_uid)):
            for name in names:
                with contextlib.suppress(OSError):
                    size += os.lstat(f"{place}/{name}").st_size
                    files += 1
    return files, size


#: Most characters that wait for a disk that hangs; further ones are counted and omitted.
MOST_WAITING = 64 * 1024**2
#: Free bytes below which a disk counts as full.
_MIN_FREE_BYTES = 256 * 1024


class LogStore:
    """The logs of all attempts.

    All methods but `check` and `begun` are called on the reactor's thread, do not block, and do not fail because of the
    disk.

    Args:
        directory: of all logs; made with mode 0750 if missing.
        worker: name of this daemon; None where no other daemon can use its database.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IReactorFromThreads,
        directory: Path,
        head_bytes: int = 1024**2,
        tail_bytes: int = 64 * 1024,
        now: Callable[[], float] = time.time,
        worker: str | None = None,
    ) -> None:
        self._reactor = reactor
        self._directory = directory
        self._now = now
        self._worker = worker
        place = str(directory)
        self._writer = LogWriter(place, log_name(worker), head_bytes, tail_bytes, self._report)
        # A search through the file of a large job does not delay readers that know the offset.
        self._reader, self._searcher = (
            LogReader(place, head_bytes, tail_bytes, partial(self._report, complaint=None)) for _ in range(2)
        )
        #: Operations for the writer, collected until the end of this reactor turn.
        self._operations: list[Operation] = []
        self._put = 0
        self._missing: dict[LogRef, int] = {}
        #: Called with the reason when logs cannot be written, from time to time.
        self.on_fault: Callable[[str], object] = lambda reason: self._log.error("{complaint}", complaint=reason)
        self._stopped = False

    @property
    def errors(self) -> int:
        """Number of failed writes since the start."""
        return self._writer.errors

    def check(self) -> None:
        """Check that files can be written; blocks.

        Raises:
            OSError: they cannot.
        """
        with tempfile.TemporaryFile(dir=self._directory) as file:
            file.write(bytes(_MIN_FREE_BYTES))
            file.flush()

    def start(self) -> None:
        """Start the threads.

        Raises:
            OSError: the directory cannot be made.
        """
        self._directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        for thread in (self._writer, self._reader, self._searcher):
            thread.start()

    async def stop(self) -> None:
        """Write all waiting lines, close every log, end the threads."""
        if self._stopped:
            return
        self._stopped = True
        if not self._writer.started:
            return
        # Reads that wait for the writer to locate a log are passed to a reader first.
        ended: Deferred[None] = Deferred()
        self._hand_over()
        self._writer.put([partial(self._writer.finish, self._now(), ended)])
        await ended
        self._writer.join()
        for reader in (self._reader, self._searcher):
            ended = Deferred()
            reader.finish(ended)
            await ended
            reader.join()

    def open(self, ref: LogRef, first_line: str) -> None:
        """Begin the log of an attempt."""
        self._put_text(partial(self._writer.begin, ref, first_line, self._now()), first_line)

    def write(self, ref: LogRef, text: str) -> None:
        """Add lines to an open log; control characters are escaped, secrets redacted."""
        if self._put - self._writer.taken > MOST_WAITING:
            self._missing[ref] = self._missing.get(ref, 0) + 1
            return
        self._put_text(partial(self._writer.add, ref, text, self._now()), text)

    def close(self, ref: LogRef, last_line: str) -> Deferred[ClosedLog]:
        """Add the last line and end the log.

        Returns:
            Fires when all is on disk, or when something could not be written (the daemon's log has the reason). Never
            fails, so that a full disk does not delay a verdict.
        """
        answer: Deferred[ClosedLog] = Deferred()
        self.end(ref, last_line, answer.callback)
        return answer

    def end(self, ref: LogRef, last_line: str, on_disk: Callable[[ClosedLog], object]) -> None:
        """Like `close`, with a callback: a Deferred would cost as much as the lines."""
        if self._stopped:
            on_disk(ClosedLog(False, None))
            return
        missing = self._missing.pop(ref, 0)
        self._add(partial(self._writer.end, ref, last_line, self._now(), missing, on_disk))

    def begun(self, refs: Collection[LogRef]) -> set[LogRef]:
        """Which of some attempts had begun to work, by this daemon's logs; callable from any thread.

        Blocks while it reads the files of their jobs. Returns all of them if it cannot read.
        """
        try:
            return begun_attempts(str(self._directory), log_name(self._worker), refs)
        except OSError as error:
            self._log.error("which attempts had begun is not known: {error}", error=str(error))
            return set(refs)

    def read(self, ref: LogRef, worker: str | None = None, span: LogSpan | None = None) -> Deferred[str]:
        """The text of a log that was written so far.

        Args:
            worker: name of the daemon that ran the attempt; None for this one.
            span: where the log is in the file, if known.

        Returns:
            Fires with the text, bounded like the log; fails with `LogMissingError` if it is not on disk.
        """
        name = self._name_of(worker)
        return self._have_read(ref, span, lambda reader, region: reader.read(ref, name, region))

    def read_piece(
        self, ref: LogRef, offset: int, most: int, worker: str | None = None, span: LogSpan | None = None
    ) -> Deferred[LogPiece]:
        """A piece of a log that may still grow, in the order of the file.

        Args:
            offset: where it begins: 0, or the end of an earlier piece.
            most: bytes.

        Returns:
            Fires with the piece; fails with `LogMissingError` if the file does not exist.
        """
        name = self._name_of(worker)
        return self._have_read(ref, span, lambda reader, region: reader.read_piece(ref, name, region, offset, most))

    def read_tail(
        self, ref: LogRef, most: int, worker: str | None = None, span: LogSpan | None = None
    ) -> Deferred[LogTail]:
        """The last lines of a log that may still grow, at most ``most`` bytes.

        Returns:
            Fires with the lines; fails with `LogMissingError` if the file does not exist.
        """
        name = self._name_of(worker)
        return self._have_read(ref, span, lambda reader, region: reader.read_tail(ref, name, region, most))

    def _name_of(self, worker: str | None) -> str:
        return log_name(self._worker if self._worker is None or worker is None else worker)

    def _have_read(
        self, ref: LogRef, span: LogSpan | None, read: Callable[[LogReader, Region | None], object]
    ) -> Deferred[Any]:
        answer: Deferred[Any] = Deferred()

        def pass_on(region: Region | None) -> None:
            reader = self._searcher if region is None else self._reader
            reader.put(answer, partial(read, reader, region))

        if self._stopped:
            answer.errback(LogMissingError("the log store has stopped"))
        elif span is not None:
            pass_on(Region(span.offset, span.offset + span.length))
        else:
            self._add(partial(self._writer.locate, ref, pass_on))
        return answer

    async def flush(self) -> None:
        """Wait until all lines so far are on disk."""
        if not self._stopped:
            answer: Deferred[None] = Deferred()
            self._add(partial(self._writer.flush, answer))
            await answer

    def _put_text(self, operation: Operation, text: str) -> None:
        if not self._stopped:
            self._put += len(text)
            self._add(operation)

    def _add(self, operation: Operation) -> None:
        """Queue an operation for the writer, with all others of this reactor turn: each transfer wakes the thread."""
        if not self._operations:
            self._reactor.callFromThread(self._hand_over)
        self._operations.append(operation)

    def _hand_over(self) -> None:
        if self._operations:
            operations, self._operations = self._operations, []
            self._writer.put(operations)

    def _report(self, answers: list[Answer], complaint: str | None) -> None:
        self._reactor.callFromThread(self._give, answers, complaint)

    def _give(self, answers: list[Answer], complaint: str | None) -> None:
        if complaint is not None:
            self.on_fault(complaint)
        for answer, value in answers:
            answer(value)

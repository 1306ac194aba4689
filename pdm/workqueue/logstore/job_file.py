"""The append-only log file of one job, with lines of the attempts at all its elements.

The file is opened for each write: no descriptor is kept for a job, and a file that an operator removed, renamed or
truncated is noticed, because its size differs from the end of the last write.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pdm.workqueue.domain.jobs import LogSpan
from pdm.workqueue.logstore.attempt_log import AttemptLog, directory_of

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

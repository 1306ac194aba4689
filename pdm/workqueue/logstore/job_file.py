"""The log file of one job: only ever appended to, by the attempts of all its elements.

The file is opened for each write: no descriptor is kept for a job, and a file that an operator removed, renamed or
truncated is noticed, because it does not end where the last write ended.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pdm.workqueue.domain.jobs import LogSpan
from pdm.workqueue.logstore.attempt_log import AttemptLog, directory_of

# Readable, too: whether it ends with a whole line must be looked at.
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_MODE, _DIRECTORY_MODE = 0o640, 0o750


class OpenLog:
    """The log of an attempt that runs, and where it is in the file of its job.

    Attributes:
        span: what is in the file; None if nothing is.
    """

    def __init__(self, file: JobFile, log: AttemptLog) -> None:
        self.file = file
        self.log = log
        self.span: LogSpan | None = None
        #: Lines of a private key that were left out, if one has begun.
        self.hidden_lines = 0
        self._replaced = file.replaced

    def place(self, begin: int, end: int) -> None:
        """Lines of it are in the file now, from ``begin`` to ``end``."""
        if self.span is None or self._replaced != self.file.replaced:
            # What came before is in a file that is gone.
            self.span = LogSpan(begin, end - begin)
            self._replaced = self.file.replaced
        else:
            self.span = LogSpan(self.span.offset, end - self.span.offset)


class JobFile:
    """A file that is being written. Used by one thread only.

    Attributes:
        open_logs: how many attempts write into it.
        replaced: how often another file, or a shorter one, was found in its place.
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
        """Put what is due of some logs at the end of the file, in one write; directories are made as needed.

        Returns:
            None, or for how many logs lines could not be written, and why. Those lines are lost; the next ones of the
            same log say so.
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
                    # What was cut off stays a line of its own.
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
        """Look at the end of a file that this has not written: a daemon that was killed may have left half a line."""
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
            # The directory of a new job is never there yet: making it first saves an open that fails.
            _make_directories(self._directory)
        try:
            return os.open(self.path, _FLAGS, _MODE)
        except FileNotFoundError:
            _make_directories(self._directory)
            return os.open(self.path, _FLAGS, _MODE)


def _make_directories(directory: str) -> None:
    """Make a directory and those above it, 0750 each: ``os.makedirs`` would give its mode to the last one only."""
    try:
        os.mkdir(directory, _DIRECTORY_MODE)  # noqa: PTH102 - called for each job; a Path costs more than the mkdir
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_directories(os.path.dirname(directory))  # noqa: PTH120 - as above
        os.mkdir(directory, _DIRECTORY_MODE)  # noqa: PTH102 - as above

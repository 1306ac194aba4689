"""One attempt's log on disk: bounded, a valid text file at any time, with proof of life while it is long.

Scheme. Lines go to the end of the file until ``head_bytes`` are written. From then on the newest lines wait in
memory, as many as fit ``tail_bytes``, and the file gets a line of life now and then (after 5 s, then in pauses that
double up to 5 minutes): how much is left out so far, and the newest line. When the attempt ends, a line says how many
lines and bytes were left out, and the tail follows. The file is only ever appended to, so ``tail -F`` shows all of it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path

from attrs import field, frozen
from attrs import validators as check

_FIRST_LIFE_S = 5.0
_LONGEST_LIFE_S = 300.0
_SHOWN_IN_LIFE = 300
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


@frozen
class LogRef:
    """Which log: the job's ``log_uid``, the element, the attempt (from 1)."""

    # It becomes a directory: what a forged record might say must not lead elsewhere.
    log_uid: str = field(validator=check.matches_re(r"[A-Za-z0-9_-]{4,64}"))
    element_id: int = field(validator=check.ge(0))
    attempt: int = field(validator=check.ge(1))

    def path(self, directory: Path) -> Path:
        """The file below the directory of all logs."""
        return Path(self.path_text(str(directory)))

    def path_text(self, directory: str) -> str:
        """The same as text; used for each attempt, where joining Paths would cost as much as the file itself."""
        return f"{directory}/{self.log_uid[:2]}/{self.log_uid}/{self.element_id}/attempt{self.attempt}.log"


class AttemptLog:
    """A log that is being written. Used by one thread only."""

    def __init__(self, path: str, head_bytes: int, tail_bytes: int) -> None:
        self._path = path
        self._room = head_bytes
        self._tail_bytes = tail_bytes
        #: What the next write puts at the end of the file.
        self._buffer: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._in_tail = 0
        self._left_out_lines = 0
        self._left_out_bytes = 0
        self._life_pause_s = _FIRST_LIFE_S
        self._next_life_at: float | None = None
        self._lost_lines = 0
        self._lost_because = ""
        self._torn = False
        self._begun = False
        #: Whether every line so far that was not left out by the bounds has been written.
        self.complete = True

    @property
    def dirty(self) -> bool:
        """Whether a write is due."""
        return bool(self._buffer)

    def add(self, line: bytes, stamp: bytes, now: float) -> None:
        """Take a line.

        Args:
            stamp: the time and a blank, for the lines of our own.
            now: when that was, in seconds.
        """
        if self._next_life_at is None:
            if len(line) <= self._room:
                self._room -= len(line)
                self._buffer.append(line)
                return
            self._next_life_at = now + self._life_pause_s
        self._tail.append(line)
        self._in_tail += len(line)
        while self._in_tail > self._tail_bytes and len(self._tail) > 1:
            gone = len(self._tail.popleft())
            self._in_tail -= gone
            self._left_out_lines += 1
            self._left_out_bytes += gone
        # A clock that was set back must not silence it.
        self._next_life_at = min(self._next_life_at, now + self._life_pause_s)
        if now >= self._next_life_at:
            self._life_pause_s = min(self._life_pause_s * 2, _LONGEST_LIFE_S)
            self._next_life_at = now + self._life_pause_s
            newest = line.rstrip(b"\n")[:_SHOWN_IN_LIFE].decode("utf-8", "ignore").encode()
            self._buffer.append(
                stamp
                + b"[log] the log is long: %d lines (%d bytes) wait or are left out; the newest: %b\n"
                % (self._left_out_lines + len(self._tail), self._left_out_bytes + self._in_tail, newest)
            )

    def add_last(self, line: bytes) -> None:
        """Take the last line: it is kept whatever the bounds say."""
        self._next_life_at = None
        if self._tail:
            self._buffer += self._shown_tail()
            self._tail.clear()
        self._buffer.append(line)

    def _shown_tail(self) -> list[bytes]:
        if not self._left_out_lines:
            return list(self._tail)
        note = b"[log] left out %d lines (%d bytes)\n" % (self._left_out_lines, self._left_out_bytes)
        return [note, *self._tail]

    def waiting_tail(self) -> bytes:
        """What the file does not contain yet."""
        return b"".join(self._shown_tail())

    def write(self) -> OSError | None:
        """Put what is due at the end of the file; directories are made as needed.

        Returns:
            None, or why it could not be written. What was due is lost then; the next write says so.
        """
        data = b"".join(self._buffer)
        self._buffer = []
        if self._lost_lines:
            note = b"[log] %d lines could not be written: %b\n" % (self._lost_lines, self._lost_because.encode())
            data = note + data
        if self._torn:
            data = b"\n" + data
        rest = memoryview(data)
        try:
            fd = self._opened()
            try:
                while rest:
                    rest = rest[os.write(fd, rest) :]
            finally:
                os.close(fd)
        except OSError as error:
            self.complete = False
            self._torn = self._torn or len(rest) < len(data)
            # A note of ours that was not written either is one line too many: a count is no less true for that.
            self._lost_lines += bytes(rest).count(b"\n")
            self._lost_because = error.strerror or type(error).__name__
            return error
        self._lost_lines = 0
        self._torn = False
        return None

    def _opened(self) -> int:
        if not self._begun:
            # The directory of a first attempt is never there yet: making it first saves an open that fails.
            _make_directories(self._path)
            self._begun = True
        try:
            return os.open(self._path, _FLAGS, 0o640)
        except FileNotFoundError:
            _make_directories(self._path)
            return os.open(self._path, _FLAGS, 0o640)


def _make_directories(path: str) -> None:
    """Make the directories above a log, 0750 each: ``os.makedirs`` would give its mode to the last one only."""
    directory = os.path.dirname(path)  # noqa: PTH120 - called for each attempt; a Path costs more than the mkdir
    try:
        os.mkdir(directory, 0o750)  # noqa: PTH102 - as above
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_directories(directory)
        os.mkdir(directory, 0o750)  # noqa: PTH102 - as above


class TimestampFormatter:
    """Formats times of lines; caches the text of the last second."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def stamp(self, at: float) -> bytes:
        """The time in UTC, ISO 8601 with milliseconds, and a blank."""
        second = int(at)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return b"%b.%03dZ " % (self._text.encode(), int((at - second) * 1000))

"""The bounded log of one attempt: its first lines, its last ones, and notes about the omitted lines between.

Lines are written at once up to ``head_bytes``. Later lines wait in memory, the newest ``tail_bytes`` of them; after 5
s, then at intervals that double up to 5 minutes, a note with the number of waiting and omitted lines and the newest
line is written. When the attempt ends, a note with the number of omitted lines and bytes is written, then the tail. The
log is append-only, so ``tail -F`` shows all of it.
"""

from __future__ import annotations

import re
import time
from collections import deque
from typing import NamedTuple, Self

_FIRST_LIFE_S = 5.0
_LONGEST_LIFE_S = 300.0
_SHOWN_IN_LIFE = 300
_UID = re.compile(r"[A-Za-z0-9_-]{4,64}", re.ASCII)
_NOT_IN_FILE_NAMES = re.compile(r"[^A-Za-z0-9._-]")


class _AttemptNumber(NamedTuple):
    log_uid: str
    element_id: int
    attempt: int


class LogRef(_AttemptNumber):
    """Identifies the log of one attempt: the job's ``log_uid``, the element, the attempt (from 1)."""

    __slots__ = ()

    def __new__(cls, log_uid: str, element_id: int, attempt: int) -> Self:
        # It becomes part of a path: reject what a forged record could use to leave the directory.
        if not _UID.fullmatch(log_uid) or element_id < 0 or attempt < 1:
            raise ValueError(f"no log_uid, element_id and attempt: {log_uid!r}, {element_id}, {attempt}")
        return tuple.__new__(cls, (log_uid, element_id, attempt))

    @property
    def key(self) -> str:
        """The second word of each of its lines in the job's file."""
        return f"{self.element_id}.{self.attempt}"

    def old_path(self, directory: str) -> str:
        """The file of this attempt alone, as earlier versions wrote it, below the directory of all logs."""
        return f"{directory_of(directory, self.log_uid)}/{self.element_id}/attempt{self.attempt}.log"


def directory_of(directory: str, log_uid: str) -> str:
    """The directory of a job's logs, as str: a Path for each job would cost as much as the file."""
    return f"{directory}/{log_uid[:2]}/{log_uid}"


def log_name(worker: str | None) -> str:
    """Name of the file that one daemon writes in the directory of a job.

    Args:
        worker: name of the daemon; None where only one daemon can use the database.
    """
    return "log" if worker is None else f"log-{_NOT_IN_FILE_NAMES.sub('-', worker)}"


class AttemptLog:
    """The log of a running attempt. Used by one thread only.

    Args:
        key: word that follows the time in each line, with a blank.
    """

    def __init__(self, key: bytes, head_bytes: int, tail_bytes: int) -> None:
        self._key = key
        self._room = head_bytes
        self._tail_bytes = tail_bytes
        #: Lines to be written next.
        self._due: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._in_tail = 0
        self._left_out_lines = 0
        self._left_out_bytes = 0
        self._life_pause_s = _FIRST_LIFE_S
        self._next_life_at: float | None = None
        self._stamp = b""
        self._lost_lines = 0
        self._lost_because = ""
        #: Whether every line that the bounds did not omit has been written.
        self.complete = True

    @property
    def is_due(self) -> bool:
        return bool(self._due)

    def add(self, text: bytes, stamp: bytes, now: float) -> None:
        """Add a line.

        Args:
            text: without the time, with the line end.
            stamp: the time and a blank.
            now: the time, in seconds.
        """
        line = stamp + self._key + text
        self._stamp = stamp
        if self._next_life_at is None:
            if len(line) <= self._room:
                self._room -= len(line)
                self._due.append(line)
                return
            self._next_life_at = now + self._life_pause_s
        self._tail.append(line)
        self._in_tail += len(line)
        while self._in_tail > self._tail_bytes and len(self._tail) > 1:
            gone = len(self._tail.popleft())
            self._in_tail -= gone
            self._left_out_lines += 1
            self._left_out_bytes += gone
        # The clock may have been set back.
        self._next_life_at = min(self._next_life_at, now + self._life_pause_s)
        if now >= self._next_life_at:
            self._life_pause_s = min(self._life_pause_s * 2, _LONGEST_LIFE_S)
            self._next_life_at = now + self._life_pause_s
            newest = (stamp + text).rstrip(b"\n")[:_SHOWN_IN_LIFE].decode("utf-8", "ignore").encode()
            self._due.append(
                self._note(
                    b"the log is long: %d lines (%d bytes) wait or are left out; the newest: %b"
                    % (self._left_out_lines + len(self._tail), self._left_out_bytes + self._in_tail, newest)
                )
            )

    def add_last(self, text: bytes, stamp: bytes) -> None:
        """Add a last line, regardless of the bounds."""
        self._next_life_at = None
        if self._tail:
            self._due += self._shown_tail()
            self._tail.clear()
        self._stamp = stamp
        self._due.append(stamp + self._key + text)

    def _note(self, text: bytes) -> bytes:
        return b"%b%b[log] %b\n" % (self._stamp, self._key, text)

    def _shown_tail(self) -> list[bytes]:
        if not self._left_out_lines:
            return list(self._tail)
        note = self._note(b"left out %d lines (%d bytes)" % (self._left_out_lines, self._left_out_bytes))
        return [note, *self._tail]

    def waiting_tail(self) -> bytes:
        """What the file will get when the attempt ends, apart from lines that are due."""
        return b"".join(self._shown_tail())

    def take(self) -> bytes:
        """Remove and return the due lines. If they cannot be written, call `lose`."""
        data = b"".join(self._due)
        self._due = []
        if self._lost_lines:
            note = b"%d lines could not be written: %b" % (self._lost_lines, self._lost_because.encode())
            data = self._note(note) + data
            self._lost_lines = 0
        return data

    def lose(self, rest: bytes, why: str) -> None:
        """Record that lines could not be written; the next write says so in a note."""
        self.complete = False
        # An unwritten note of ours is counted, too: the count may be one too high.
        self._lost_lines += rest.count(b"\n")
        self._lost_because = why


class TimestampFormatter:
    """Formats times of lines; caches the text of the last second."""

    def __init__(self) -> None:
        self._second = -1
        self._text = b""

    def stamp(self, at: float) -> bytes:
        """The time in UTC, ISO 8601 with milliseconds, and a blank: `STAMP_BYTES`."""
        second = int(at)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()
        return b"%b.%03dZ " % (self._text, int((at - second) * 1000))


STAMP_BYTES = len("2027-01-15T08:00:00.250Z ")

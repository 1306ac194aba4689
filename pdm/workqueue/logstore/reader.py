"""Read logs on threads of their own: only the requested part of a file is in memory.

The second word of each line identifies its attempt. The position is known for attempts that run here or have ended.
Logs of attempts that were lost with their daemon, or run in another one, are searched for in the whole file. Earlier
versions wrote a file for each attempt.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from pdm.workqueue.logstore.attempt_log import STAMP_BYTES, LogRef, directory_of

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_CHUNK_BYTES = 256 * 1024
#: No line of the log store is longer.
_LONGEST_LINE_BYTES = 512 * 1024
#: Notes and last lines come on top of head and tail.
_READ_MARGIN_BYTES = 512 * 1024
_KEY_OF_LINE = re.compile(rb"^[^\n]{%d} (\d+\.\d+) [^\n]*" % (STAMP_BYTES - 1), re.MULTILINE)
#: Bytes of a file in which the last lines of an attempt are looked for.
_LONGEST_WINDOW_BYTES = 32 * 1024**2
_NEWLINE = ord("\n")

#: The callback of a Deferred and its result (a `Failure` fails it).
Answer = tuple[Callable[[Any], object], object]


class LogMissingError(Exception):
    """The log of an attempt is not on disk."""


@frozen
class LogPiece:
    """A piece of a log.

    Attributes:
        text: whole lines; None if the piece has no line of the attempt.
        end: position in the file where it ends, and where the next one begins.
        is_last: whether the file has no more yet.
    """

    text: str | None
    end: int
    is_last: bool


@frozen
class LogTail:
    """The end of a log.

    Attributes:
        text: whole lines.
        end: position in the file where it ends, for a `LogPiece` after it.
        is_cut: whether earlier lines are left out.
    """

    text: str
    end: int
    is_cut: bool


@frozen
class Region:
    """The part of a job's file that has the lines of an attempt.

    Attributes:
        tail: newest lines of a running attempt that are not in the file yet, as they would be written.
    """

    begin: int
    end: int
    tail: bytes = b""


class LogReader:
    """Reads logs one after the other on its own thread.

    Args:
        report: called on the thread with answers.
    """

    def __init__(
        self, directory: str, head_bytes: int, tail_bytes: int, report: Callable[[list[Answer]], None]
    ) -> None:
        self._directory = directory
        self._most_bytes = head_bytes + _READ_MARGIN_BYTES
        self._tail_bytes = tail_bytes
        self._report = report
        self._queue: queue.SimpleQueue[tuple[Deferred[Any], Callable[[], object]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="logreader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, answer: Deferred[Any], read: Callable[[], object]) -> None:
        """Queue a read; thread-safe."""
        self._queue.put((answer, read))

    def finish(self, answer: Deferred[None]) -> None:
        """End the thread after all queued reads; thread-safe."""
        self.put(answer, lambda: None)
        self._queue.put(None)

    def join(self) -> None:
        """Wait for the thread to end, after `finish`."""
        self._thread.join()

    def _run(self) -> None:
        while (wanted := self._queue.get()) is not None:
            answer, read = wanted
            try:
                result = read()
            except Exception:  # passed to the caller's Deferred; the thread keeps running
                result = Failure()
            self._report([(answer.callback, result)])

    # The methods below run on the thread.

    def read(self, ref: LogRef, name: str, region: Region | None) -> str:
        """The text of a log, bounded.

        Args:
            name: name of the file in the job's directory.
            region: the part of that file; None if unknown.

        Raises:
            LogMissingError: no line of it is on disk.
        """
        with _opened(self._directory, ref, name, region, 0, half_line=True) as lines:
            text = self._bounded(lines)
        if region is not None and region.tail:
            text += b"".join(line for line, _ in own_lines(region.tail, _key_of(ref)))
        if not text:
            raise LogMissingError(_missing(ref))
        return text.decode("utf-8", "replace")

    def _bounded(self, lines: Iterable[bytes]) -> bytes:
        room, in_tail, left_out = self._most_bytes, 0, 0
        head: list[bytes] = []
        tail: deque[bytes] = deque()
        for line in lines:
            if not tail and len(line) <= room:
                room -= len(line)
                head.append(line)
                continue
            tail.append(line)
            in_tail += len(line)
            while in_tail > self._tail_bytes and len(tail) > 1:
                gone = len(tail.popleft())
                in_tail -= gone
                left_out += gone
        if left_out:
            head.append(b"[log] %d bytes in the middle are not shown\n" % left_out)
        return b"".join(head) + b"".join(tail)

    def read_piece(self, ref: LogRef, name: str, region: Region | None, offset: int, most: int) -> LogPiece:
        """A piece of a log: lines of at most ``most`` bytes in total, but at least one line if there is one.

        Raises:
            LogMissingError: the file is not on disk.
        """
        taken: list[bytes] = []
        size = 0
        with _opened(self._directory, ref, name, region, offset, half_line=False) as lines:
            end = lines.passed
            is_last = True
            for line in lines:
                size += len(line)
                if taken and size > most:
                    is_last = False
                    break
                taken.append(line)
                end = lines.passed
        if is_last:
            end = lines.passed
        from_the_first = offset <= (0 if region is None else region.begin)
        text = None if from_the_first and not taken else b"".join(taken).decode("utf-8", "replace")
        return LogPiece(text, end, is_last)

    def read_tail(self, ref: LogRef, name: str, region: Region | None, most: int) -> LogTail:
        """The last lines of a log, of at most ``most`` bytes in total, but at least one line if there is one.

        Raises:
            LogMissingError: the file is not on disk.
        """
        # Other attempts write into the same file: where few of the last lines are of this one, more are read.
        window = most
        while True:
            with _opened(self._directory, ref, name, region, 0, half_line=False) as lines:
                begin, end = lines.passed, lines.size
                lines.passed = max(begin, end - window)
                is_cut = lines.passed > begin
                taken: deque[bytes] = deque()
                size = 0
                for line in lines:
                    taken.append(line)
                    size += len(line)
                    while size > most and len(taken) > 1:
                        size -= len(taken.popleft())
                        is_cut = True
                end = lines.passed
            if size >= most // 2 or not is_cut or window >= _LONGEST_WINDOW_BYTES:
                return LogTail(b"".join(taken).decode("utf-8", "replace"), end, is_cut)
            window *= 8


def begun_attempts(directory: str, name: str, refs: Collection[LogRef]) -> set[LogRef]:
    """Which of some attempts at a job have a line on disk; blocks while it reads the whole file.

    Args:
        name: name of the file in the job's directory.

    Raises:
        OSError: it cannot be read.
    """
    found = {ref for ref in refs if os.path.lexists(ref.old_path(directory))}
    wanted = {_key_of(ref).strip(): ref for ref in refs if ref not in found}
    for log_uid in {ref.log_uid for ref in wanted.values()}:
        try:
            fd = os.open(f"{directory_of(directory, log_uid)}/{name}", _FLAGS)
        except FileNotFoundError:
            continue
        try:
            for data, _ in whole_lines(fd, 0, os.fstat(fd).st_size):
                found.update(wanted.pop(key) for key in wanted.keys() & set(_KEY_OF_LINE.findall(data)))
                if not wanted:
                    break
        finally:
            os.close(fd)
    return found


class _Lines:
    """The lines of one attempt in a part of a file, without the word that identifies the attempt.

    Args:
        key: that word between blanks; None if all lines are of the attempt.
        begin: where the part begins; the rest of a line that began before is skipped.
        end: where it ends; None for the end of the file.

    Attributes:
        passed: position up to which all lines were returned.
    """

    def __init__(self, fd: int, key: bytes | None, begin: int, end: int | None) -> None:
        self._fd = fd
        self._key = key
        self._end = end
        self.passed = begin

    @property
    def size(self) -> int:
        """Position of the end."""
        return os.fstat(self._fd).st_size if self._end is None else self._end

    def __iter__(self) -> Iterator[bytes]:
        for data, position in whole_lines(self._fd, self.passed, self._end):
            for line, end in own_lines(data, self._key):
                self.passed = position + end
                yield line
            self.passed = position + len(data)


def own_lines(data: bytes, key: bytes | None) -> Iterator[tuple[bytes, int]]:
    """The lines of one attempt among some lines, and where each ends; see `_Lines`."""
    if key is None:
        end = 0
        for line in data.splitlines(keepends=True):
            end += len(line)
            yield line, end
        return
    found = data.find(key)
    while found >= 0:
        begin, text = found - STAMP_BYTES + 1, found + len(key)
        end = found + 1
        if begin == 0 or (begin > 0 and data[begin - 1] == _NEWLINE):
            end = data.find(b"\n", text) + 1 or len(data)
            yield data[begin : begin + STAMP_BYTES] + data[text:end], end
        found = data.find(key, end)


def whole_lines(fd: int, begin: int, end: int | None) -> Iterator[tuple[bytes, int]]:
    """The whole lines of a part of a file, in chunks of many lines with their position.

    Half a line at the end is included if ``end`` is given. Lines that are too long are omitted.
    """
    position = begin
    data = b""
    # Skip the rest of a line.
    in_line = begin > 0 and os.pread(fd, 1, begin - 1) != b"\n"
    while end is None or position < end:
        chunk = os.pread(fd, _CHUNK_BYTES if end is None else min(_CHUNK_BYTES, end - position), position)
        if not chunk:
            break
        position += len(chunk)
        data += chunk
        if in_line:
            _, newline, data = data.partition(b"\n")
            in_line = not newline
        cut = data.rfind(b"\n") + 1
        if cut:
            yield data[:cut], position - len(data)
            data = data[cut:]
        elif len(data) > _LONGEST_LINE_BYTES:
            data, in_line = b"", True
    if data and end is not None:
        yield data, position - len(data)


@contextmanager
def _opened(
    directory: str, ref: LogRef, name: str, region: Region | None, offset: int, *, half_line: bool
) -> Iterator[_Lines]:
    """The lines of an attempt in its file, from a position on; see `LogReader.read`.

    ``half_line``: whether the file may end with half a line, as a killed daemon leaves it.
    """
    fd = -1
    key: bytes | None = _key_of(ref)
    try:
        if region is None:
            try:
                fd = os.open(ref.old_path(directory), _FLAGS)
                key = None
            except FileNotFoundError:
                pass
        if fd < 0:
            fd = os.open(f"{directory_of(directory, ref.log_uid)}/{name}", _FLAGS)
        if region is None:
            size = os.fstat(fd).st_size
            yield _Lines(fd, key, min(offset, size), size if half_line else None)
        else:
            yield _Lines(fd, key, min(max(offset, region.begin), region.end), region.end)
    except OSError as error:
        raise LogMissingError(_missing(ref, error)) from error
    finally:
        if fd >= 0:
            os.close(fd)


def _key_of(ref: LogRef) -> bytes:
    return f" {ref.key} ".encode()


def _missing(ref: LogRef, error: OSError | None = None) -> str:
    what = "is not on disk"
    if error is not None and not isinstance(error, FileNotFoundError):
        what = f"cannot be read: {error.strerror}"
    return f"the log of element {ref.element_id}, attempt {ref.attempt} {what}"

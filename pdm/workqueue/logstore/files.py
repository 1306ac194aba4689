"""Keeps the logs of attempts: told by the reactor without waiting, written by one thread.

One file an attempt, ``<logs>/<log_uid[:2]>/<log_uid>/<element>/attempt<K>.log``, with the UTC time on each line. The
thread takes all that has come since it last looked. A log that is closed is written out at once, others within 50 ms:
a short attempt costs one open, one write and one close, and a long one shows while it runs. "On disk" means handed
to the operating system: it outlives the death of the daemon, not the loss of power.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger

from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.writer import Answer, LogMissingError, LogPiece, LogWriter

__all__ = ["LogMissingError", "LogPiece", "LogRef", "LogStore"]

#: Most characters that wait for a disk that hangs; what comes beyond is counted and left out.
MOST_WAITING = 64 * 1024**2
#: A disk with less room than this is full.
_LEAST_ROOM = 256 * 1024


class LogStore:
    """The logs of all attempts.

    All methods are called on the reactor's thread; none of them waits, none fails because of the disk.

    Args:
        reactor: where answers are given.
        folder: of all logs; made, mode 0750, if it is missing.
        head_bytes: how much of the beginning of a log is kept.
        tail_bytes: how much of its end.
        now: the time in seconds since 1970.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IReactorFromThreads,
        folder: Path,
        head_bytes: int = 1024**2,
        tail_bytes: int = 64 * 1024,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._reactor = reactor
        self._folder = folder
        self._now = now
        self._writer = LogWriter(folder, head_bytes, tail_bytes, self._report)
        self._put = 0
        self._missing: dict[LogRef, int] = {}
        self._stopped = False

    @property
    def errors(self) -> int:
        """How many writes have failed since the start."""
        return self._writer.errors

    def check(self) -> None:
        """See that the folder takes files; blocks.

        Raises:
            OSError: it does not.
        """
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(bytes(_LEAST_ROOM))
            file.flush()

    def start(self) -> None:
        """Begin to write.

        Raises:
            OSError: the folder cannot be made.
        """
        self._folder.mkdir(mode=0o750, parents=True, exist_ok=True)
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
        return Path(ref.place(str(self._folder))).exists()

    def read(self, ref: LogRef) -> Deferred[str]:
        """The text of a log, as far as it is.

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
        """A piece of a log that may still be written, as it stands in its file: what came later is never before it.

        Args:
            ref: which log.
            offset: where the piece begins, in bytes.
            most: bytes, at most.

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
        """Wait until everything told so far is on disk."""
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

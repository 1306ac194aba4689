"""A log file that may be rotated away under its writer."""

from __future__ import annotations

import os
import threading
from pathlib import Path


class LogFile:
    """Appends to a file; opens a new one when the old was renamed or removed (logrotate without ``copytruncate``).

    Args:
        path: of the file; its folder must be there.

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

        Never raises for a full disk or a lost folder: a log that cannot be written must not stop what it tells of.
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

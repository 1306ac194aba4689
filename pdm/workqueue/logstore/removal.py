"""Removal of the logs of whole jobs, in the present layout and in that of earlier versions; blocks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from attrs import frozen

from pdm.workqueue.logstore.attempt_log import LogRef, directory_of

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

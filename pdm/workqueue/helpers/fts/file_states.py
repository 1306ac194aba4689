"""What an FTS3 says of the files of a copy: their states, and why it has not transferred one."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.copying import ProgressReporter
from pdm.workqueue.helpers.fts.rest import CANCELED, HandedFile, HandedJob
from pdm.workqueue.helpers.storage import StorageError

_LONGEST_NUMBER = 5
#: ``TRANSFER [110] ...``; this service's own API of FTS3 has a `FailureCode` in the brackets.
_REASON = re.compile(r"\s*(?:[A-Z]+\s+)?([A-Z]+)\s*\[\s*(\w{1,40})\s*\]:?\s*(.*)", re.DOTALL)
#: An error of the FTS3's own process (AGENT) says nothing of either end.
_SCOPES = {"SOURCE": FailureScope.SOURCE, "DESTINATION": FailureScope.DESTINATION}
_CHECKSUM = re.compile(r"checksum\w*\s[\w\s]{0,80}?\b(?:mismatch|differ|do(?:es)? not match)", re.IGNORECASE)

#: The state of files that were submitted.
_SUBMITTED = "SUBMITTED"
#: A file must be missing in so many answers in a row.
_MOST_MISSING = 3
#: Changes of a file's state that count as progress: an FTS3 tries a file again a few times by itself.
_MOST_CHANGES = 50


class FileStates:
    """The last state of each file of a batch; other states are written to its log.

    Args:
        batch: of the files.
        url: of the FTS3.
        summary_s: seconds between two summaries.
    """

    def __init__(self, batch: ActiveBatch, url: str, summary_s: float) -> None:
        self._batch = batch
        self._url = url
        self._summary_s = summary_s
        self._files: dict[int, HandedFile] = {}
        self._missing: Counter[int] = Counter()
        self._changes: Counter[int] = Counter()
        self._summed_at = time.monotonic()

    def of(self, key: int) -> HandedFile:
        """The last state of a file."""
        return self._files[key]

    def begin(self, key: int, file: HandedFile) -> None:
        """Store the state of a file of an earlier attempt."""
        self._files[key] = file

    def note(self, job: HandedJob, key: int, file: HandedFile, reporter: ProgressReporter) -> bool:
        """Store the state of a file, and log it if it is another one; returns whether that is progress."""
        self._missing.pop(key, None)
        before = self._files.get(key)
        self._files[key] = file
        if before is not None and before.file_state == file.file_state:
            return False
        if before is None and file.file_state == _SUBMITTED:
            # The log says so already.
            return True
        self._changes[key] += 1
        if self._changes[key] > _MOST_CHANGES and not file.is_final:
            # It goes round in circles, which is no progress.
            return False
        reason = f": {' '.join(file.reason.split())[:1000]}" if file.reason else ""
        self._batch.log(key, f"FTS3 job {job.id} file {file.file_id}: {file.file_state}{reason}")
        if file.file_state == "ACTIVE":
            reporter.restart()
        elif file.is_final:
            reporter.end()
        return True

    def is_missing(self, key: int) -> bool:
        """An answer does not have the file: whether that has been so for too long."""
        self._missing[key] += 1
        return self._missing[key] >= _MOST_MISSING

    def summarize(self, pending: Sequence[int]) -> None:
        """Write how many of some files are in each state, now and then."""
        now = time.monotonic()
        if pending and now - self._summed_at > self._summary_s:
            self._summed_at = now
            states = Counter(self._files[key].file_state for key in pending if key in self._files)
            counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
            self._batch.log(pending[0], f"waiting for the FTS3 at {self._url}: {counts or 'no answer'}")


def error_of(file: HandedFile) -> StorageError:
    """The error of a file in the state FAILED or CANCELED."""
    reason = (file.reason or "").strip()
    if file.file_state == CANCELED:
        return StorageError(
            f"the transfer was cancelled at the FTS3{': ' if reason else ''}{reason}",
            code=FailureCode.SERVER_ERROR,
            scope=FailureScope.TRANSFER,
        )
    found = _REASON.match(reason)
    category, word, text = ("TRANSFER", "0", reason) if found is None else found.groups()
    scope = _SCOPES.get(category, FailureScope.TRANSFER)
    code = FailureCode.__members__.get(word)
    if _CHECKSUM.search(text):
        code = FailureCode.CHECKSUM_MISMATCH
    number = int(word) if word.isascii() and word.isdigit() and len(word) <= _LONGEST_NUMBER else 0
    return StorageError(text or "the FTS3 gives no reason", errno=number or None, code=code, scope=scope)

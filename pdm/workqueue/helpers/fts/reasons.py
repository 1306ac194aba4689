"""What an FTS3 says of a file that it has not transferred, as an error with our codes and scopes."""

from __future__ import annotations

import re

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.fts.rest import CANCELED, FtsFile
from pdm.workqueue.helpers.storage import StorageError

#: ``TRANSFER [110] ...``; some versions name the phase first.
_REASON = re.compile(r"\s*(?:\w+\s+)?(SOURCE|DESTINATION|TRANSFER|AGENT)\s*\[\s*(\d{1,5})\s*\]:?\s*(.*)", re.DOTALL)
#: An error of the FTS3's own process (AGENT) says nothing of either end.
_SCOPES = {"SOURCE": FailureScope.SOURCE, "DESTINATION": FailureScope.DESTINATION}
_CHECKSUM = re.compile(r"checksum\w*\s+(?:\w+\s+)*(?:mismatch|differ|do(?:es)? not match)", re.IGNORECASE)


def error_of(file: FtsFile) -> StorageError:
    """The error of a file in the state FAILED or CANCELED."""
    reason = (file.reason or "").strip()
    if file.file_state == CANCELED:
        return StorageError(
            f"the transfer was cancelled at the FTS3{': ' if reason else ''}{reason}",
            code=FailureCode.SERVER_ERROR,
            scope=FailureScope.TRANSFER,
        )
    found = _REASON.match(reason)
    category, number, text = ("TRANSFER", "0", reason) if found is None else found.groups()
    scope = _SCOPES.get(category, FailureScope.TRANSFER)
    code = FailureCode.CHECKSUM_MISMATCH if _CHECKSUM.search(text) else None
    return StorageError(text or "the FTS3 gives no reason", errno=int(number) or None, code=code, scope=scope)

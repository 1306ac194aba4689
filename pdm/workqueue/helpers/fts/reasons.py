"""What an FTS3 says of a file that it has not transferred, as an error with our codes and scopes."""

from __future__ import annotations

import re

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.fts.rest import CANCELED, HandedFile
from pdm.workqueue.helpers.storage import StorageError

_LONGEST_NUMBER = 5
#: ``TRANSFER [110] ...``; this service's own API of FTS3 has a `FailureCode` in the brackets.
_REASON = re.compile(r"\s*(?:[A-Z]+\s+)?([A-Z]+)\s*\[\s*(\w{1,40})\s*\]:?\s*(.*)", re.DOTALL)
#: An error of the FTS3's own process (AGENT) says nothing of either end.
_SCOPES = {"SOURCE": FailureScope.SOURCE, "DESTINATION": FailureScope.DESTINATION}
_CHECKSUM = re.compile(r"checksum\w*\s[\w\s]{0,80}?\b(?:mismatch|differ|do(?:es)? not match)", re.IGNORECASE)


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

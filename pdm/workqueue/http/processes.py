"""The process of an attempt: as the first line of its log names it, and as the failure says how it ended."""

from __future__ import annotations

import re

from msgspec import UNSET, UnsetType

from pdm.workqueue.domain.failures import AttemptFailure, FailureCode
from pdm.workqueue.wire.responses import ProcessView

#: The daemon writes the first line before anything that comes from elsewhere.
_FIRST_LINE = re.compile(r"(?:\S+ ){0,2}host=(\S+) pid=([0-9]{1,10}) ")
_ENDED = re.compile(r"the helper process ([0-9]+) ended \((signal [0-9]+|exit status [0-9]+)")


def process_view(log: str | None, failure: AttemptFailure | None) -> ProcessView | UnsetType:
    """The process of an attempt; ``log`` begins with its first line."""
    found = None if log is None else _FIRST_LINE.match(log)
    if found is None:
        return UNSET
    ended = None
    if failure is not None and failure.code is FailureCode.CRASHED:
        how = _ENDED.search(failure.message)
        ended = None if how is None or how[1] != found[2] else how[2]
    return ProcessView(host=found[1], pid=int(found[2]), ended=ended)

"""Which files of a listing a COPY takes: by pattern, size and time."""

from __future__ import annotations

import re
from datetime import datetime

#: How many patterns a copy may have, and of how many characters each.
MOST_RULES, LONGEST_PATTERN = 1000, 4096

_DURATION = re.compile(r"([0-9]{1,9})([smhdw])", re.ASCII)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def time_from_text(text: str, submitted: float) -> float:
    """The time of a timestamp, or of a duration before the submission; seconds since 1970 UTC.

    Args:
        text: RFC 3339 with an offset from UTC, or a number and a unit (``s``, ``m``, ``h``, ``d``, ``w``).
        submitted: when the job was, in the same seconds.

    Raises:
        ValueError: it is neither.
    """
    if duration := _DURATION.fullmatch(text):
        return submitted - int(duration[1]) * _UNITS_S[duration[2]]
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        parsed = None
    if parsed is None or parsed.tzinfo is None:
        raise ValueError(
            "a time such as 2026-03-01T00:00:00Z is expected, or a duration before the submission such as 12h or 7d"
        )
    return parsed.timestamp()

"""Parameters of the URL."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from datetime import UTC, datetime

Query = Sequence[tuple[str, str]]


def query(**filters: enum.Enum | datetime | str | int | None) -> Query:
    """The filters that are set, as the API spells them: enumerations by name, moments in ISO 8601 UTC.

    Raises:
        ValueError: a moment without a time zone.
    """
    return [(name, _spelled(value)) for name, value in filters.items() if value is not None]


def _spelled(value: enum.Enum | datetime | str | int) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("a moment needs its time zone: datetime.now(timezone.utc)")
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return str(value)

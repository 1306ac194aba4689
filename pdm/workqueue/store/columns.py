"""Column types and constants that models and queries share."""

from __future__ import annotations

import enum
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

#: ``due_at`` of an element that was never put off: it comes before all that were.
AT_ONCE = datetime(1970, 1, 1, tzinfo=UTC)
#: ``work_due_at`` of a job of which elements still wait to be cancelled or retried: until that is through none is due.
NEVER = datetime(9999, 1, 1, tzinfo=UTC)
#: A claim and a new credential are dated before their transactions, which may come in the other order.
CLOCKS_DIFFER = timedelta(seconds=5)
#: The largest number a column of bytes holds; sums of hostile listings stop here.
MOST_BYTES = 2**63 - 1
#: Text of a failure is kept up to this many characters.
LONGEST_MESSAGE = 2000


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """A moment: aware in Python, UTC in the database, whatever the server's time zone is."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a naive time reached the database: {value}")
        if value.tzinfo is not UTC:
            value = value.astimezone(UTC)
        # SQLite keeps text; without the offset it sorts as time does.
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class ForeignText(sa.types.TypeDecorator[str]):
    """Text that tools and servers wrote: bounded, and without what PostgreSQL cannot hold."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        bounded = value[:LONGEST_MESSAGE].replace("\0", "\N{SYMBOL FOR NULL}")
        return bounded.encode("utf-8", "replace").decode("utf-8")


def named(enumeration: type[enum.Enum], name: str) -> sa.Enum:
    """A column of member names, with a CHECK, so that the table reads well and takes nothing else."""
    length = max(len(member.name) for member in enumeration) + 8
    return sa.Enum(enumeration, name=name, native_enum=False, create_constraint=True, length=length)


#: Numbers the database gives out. SQLite counts only its INTEGER PRIMARY KEY.
Key: Any = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

"""What is forgotten by age: the keys of requests that nobody will repeat any more.

Workers stay: there is one row for each instance that ever was, and the attempts that it ended name it.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.store.tables import idempotent_requests

_OLD_KEYS = (
    sa.select(idempotent_requests.c.user_id, idempotent_requests.c.key)
    .where(
        sa.tuple_(idempotent_requests.c.user_id, idempotent_requests.c.key)
        > sa.tuple_(bindparam("user"), bindparam("client_key")),
        idempotent_requests.c.created_at < bindparam("before"),
    )
    .order_by(idempotent_requests.c.user_id, idempotent_requests.c.key)
    .limit(bindparam("most"))
)
_FORGET = sa.delete(idempotent_requests).where(
    idempotent_requests.c.user_id == bindparam("user"),
    idempotent_requests.c.key == bindparam("client_key"),
    idempotent_requests.c.created_at < bindparam("before"),
)


def old_keys(session: Session, before: datetime, after: tuple[int, str], most: int) -> list[tuple[int, str]]:
    """User and Idempotency-Key of requests that were made before some moment.

    Only reads, and may read the whole table: to be run beside the writers.

    Args:
        session: of the database.
        before: the moment, UTC.
        after: where the last call came to; ``(0, "")`` at first.
        most: at most so many.
    """
    parameters = {"user": after[0], "client_key": after[1], "before": before, "most": most}
    return [(row.user_id, row.key) for row in session.execute(_OLD_KEYS, parameters)]


def forget_keys(session: Session, keys: Collection[tuple[int, str]], before: datetime) -> None:
    """Forget these keys, unless they were used anew."""
    if keys:
        session.execute(_FORGET, [{"user": user, "client_key": key, "before": before} for user, key in keys])

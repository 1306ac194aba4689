"""Idempotency keys: a request that is repeated with its key gets what the first one has made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.store.records import idempotent_requests


class IdempotencyConflictError(Exception):
    """The key was used for another request."""


@frozen
class IdempotencyKey:
    """Identifies a repeated request.

    Attributes:
        key: chosen by the client.
        fingerprint: of the request's route and body.
    """

    user_id: int
    key: str
    fingerprint: str

    def check(self, fingerprint: str) -> None:
        """Raise `IdempotencyConflictError` unless an earlier request with this key was the same."""
        if fingerprint != self.fingerprint:
            raise IdempotencyConflictError(
                f"the Idempotency-Key {self.key!r} was used for another request: take a new key for a new request"
            )


_FIND_KEY = sa.select(idempotent_requests.c.fingerprint, idempotent_requests.c.job_id).where(
    idempotent_requests.c.user_id == bindparam("user"), idempotent_requests.c.key == bindparam("client_key")
)
_INSERT_KEY = sa.insert(idempotent_requests)


def earlier_job(session: Session, key: IdempotencyKey) -> int | None:
    """The job that an earlier request with a key has registered; None if there was none.

    Raises:
        IdempotencyConflictError: it was another request.
    """
    known = session.connection().execute(_FIND_KEY, {"user": key.user_id, "client_key": key.key}).one_or_none()
    if known is None:
        return None
    key.check(known.fingerprint)
    number: int = known.job_id
    return number


def remember_job(session: Session, key: IdempotencyKey, job_id: int, now: datetime) -> None:
    """Store that a request with a key has registered a job."""
    request = {"user_id": key.user_id, "key": key.key, "fingerprint": key.fingerprint}
    session.connection().execute(_INSERT_KEY, [request | {"job_id": job_id, "created_at": now}])


def earlier_row(
    session: Session, key: IdempotencyKey, table: sa.Table, columns: Sequence[sa.Column[Any]]
) -> sa.Row[Any] | None:
    """The row with ``request_key`` and ``fingerprint`` that an earlier request with a key has made; None if none has.

    Raises:
        IdempotencyConflictError: it was another request.
    """
    of_key = sa.and_(table.c.user_id == key.user_id, table.c.request_key == key.key)
    fingerprint = session.scalar(sa.select(table.c.fingerprint).where(of_key))
    if fingerprint is None:
        return None
    key.check(fingerprint)
    return session.execute(sa.select(*columns).where(of_key)).one()


_EXPIRED_KEYS = (
    sa.select(idempotent_requests.c.user_id, idempotent_requests.c.key)
    .where(
        sa.tuple_(idempotent_requests.c.user_id, idempotent_requests.c.key)
        > sa.tuple_(bindparam("user"), bindparam("client_key")),
        idempotent_requests.c.created_at < bindparam("before"),
    )
    .order_by(idempotent_requests.c.user_id, idempotent_requests.c.key)
    .limit(bindparam("most"))
)
_DELETE_KEY = sa.delete(idempotent_requests).where(
    idempotent_requests.c.user_id == bindparam("user"),
    idempotent_requests.c.key == bindparam("client_key"),
    idempotent_requests.c.created_at < bindparam("before"),
)


def expired_keys(session: Session, before: datetime, after: tuple[int, str], most: int) -> list[tuple[int, str]]:
    """User and Idempotency-Key of requests before a time. Only reads; may scan the whole table: run it in a reader.

    ``after``: last result of the previous call; ``(0, "")`` at first.
    """
    parameters = {"user": after[0], "client_key": after[1], "before": before, "most": most}
    return [(row.user_id, row.key) for row in session.execute(_EXPIRED_KEYS, parameters)]


def delete_keys(session: Session, keys: Collection[tuple[int, str]], before: datetime) -> None:
    """Delete these keys, unless they were used again since."""
    if keys:
        session.execute(_DELETE_KEY, [{"user": user, "client_key": key, "before": before} for user, key in keys])

"""What attempts store before they change anything: the state that they found, and the job of another service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import ClaimToken
from pdm.workqueue.store.records import (
    WORKER_ID,
    elements,
    matched,
)


def record_initial_state(session: Session, worker: str, token: ClaimToken, found: Mapping[str, Any]) -> bool:
    """Store the state of the storage that an attempt has found, before it changes anything.

    ``worker``: incarnation that has the claim. ``found``: state of source and destination.

    Returns:
        False if the claim is lost: then nothing may be changed.
    """
    statement = (
        sa.update(elements)
        .where(
            elements.c.job_id == token.job_id,
            elements.c.id == token.element_id,
            elements.c.attempts == token.attempt,
            elements.c.status == JobStatus.RUNNING,
            elements.c.worker_id == WORKER_ID.scalar_subquery(),
        )
        .values(begun=dict(found))
    )
    return bool(matched(session, statement, {"of_incarnation": worker}))


_HAND_OVER = sa.update(elements).where(
    elements.c.job_id == sa.bindparam("of_job"),
    elements.c.id.in_(sa.bindparam("numbers", expanding=True)),
    elements.c.attempts == sa.bindparam("attempt"),
    elements.c.status == JobStatus.RUNNING,
    elements.c.worker_id == sa.bindparam("of_worker"),
)
#: Elements of one statement.
_HANDED_AT_ONCE = 500


def record_hand_over(session: Session, worker: str, tokens: Sequence[ClaimToken], handed: str) -> bool:
    """Store the job of another service to which attempts hand their elements over, before they do.

    ``worker``: incarnation that has the claims.

    Returns:
        False if a claim is lost: then nothing may be handed over.
    """
    number = session.scalar(WORKER_ID, {"of_incarnation": worker})
    if number is None:
        return False
    statement = _HAND_OVER.values(begun={"handed": handed})
    alike: dict[tuple[int, int], list[int]] = {}
    for token in sorted(tokens):
        alike.setdefault((token.job_id, token.attempt), []).append(token.element_id)
    rows = [
        {"of_job": job_id, "attempt": attempt, "numbers": numbers[at : at + _HANDED_AT_ONCE], "of_worker": number}
        for (job_id, attempt), numbers in alike.items()
        for at in range(0, len(numbers), _HANDED_AT_ONCE)
    ]
    return sum(matched(session, statement, row) for row in rows) == len(tokens)

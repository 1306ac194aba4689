"""Temporary files that attempts of final elements may have left at their destinations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.jobs import ClaimToken, ElementRecord, JobRecord
from pdm.workqueue.store.records import (
    ELEMENT_COLUMNS,
    FINAL,
    JOB_COLUMNS,
    element_record,
    elements,
    job_record,
    jobs,
)
from pdm.workqueue.WorkqueueDB import HAS_LEFTOVER


def leftovers(session: Session, limit: int, after: tuple[int, int] = (0, -1)) -> list[tuple[ElementRecord, JobRecord]]:
    """Final elements that may have left temporary files, with their jobs; the oldest jobs first.

    ``after``: job and number of the element where the last call ended.
    """
    rows: list[sa.Row[Any]] = list(session.execute(leftovers_statement(limit, after)))
    by_number = {
        row.id: job_record(row)
        for row in session.execute(sa.select(*JOB_COLUMNS).where(jobs.c.id.in_({row.job_id for row in rows})))
    }
    return [(element_record(row), by_number[row.job_id]) for row in rows]


def leftovers_statement(limit: int, after: tuple[int, int]) -> sa.Select[Any]:
    """The query of `leftovers`."""
    return (
        sa.select(*ELEMENT_COLUMNS)
        .where(
            sa.text(HAS_LEFTOVER),
            elements.c.status.in_(FINAL),
            sa.tuple_(elements.c.job_id, elements.c.id) > sa.tuple_(*after),
        )
        .order_by(elements.c.job_id, elements.c.id)
        .limit(limit)
    )


# No IN: SQLAlchemy cannot expand lists in an executemany.
_CLEAR_LEFTOVER = sa.update(elements).where(
    elements.c.job_id == sa.bindparam("of_job"),
    elements.c.id == sa.bindparam("number"),
    elements.c.attempts == sa.bindparam("attempt"),
    sa.or_(*(elements.c.status == status for status in FINAL)),
)


def clear_leftovers(session: Session, tokens: Iterable[ClaimToken]) -> None:
    """Record that nothing is left; elements that were retried since are skipped."""
    gone = [
        {"of_job": token.job_id, "number": token.element_id, "attempt": token.attempt, "residue": False}
        for token in tokens
    ]
    if gone:
        session.execute(_CLEAR_LEFTOVER, gone)

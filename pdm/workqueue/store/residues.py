"""What attempts have left: temporary files of elements that have ended, and what renames found before they began."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord, Token
from pdm.workqueue.store.records import ELEMENT_COLUMNS, JOB_COLUMNS, element_record, job_record
from pdm.workqueue.store.tables import elements, jobs, matched, workers
from pdm.workqueue.WorkqueueDB import HAS_RESIDUE

_FINAL = [status for status in JobStatus if status.is_final]


def residues(session: Session, limit: int, after: tuple[int, int] = (0, -1)) -> list[tuple[ElementRecord, JobRecord]]:
    """Final elements that may have left something, with their jobs; the oldest jobs first.

    Args:
        session: of the database.
        limit: at most so many.
        after: job and number of the element where the last call ended.
    """
    rows: list[sa.Row[Any]] = list(session.execute(residues_statement(limit, after)))
    by_number = {
        row.id: job_record(row)
        for row in session.execute(sa.select(*JOB_COLUMNS).where(jobs.c.id.in_({row.job_id for row in rows})))
    }
    return [(element_record(row), by_number[row.job_id]) for row in rows]


def residues_statement(limit: int, after: tuple[int, int]) -> sa.Select[Any]:
    """The query for elements of `residues`."""
    return (
        sa.select(*ELEMENT_COLUMNS)
        .where(
            sa.text(HAS_RESIDUE),
            elements.c.status.in_(_FINAL),
            sa.tuple_(elements.c.job_id, elements.c.id) > sa.tuple_(*after),
        )
        .order_by(elements.c.job_id, elements.c.id)
        .limit(limit)
    )


# No IN: for executemany, SQLAlchemy cannot expand a list into parameters of the statement.
_CLEAR = sa.update(elements).where(
    elements.c.job_id == sa.bindparam("of_job"),
    elements.c.id == sa.bindparam("number"),
    elements.c.attempts == sa.bindparam("attempt"),
    sa.or_(*(elements.c.status == status for status in _FINAL)),
)


def clear_residue(session: Session, tokens: Iterable[Token]) -> None:
    """Note that nothing is left; elements that were set going again since are passed over."""
    gone = [
        {"of_job": token.job_id, "number": token.element_id, "attempt": token.attempt, "residue": False}
        for token in tokens
    ]
    if gone:
        session.execute(_CLEAR, gone)


def note_begun(session: Session, worker: str, token: Token, found: Mapping[str, Any]) -> bool:
    """Keep what an attempt has found, before it does anything.

    Args:
        session: of the database.
        worker: the incarnation whose claim it is.
        token: of the attempt.
        found: what is there before.

    Returns:
        False if the claim is lost: then it must not be done.
    """
    statement = (
        sa.update(elements)
        .where(
            elements.c.job_id == token.job_id,
            elements.c.id == token.element_id,
            elements.c.attempts == token.attempt,
            elements.c.status == JobStatus.RUNNING,
            elements.c.worker_id == sa.select(workers.c.id).where(workers.c.incarnation == worker).scalar_subquery(),
        )
        .values(begun=dict(found))
    )
    return bool(matched(session, statement))

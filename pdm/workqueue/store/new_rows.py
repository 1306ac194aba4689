"""Rows of new elements and of ended attempts."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.jobs import NewElement, Token
from pdm.workqueue.store.columns import AT_ONCE
from pdm.workqueue.store.records import failure_columns
from pdm.workqueue.store.tables import attempts, elements

INSERT_ELEMENTS = sa.insert(elements)
INSERT_ATTEMPTS = sa.insert(attempts)


def element_row(job_id: int, number: int, new: NewElement, max_tries: int, now: datetime) -> dict[str, Any]:
    """A new element, SUBMITTED."""
    return {
        "job_id": job_id,
        "id": number,
        "type": new.type,
        "status": JobStatus.SUBMITTED,
        "src_filepath": new.src_filepath,
        "dst_filepath": new.dst_filepath,
        "size": new.size,
        "is_directory": new.is_directory,
        "phase": new.phase,
        "attempts": 0,
        "lost": 0,
        "max_tries": max_tries,
        "timestamp": now,
        "due_at": AT_ONCE,
        "residue": False,
    }


def attempt_row(
    token: Token,
    status: JobStatus,
    started_at: datetime,
    ended_at: datetime,
    worker_id: int,
    transferred: int,
    failure: AttemptFailure | None,
) -> dict[str, Any]:
    """An attempt that has ended."""
    return {
        "job_id": token.job_id,
        "element_id": token.element_id,
        "attempt": token.attempt,
        "status": status,
        "started_at": started_at,
        "ended_at": ended_at,
        "worker_id": worker_id,
        "transferred": transferred,
        **failure_columns(failure),
    }

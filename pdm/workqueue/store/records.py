"""Rows to records: what leaves the store is frozen and knows no session."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.domain.jobs import AttemptRecord, Counters, ElementRecord, JobRecord
from pdm.workqueue.store.columns import AT_ONCE
from pdm.workqueue.store.tables import attempts, elements, jobs, workers


def _columns(table: sa.Table, *names: str) -> Sequence[sa.Column[Any]]:
    return tuple(table.c[name] for name in names)


#: What `job_record` reads, in its order.
JOB_COLUMNS = (
    *_columns(jobs, "id", "user_id", "type", "status", "protocol"),
    *_columns(jobs, "src_siteid", "src_filepath", "dst_siteid", "dst_filepath"),
    *_columns(jobs, "extra_opts", "priority", "max_tries", "label", "log_uid"),
    *_columns(jobs, "timestamp", "finished_at", "cancel_requested"),
    *_columns(jobs, "bytes_total", "bytes_done", "skipped"),
    *_columns(jobs, "num_elements", "num_submitted", "num_running", "num_done"),
    *_columns(jobs, "num_failed", "num_cancelled", "num_held"),
    *_columns(jobs, "started_at", "already_there", "bytes_already_there"),
)
#: What `element_record` reads, in its order.
ELEMENT_COLUMNS = (
    *_columns(elements, "job_id", "id", "type", "status", "src_filepath", "dst_filepath", "size", "is_directory"),
    *_columns(elements, "attempts", "lost", "max_tries", "timestamp", "due_at"),
    *_columns(elements, "transferred", "elapsed_s", "checksum"),
    *_columns(elements, "failure_scope", "failure_code", "failure_message", "already_there"),
)
#: What `attempt_record` reads, in its order; of `attempts` joined with `workers`.
ATTEMPT_COLUMNS: Sequence[sa.Column[Any]] = (
    attempts.c.job_id,
    attempts.c.element_id,
    attempts.c.attempt,
    attempts.c.status,
    attempts.c.started_at,
    attempts.c.ended_at,
    workers.c.name,
    attempts.c.transferred,
    attempts.c.failure_scope,
    attempts.c.failure_code,
    attempts.c.failure_message,
)


def job_record(row: Sequence[Any]) -> JobRecord:
    """A job from a row that begins with `JOB_COLUMNS`."""
    values = [*row[:17], Counters(*row[20:27]), *row[17:20], *row[27:30]]
    return JobRecord(*values)


def element_record(row: Sequence[Any]) -> ElementRecord:
    """An element from a row that begins with `ELEMENT_COLUMNS`."""
    values = [*row[:12], _put_off(row[3], row[12]), *row[13:16], _failure(*row[16:19]), row[19]]
    return ElementRecord(*values)


def claimed_record(row: Sequence[Any]) -> ElementRecord:
    """An element as it is once claimed, from a row that was read before: RUNNING, one attempt more."""
    values = [*row[:3], JobStatus.RUNNING, *row[4:8], row[8] + 1, *row[9:12], None, *row[13:16], _failure(*row[16:19])]
    return ElementRecord(*values)


def attempt_record(row: Sequence[Any]) -> AttemptRecord:
    """An attempt from a row of `ATTEMPT_COLUMNS`."""
    values = [*row[:8], _failure(*row[8:11])]
    return AttemptRecord(*values)


def failure_columns(failure: AttemptFailure | None) -> dict[str, str | None]:
    """A failure as both tables that keep one store it."""
    if failure is None:
        return {"failure_scope": None, "failure_code": None, "failure_message": None}
    return {
        "failure_scope": failure.scope.value,
        "failure_code": failure.code.value,
        "failure_message": failure.message,
    }


def _failure(scope: str | None, code: str | None, message: str | None) -> AttemptFailure | None:
    if scope is None or code is None:
        return None
    return AttemptFailure(Scope(scope), FailureCode(code), message or "")


def _put_off(status: JobStatus, due_at: datetime) -> datetime | None:
    return due_at if status is JobStatus.SUBMITTED and due_at != AT_ONCE else None

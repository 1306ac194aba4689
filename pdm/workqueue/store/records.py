"""Tables, and the conversion of their rows to frozen records and back.

Statements use the tables, not the ORM: they load no objects. What leaves the store is frozen and knows no session.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import AttemptRecord, ClaimToken, Counters, ElementRecord, JobRecord, NewElement
from pdm.workqueue.WorkqueueDB import (
    AT_ONCE,
    Attempt,
    AuditRow,
    Base,
    CredentialRow,
    IdempotentRequest,
    Job,
    JobElement,
    KeyCheck,
    ListingChunk,
    ListingNotes,
    PendingDelegationRow,
    RestrictionRow,
    SiteRow,
    SiteVersionRow,
    User,
    Worker,
)


def _table(model: type[Base]) -> sa.Table:
    return cast(sa.Table, model.__table__)


jobs = _table(Job)
elements = _table(JobElement)
attempts = _table(Attempt)
users = _table(User)
workers = _table(Worker)
key_checks = _table(KeyCheck)
listing_chunks = _table(ListingChunk)
listing_notes = _table(ListingNotes)
credentials = _table(CredentialRow)
pending_delegations = _table(PendingDelegationRow)
idempotent_requests = _table(IdempotentRequest)
sites = _table(SiteRow)
restrictions = _table(RestrictionRow)
audit = _table(AuditRow)
catalogue = _table(SiteVersionRow)


def matched(session: Session, statement: sa.Update | sa.Delete) -> int:
    """Run a change; the number of rows that it met."""
    return cast(sa.CursorResult[Any], session.execute(statement)).rowcount


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
    *_columns(elements, "failure_scope", "failure_code", "failure_message", "already_there", "begun"),
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
    values = [*row[:12], _put_off(row[3], row[12]), *row[13:16], _failure(*row[16:19]), *row[19:21]]
    return ElementRecord(*values)


def claimed_record(row: Sequence[Any]) -> ElementRecord:
    """An element as it is once claimed, from a row that was read before: RUNNING, one attempt more."""
    begun = (*row[9:12], None, *row[13:16], _failure(*row[16:19]), *row[19:21])
    values = [*row[:3], JobStatus.RUNNING, *row[4:8], row[8] + 1, *begun]
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
    return AttemptFailure(FailureScope(scope), FailureCode(code), message or "")


def _put_off(status: JobStatus, due_at: datetime) -> datetime | None:
    return due_at if status is JobStatus.SUBMITTED and due_at != AT_ONCE else None


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
    token: ClaimToken,
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

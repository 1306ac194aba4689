"""Tables, and the conversion of their rows to frozen records and back.

Statements use the tables, not the ORM: they load no objects. The store returns frozen records without a session.
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


#: The row of the daemon that claims under an incarnation. The parameter has no column's name: UPDATE would set that.
IS_INCARNATION = workers.c.incarnation == sa.bindparam("of_incarnation")
WORKER_ID = sa.select(workers.c.id).where(IS_INCARNATION)


def matched(session: Session, statement: sa.Update | sa.Delete, parameters: dict[str, Any] | None = None) -> int:
    """Execute a statement and return the number of rows that it matched."""
    return cast(sa.CursorResult[Any], session.execute(statement, parameters)).rowcount


def _columns(table: sa.Table, *names: str) -> Sequence[sa.Column[Any]]:
    return tuple(table.c[name] for name in names)


#: What `job_record` reads.
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
#: What `element_record` reads.
ELEMENT_COLUMNS = (
    *_columns(elements, "job_id", "id", "type", "status", "src_filepath", "dst_filepath", "size", "is_directory"),
    *_columns(elements, "attempts", "lost", "max_tries", "timestamp", "due_at"),
    *_columns(elements, "transferred", "elapsed_s", "checksum"),
    *_columns(elements, "failure_scope", "failure_code", "failure_message", "already_there", "begun"),
)
#: What `attempt_record` reads; of `attempts` joined with `workers`.
ATTEMPT_COLUMNS: Sequence[sa.ColumnElement[Any]] = (
    attempts.c.job_id,
    attempts.c.element_id,
    attempts.c.attempt,
    attempts.c.status,
    attempts.c.started_at,
    attempts.c.ended_at,
    workers.c.name.label("worker"),
    attempts.c.transferred,
    attempts.c.failure_scope,
    attempts.c.failure_code,
    attempts.c.failure_message,
)


def job_record(row: Any) -> JobRecord:
    """A job from a row of `JOB_COLUMNS`."""
    return JobRecord(
        id=row.id,
        user_id=row.user_id,
        type=row.type,
        status=row.status,
        protocol=row.protocol,
        src_siteid=row.src_siteid,
        src_filepath=row.src_filepath,
        dst_siteid=row.dst_siteid,
        dst_filepath=row.dst_filepath,
        options=row.extra_opts,
        priority=row.priority,
        max_tries=row.max_tries,
        label=row.label,
        log_uid=row.log_uid,
        timestamp=row.timestamp,
        started_at=row.started_at,
        finished_at=row.finished_at,
        cancel_requested=row.cancel_requested,
        counters=Counters(
            elements=row.num_elements,
            submitted=row.num_submitted,
            running=row.num_running,
            done=row.num_done,
            failed=row.num_failed,
            cancelled=row.num_cancelled,
            held=row.num_held,
        ),
        bytes_total=row.bytes_total,
        bytes_done=row.bytes_done,
        skipped=row.skipped,
        already_there=row.already_there,
        bytes_already_there=row.bytes_already_there,
    )


def element_record(row: Any) -> ElementRecord:
    """An element from a row of `ELEMENT_COLUMNS`."""
    is_postponed = row.status is JobStatus.SUBMITTED and row.due_at != AT_ONCE
    return _element(row, row.status, row.attempts, row.due_at if is_postponed else None)


def claimed_record(row: Any) -> ElementRecord:
    """A claimed element, from a row of `ELEMENT_COLUMNS` read before the claim: RUNNING, one attempt more."""
    return _element(row, JobStatus.RUNNING, row.attempts + 1, None)


def _element(row: Any, status: JobStatus, attempts: int, not_before: datetime | None) -> ElementRecord:
    return ElementRecord(
        job_id=row.job_id,
        id=row.id,
        type=row.type,
        status=status,
        src_filepath=row.src_filepath,
        dst_filepath=row.dst_filepath,
        size=row.size,
        is_directory=row.is_directory,
        attempts=attempts,
        lost=row.lost,
        max_tries=row.max_tries,
        timestamp=row.timestamp,
        not_before=not_before,
        transferred=row.transferred,
        elapsed_s=row.elapsed_s,
        checksum=row.checksum,
        failure=_failure(row),
        already_there=row.already_there,
        begun=row.begun,
    )


def attempt_record(row: Any) -> AttemptRecord:
    """An attempt from a row of `ATTEMPT_COLUMNS`."""
    return AttemptRecord(
        job_id=row.job_id,
        element_id=row.element_id,
        attempt=row.attempt,
        status=row.status,
        started_at=row.started_at,
        ended_at=row.ended_at,
        worker=row.worker,
        transferred=row.transferred,
        failure=_failure(row),
    )


def failure_columns(failure: AttemptFailure | None) -> dict[str, str | None]:
    """A failure as columns of ``job_elements`` and ``attempts``."""
    if failure is None:
        return {"failure_scope": None, "failure_code": None, "failure_message": None}
    return {
        "failure_scope": failure.scope.value,
        "failure_code": failure.code.value,
        "failure_message": failure.message,
    }


def _failure(row: Any) -> AttemptFailure | None:
    if row.failure_scope is None or row.failure_code is None:
        return None
    return AttemptFailure(FailureScope(row.failure_scope), FailureCode(row.failure_code), row.failure_message or "")


INSERT_ELEMENTS = sa.insert(elements)
INSERT_ATTEMPTS = sa.insert(attempts)


def element_row(job_id: int, number: int, new: NewElement, max_tries: int, now: datetime) -> dict[str, Any]:
    """A new SUBMITTED element."""
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
    """An ended attempt."""
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

"""Tables, and the conversion of their rows to frozen records and back.

Statements use the tables, not the ORM: they load no objects. The store returns frozen records without a session.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, cast

import attrs
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType, PlannedAction
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.holds import HoldBy, JobHold
from pdm.workqueue.domain.jobs import (
    AttemptRecord,
    CancelCode,
    CancelReason,
    ClaimToken,
    Counters,
    ElementRecord,
    JobRecord,
    LogSpan,
    NewElement,
    Predecessors,
)
from pdm.workqueue.store.row_statements import RowStatement
from pdm.workqueue.WorkqueueDB import (
    AT_ONCE,
    NEVER,
    Attempt,
    AuditRow,
    Base,
    CredentialRow,
    DeliveryRow,
    EventRow,
    FailureCountRow,
    FtsBanRow,
    FtsFileRow,
    FtsJobRow,
    FtsPartRow,
    IdempotentRequest,
    Job,
    JobCountsRow,
    JobElement,
    KeptReceiptRow,
    KeyCheck,
    ListingChunk,
    ListingNotes,
    LogonFailure,
    MailNoticeRow,
    MailSubscriptionRow,
    NotifiedRow,
    OidcLoginRow,
    PendingDelegationRow,
    PredecessorRow,
    PurgedJobRow,
    RestrictionRow,
    RetentionRow,
    ScheduleRow,
    ScheduleRunRow,
    SiteRow,
    SiteVersionRow,
    User,
    WaitElementRow,
    WaitRow,
    WebhookRow,
    Worker,
)


def _table(model: type[Base]) -> sa.Table:
    return cast(sa.Table, model.__table__)


jobs = _table(Job)
elements = _table(JobElement)
attempts = _table(Attempt)
job_counts = _table(JobCountsRow)
users = _table(User)
workers = _table(Worker)
key_checks = _table(KeyCheck)
logon_failures = _table(LogonFailure)
listing_chunks = _table(ListingChunk)
listing_notes = _table(ListingNotes)
credentials = _table(CredentialRow)
oidc_logins = _table(OidcLoginRow)
pending_delegations = _table(PendingDelegationRow)
idempotent_requests = _table(IdempotentRequest)
predecessors = _table(PredecessorRow)
schedules = _table(ScheduleRow)
schedule_runs = _table(ScheduleRunRow)
sites = _table(SiteRow)
restrictions = _table(RestrictionRow)
audit = _table(AuditRow)
catalogue = _table(SiteVersionRow)
events = _table(EventRow)
failure_counts = _table(FailureCountRow)
webhooks = _table(WebhookRow)
deliveries = _table(DeliveryRow)
mail_subscriptions = _table(MailSubscriptionRow)
mail_notices = _table(MailNoticeRow)
notified = _table(NotifiedRow)
fts_jobs = _table(FtsJobRow)
fts_parts = _table(FtsPartRow)
fts_files = _table(FtsFileRow)
fts_bans = _table(FtsBanRow)
purged_jobs = _table(PurgedJobRow)
kept_receipts = _table(KeptReceiptRow)
retention = _table(RetentionRow)
waits = _table(WaitRow)
wait_elements = _table(WaitElementRow)


#: The row of the daemon that claims under an incarnation. The parameter has no column's name: UPDATE would set that.
IS_INCARNATION = workers.c.incarnation == sa.bindparam("of_incarnation")
WORKER_ID = sa.select(workers.c.id).where(IS_INCARNATION)


#: Of jobs that are not purged; the rows of the others are being deleted.
IS_THERE = jobs.c.purged_at.is_(None)
#: Of jobs and elements that have ended.
FINAL = tuple(status for status in JobStatus if status.is_final)


def matched(session: Session, statement: sa.Update | sa.Delete, parameters: dict[str, Any] | None = None) -> int:
    """Execute a statement and return the number of rows that it matched."""
    return cast(sa.CursorResult[Any], session.execute(statement, parameters)).rowcount


def columns_of(table: sa.Table, *names: str) -> Sequence[sa.Column[Any]]:
    return tuple(table.c[name] for name in names)


#: What `job_record` reads.
JOB_COLUMNS = (
    *columns_of(jobs, "id", "user_id", "type", "status", "protocol"),
    *columns_of(jobs, "src_siteid", "src_filepath", "dst_siteid", "dst_filepath"),
    *columns_of(jobs, "extra_opts", "priority", "max_tries", "label", "log_uid"),
    *columns_of(jobs, "timestamp", "finished_at", "cancel_requested"),
    *columns_of(jobs, "bytes_total", "bytes_done", "skipped"),
    *columns_of(jobs, "num_elements", "num_submitted", "num_running", "num_done"),
    *columns_of(jobs, "num_failed", "num_cancelled", "num_held"),
    *columns_of(jobs, "started_at", "already_there", "bytes_already_there"),
    *columns_of(jobs, "after", "is_awaited", "deadline", "cancel_reason", "schedule_id"),
    *columns_of(jobs, "hold", "held_until", "max_active"),
)
#: What `element_record` reads.
ELEMENT_COLUMNS = (
    *columns_of(elements, "job_id", "id", "type", "status", "src_filepath", "dst_filepath", "size", "is_directory"),
    *columns_of(elements, "attempts", "lost", "max_tries", "timestamp", "due_at"),
    *columns_of(elements, "transferred", "elapsed_s", "checksum"),
    *columns_of(elements, "failure_scope", "failure_code", "failure_message", "already_there", "begun"),
    *columns_of(elements, "planned", "mtime", "not_preserved"),
)
_JOB_NAMES = tuple(column.name for column in JOB_COLUMNS)
_COUNTERS = tuple((f"num_{counter.name}", counter.name) for counter in attrs.fields(Counters))


def job_record(row: Iterable[Any]) -> JobRecord:
    """A job from a row that begins with `JOB_COLUMNS`."""
    # A dict, not the attributes of `sa.Row`: those take twice as long for a whole record.
    values = dict(zip(_JOB_NAMES, row, strict=False))
    counters = Counters(**{counter: values.pop(column) for column, counter in _COUNTERS})
    if (after := values["after"]) is not None:
        values["after"] = Predecessors(tuple(after["jobs"]), after["any"], after.get("failed", False))
    if (reason := values["cancel_reason"]) is not None:
        values["cancel_reason"] = CancelReason(CancelCode(reason["code"]), reason["message"])
    until = values.pop("held_until")
    if until is not None:
        values["hold"] = _job_hold(values["hold"], until)
    return JobRecord(options=values.pop("extra_opts"), counters=counters, **values)


def _job_hold(value: Mapping[str, Any], until: datetime) -> JobHold:
    return JobHold(
        by=HoldBy(value["by"]),
        subject=value["subject"],
        message=value["message"],
        since=datetime.fromisoformat(value["since"]),
        until=None if until >= NEVER else until,
    )


def hold_columns(hold: JobHold | None) -> dict[str, Any]:
    """The values of the columns ``hold`` and ``held_until``."""
    if hold is None:
        return {"hold": None, "held_until": None}
    value = {"by": hold.by.value, "subject": hold.subject, "message": hold.message, "since": hold.since.isoformat()}
    return {"hold": value, "held_until": hold.until or NEVER}


def predecessors_column(after: Predecessors | None) -> dict[str, Any] | None:
    """The value of the column ``after``."""
    if after is None:
        return None
    value = {"jobs": list(after.jobs), "any": after.any_end}
    return value | {"failed": True} if after.on_failure else value


def element_record(row: Iterable[Any], *, claimed: bool = False) -> ElementRecord:
    """An element from a row of `ELEMENT_COLUMNS`.

    ``claimed``: the row was read before its claim; since then it is RUNNING, with one attempt more.
    """
    # Unpacked, not by a dict as for jobs, which takes twice as long.
    (job_id, number, type_, status, source, destination, size, is_directory, tries, lost, max_tries, *rest) = row
    timestamp, due_at, transferred, elapsed_s, checksum, scope, code, message, already_there, begun, *planning = rest
    planned, mtime, not_preserved = planning
    return ElementRecord(
        job_id=job_id,
        id=number,
        type=type_,
        status=JobStatus.RUNNING if claimed else status,
        src_filepath=source,
        dst_filepath=destination,
        size=size,
        is_directory=is_directory,
        attempts=tries + claimed,
        lost=lost,
        max_tries=max_tries,
        timestamp=timestamp,
        not_before=due_at if status is JobStatus.SUBMITTED and not claimed and due_at != AT_ONCE else None,
        transferred=transferred,
        elapsed_s=elapsed_s,
        checksum=checksum,
        failure=_failure(scope, code, message),
        already_there=already_there,
        begun=begun,
        planned=None if planned is None else PlannedAction(planned),
        mtime=mtime,
        not_preserved=not_preserved,
    )


_FAILURE_COLUMNS = ("failure_scope", "failure_code", "failure_message")
#: The ended attempts at the elements ``first`` to ``last`` of a job, in order: those that have succeeded are columns of
#: their elements, since schema 0010; all others are rows of `attempts`.
ENDED_ATTEMPTS = sa.union_all(
    sa.select(
        *columns_of(attempts, "job_id", "element_id", "attempt", "status", "started_at", "ended_at"),
        sa.null().label("elapsed_s"),
        workers.c.name.label("worker"),
        *columns_of(attempts, "transferred", "log_offset", "log_length", *_FAILURE_COLUMNS),
    )
    .join_from(attempts, workers, attempts.c.worker_id == workers.c.id)
    .where(
        attempts.c.job_id == sa.bindparam("job"),
        attempts.c.element_id.between(sa.bindparam("first"), sa.bindparam("last")),
    ),
    sa.select(
        *(elements.c.job_id, elements.c.id, elements.c.attempts, elements.c.status, elements.c.started_at, sa.null()),
        elements.c.elapsed_s,
        workers.c.name,
        *columns_of(elements, "transferred", "log_offset", "log_length"),
        *(sa.null().label(name) for name in _FAILURE_COLUMNS),
    )
    .join_from(elements, workers, elements.c.worker_id == workers.c.id)
    .where(
        elements.c.job_id == sa.bindparam("job"),
        elements.c.id.between(sa.bindparam("first"), sa.bindparam("last")),
        elements.c.started_at.is_not(None),
    ),
).order_by("element_id", "attempt")


def attempt_record(row: Iterable[Any]) -> AttemptRecord:
    """An attempt from a row of `ENDED_ATTEMPTS`."""
    job_id, number, attempt, status, started_at, ended_at, elapsed_s, worker, transferred, *rest = row
    offset, length, scope, code, message = rest
    return AttemptRecord(
        job_id=job_id,
        element_id=number,
        attempt=attempt,
        status=status,
        started_at=started_at,
        ended_at=ended_at or started_at + timedelta(seconds=elapsed_s),
        worker=worker,
        transferred=transferred,
        failure=_failure(scope, code, message),
        log=None if offset is None or length is None else LogSpan(offset, length),
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


def _failure(scope: str | None, code: str | None, message: str | None) -> AttemptFailure | None:
    """A failure from the columns of a row."""
    if scope is None or code is None:
        return None
    return AttemptFailure(FailureScope(scope), FailureCode(code), message or "")


#: By primary key, one by one: with a wider condition and outdated statistics of a young job, PostgreSQL may read the
#: whole job. The parameters have no column's names: UPDATE would set those.
UPDATE_ELEMENT = sa.update(elements).where(
    elements.c.job_id == sa.bindparam("of_job"), elements.c.id == sa.bindparam("number")
)
INSERT_ATTEMPTS = sa.insert(attempts)


_INSERT_ELEMENTS = RowStatement(
    """
    WITH new (id, type, src_filepath, dst_filepath, size, is_directory, phase) AS (VALUES {rows})
    INSERT INTO job_elements (job_id, max_tries, timestamp, due_at, status, attempts, lost, residue,
        id, type, src_filepath, dst_filepath, size, is_directory, phase)
    SELECT ?, ?, ?, ?, 'SUBMITTED', 0, 0, FALSE,
        id, type, src_filepath, dst_filepath, size, is_directory, phase FROM new
    """,
    columns_of(elements, "id", "type", "src_filepath", "dst_filepath", "size", "is_directory", "phase"),
    columns_of(elements, "job_id", "max_tries", "timestamp", "due_at"),
)


#: With the checksums that the files must have: of an element that is not DONE, the checksum is that.
_INSERT_WITH_CHECKSUMS = RowStatement(
    """
    WITH new (id, type, src_filepath, dst_filepath, size, is_directory, phase, checksum) AS (VALUES {rows})
    INSERT INTO job_elements (job_id, max_tries, timestamp, due_at, status, attempts, lost, residue,
        id, type, src_filepath, dst_filepath, size, is_directory, phase, checksum)
    SELECT ?, ?, ?, ?, 'SUBMITTED', 0, 0, FALSE,
        id, type, src_filepath, dst_filepath, size, is_directory, phase, checksum FROM new
    """,
    columns_of(elements, "id", "type", "src_filepath", "dst_filepath", "size", "is_directory", "phase", "checksum"),
    columns_of(elements, "job_id", "max_tries", "timestamp", "due_at"),
)


#: With the columns that only elements of compared trees have; some of them are DONE already.
_INSERT_PLANNED = RowStatement(
    """
    WITH new (id, type, src_filepath, dst_filepath, size, is_directory, phase, status, already_there, planned, mtime)
        AS (VALUES {rows})
    INSERT INTO job_elements (job_id, max_tries, timestamp, due_at, attempts, lost, residue,
        id, type, src_filepath, dst_filepath, size, is_directory, phase, status, already_there, planned, mtime)
    SELECT ?, ?, ?, ?, 0, 0, FALSE,
        id, type, src_filepath, dst_filepath, size, is_directory, phase, status, already_there, planned,
        CAST(mtime AS BIGINT) FROM new
    """,
    columns_of(
        *(elements, "id", "type", "src_filepath", "dst_filepath", "size", "is_directory", "phase"),
        *("status", "already_there", "planned", "mtime"),
    ),
    columns_of(elements, "job_id", "max_tries", "timestamp", "due_at"),
)


def insert_elements(
    session: Session,
    job_id: int,
    first: int,
    new: Sequence[NewElement],
    max_tries: int,
    now: datetime,
    checksums: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """Insert elements, numbered from ``first``: SUBMITTED, or DONE where nothing is left to do.

    ``checksums`` are those that files of copies must have, by number; elements of a compared tree have none.
    """
    rows = [
        (first + offset, one.type, one.src_filepath, one.dst_filepath, one.size, one.is_directory, one.phase)
        for offset, one in enumerate(new)
    ]
    if checksums:
        checked_rows = [(*row, checksums.get(row[0])) for row in rows]
        _INSERT_WITH_CHECKSUMS.execute(session, checked_rows, job_id, max_tries, now, AT_ONCE)
        return
    if not any(one.planned or one.done for one in new):
        _INSERT_ELEMENTS.execute(session, rows, job_id, max_tries, now, AT_ONCE)
        return
    planned_rows = [
        (*row, _status(one), _is_there(one), one.planned, one.mtime) for row, one in zip(rows, new, strict=True)
    ]
    _INSERT_PLANNED.execute(session, planned_rows, job_id, max_tries, now, AT_ONCE)


def _status(new: NewElement) -> JobStatus:
    return JobStatus.DONE if new.done else JobStatus.SUBMITTED


def _is_there(new: NewElement) -> bool:
    return new.planned is PlannedAction.SAME and new.type is JobType.COPY


def attempt_row(
    token: ClaimToken,
    status: JobStatus,
    started_at: datetime,
    ended_at: datetime,
    worker_id: int,
    transferred: int,
    failure: AttemptFailure | None,
    log: LogSpan | None = None,
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
        "log_offset": None if log is None else log.offset,
        "log_length": None if log is None else log.length,
        **failure_columns(failure),
    }

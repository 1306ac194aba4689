"""The tables of the queue: declarative models and their column types, the same on PostgreSQL and SQLite.

Status, type and protocol are stored by name, times in UTC, sizes in 64 bits, options as JSON. The counters of a job are
updated by delta in the transaction that changes its elements; a CHECK rejects counters that do not sum up. Frequent
queries use the partial indexes below. Their conditions are defined once, as text, because a database uses a partial
index only if the query repeats its condition literally.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, ForeignKeyConstraint, Index, Integer, String, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType

__all__ = [
    "JobType",
    "JobProtocol",
    "JobStatus",
    "Base",
    "User",
    "Job",
    "JobElement",
    "Attempt",
    "Worker",
    "KeyCheck",
    "ListingChunk",
    "ListingNotes",
    "CredentialRow",
    "PendingDelegationRow",
    "IdempotentRequest",
    "PredecessorRow",
    "ScheduleRow",
    "ScheduleRunRow",
    "SiteRow",
    "RestrictionRow",
    "AuditRow",
    "SiteVersionRow",
    "EventRow",
    "FailureCountRow",
    "WebhookRow",
    "DeliveryRow",
    "MailSubscriptionRow",
    "MailNoticeRow",
    "NotifiedRow",
    "PurgedJobRow",
    "KeptReceiptRow",
    "RetentionRow",
    "WaitRow",
    "WaitElementRow",
]

#: ``due_at`` of an element that was never postponed: it sorts before all that were.
AT_ONCE = datetime(1970, 1, 1, tzinfo=UTC)
#: ``work_due_at`` of a job whose cancellation or retry is not complete: nothing of it is due. ``held_until`` of a hold
#: without an end.
NEVER = datetime(9999, 1, 1, tzinfo=UTC)
#: Claims and new credentials have times from before their transactions, which may commit in the other order.
CLOCK_SKEW = timedelta(seconds=5)
#: Largest value of a column of bytes; sums of hostile listings are capped here.
MAX_BYTES = 2**63 - 1
#: Longer failure texts are cut.
MAX_TEXT_LENGTH = 2000


#: Conversions of times that are remembered: elements of a listing have one time, and so have those of a claim.
_MOST_TIMES = 1024


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """A time: aware in Python, UTC in the database, whatever the server's time zone is.

    SQLite stores text without the offset, which sorts correctly. It is written and read by functions of ``datetime``,
    in a third of the time that SQLAlchemy's own conversion takes, and once for elements of the same time.
    """

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is UTC:
            return value
        if value.tzinfo is None:
            raise ValueError(f"a naive time reached the database: {value}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def bind_processor(self, dialect: Dialect) -> Callable[[datetime | None], Any] | None:
        if dialect.name != "sqlite":
            return super().bind_processor(dialect)

        @functools.lru_cache(maxsize=_MOST_TIMES)
        def text_of(value: datetime | None) -> str | None:
            value = self.process_bind_param(value, dialect)
            return None if value is None else value.isoformat(" ", "microseconds")[:_NAIVE_LENGTH]

        return text_of

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], datetime | None] | None:
        if dialect.name != "sqlite":
            return super().result_processor(dialect, coltype)
        return _time_of_text


#: Length of a time without its offset, as SQLite stores it.
_NAIVE_LENGTH = len("2026-01-01 00:00:00.000000")


@functools.lru_cache(maxsize=_MOST_TIMES)
def _time_of_text(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text).replace(tzinfo=UTC)


class UntrustedText(sa.types.TypeDecorator[str]):
    """Text from tools and servers: limited in length, without characters that PostgreSQL rejects."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        bounded = value[:MAX_TEXT_LENGTH].replace("\0", "\N{SYMBOL FOR NULL}")
        return bounded if bounded.isascii() else bounded.encode("utf-8", "replace").decode("utf-8")


def enum_column(enumeration: type[enum.Enum], name: str) -> sa.Enum:
    """A column of member names, with a CHECK."""
    length = max(len(member.name) for member in enumeration) + 8
    return sa.Enum(enumeration, name=name, native_enum=False, create_constraint=True, length=length)


#: Autoincremented ids: SQLite does that only for INTEGER PRIMARY KEY.
RowId: Any = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


#: Conditions of the partial indexes.
IS_WAITING_WORK = "status = 'SUBMITTED' AND type <> 'LIST'"
IS_RUNNING = "status = 'RUNNING'"
IS_SET_ASIDE = "status IN ('FAILED', 'CANCELLED', 'HELD')"
IS_HELD = f"{IS_SET_ASIDE} AND status = 'HELD'"
HAS_LEFTOVER = "residue IS TRUE"
HAS_WORK = "work_due_at IS NOT NULL"
HAS_LISTING = "list_due_at IS NOT NULL"
HAS_RUNNING = "num_running > 0"
HAS_HELD = "num_held > 0"
HAS_HOLD = "held_until IS NOT NULL"
HAS_OPEN_DEADLINE = "deadline IS NOT NULL AND finished_at IS NULL"
IS_DUE = "next_due IS NOT NULL"
IS_UNDELIVERED = "due_at IS NOT NULL"
HAS_ENDED = "finished_at IS NOT NULL AND purged_at IS NULL"
IS_NOT_DONE = "status <> 'DONE'"
IS_PURGED = "purged_at IS NOT NULL"
IS_OF_JOB = "job_id IS NOT NULL"
HAS_RECEIPT = "receipt_pieces IS NOT NULL"


def _partial(name: str, condition: str, *columns: str) -> Index:
    return Index(name, *columns, sqlite_where=sa.text(condition), postgresql_where=sa.text(condition))


class Base(DeclarativeBase):
    metadata = sa.MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(referred_table_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, int: BigInteger, str: Text}  # noqa: RUF012 - read by SQLAlchemy


class User(Base):
    """An end entity that may use the service.

    Attributes:
        authority: subject of the authority that issued the user's certificate; null until a user from an earlier
            version connects.
    """

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    subject: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str] = mapped_column(String(16))
    registered_at: Mapped[datetime]
    authority: Mapped[str | None]


class Job(Base):
    """One request of a user.

    Attributes:
        timestamp: when it was registered.
        started_at: when its first element was first claimed.
        list_due_at: when its listing may be claimed; null if it does not wait.
        work_due_at: lower bound of when another element may be claimed; null if none can, the year 9999 while a
            cancellation or retry is not complete. Both are null while the job waits for others or a person holds it.
        after: the jobs that it waits for, as in ``pdm.workqueue.store.records``; null for none.
        is_awaited: whether another job was submitted to wait for this one.
        deadline: when it is cancelled; null for never.
        schedule_id: the schedule of which it is a run; that may have been removed.
        cancel_reason: ``{"code": ..., "message": ...}`` if the service has cancelled it, not its user.
        purged_at: when it became one of `PurgedJobRow`; its rows are being deleted, and nothing reads them any more.
        hold: ``{"by": ..., "subject": ..., "message": ..., "since": ...}`` while a person holds it; null otherwise.
        held_until: when it is resumed by itself, the year 9999 for never; null while it is not held by a person.
        max_active: how many of its elements but the listing may run at once; null for no limit of its own.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(
            "num_elements = num_submitted + num_running + num_done + num_failed + num_cancelled + num_held",
            name="counters_sum",
        ),
        CheckConstraint(
            "num_submitted >= 0 AND num_running >= 0 AND num_done >= 0"
            " AND num_failed >= 0 AND num_cancelled >= 0 AND num_held >= 0",
            name="counters_positive",
        ),
        Index("ix_jobs_user", "user_id", "id"),
        Index("ix_jobs_user_status", "user_id", "status", "id"),
        _partial("ix_jobs_status", IS_NOT_DONE, "status", "id"),
        _partial("ix_jobs_work", HAS_WORK, "user_id", "priority", "id", "work_due_at"),
        _partial("ix_jobs_work_due", HAS_WORK, "work_due_at"),
        _partial("ix_jobs_listing", HAS_LISTING, "user_id", "priority", "id", "list_due_at"),
        _partial("ix_jobs_listing_due", HAS_LISTING, "list_due_at"),
        _partial("ix_jobs_running", HAS_RUNNING, "user_id", "id"),
        _partial("ix_jobs_held", HAS_HELD, "user_id", "id"),
        _partial("ix_jobs_hold", HAS_HOLD, "held_until", "id"),
        _partial("ix_jobs_deadline", HAS_OPEN_DEADLINE, "deadline"),
        _partial("ix_jobs_ended", HAS_ENDED, "finished_at", "id"),
        _partial("ix_jobs_purged", IS_PURGED, "id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    type: Mapped[JobType] = mapped_column(enum_column(JobType, "type"))
    status: Mapped[JobStatus] = mapped_column(enum_column(JobStatus, "status"))
    protocol: Mapped[JobProtocol] = mapped_column(enum_column(JobProtocol, "protocol"))
    src_siteid: Mapped[int]
    src_filepath: Mapped[str]
    dst_siteid: Mapped[int | None]
    dst_filepath: Mapped[str | None]
    extra_opts: Mapped[Mapping[str, Any]] = mapped_column(sa.JSON)
    priority: Mapped[int] = mapped_column(Integer)
    max_tries: Mapped[int] = mapped_column(Integer)
    label: Mapped[str | None]
    log_uid: Mapped[str] = mapped_column(String(64))
    timestamp: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    cancel_requested: Mapped[bool]
    num_elements: Mapped[int]
    num_submitted: Mapped[int]
    num_running: Mapped[int]
    num_done: Mapped[int]
    num_failed: Mapped[int]
    num_cancelled: Mapped[int]
    num_held: Mapped[int]
    bytes_total: Mapped[int]
    bytes_done: Mapped[int]
    skipped: Mapped[int]
    already_there: Mapped[int] = mapped_column(server_default="0")
    bytes_already_there: Mapped[int] = mapped_column(server_default="0")
    list_due_at: Mapped[datetime | None]
    work_due_at: Mapped[datetime | None]
    after: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    is_awaited: Mapped[bool] = mapped_column(server_default=sa.false())
    deadline: Mapped[datetime | None]
    cancel_reason: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    schedule_id: Mapped[int | None]
    purged_at: Mapped[datetime | None]
    hold: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    held_until: Mapped[datetime | None]
    max_active: Mapped[int | None] = mapped_column(Integer)


class JobCountsRow(Base):
    """Elements of a job that are DONE and that its row still counts as RUNNING; see `pdm.workqueue.store.job_counts`.

    Attributes:
        bytes_total: by how much it grows, as the other columns of this name in `Job`.
    """

    __tablename__ = "job_counts"
    __table_args__ = (Index("ix_job_counts_job", "job_id"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    #: No foreign key: its check would lock the row of the job.
    job_id: Mapped[int]
    done: Mapped[int]
    bytes_total: Mapped[int]
    bytes_done: Mapped[int]
    already_there: Mapped[int]
    bytes_already_there: Mapped[int]


class PredecessorRow(Base):
    """A job that still waits for another one; removed when that has ended and the job was told.

    Attributes:
        job_id: the job that waits.
        predecessor_id: an older job of the same user.
    """

    __tablename__ = "predecessors"
    __table_args__ = (
        Index("ix_predecessors_predecessor", "predecessor_id", "job_id"),
        {"sqlite_with_rowid": False},
    )

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    predecessor_id: Mapped[int] = mapped_column(
        ForeignKey("jobs.id", name="fk_predecessors_awaited_jobs"), primary_key=True
    )


class ScheduleRow(Base):
    """A job that is submitted again and again.

    Attributes:
        recurrence: a cron expression, or ``every`` and a duration.
        submission: the body of ``POST /jobs``.
        next_due: when it runs next; null while it is paused.
        request_key: the ``Idempotency-Key`` of the request that has created it.
        fingerprint: of that request.
    """

    __tablename__ = "schedules"
    __table_args__ = (
        Index("ix_schedules_user", "user_id", "id"),
        sa.UniqueConstraint("user_id", "request_key"),
        _partial("ix_schedules_due", IS_DUE, "next_due"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    recurrence: Mapped[str]
    timezone: Mapped[str]
    submission: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    created_at: Mapped[datetime]
    next_due: Mapped[datetime | None]
    request_key: Mapped[str | None]
    fingerprint: Mapped[str | None]


class ScheduleRunRow(Base):
    """What became of a schedule at one of its times.

    Attributes:
        due_at: that time; the row may be written later, if no daemon ran.
        job_id: the job; null if none was submitted, or if it was purged.
    """

    __tablename__ = "schedule_runs"
    __table_args__ = (
        _partial("ix_schedule_runs_job", IS_OF_JOB, "job_id"),
        {"sqlite_with_rowid": False},
    )

    schedule_id: Mapped[int] = mapped_column(ForeignKey("schedules.id"), primary_key=True)
    due_at: Mapped[datetime] = mapped_column(primary_key=True)
    made_at: Mapped[datetime]
    outcome: Mapped[str] = mapped_column(String(16))
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id"))
    message: Mapped[str | None] = mapped_column(UntrustedText)


class JobElement(Base):
    """One unit of a job: its listing (number 0), a file, a directory.

    Attributes:
        timestamp: when it was planned.
        due_at: when it may be claimed; 1970 for at once.
        attempts: attempts begun; the newest has this number.
        worker_id: the worker that runs the newest attempt, or whose attempt has succeeded.
        lost: attempts that do not count towards ``max_tries``.
        residue: whether attempts may have left a temporary file at the destination.
        already_there: whether the destination had the file before, so that nothing was transferred.
        begun: the state of source and destination before an attempt changed them.
        started_at: of the attempt that has succeeded, the newest, which took ``elapsed_s``; it has no row in
            ``attempts``. Null in all other elements, and in those of earlier versions. So are ``log_offset`` and
            ``log_length``, see `pdm.workqueue.domain.jobs.LogSpan`.
        planned: name of a `pdm.workqueue.domain.enums.PlannedAction`; null where nothing was compared.
        mtime: of the file when it was listed, seconds since 1970; null where that is not needed later.
        not_preserved: attributes of the source that could not be set, separated by commas; null for none.
    """

    __tablename__ = "job_elements"
    __table_args__ = (
        # First attempts in the order of the listing, then retries: failures do not delay others.
        _partial("ix_elements_waiting", IS_WAITING_WORK, "job_id", "phase", "due_at", "id"),
        _partial("ix_elements_running", IS_RUNNING, "job_id", "phase", "id", "worker_id"),
        _partial("ix_elements_set_aside", IS_SET_ASIDE, "job_id", "status", "id"),
        _partial("ix_elements_residue", HAS_LEFTOVER, "job_id", "id"),
        # Clustered by (job, number): a page of a job is contiguous.
        {"sqlite_with_rowid": False},
    )

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True)
    type: Mapped[JobType] = mapped_column(enum_column(JobType, "type"))
    status: Mapped[JobStatus] = mapped_column(enum_column(JobStatus, "status"))
    src_filepath: Mapped[str]
    dst_filepath: Mapped[str | None]
    size: Mapped[int]
    is_directory: Mapped[bool]
    phase: Mapped[int] = mapped_column(Integer)
    attempts: Mapped[int] = mapped_column(Integer)
    lost: Mapped[int] = mapped_column(Integer)
    max_tries: Mapped[int] = mapped_column(Integer)
    timestamp: Mapped[datetime]
    due_at: Mapped[datetime]
    worker_id: Mapped[int | None]
    claimed_at: Mapped[datetime | None]
    transferred: Mapped[int | None]
    elapsed_s: Mapped[float | None]
    checksum: Mapped[str | None] = mapped_column(UntrustedText)
    residue: Mapped[bool]
    failure_scope: Mapped[str | None] = mapped_column(String(16))
    failure_code: Mapped[str | None] = mapped_column(String(32))
    failure_message: Mapped[str | None] = mapped_column(UntrustedText)
    already_there: Mapped[bool] = mapped_column(server_default=sa.false())
    begun: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    started_at: Mapped[datetime | None]
    log_offset: Mapped[int | None]
    log_length: Mapped[int | None]
    planned: Mapped[str | None] = mapped_column(String(12))
    mtime: Mapped[int | None]
    not_preserved: Mapped[str | None] = mapped_column(String(12))


class Worker(Base):
    """A daemon that claims; see `pdm.workqueue.store.leases.WorkerIdentity`. With a lease it is a node of the cluster.

    All columns from ``node`` on are null in rows of earlier versions.

    Attributes:
        lease_until: null once the lease was taken away.
        node: name for people.
        address: URL under which other nodes reach it; null for none.
        started_at: by the clock that measures leases, as ``seen_at``, the last renewal of its lease.
        drain: why it claims nothing more, by an operator; null while it claims.
        drain_until: then it gives back what still runs; null for never.
        sick: why it claims nothing, by its own checks; null while it is healthy.
        report: what it says of itself with each renewal.
        counts_apart: whether it knows of `JobCountsRow`.
    """

    __tablename__ = "workers"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    lease_until: Mapped[datetime | None]
    incarnation: Mapped[str | None] = mapped_column(String(64))
    instance: Mapped[str | None] = mapped_column(String(256))
    host: Mapped[str | None] = mapped_column(String(256))
    node: Mapped[str | None] = mapped_column(String(256))
    address: Mapped[str | None]
    version: Mapped[str | None] = mapped_column(String(64))
    started_at: Mapped[datetime | None]
    seen_at: Mapped[datetime | None]
    drain: Mapped[str | None] = mapped_column(UntrustedText)
    drain_until: Mapped[datetime | None]
    sick: Mapped[str | None] = mapped_column(UntrustedText)
    report: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    counts_apart: Mapped[bool | None]


class KeyCheck(Base):
    """One row, encrypted with the key of the credentials: a daemon with another key cannot decrypt it."""

    __tablename__ = "key_checks"

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=False)
    secret: Mapped[bytes]


class LogonFailure(Base):
    """A MyProxy logon that was refused, or that runs."""

    __tablename__ = "logon_failures"
    __table_args__ = (Index("ix_logon_failures_user", "user_id", "failed_at"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    failed_at: Mapped[datetime]


class Attempt(Base):
    """An ended attempt at an element that did not succeed; a successful one is stored in columns of the element.

    Attributes:
        log_offset: see `pdm.workqueue.domain.jobs.LogSpan`; null in rows of earlier versions, and of attempts that were
            lost with their daemon. So is ``log_length``.
    """

    __tablename__ = "attempts"
    __table_args__ = (
        ForeignKeyConstraint(["job_id", "element_id"], ["job_elements.job_id", "job_elements.id"]),
        Index("ix_attempts_worker", "worker_id"),
        {"sqlite_with_rowid": False},
    )

    job_id: Mapped[int] = mapped_column(primary_key=True)
    element_id: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    status: Mapped[JobStatus] = mapped_column(enum_column(JobStatus, "status"))
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime]
    worker_id: Mapped[int] = mapped_column(ForeignKey("workers.id"))
    transferred: Mapped[int]
    failure_scope: Mapped[str | None] = mapped_column(String(16))
    failure_code: Mapped[str | None] = mapped_column(String(32))
    failure_message: Mapped[str | None] = mapped_column(UntrustedText)
    log_offset: Mapped[int | None]
    log_length: Mapped[int | None]


class ListingChunk(Base):
    """A chunk of the result of a LIST element; ``entries`` is JSON text."""

    __tablename__ = "listing_chunks"
    __table_args__ = (ForeignKeyConstraint(["job_id", "element_id"], ["job_elements.job_id", "job_elements.id"]),)

    job_id: Mapped[int] = mapped_column(primary_key=True)
    element_id: Mapped[int] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    entries: Mapped[str]


class ListingNotes(Base):
    """Entries that a LIST element could not read or skipped, and why.

    Attributes:
        content: JSON text.
        counts: number by code, JSON text; null in rows of earlier versions. A row without entries may have
            ``FREE_BYTES`` here: bytes that were free at the destination of a copy.
    """

    __tablename__ = "listing_notes"
    __table_args__ = (ForeignKeyConstraint(["job_id", "element_id"], ["job_elements.job_id", "job_elements.id"]),)

    job_id: Mapped[int] = mapped_column(primary_key=True)
    element_id: Mapped[int] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    content: Mapped[str]
    counts: Mapped[str | None]


class CredentialRow(Base):
    """A user's credential of one kind for one site; ``secret`` is encrypted.

    Attributes:
        site_id: 0 for every site.
        valid_until: null for no expiry.
        details: shown to the user: public key, VOMS attributes, account.
    """

    __tablename__ = "credentials"
    __table_args__ = (sa.UniqueConstraint("user_id", "kind", "site_id"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    kind: Mapped[str] = mapped_column(String(32))
    site_id: Mapped[int]
    label: Mapped[str | None]
    subject: Mapped[str]
    valid_until: Mapped[datetime | None]
    details: Mapped[Mapping[str, Any]] = mapped_column(sa.JSON)
    stored_at: Mapped[datetime]
    secret: Mapped[bytes]


class PendingDelegationRow(Base):
    """A delegation that waits for the signed proxy; ``key`` is encrypted."""

    __tablename__ = "pending_delegations"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), unique=True)
    key: Mapped[bytes]
    csr_pem: Mapped[str]
    created_at: Mapped[datetime]


class IdempotentRequest(Base):
    """The job of a request with an ``Idempotency-Key``, so that a repeated request does not register another."""

    __tablename__ = "idempotent_requests"
    __table_args__ = (Index("ix_idempotent_requests_job", "job_id"),)

    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime]


class OidcLoginRow(Base):
    """A user's login at the token issuer of a site; both secrets are encrypted.

    Attributes:
        secret: refresh token, and the one before it; null before the first login, and where the issuer gives none.
        generation: grows with each change of `secret` but by ``pdm admin rekey``.
        issuer, client_id: of the site when the user logged in: the tokens are theirs.
        due_at: when the access token is to be renewed; null for never.
        valid_until: end of the access token.
        failures: failed renewals in a row.
        ended_at: when the issuer refused the refresh token for good.
        device: code that the user has to approve; null if no login is waiting.
        device_until, device_due_at, device_interval_s: of that code.
        leased_by: incarnation of the daemon that renews; null if none does.
    """

    __tablename__ = "oidc_logins"
    __table_args__ = (
        sa.UniqueConstraint("user_id", "site_id"),
        Index("ix_oidc_logins_due", "due_at"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    site_id: Mapped[int]
    issuer: Mapped[str]
    client_id: Mapped[str]
    secret: Mapped[bytes | None]
    generation: Mapped[int]
    subject: Mapped[str]
    logged_in_at: Mapped[datetime | None]
    refreshed_at: Mapped[datetime | None]
    valid_until: Mapped[datetime | None]
    due_at: Mapped[datetime | None]
    failures: Mapped[int]
    error: Mapped[str | None]
    ended_at: Mapped[datetime | None]
    device: Mapped[bytes | None]
    device_until: Mapped[datetime | None]
    device_due_at: Mapped[datetime | None]
    device_interval_s: Mapped[int | None]
    leased_by: Mapped[str | None] = mapped_column(String(64))
    leased_until: Mapped[datetime | None]


class SiteRow(Base):
    """A site that a user has created; sites of the configuration are not stored.

    Attributes:
        endpoints: name of a protocol → URLs.
        authorities: PEM, or empty.
        myproxy: ``HOST:PORT`` of its MyProxy server.
        mover: ``native`` or ``tools``.
        tape: URL of its tape API; null where its HTTPS endpoint names it, or where it has none.
        fts: URL of the FTS3 that carries out copies.
        unlisted: whether the service has made it of a URL.
        oidc: what it says about tokens; see `pdm.workqueue.domain.oidc.OidcSettings`.
        oidc_secret: of the client, encrypted.
    """

    __tablename__ = "sites"

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=False)
    owner_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    public: Mapped[bool]
    name: Mapped[str]
    description: Mapped[str]
    default_folder: Mapped[str]
    endpoints: Mapped[Mapping[str, Any]] = mapped_column(sa.JSON)
    limit_in: Mapped[int | None]
    limit_out: Mapped[int | None]
    authorities: Mapped[str]
    myproxy: Mapped[str | None]
    mover: Mapped[str] = mapped_column(String(8), server_default="native")
    tape: Mapped[str | None]
    fts: Mapped[str | None]
    unlisted: Mapped[bool] = mapped_column(server_default=sa.false())
    oidc: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    oidc_secret: Mapped[bytes | None]
    created_at: Mapped[datetime]


class RestrictionRow(Base):
    """A drained site or a banned user; ``kind`` says which."""

    __tablename__ = "restrictions"

    kind: Mapped[str] = mapped_column(String(8), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    message: Mapped[str]
    subject: Mapped[str]
    since: Mapped[datetime]


class AuditRow(Base):
    """An action in the audit log; rows are never changed."""

    __tablename__ = "audit"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    at: Mapped[datetime]
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    subject: Mapped[str]
    action: Mapped[str] = mapped_column(String(32))
    target: Mapped[str]
    details: Mapped[str]


class SiteVersionRow(Base):
    """One row: the version of sites and restrictions, by which other daemons notice changes, and the last site id.

    Each change updates this row first, so that changes are serialized.
    """

    __tablename__ = "catalogue"

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=False)
    version: Mapped[int]
    last_site: Mapped[int]


class EventRow(Base):
    """An event of a job or a site, written in the transaction that it tells about; rows are never changed.

    Attributes:
        kind: a `pdm.workqueue.domain.notifications.EventKind`.
        job_id: null for a site; so is ``owner_id``, the user of the job.
        data: JSON.
        xact: PostgreSQL: number of the transaction that has written it, or that of the job's event before, if it is
            higher. Transactions commit in another order than they take ids, and readers must not skip any: they read
            in the order of ``xact``, and only what is below all running transactions. 0 on SQLite, which has one
            writer.
    """

    __tablename__ = "events"
    __table_args__ = (
        # SQLite reads by id: there it has no rows, and costs nothing.
        Index("ix_events_order", "xact", "id", sqlite_where=sa.text("xact > 0")),
        Index("ix_events_job", "job_id", "xact", "id"),
        Index("ix_events_owner", "owner_id", "xact", "id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(16))
    job_id: Mapped[int | None]
    owner_id: Mapped[int | None]
    data: Mapped[str]
    xact: Mapped[int]


class FailureCountRow(Base):
    """Number of failed attempts of a job with one code, by which events of failures are bounded."""

    __tablename__ = "failure_counts"
    __table_args__ = ({"sqlite_with_rowid": False},)

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    code: Mapped[str] = mapped_column(String(32), primary_key=True)
    count: Mapped[int]


class WebhookRow(Base):
    """A URL to which events are sent; ``secret`` is encrypted.

    Attributes:
        uid: random; part of the ids of its messages.
        kinds: of events.
        job_id: the only job whose events are sent; null for all of the user's. It may have been removed.
        after_event: only later events are sent.
        request_key: the ``Idempotency-Key`` of the request that has created it.
        fingerprint: of that request.
        failing_since: null after a success.
        failures: deliveries in a row that got no answer.
        rests_until: nothing is sent before.
        leased_by: incarnation of the daemon that sends; null if none does.
    """

    __tablename__ = "webhooks"
    __table_args__ = (
        Index("ix_webhooks_user", "user_id", "id"),
        _partial("ix_webhooks_job", IS_OF_JOB, "job_id"),
        sa.UniqueConstraint("user_id", "request_key"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    uid: Mapped[str] = mapped_column(String(32))
    url: Mapped[str]
    kinds: Mapped[list[Any]] = mapped_column(sa.JSON)
    job_id: Mapped[int | None]
    secret: Mapped[bytes]
    created_at: Mapped[datetime]
    after_event: Mapped[int]
    request_key: Mapped[str | None]
    fingerprint: Mapped[str | None]
    failing_since: Mapped[datetime | None]
    failures: Mapped[int] = mapped_column(Integer)
    rests_until: Mapped[datetime | None]
    disabled_at: Mapped[datetime | None]
    disabled_why: Mapped[str | None] = mapped_column(UntrustedText)
    leased_by: Mapped[str | None] = mapped_column(String(64))
    leased_until: Mapped[datetime | None]


class DeliveryRow(Base):
    """One event for one webhook; the last ones that ended are kept.

    Attributes:
        event_id: 0 for a test.
        job_id: 0 for events that belong to no job; those of one job are sent in order.
        body: JSON text.
        due_at: the next try; null if it has ended.
        status: of HTTP, of the last try.
    """

    __tablename__ = "deliveries"
    __table_args__ = (
        _partial("ix_deliveries_due", IS_UNDELIVERED, "webhook_id", "job_id", "id", "due_at"),
        Index("ix_deliveries_webhook", "webhook_id", "id"),
        Index("ix_deliveries_job", "job_id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    webhook_id: Mapped[int] = mapped_column(ForeignKey("webhooks.id"))
    event_id: Mapped[int]
    job_id: Mapped[int]
    kind: Mapped[str] = mapped_column(String(16))
    body: Mapped[str]
    created_at: Mapped[datetime]
    attempts: Mapped[int] = mapped_column(Integer)
    first_tried_at: Mapped[datetime | None]
    due_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    state: Mapped[str] = mapped_column(String(16))
    status: Mapped[int | None] = mapped_column(Integer)
    error: Mapped[str | None] = mapped_column(UntrustedText)


class MailSubscriptionRow(Base):
    """A user's mail address, and what is sent to it.

    Attributes:
        notify: names of what the user is notified of.
        per: ``job`` or ``day``.
        after_event: only later events are notified.
        code_digest: SHA-256 of the code that confirms the address; null if none is awaited.
        confirmations: codes that were sent since ``confirmations_since``.
        due_at: when the next mail is sent; null if there is nothing to say.
        leased_by: incarnation of the daemon that sends; null if none does.
    """

    __tablename__ = "mail_subscriptions"
    __table_args__ = (_partial("ix_mail_subscriptions_due", IS_UNDELIVERED, "due_at"),)

    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True, autoincrement=False)
    address: Mapped[str]
    notify: Mapped[list[Any]] = mapped_column(sa.JSON)
    per: Mapped[str] = mapped_column(String(8))
    after_event: Mapped[int]
    confirmed_at: Mapped[datetime | None]
    code_digest: Mapped[str | None] = mapped_column(String(64))
    code_sent_at: Mapped[datetime | None]
    wrong_codes: Mapped[int] = mapped_column(Integer)
    confirmations: Mapped[int] = mapped_column(Integer)
    confirmations_since: Mapped[datetime | None]
    due_at: Mapped[datetime | None]
    sent_at: Mapped[datetime | None]
    failures: Mapped[int] = mapped_column(Integer)
    error: Mapped[str | None] = mapped_column(UntrustedText)
    leased_by: Mapped[str | None] = mapped_column(String(64))
    leased_until: Mapped[datetime | None]


class MailNoticeRow(Base):
    """Something that the next mail to a user says.

    Attributes:
        job_id: 0 for a confirmation code, which ``details`` has then.
        what: ``ended``, ``failed`` or ``held``; ``code`` for a confirmation.
        details: JSON text of the event.
    """

    __tablename__ = "mail_notices"
    __table_args__ = (
        Index("ix_mail_notices_user", "user_id", "id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("mail_subscriptions.user_id"))
    job_id: Mapped[int]
    what: Mapped[str] = mapped_column(String(8))
    at: Mapped[datetime]
    details: Mapped[str]


class NotifiedRow(Base):
    """One row: the last event that was entered for webhooks and mail; locked while events are entered."""

    __tablename__ = "notified"

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=False)
    event_id: Mapped[int]


class FtsJobRow(Base):
    """A job as a client of FTS3 has submitted it; its files are elements of the jobs of `FtsPartRow`.

    Attributes:
        fts_id: a UUID, which the client may know before it submits; one of the user's.
        details: what the client has sent beside the files, for its questions.
    """

    __tablename__ = "fts_jobs"
    __table_args__ = (
        Index("ux_fts_jobs_fts_id", "fts_id", "user_id", unique=True),
        Index("ix_fts_jobs_user", "user_id", "id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    fts_id: Mapped[str] = mapped_column(String(36))
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    vo_name: Mapped[str]
    submitted_at: Mapped[datetime]
    details: Mapped[dict[str, Any]] = mapped_column(sa.JSON)


class FtsPartRow(Base):
    """A job that carries out files of an `FtsJobRow`.

    Attributes:
        fts_job: number of the `FtsJobRow`, which is deleted with the last of its parts.
    """

    __tablename__ = "fts_parts"
    __table_args__ = (Index("ix_fts_parts_fts_job", "fts_job", "position"), {"sqlite_with_rowid": False})

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True, autoincrement=False)
    fts_job: Mapped[int]
    position: Mapped[int] = mapped_column(Integer)


class FtsFileRow(Base):
    """What a client of FTS3 has said of one file, an element.

    Attributes:
        file_index: place among the files of the submission; those with several sources have one for all.
        details: whatever is given back as it came.
    """

    __tablename__ = "fts_files"
    __table_args__ = ({"sqlite_with_rowid": False},)

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True, autoincrement=False)
    element_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    file_index: Mapped[int]
    source_surl: Mapped[str]
    dest_surl: Mapped[str]
    details: Mapped[dict[str, Any]] = mapped_column(sa.JSON)


class FtsBanRow(Base):
    """A storage that an operator has banned by FTS3's REST API; its sites are drained.

    Attributes:
        storage: ``SCHEME://HOST``.
        status: ``CANCEL``, ``WAIT``, or ``WAIT_AS`` if jobs for it are accepted, and wait.
        user_id: the operator.
    """

    __tablename__ = "fts_bans"

    storage: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(String(8))
    message: Mapped[str]
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    since: Mapped[datetime]


class PurgedJobRow(Base):
    """What is left of a job whose rows were removed by age: its summary, and where its receipt and logs are.

    Attributes:
        num_done: elements; so are ``num_failed`` and ``num_cancelled``.
        receipt_pieces: number of its `KeptReceiptRow`; 0 while they are being removed, null if there are none.
    """

    __tablename__ = "purged_jobs"
    __table_args__ = (
        Index("ix_purged_jobs_purged", "purged_at", "id"),
        _partial("ix_purged_jobs_receipt", HAS_RECEIPT, "finished_at", "id"),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=False)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    type: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(16))
    src_siteid: Mapped[int]
    src_filepath: Mapped[str]
    dst_siteid: Mapped[int | None]
    dst_filepath: Mapped[str | None]
    label: Mapped[str | None]
    log_uid: Mapped[str] = mapped_column(String(64))
    timestamp: Mapped[datetime]
    finished_at: Mapped[datetime]
    purged_at: Mapped[datetime]
    num_elements: Mapped[int]
    num_done: Mapped[int]
    num_failed: Mapped[int]
    num_cancelled: Mapped[int]
    bytes_done: Mapped[int]
    receipt_pieces: Mapped[int | None] = mapped_column(Integer)


class KeptReceiptRow(Base):
    """A piece of the receipt of a purged job: lines of JSON, compressed with zlib.

    It is written before the job is purged, and has no foreign key because of that.
    """

    __tablename__ = "kept_receipts"

    job_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    content: Mapped[bytes]


class RetentionRow(Base):
    """One row: the daemon that removes what is old.

    Attributes:
        leased_by: its incarnation; null if none does.
        receipt_of: the job whose receipt is being written before it is purged.
    """

    __tablename__ = "retention"

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=False)
    leased_by: Mapped[str | None] = mapped_column(String(64))
    leased_until: Mapped[datetime | None]
    receipt_of: Mapped[int | None]


class WaitRow(Base):
    """Elements of a job that are HELD while a site is polled; see `pdm.workqueue.domain.holds.Wait`.

    Attributes:
        began_at: when its elements were set aside.
        due_at: when it is visited next.
        leased_by: incarnation of the daemon that visits it; null for none.
        message: why the last visit got no answer; null if it got one.
    """

    __tablename__ = "waits"
    __table_args__ = (
        Index("ix_waits_due", "due_at"),
        Index("ix_waits_job", "job_id", "kind", "phase"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"))
    kind: Mapped[str] = mapped_column(String(16))
    phase: Mapped[str] = mapped_column(String(16))
    site_id: Mapped[int]
    request: Mapped[str | None] = mapped_column(UntrustedText)
    began_at: Mapped[datetime]
    deadline: Mapped[datetime]
    due_at: Mapped[datetime]
    leased_by: Mapped[str | None] = mapped_column(String(64))
    leased_until: Mapped[datetime | None]
    turn: Mapped[int] = mapped_column(server_default="0")
    polls: Mapped[int] = mapped_column(Integer, server_default="0")
    errors: Mapped[int] = mapped_column(Integer, server_default="0")
    message: Mapped[str | None] = mapped_column(UntrustedText)


class WaitElementRow(Base):
    """An element that a wait concerns; ``ready``: whether its request has brought the file to disk."""

    __tablename__ = "wait_elements"
    __table_args__ = ({"sqlite_with_rowid": False},)

    wait_id: Mapped[int] = mapped_column(ForeignKey("waits.id"), primary_key=True)
    element_id: Mapped[int] = mapped_column(primary_key=True)
    ready: Mapped[bool] = mapped_column(server_default=sa.false())

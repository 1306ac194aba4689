"""Register, fetch and page jobs, elements and attempts; idempotency keys and their expiry."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from attrs import define, field, frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.jobs import AttemptRecord, ElementRecord, JobRecord, NewJob
from pdm.workqueue.store.events import note_submitted
from pdm.workqueue.store.idempotency import IdempotencyKey, earlier_job, remember_job
from pdm.workqueue.store.records import (
    ELEMENT_COLUMNS,
    ENDED_ATTEMPTS,
    IS_THERE,
    JOB_COLUMNS,
    attempt_record,
    element_record,
    elements,
    insert_elements,
    job_record,
    jobs,
    predecessors_column,
    workers,
)
from pdm.workqueue.WorkqueueDB import AT_ONCE, IS_NOT_DONE, IS_SET_ASIDE, MAX_BYTES

#: Capacity; the least recently used job leaves first.
MOST_JOBS = 2048
#: Jobs with longer paths and labels are not cached, which bounds the memory to some tens of MiB.
LONGEST_TEXT = 2000

_KEY = "written jobs"


def note_written(session: Session, record: JobRecord) -> None:
    """Record that this transaction has written a job; it is cached after the commit."""
    session.info.setdefault(_KEY, {})[record.id] = record


def written_jobs(session: Session) -> Mapping[int, JobRecord]:
    """The jobs that a transaction has written, in their last state."""
    noted: Mapping[int, JobRecord] = session.info.get(_KEY, {})
    return noted


@define(eq=False)
class JobRead:
    """A read of one job; its result is cached if the job was not written meanwhile."""

    record: JobRecord | None = None


@define(eq=False)
class JobCache:
    """Caches jobs. Writer threads call `begin_write` and `end_write`, the reactor thread the other methods.

    Attributes:
        most: capacity; 0 if other processes write the database, too.
    """

    most: int = MOST_JOBS
    _kept: OrderedDict[int, JobRecord] = field(factory=OrderedDict)
    #: Job → number of the latest commit that writes it.
    _being_written: dict[int, int] = field(factory=dict)
    #: Running reads of jobs that no commit has touched since.
    _loading: dict[int, JobRead] = field(factory=dict)
    _commits: int = 0
    _lock: threading.Lock = field(factory=threading.Lock)

    def get(self, job_id: int) -> JobRecord | None:
        """A job as committed, None if it is not cached."""
        with self._lock:
            record = self._kept.get(job_id)
            if record is not None:
                self._kept.move_to_end(job_id)
            return record

    @contextmanager
    def loading(self, job_id: int) -> Iterator[JobRead]:
        """Context of a read; set ``record`` of the result, which is cached if it is still current."""
        loading = JobRead()
        with self._lock:
            if self.most and job_id not in self._being_written:
                self._loading[job_id] = loading
        try:
            yield loading
        finally:
            with self._lock:
                if self._loading.get(job_id) is loading:
                    del self._loading[job_id]
                    if loading.record is not None:
                        self._keep(loading.record)

    def begin_write(self, records: Mapping[int, JobRecord]) -> int:
        """Remove the jobs of a commit from the cache; returns the number of the commit."""
        with self._lock:
            self._commits += 1
            if self.most:
                for job_id in records:
                    self._kept.pop(job_id, None)
                    self._loading.pop(job_id, None)
                    self._being_written[job_id] = self._commits
            return self._commits

    def end_write(self, commit: int, records: Mapping[int, JobRecord], *, committed: bool) -> None:
        """Cache the jobs of a commit, unless a later commit has begun to change the same job.

        ``commit``: number from `begin_write`. ``records``: as for `begin_write`. ``committed``: False after a rollback:
        then the next request reads the database.
        """
        with self._lock:
            for job_id, record in records.items():
                if self._being_written.get(job_id) == commit:
                    del self._being_written[job_id]
                    if committed:
                        self._keep(record)

    def forget(self, numbers: Collection[int]) -> None:
        """Drop jobs that are not there any more; a read of one of them that still runs is not cached either."""
        with self._lock:
            for job_id in numbers:
                self._kept.pop(job_id, None)
                self._loading.pop(job_id, None)

    def _keep(self, record: JobRecord) -> None:
        if len(record.src_filepath) + len(record.dst_filepath or "") + len(record.label or "") > LONGEST_TEXT:
            return
        self._kept[record.id] = record
        self._kept.move_to_end(record.id)
        if len(self._kept) > self.most:
            self._kept.popitem(last=False)


_SET_ASIDE = frozenset({JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.HELD})


@frozen
class JobFilter:
    """Which jobs; None stands for all.

    Attributes:
        site: source or destination.
        label_part: any part of the label, in any case of ASCII letters.
        since: registered at that time or later.
        after: only ids above.
        before: only ids below.
        newest_first: in descending order, so that ``limit`` keeps the newest.
    """

    owner_id: int | None = None
    statuses: Collection[JobStatus] | None = None
    types: Collection[JobType] | None = None
    site: int | None = None
    label: str | None = None
    label_part: str | None = None
    since: datetime | None = None
    limit: int | None = None
    after: int | None = None
    before: int | None = None
    newest_first: bool = False


@frozen
class ElementFilter:
    """Which elements of a job; None stands for all.

    Attributes:
        after: only ids above.
        with_attempts: only elements that were started at least once.
        codes: only elements whose last attempt failed with one of these codes.
        scopes: only elements whose last attempt failed with one of these scopes.
        name_part: any part of the path at the source or the destination, in any case of ASCII letters.
        until: only ids up to this one.
    """

    statuses: Collection[JobStatus] | None = None
    types: Collection[JobType] | None = None
    limit: int | None = None
    after: int | None = None
    with_attempts: bool = False
    codes: Collection[FailureCode] | None = None
    scopes: Collection[FailureScope] | None = None
    name_part: str | None = None
    until: int | None = None


_FETCH = sa.select(*JOB_COLUMNS).where(jobs.c.id == bindparam("number"), IS_THERE)
_INSERT_JOB = sa.insert(jobs).returning(jobs.c.id)


def submit(session: Session, new: NewJob, key: IdempotencyKey | None, now: datetime) -> JobRecord:
    """Register a job with its first element, or return the job of an earlier request with the same key.

    Raises:
        IdempotencyConflictError: the key was used for another request.
    """
    # The session would look up its engine at each statement.
    connection = session.connection()
    known = None if key is None else earlier_job(session, key)
    if known is not None:
        return job_record(connection.execute(_FETCH, {"number": known}).one())
    row = _job_row(new, now)
    row["id"] = job_id = connection.execute(_INSERT_JOB, row).scalar_one()
    insert_elements(session, job_id, 0, [new.first, *new.more], new.max_tries, now, new.checksums)
    if key is not None:
        remember_job(session, key, job_id, now)
    # Built from the inserted values instead of reading the row back.
    record = job_record(row.get(column.name) for column in JOB_COLUMNS)
    note_written(session, record)
    note_submitted(session, record)
    return record


def _job_row(new: NewJob, now: datetime) -> dict[str, Any]:
    listing = new.first.type is JobType.LIST
    return {
        "user_id": new.user_id,
        "type": new.type,
        "status": JobStatus.SUBMITTED,
        "protocol": new.protocol,
        "src_siteid": new.src_siteid,
        "src_filepath": new.src_filepath,
        "dst_siteid": new.dst_siteid,
        "dst_filepath": new.dst_filepath,
        "extra_opts": dict(new.options),
        "priority": new.priority,
        "max_tries": new.max_tries,
        "label": new.label,
        "max_active": new.max_active,
        "log_uid": new.log_uid,
        "timestamp": now,
        "cancel_requested": False,
        "num_elements": 1 + len(new.more),
        "num_submitted": 1 + len(new.more),
        "num_running": 0,
        "num_done": 0,
        "num_failed": 0,
        "num_cancelled": 0,
        "num_held": 0,
        "bytes_total": min(sum(one.size for one in (new.first, *new.more)), MAX_BYTES),
        "bytes_done": 0,
        "skipped": 0,
        "already_there": 0,
        "bytes_already_there": 0,
        "list_due_at": AT_ONCE if listing else None,
        "work_due_at": None if listing else AT_ONCE,
        "after": predecessors_column(new.after),
        "is_awaited": False,
        "deadline": new.deadline,
        "cancel_reason": None,
        "schedule_id": new.schedule_id,
    }


_PAGE = sa.select(*JOB_COLUMNS)


def fetch(session: Session, job_id: int, owner_id: int | None) -> JobRecord | None:
    """A job; None if it does not exist or its owner is not ``owner_id``. ``owner_id`` None: any owner."""
    row = session.execute(_FETCH, {"number": job_id}).one_or_none()
    if row is None:
        return None
    record = job_record(row)
    return record if owner_id in (None, record.user_id) else None


def page(session: Session, wanted: JobFilter) -> list[JobRecord]:
    """Jobs in ascending order of their ids, or in descending order."""
    return [job_record(row) for row in session.execute(page_statement(wanted))]


def page_statement(wanted: JobFilter) -> sa.Select[Any]:
    """The query of `page`."""
    order = jobs.c.id.desc() if wanted.newest_first else jobs.c.id
    conditions = _conditions(wanted)
    statement = _PAGE.order_by(order).limit(wanted.limit)
    if wanted.statuses and wanted.limit is not None:
        # The first ones of each status, from an index. In the order of numbers, those few that still run would be
        # searched in the whole history.
        firsts = (
            sa.select(jobs.c.id).where(*_has_status(wanted, status), *conditions).order_by(order).limit(wanted.limit)
            for status in sorted(wanted.statuses, key=lambda status: status.name)
        )
        found = sa.union_all(*(sa.select(first.subquery().c.id) for first in firsts))
        return statement.where(jobs.c.id.in_(found))
    if wanted.statuses:
        statement = statement.where(jobs.c.status.in_(wanted.statuses))
    return statement.where(*conditions)


def _has_status(wanted: JobFilter, status: JobStatus) -> Sequence[sa.ColumnElement[bool]]:
    # In the text: a generic plan of PostgreSQL expects as many that run as that are DONE, and reads all of the user's.
    has_status = jobs.c.status == sa.literal(status, jobs.c.status.type, literal_execute=True)
    if wanted.owner_id is not None or status is JobStatus.DONE:
        return [has_status]
    # Of all users, a partial index has those that are not DONE; those that are will be found in the order of numbers.
    return [has_status, sa.text(IS_NOT_DONE)]  # type: ignore[list-item]  # a text is a condition, too


def _conditions(wanted: JobFilter) -> list[sa.ColumnElement[bool]]:
    """All of a filter but the statuses."""
    found: list[sa.ColumnElement[bool]] = [IS_THERE]
    if wanted.owner_id is not None:
        found.append(jobs.c.user_id == wanted.owner_id)
    if wanted.types:
        found.append(jobs.c.type.in_(wanted.types))
    if wanted.site is not None:
        found.append(sa.or_(jobs.c.src_siteid == wanted.site, jobs.c.dst_siteid == wanted.site))
    if "\0" in (wanted.label or "") + (wanted.label_part or ""):
        # No text has NUL: PostgreSQL refuses it, also as a value to compare with.
        return [sa.false()]
    if wanted.label is not None:
        found.append(jobs.c.label == wanted.label)
    if wanted.label_part is not None:
        found.append(jobs.c.label.icontains(wanted.label_part, autoescape=True))
    if wanted.since is not None:
        found.append(jobs.c.timestamp >= wanted.since)
    if wanted.after is not None:
        found.append(jobs.c.id > wanted.after)
    if wanted.before is not None:
        found.append(jobs.c.id < wanted.before)
    return found


_FETCH_ELEMENT = sa.select(*ELEMENT_COLUMNS).where(
    elements.c.job_id == bindparam("job"), elements.c.id == bindparam("number")
)
_PAGE_ELEMENTS = sa.select(*ELEMENT_COLUMNS).where(elements.c.job_id == bindparam("job")).order_by(elements.c.id)


def fetch_element(session: Session, job_id: int, element_id: int) -> ElementRecord | None:
    row = session.execute(_FETCH_ELEMENT, {"job": job_id, "number": element_id}).one_or_none()
    return None if row is None else element_record(row)


def page_elements(session: Session, job_id: int, wanted: ElementFilter) -> list[ElementRecord]:
    """Elements of a job in ascending order."""
    return [element_record(row) for row in session.execute(elements_statement(job_id, wanted))]


def elements_statement(job_id: int, wanted: ElementFilter) -> sa.Select[Any]:
    """The query of `page_elements`."""
    statement = _PAGE_ELEMENTS.params(job=job_id).limit(wanted.limit)
    if wanted.statuses:
        statement = statement.where(elements.c.status.in_(wanted.statuses))
        if _SET_ASIDE.issuperset(wanted.statuses):
            # The partial index finds the few FAILED ones without scanning the others.
            statement = statement.where(sa.text(IS_SET_ASIDE))
    if wanted.types:
        statement = statement.where(elements.c.type.in_(wanted.types))
    if wanted.after is not None:
        statement = statement.where(elements.c.id > wanted.after)
    if wanted.codes:
        statement = statement.where(
            elements.c.failure_code.in_([code.value for code in wanted.codes]), elements.c.status != JobStatus.DONE
        )
    if wanted.scopes:
        statement = statement.where(elements.c.failure_scope.in_([scope.value for scope in wanted.scopes]))
    if "\0" in (wanted.name_part or ""):
        return statement.where(sa.false())
    if wanted.name_part is not None:
        found = (
            column.icontains(wanted.name_part, autoescape=True)
            for column in (elements.c.src_filepath, elements.c.dst_filepath)
        )
        statement = statement.where(sa.or_(*found))
    if wanted.until is not None:
        statement = statement.where(elements.c.id <= wanted.until)
    if wanted.with_attempts:
        statement = statement.where(elements.c.attempts > 0)
    return statement


def attempts(session: Session, job_id: int, element_id: int) -> list[AttemptRecord]:
    """The ended attempts of an element, the oldest first."""
    return ended_attempts(session, job_id, element_id, element_id)


def latest_attempts(session: Session, job_id: int, first: int, last: int) -> dict[int, AttemptRecord]:
    """The latest ended attempt of each element from one to another, by the element's number."""
    # Of each element, the latest comes last and stays.
    return {record.element_id: record for record in ended_attempts(session, job_id, first, last)}


def ended_attempts(session: Session, job_id: int, first: int, last: int) -> list[AttemptRecord]:
    """The ended attempts of the elements from one to another, by element and attempt."""
    rows = session.execute(ENDED_ATTEMPTS, {"job": job_id, "first": first, "last": last})
    return [attempt_record(row) for row in rows]


_WORKER_OF_ELEMENT = sa.select(workers.c.name).where(
    workers.c.id == elements.c.worker_id,
    elements.c.job_id == bindparam("job"),
    elements.c.id == bindparam("number"),
    elements.c.status == JobStatus.RUNNING,
)


def worker_of_element(session: Session, job_id: int, element_id: int) -> str | None:
    """The name of the daemon that runs an element; None if none does."""
    name: str | None = session.scalar(_WORKER_OF_ELEMENT, {"job": job_id, "number": element_id})
    return name


def fetch_attempt(session: Session, job_id: int, element_id: int, attempt: int) -> AttemptRecord | None:
    """An ended attempt."""
    return next((one for one in attempts(session, job_id, element_id) if one.attempt == attempt), None)

"""Removal of old records that belong to no job, of the free pages of an SQLite file, and a survey of what is old."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.store.records import (
    attempts,
    audit,
    credentials,
    elements,
    events,
    jobs,
    matched,
    pending_delegations,
    purged_jobs,
    workers,
)
from pdm.workqueue.store.retention import HAS_LEFTOVER_FILES, IS_AWAITED, Step
from pdm.workqueue.WorkqueueDB import CLOCK_SKEW, HAS_ENDED, HAS_RECEIPT

#: Remaining jobs and elements that are searched for the name of a dead worker.
_MOST_SEARCHED = 100_000
_MOST_JOBS_SEARCHED = 500
#: Dead workers that are examined at once.
_WORKERS_AT_ONCE = 10
_OLDEST_RECORDS = sa.select(audit.c.id).order_by(audit.c.id).limit(bindparam("most"))
_DELETE_RECORDS = sa.delete(audit).where(audit.c.id.in_(_OLDEST_RECORDS), audit.c.at < bindparam("before"))
_OLDEST_EVENTS = sa.select(events.c.id).order_by(events.c.id).limit(bindparam("most"))
_DELETE_EVENTS = sa.delete(events).where(events.c.id.in_(_OLDEST_EVENTS), events.c.at < bindparam("before"))


def remove_audit(session: Session, before: datetime, most: int) -> Step:
    """Remove audit records of before a time, of a number of the oldest."""
    count = matched(session, _DELETE_RECORDS, {"before": before, "most": most})
    return Step(count, more=count == most)


def remove_events(session: Session, before: datetime, most: int) -> Step:
    """Remove events of before a time, of a number of the oldest."""
    count = matched(session, _DELETE_EVENTS, {"before": before, "most": most})
    return Step(count, more=count == most)


def remove_credentials(session: Session, before: datetime) -> int:
    """Remove credentials that had expired before a time, and delegations that were begun before it; their number."""
    expired = sa.delete(credentials).where(credentials.c.valid_until < before)
    pending = sa.delete(pending_delegations).where(pending_delegations.c.created_at < before)
    return matched(session, expired) + matched(session, pending)


_OLDEST_JOBS = (
    sa.select(jobs.c.id, jobs.c.timestamp, jobs.c.num_elements).order_by(jobs.c.id).limit(_MOST_JOBS_SEARCHED)
)
_DEAD_WORKERS = (
    sa.select(workers.c.id, workers.c.seen_at)
    .where(
        sa.or_(workers.c.lease_until.is_(None), workers.c.lease_until < bindparam("before")),
        workers.c.seen_at < bindparam("before"),
        ~sa.exists().where(attempts.c.worker_id == workers.c.id).correlate(workers),
    )
    .order_by(workers.c.seen_at)
    .limit(_WORKERS_AT_ONCE)
)


def dead_workers(session: Session, before: datetime) -> list[int]:
    """Daemons that were last seen before a time, and by which no attempt is stored. Only reads: run it in a reader.

    Elements have their worker, but no index by it. A worker has run elements only of jobs that were registered before
    it was last seen: if many of those are kept, it is kept, too.
    """
    dead = session.execute(_DEAD_WORKERS, {"before": before}).all()
    if not dead:
        return []
    oldest = session.execute(_OLDEST_JOBS).all()
    found = []
    for worker in dead:
        older = [job for job in oldest if job.timestamp <= worker.seen_at + CLOCK_SKEW]
        if len(older) == _MOST_JOBS_SEARCHED or sum(job.num_elements for job in older) > _MOST_SEARCHED:
            # Of the others, seen later, even more jobs are kept.
            break
        has_run = sa.exists().where(elements.c.job_id.in_([job.id for job in older]), elements.c.worker_id == worker.id)
        if not session.scalar(sa.select(has_run)):
            found.append(worker.id)
    return found


def remove_workers(session: Session, numbers: Collection[int], before: datetime) -> int:
    """Remove the rows of daemons, unless they have come back since; returns their number."""
    condition = sa.and_(
        workers.c.id.in_(numbers),
        sa.or_(workers.c.lease_until.is_(None), workers.c.lease_until < before),
        workers.c.seen_at < before,
    )
    return matched(session, sa.delete(workers).where(condition)) if numbers else 0


#: Free pages that stay in the file, because new rows will need them: at least so many, and a part of all.
_PAGES_KEPT, _PART_KEPT = 1000, 20
#: ``PRAGMA auto_vacuum``: free pages are returned when asked for.
_INCREMENTAL = 2


def shrink(session: Session, most: int) -> int:
    """Return free pages of an SQLite file to the file system, at most a number; returns how many.

    Does nothing on PostgreSQL, whose autovacuum keeps the space of deleted rows for new ones, and in a file that an
    earlier version has made: that must be rewritten once (``pdm admin prune --compact``).
    """
    connection = session.connection()
    if connection.dialect.name != "sqlite" or sqlite_pragma(connection, "auto_vacuum") != _INCREMENTAL:
        return 0
    free = sqlite_pragma(connection, "freelist_count")
    count = min(most, free - max(_PAGES_KEPT, sqlite_pragma(connection, "page_count") // _PART_KEPT))
    if count <= 0:
        return 0
    # Python's driver makes one step of this statement, which returns one page, whatever number it has.
    for _ in range(count):
        connection.exec_driver_sql("PRAGMA incremental_vacuum(1)")
    return count


def sqlite_pragma(connection: sa.Connection, name: str) -> int:
    """The value of a numeric setting of an SQLite database."""
    value: int = connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
    return value


@frozen(kw_only=True)
class Survey:
    """What is older than some times; nothing is changed.

    Attributes:
        kept_for_files: old jobs that are kept because temporary files of theirs are not removed yet.
        kept_for_others: old jobs that are kept because other jobs wait for them.
        bytes: of the rows of jobs in the database, estimated by their part of all elements.
    """

    jobs: int
    elements: int
    bytes: int
    kept_for_files: int
    kept_for_others: int
    events: int
    records: int
    receipts: int
    summaries: int


def survey(
    session: Session,
    *,
    jobs_before: datetime | None,
    events_before: datetime | None,
    audit_before: datetime | None,
    receipts_before: datetime | None,
    summaries_before: datetime | None,
) -> Survey:
    """Count what is older than some times; None stands for nothing. Reads large parts of the database."""

    def count(table: sa.Table, column: sa.ColumnElement[Any], before: datetime | None, *more: Any) -> int:
        if before is None:
            return 0
        return session.scalar(sa.select(sa.func.count()).select_from(table).where(column < before, *more)) or 0

    number = elements_going = kept_for_files = kept_for_others = 0
    if jobs_before is not None:
        old = (sa.text(HAS_ENDED), jobs.c.finished_at < jobs_before)
        sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(jobs.c.num_elements), 0))
        number, elements_going = session.execute(
            sums.select_from(jobs).where(*old, ~HAS_LEFTOVER_FILES, ~IS_AWAITED)
        ).one()
        kept_for_files = count(jobs, jobs.c.finished_at, jobs_before, sa.text(HAS_ENDED), HAS_LEFTOVER_FILES)
        kept_for_others = count(jobs, jobs.c.finished_at, jobs_before, sa.text(HAS_ENDED), IS_AWAITED)
    all_elements = session.scalar(sa.select(sa.func.coalesce(sa.func.sum(jobs.c.num_elements), 0))) or 0
    return Survey(
        jobs=number,
        elements=int(elements_going),
        bytes=round(_bytes_of_jobs(session) * int(elements_going) / max(int(all_elements), 1)),
        kept_for_files=kept_for_files,
        kept_for_others=kept_for_others,
        events=count(events, events.c.at, events_before),
        records=count(audit, audit.c.at, audit_before),
        receipts=count(purged_jobs, purged_jobs.c.finished_at, receipts_before, sa.text(HAS_RECEIPT)),
        summaries=count(purged_jobs, purged_jobs.c.purged_at, summaries_before),
    )


_SIZES = sa.text(
    "SELECT SUM(pg_total_relation_size(CAST(name AS regclass)))"
    " FROM (VALUES ('jobs'), ('job_elements'), ('attempts'), ('listing_chunks'), ('listing_notes')) AS of_jobs (name)"
)


def _bytes_of_jobs(session: Session) -> int:
    """Bytes of the tables of jobs with their indexes; on SQLite, of the whole file without free pages."""
    connection = session.connection()
    if connection.dialect.name != "sqlite":
        return int(session.scalar(_SIZES) or 0)
    used = sqlite_pragma(connection, "page_count") - sqlite_pragma(connection, "freelist_count")
    return used * sqlite_pragma(connection, "page_size")

"""Remove what is old, a few rows in each transaction.

A job is purged in two steps. The first, `purge`, checks that it may go, writes its summary to ``purged_jobs`` and sets
``purged_at``: from then on no statement finds the job. The second, `remove_rows`, deletes the rows of such jobs, and
continues after a crash where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.store import webhooks as webhook_store
from pdm.workqueue.store.leases import is_free, lease_clock
from pdm.workqueue.store.records import (
    FINAL,
    attempts,
    columns_of,
    deliveries,
    elements,
    events,
    failure_counts,
    fts_files,
    fts_jobs,
    fts_parts,
    idempotent_requests,
    jobs,
    kept_receipts,
    listing_chunks,
    listing_notes,
    matched,
    predecessors,
    purged_jobs,
    retention,
    schedule_runs,
    wait_elements,
    waits,
    webhooks,
)
from pdm.workqueue.WorkqueueDB import HAS_ENDED, HAS_LEFTOVER, IS_PURGED

_R = TypeVar("_R")

#: Jobs whose rows one transaction removes at most.
_JOBS_AT_ONCE = 500
#: Rows of other tables for a job, besides its elements; only estimated.
_ROWS_OF_JOB = 6
#: Chunks of a listing and pieces of receipts are large.
ROWS_FOR_CHUNK = 20


class EndedJob(NamedTuple):
    """A job that has ended."""

    finished_at: datetime
    id: int
    num_elements: int
    log_uid: str

    @property
    def place(self) -> tuple[datetime, int]:
        """Where it is in the order of `ended_jobs`."""
        return self.finished_at, self.id


@frozen
class Step:
    """What one transaction has removed.

    Attributes:
        rows: of all tables.
        jobs: that are gone now.
        more: whether there is more to remove.
    """

    rows: int
    jobs: int = 0
    more: bool = False


def timed(session: Session, function: Callable[..., _R], *args: object) -> tuple[_R, float]:
    """The result of a function of this module, and how many seconds it took."""
    began = time.perf_counter()
    result = function(session, *args)
    return result, time.perf_counter() - began


# -- one daemon at a time

_TURN = sa.update(retention).where(retention.c.id == 1)


def take_turn(session: Session, incarnation: str, lease_s: float, now: datetime) -> bool:
    """Lease the removal of what is old, or renew that lease; False while another daemon has it."""
    timestamp = lease_clock(session, now)
    mine = sa.or_(retention.c.leased_by == incarnation, is_free(retention, timestamp))
    until = timestamp + timedelta(seconds=lease_s)
    if session.scalar(sa.select(retention.c.id)) is None:
        session.execute(sa.insert(retention).values(id=1))
    return bool(matched(session, _TURN.where(mine).values(leased_by=incarnation, leased_until=until)))


def end_turn(session: Session, incarnation: str) -> None:
    """End the lease."""
    mine = _TURN.where(retention.c.leased_by == incarnation)
    session.execute(mine.values(leased_by=None, leased_until=None))


# -- which jobs

_ENDED = (
    sa.select(jobs.c.finished_at, jobs.c.id, jobs.c.num_elements, jobs.c.log_uid)
    .where(sa.text(HAS_ENDED), jobs.c.finished_at < bindparam("before"))
    .order_by(jobs.c.finished_at, jobs.c.id)
    .limit(bindparam("most"))
)
_ENDED_AFTER = _ENDED.where(
    sa.tuple_(jobs.c.finished_at, jobs.c.id)
    > sa.tuple_(bindparam("after", type_=jobs.c.finished_at.type), bindparam("after_id"))
)


def ended_jobs(session: Session, before: datetime, after: tuple[datetime, int] | None, most: int) -> list[EndedJob]:
    """Jobs that have ended before a time, in the order of their ends.

    ``after``: place of the last one of the previous call; None for the first.
    """
    parameters: dict[str, Any] = {"before": before, "most": most}
    if after is None:
        rows = session.execute(_ENDED, parameters)
    else:
        rows = session.execute(_ENDED_AFTER, parameters | {"after": after[0], "after_id": after[1]})
    return [EndedJob(*row) for row in rows]


HAS_LEFTOVER_FILES = sa.exists().where(elements.c.job_id == jobs.c.id, sa.text(HAS_LEFTOVER)).correlate(jobs)
IS_AWAITED = sa.exists().where(predecessors.c.predecessor_id == jobs.c.id).correlate(jobs)
_FINISHED_AT = bindparam("ended_before", type_=jobs.c.finished_at.type)
_LOCK_ENDED = (
    sa.select(jobs.c.id, jobs.c.finished_at)
    .where(
        jobs.c.id.in_(bindparam("numbers", expanding=True)),
        sa.text(HAS_ENDED),
        jobs.c.finished_at < _FINISHED_AT,
        jobs.c.status.in_(FINAL),
    )
    .order_by(jobs.c.id)
)
_LOCK_PURGEABLE = _LOCK_ENDED.where(~HAS_LEFTOVER_FILES, ~IS_AWAITED).with_for_update(skip_locked=True, of=jobs)
_SUMMARY = (
    *("user_id", "src_siteid", "src_filepath", "dst_siteid", "dst_filepath", "label", "log_uid"),
    *("timestamp", "finished_at", "num_elements", "num_done", "num_failed", "num_cancelled", "bytes_done"),
)
_WRITE_SUMMARY = sa.insert(purged_jobs).from_select(
    ["id", *_SUMMARY, "type", "status", "purged_at"],
    sa.select(
        jobs.c.id,
        *columns_of(jobs, *_SUMMARY),
        sa.cast(jobs.c.type, sa.String),
        sa.cast(jobs.c.status, sa.String),
        bindparam("at", type_=purged_jobs.c.purged_at.type),
    ).where(jobs.c.id.in_(bindparam("numbers", expanding=True))),
)
_PURGE = (
    sa.update(jobs)
    .where(jobs.c.id.in_(bindparam("numbers", expanding=True)))
    .values(
        purged_at=bindparam("at", type_=jobs.c.purged_at.type),
        # A daemon of an earlier version does not know ``purged_at``: for it there is nothing to retry.
        num_done=jobs.c.num_elements,
        num_failed=0,
        num_cancelled=0,
    )
)
_FORGET_RUN = sa.update(schedule_runs).where(schedule_runs.c.job_id.in_(bindparam("numbers", expanding=True)))
_WAITING_DELIVERY = (
    sa.exists().where(deliveries.c.webhook_id == webhooks.c.id, deliveries.c.due_at.is_not(None)).correlate(webhooks)
)
_WEBHOOKS = sa.select(webhooks.c.id).where(
    webhooks.c.job_id.in_(bindparam("numbers", expanding=True)), ~_WAITING_DELIVERY
)
_COUNT_PIECES = sa.update(purged_jobs).where(purged_jobs.c.id == bindparam("number"))


def purge(
    session: Session,
    ended: Collection[EndedJob],
    before: datetime,
    now: datetime,
    receipts: Mapping[int, int] | None = None,
    pieces: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Purge jobs that have ended before a time; their rows are removed later, by `remove_rows`.

    A job is left alone that another transaction has locked, that has ended again since it was read, whose temporary
    files are not removed yet, or for which another job waits.

    ``receipts``: number of stored pieces of the receipts of these jobs; None if receipts are not kept. ``pieces``: rows
    of ``kept_receipts`` that are not stored yet, of these jobs.

    Returns:
        The numbers of those that are purged.
    """
    read = {job.id: job.finished_at for job in ended}
    rows = session.execute(_LOCK_PURGEABLE, {"numbers": sorted(read), "ended_before": before}).all()
    numbers = [row.id for row in rows if row.finished_at == read[row.id]]
    if not numbers:
        return []
    those = {"numbers": numbers}
    session.execute(_WRITE_SUMMARY, those | {"at": now})
    session.execute(_PURGE, those | {"at": now})
    session.execute(_FORGET_RUN.values(job_id=None), those)
    for webhook in session.scalars(_WEBHOOKS, those).all():
        webhook_store.remove(session, webhook)
    if receipts is not None:
        kept = [piece for piece in pieces if piece["job_id"] in set(numbers)]
        if kept:
            session.execute(sa.insert(kept_receipts), kept)
        session.execute(
            _COUNT_PIECES.values(receipt_pieces=bindparam("pieces")),
            [{"number": number, "pieces": receipts[number]} for number in numbers],
        )
        session.execute(_TURN.where(retention.c.receipt_of.in_(numbers)).values(receipt_of=None))
    return numbers


def lock_ended(session: Session, numbers: Collection[int], before: datetime) -> list[int]:
    """Those of some jobs that have ended before a time; they cannot be retried before this transaction ends."""
    statement = _LOCK_ENDED.with_for_update(of=jobs)
    return [row.id for row in session.execute(statement, {"numbers": sorted(numbers), "ended_before": before})]


def remove_logs_of(
    session: Session, ended: Collection[EndedJob], before: datetime, remove: Callable[[Sequence[str]], int]
) -> int:
    """Remove the logs of jobs that have ended before a time, while none of them can be retried.

    ``remove``: takes their ``log_uid``, and returns how many had logs.
    """
    still = set(lock_ended(session, [job.id for job in ended], before))
    return remove([job.log_uid for job in ended if job.id in still])


# -- the rows of purged jobs

_PURGED = sa.select(jobs.c.id, jobs.c.num_elements).where(sa.text(IS_PURGED)).order_by(jobs.c.id).limit(_JOBS_AT_ONCE)
_NTH_ELEMENT = (
    sa.select(elements.c.id)
    .where(elements.c.job_id == bindparam("job"))
    .order_by(elements.c.id)
    .offset(bindparam("skip"))
    .limit(1)
)
_DELETE_ELEMENTS_BELOW = sa.delete(elements).where(
    elements.c.job_id == bindparam("job"), elements.c.id < bindparam("end")
)


def of_jobs(column: sa.Column[Any]) -> sa.ColumnElement[bool]:
    """Whether a column has one of ``numbers``."""
    return column.in_(bindparam("numbers", expanding=True))


def delete_some(table: sa.Table, key: Sequence[str], condition: sa.ColumnElement[bool]) -> sa.Delete:
    """A statement that deletes at most ``most`` rows of a condition."""
    columns = columns_of(table, *key)
    chosen = sa.select(*columns).where(condition).limit(bindparam("most"))
    place: Any = columns[0] if len(columns) == 1 else sa.tuple_(*columns)
    return sa.delete(table).where(place.in_(chosen))


_WAITS = sa.select(waits.c.id).where(of_jobs(waits.c.job_id))
#: Tables that may have many rows for one job, and how many rows of elements one of theirs counts for.
_BULKY = tuple(
    (delete_some(table, key, condition), weight)
    for table, key, condition, weight in (
        (listing_chunks, ("job_id", "element_id", "sequence"), of_jobs(listing_chunks.c.job_id), ROWS_FOR_CHUNK),
        (listing_notes, ("job_id", "element_id", "sequence"), of_jobs(listing_notes.c.job_id), ROWS_FOR_CHUNK),
        (attempts, ("job_id", "element_id", "attempt"), of_jobs(attempts.c.job_id), 1),
        (wait_elements, ("wait_id", "element_id"), wait_elements.c.wait_id.in_(_WAITS), 1),
        (events, ("id",), of_jobs(events.c.job_id), 1),
        (fts_files, ("job_id", "element_id"), of_jobs(fts_files.c.job_id), 1),
        (deliveries, ("id",), sa.and_(of_jobs(deliveries.c.job_id), deliveries.c.due_at.is_(None)), 1),
    )
)
_OTHER_PARTS = fts_parts.alias()
#: What else belongs to jobs, in an order that foreign keys allow.
_THE_REST = (
    sa.delete(fts_jobs).where(
        fts_jobs.c.id.in_(sa.select(fts_parts.c.fts_job).where(of_jobs(fts_parts.c.job_id))),
        ~sa.exists().where(_OTHER_PARTS.c.fts_job == fts_jobs.c.id, ~of_jobs(_OTHER_PARTS.c.job_id)),
    ),
    sa.delete(fts_parts).where(of_jobs(fts_parts.c.job_id)),
    sa.delete(elements).where(of_jobs(elements.c.job_id)),
    sa.delete(failure_counts).where(of_jobs(failure_counts.c.job_id)),
    sa.delete(idempotent_requests).where(of_jobs(idempotent_requests.c.job_id)),
    sa.delete(predecessors).where(of_jobs(predecessors.c.job_id)),
    sa.delete(waits).where(of_jobs(waits.c.job_id)),
    sa.delete(jobs).where(of_jobs(jobs.c.id), jobs.c.purged_at.is_not(None)),
)


def remove_rows(session: Session, most: int) -> Step:
    """Delete about ``most`` rows of purged jobs; the row of a job is the last."""
    chosen: list[int] = []
    expected = 0
    for row in session.execute(_PURGED):
        if chosen and expected + row.num_elements + _ROWS_OF_JOB > most:
            break
        chosen.append(row.id)
        expected += row.num_elements + _ROWS_OF_JOB
    if not chosen:
        return Step(0)
    removed = 0
    for statement, weight in _BULKY:
        limit = max(most // weight, 1)
        count = matched(session, statement, {"numbers": chosen, "most": limit})
        removed += count * weight
        if count == limit or removed >= most:
            return Step(removed, more=True)
    if expected > most:
        (job,) = chosen
        end = session.scalar(_NTH_ELEMENT, {"job": job, "skip": most - removed})
        if end is not None:
            return Step(removed + matched(session, _DELETE_ELEMENTS_BELOW, {"job": job, "end": end}), more=True)
    for delete in _THE_REST:
        removed += matched(session, delete, {"numbers": chosen})
    return Step(removed, len(chosen), more=True)


# -- receipts that are written before their jobs are purged


def begin_receipt(session: Session, job_id: int) -> None:
    """Prepare to store the receipt of a job in several transactions; removes what an earlier try has left."""
    session.execute(_TURN.values(receipt_of=job_id))
    session.execute(sa.delete(kept_receipts).where(kept_receipts.c.job_id == job_id))


def store_pieces(session: Session, pieces: Sequence[Mapping[str, Any]]) -> None:
    """Store pieces of a receipt: rows of ``kept_receipts``."""
    session.execute(sa.insert(kept_receipts), pieces)


def drop_unfinished_receipt(session: Session) -> None:
    """Remove the pieces of a receipt whose job was not purged after all."""
    job_id = session.scalar(sa.select(retention.c.receipt_of).where(retention.c.id == 1))
    if job_id is not None:
        session.execute(sa.delete(kept_receipts).where(kept_receipts.c.job_id == job_id))
        session.execute(_TURN.values(receipt_of=None))

"""Elements of a COPY whose listing says what is planned: removals that wait, and the counts of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from itertools import takewhile
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType, PlannedAction
from pdm.workqueue.domain.jobs import ClaimToken, JobRecord, NewElement
from pdm.workqueue.store.locks import LockedJob, lock_job, save_jobs
from pdm.workqueue.store.records import columns_of, elements, insert_elements, matched
from pdm.workqueue.store.row_statements import RowStatement
from pdm.workqueue.WorkqueueDB import MAX_BYTES

#: Phase of the removals of source files: after the whole listing and all copies. A link may lead to another of them.
_SOURCE_PHASE = 1
#: Planned deletions that one transaction drops.
_DROPPED_AT_ONCE = 5000

_COPIED = RowStatement(
    """
    WITH asked (number) AS (VALUES {rows})
    SELECT id, src_filepath, size, mtime FROM asked, job_elements WHERE job_id = ? AND id = number
    """,
    columns_of(elements, "id"),
    columns_of(elements, "job_id"),
    columns_of(elements, "id", "src_filepath", "size", "mtime"),
)


def is_moved(job: JobRecord, *, already_there: bool, attempt: int, planned: str | None) -> bool:
    """Whether the source of a copy that is DONE is removed.

    What the destination had before stays at the source, whatever its checksum: both sites may show one storage,
    and it the same file. Only where the listing of the destination had nothing, an earlier attempt has brought what a
    later one finds there.
    """
    if not job.moves:
        return False
    return not already_there or (attempt > 1 and planned == PlannedAction.COPY)


def add_source_removals(session: Session, job: LockedJob, copied: Sequence[int], now: datetime) -> None:
    """Add the removals of source files in the transaction that settles their copies as DONE; the caller saves the job.

    ``copied``: numbers of the COPY elements.
    """
    rows = sorted(_COPIED.execute(session, [(number,) for number in copied], job.id))
    new = [
        NewElement(JobType.REMOVE, path, size=size, phase=_SOURCE_PHASE, planned=PlannedAction.MOVED, mtime=mtime)
        for _, path, size, mtime in rows
    ]
    insert_elements(session, job.id, job.counters.elements, new, job.record.max_tries, now)
    job.grow(new)


@frozen
class PlannedCount:
    """How many elements have one action.

    Attributes:
        size: bytes of the files.
    """

    action: PlannedAction
    files: int
    directories: int
    size: int


#: Whether a file is the same may have turned out when its checksum was compared.
_ACTION = sa.case((elements.c.already_there, PlannedAction.SAME.value), else_=elements.c.planned)
_COUNT = (
    sa.select(
        _ACTION,
        sa.func.count(),
        sa.func.sum(sa.case((elements.c.is_directory, 1), else_=0)),
        # In two halves: SQLite refuses sums above 63 bits.
        sa.func.sum(elements.c.size.op(">>")(32)),
        sa.func.sum(elements.c.size.op("&")(2**32 - 1)),
    )
    .where(elements.c.job_id == bindparam("of_job"), elements.c.planned.is_not(None))
    .group_by(_ACTION)
)


def count_planned(session: Session, job_id: int) -> list[PlannedCount]:
    """What was planned for the elements of a job; reads all of them."""
    counts = []
    for action, count, directories, high, low in session.execute(_COUNT, {"of_job": job_id}):
        size = min((int(high) << 32) + int(low), MAX_BYTES)
        counts.append(PlannedCount(PlannedAction(action), count - directories, directories, size))
    return counts


_LAST_ELEMENTS = (
    sa.select(*columns_of(elements, "id", "status", "planned", "attempts"))
    .where(elements.c.job_id == bindparam("of_job"))
    .order_by(elements.c.id.desc())
    .limit(_DROPPED_AT_ONCE)
)
_DELETE = sa.delete(elements).where(
    elements.c.job_id == bindparam("of_job"), elements.c.id.between(bindparam("first"), bindparam("last"))
)


def drop_deletions(session: Session, token: ClaimToken, now: datetime) -> bool:
    """Drop deletions that an earlier attempt of a listing has planned: the source may have those files by now.

    They wait for the whole listing, so none has begun; and they have the last numbers of the job, so no gap is left.

    Returns:
        Whether there may be more.
    """
    job = lock_job(session, token.job_id)
    if job is None:
        return False
    dropped = list(takewhile(_is_unbegun_deletion, session.execute(_LAST_ELEMENTS, {"of_job": job.id})))
    if not dropped:
        return False
    matched(session, _DELETE, {"of_job": job.id, "first": dropped[-1].id, "last": dropped[0].id})
    for status, count in Counter(row.status for row in dropped).items():
        job.shrink(status, count)
    job.roll_up(now)
    save_jobs(session, [job])
    return len(dropped) == _DROPPED_AT_ONCE


def _is_unbegun_deletion(row: sa.Row[Any]) -> bool:
    return row.planned == PlannedAction.DELETE and not row.attempts and row.status is not JobStatus.DONE

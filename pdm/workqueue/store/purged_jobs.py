"""What is left of purged jobs: summaries, stored receipts, and logs that are still to be removed."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.retention import PurgedJob
from pdm.workqueue.store.records import (
    kept_receipts,
    matched,
    purged_jobs,
)
from pdm.workqueue.store.retention import ROWS_FOR_CHUNK, Step, delete_some, of_jobs
from pdm.workqueue.WorkqueueDB import HAS_RECEIPT

_PURGED_JOB = sa.select(purged_jobs).where(purged_jobs.c.id == bindparam("number"))


def purged_job(session: Session, job_id: int, owner_id: int | None) -> PurgedJob | None:
    """A purged job; None if there is none, or its owner is not ``owner_id``. ``owner_id`` None: any owner."""
    row = session.execute(_PURGED_JOB, {"number": job_id}).one_or_none()
    if row is None or owner_id not in (None, row.user_id):
        return None
    return PurgedJob(
        id=row.id,
        user_id=row.user_id,
        type=row.type,
        status=JobStatus[row.status],
        src_siteid=row.src_siteid,
        src_filepath=row.src_filepath,
        dst_siteid=row.dst_siteid,
        dst_filepath=row.dst_filepath,
        label=row.label,
        timestamp=row.timestamp,
        finished_at=row.finished_at,
        purged_at=row.purged_at,
        done=row.num_done,
        failed=row.num_failed,
        cancelled=row.num_cancelled,
        bytes_done=row.bytes_done,
        receipt_pieces=row.receipt_pieces or 0,
    )


def purged_statuses(session: Session, numbers: Collection[int], owner_id: int) -> dict[int, JobStatus]:
    """How those of some jobs have ended that are purged."""
    rows = session.execute(
        sa.select(purged_jobs.c.id, purged_jobs.c.status).where(
            purged_jobs.c.id.in_(numbers), purged_jobs.c.user_id == owner_id
        )
    )
    return {row.id: JobStatus[row.status] for row in rows}


_PIECE = sa.select(kept_receipts.c.content).where(
    kept_receipts.c.job_id == bindparam("number"), kept_receipts.c.number == bindparam("piece")
)


def receipt_piece(session: Session, job_id: int, number: int) -> bytes | None:
    """A piece of the stored receipt of a purged job, compressed; None if it was removed."""
    return session.scalar(_PIECE, {"number": job_id, "piece": number})


_OLD_RECEIPT = (
    sa.select(purged_jobs.c.id)
    .where(sa.text(HAS_RECEIPT), purged_jobs.c.finished_at < bindparam("before"))
    .order_by(purged_jobs.c.finished_at, purged_jobs.c.id)
    .limit(bindparam("most"))
)
_DELETE_PIECES = delete_some(kept_receipts, ("job_id", "number"), of_jobs(kept_receipts.c.job_id))


def remove_receipts(session: Session, before: datetime, most: int) -> Step:
    """Remove stored receipts of jobs that ended before a time: about ``most`` rows of usual size."""
    limit = max(most // ROWS_FOR_CHUNK, 1)
    numbers = session.scalars(_OLD_RECEIPT, {"before": before, "most": limit}).all()
    if not numbers:
        return Step(0)
    those = purged_jobs.c.id.in_(numbers)
    # Not readable from the first piece on that is missing.
    session.execute(sa.update(purged_jobs).where(those).values(receipt_pieces=0))
    removed = matched(session, _DELETE_PIECES, {"numbers": list(numbers), "most": limit})
    if removed < limit:
        session.execute(sa.update(purged_jobs).where(those).values(receipt_pieces=None))
    return Step(removed * ROWS_FOR_CHUNK or 1, more=True)


_OLD_SUMMARY = (
    sa.select(purged_jobs.c.id)
    .where(purged_jobs.c.purged_at < bindparam("before"), purged_jobs.c.receipt_pieces.is_(None))
    .order_by(purged_jobs.c.purged_at, purged_jobs.c.id)
    .limit(bindparam("most"))
)
_DELETE_SUMMARIES = sa.delete(purged_jobs).where(purged_jobs.c.id.in_(_OLD_SUMMARY))


def remove_summaries(session: Session, before: datetime, most: int) -> Step:
    """Remove summaries of jobs that were purged before a time, unless their receipt is kept."""
    count = matched(session, _DELETE_SUMMARIES, {"before": before, "most": most})
    return Step(count, more=count == most)


class PurgedLog(NamedTuple):
    """The logs of a purged job."""

    purged_at: datetime
    id: int
    log_uid: str


_PURGED_LOGS = (
    sa.select(purged_jobs.c.purged_at, purged_jobs.c.id, purged_jobs.c.log_uid)
    .where(
        sa.tuple_(purged_jobs.c.purged_at, purged_jobs.c.id)
        > sa.tuple_(bindparam("after", type_=purged_jobs.c.purged_at.type), bindparam("after_id"))
    )
    .order_by(purged_jobs.c.purged_at, purged_jobs.c.id)
    .limit(bindparam("most"))
)


def purged_logs(session: Session, after: tuple[datetime, int], most: int) -> list[PurgedLog]:
    """The logs of purged jobs, in the order in which they were purged."""
    rows = session.execute(_PURGED_LOGS, {"after": after[0], "after_id": after[1], "most": most})
    return [PurgedLog(*row) for row in rows]

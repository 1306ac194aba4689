"""Counts of elements that are DONE, apart from the rows of their jobs.

The row of a job has its counters. Whoever changes them locks it until the end of the transaction, so daemons that store
results of one job would wait for each other. Instead they append rows of `JobCountsRow`, without a lock, for as long as
the job has other elements that are open. Whoever locks the job next adds these rows to its counters and deletes them:
`added_up`. At the latest the daemon that has appended them does so, or, if that has died, another one.

Until then the row of the job counts these elements as RUNNING. So the job is not final before all of them are added up,
and only under the lock of its row it becomes final.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.store.records import IS_INCARNATION, columns_of, job_counts, jobs, workers
from pdm.workqueue.store.row_statements import RowStatement
from pdm.workqueue.WorkqueueDB import MAX_BYTES

#: Jobs that are looked for at once.
_MOST_JOBS = 500
#: Sums of sizes stop at `MAX_BYTES`.
_SIZES = ("bytes_total", "bytes_done", "bytes_already_there")

#: Whether a job has such rows; only a daemon on PostgreSQL appends any.
HAS_COUNTS = sa.exists().where(job_counts.c.job_id == jobs.c.id).label("has_counts")

_others = workers.alias("others")
_WORKER = sa.select(
    workers.c.id,
    # A daemon of an earlier version takes back what another one runs without a look at results that are being stored.
    sa.not_(
        sa.exists().where(_others.c.lease_until > sa.func.clock_timestamp(), _others.c.counts_apart.is_not(sa.true()))
    ),
).where(IS_INCARNATION)

_APPEND = RowStatement(
    """
    INSERT INTO job_counts (job_id, done, bytes_total, bytes_done, already_there, bytes_already_there) VALUES {rows}
    """,
    columns_of(job_counts, "job_id", "done", "bytes_total", "bytes_done", "already_there", "bytes_already_there"),
)


def worker_that_appends(session: Session, worker: str) -> tuple[int | None, bool]:
    """The id of a worker, None if its incarnation has been replaced; whether all live daemons know of such rows.

    Only for a shared database.
    """
    row = session.execute(_WORKER, {"of_incarnation": worker}).one_or_none()
    return (None, False) if row is None else (row[0], row[1])


def append(session: Session, counts: Collection[Sequence[int]]) -> None:
    """Count elements as DONE: job, elements, and what they add to the other columns of `JobCountsRow`, in order."""
    _APPEND.execute(session, counts)


def _added_up() -> sa.Update:
    names = ("done", *_SIZES, "already_there")
    counted = sa.select(
        job_counts.c.job_id, *(sa.cast(sa.func.sum(job_counts.c[name]), sa.BigInteger).label(name) for name in names)
    ).join(jobs, jobs.c.id == job_counts.c.job_id)
    sums = (
        counted.where(job_counts.c.job_id.in_(bindparam("numbers", expanding=True)))
        .group_by(job_counts.c.job_id, jobs.c.num_submitted, jobs.c.num_running)
        .having(
            sa.or_(
                bindparam("to_the_end", type_=sa.Boolean()),
                jobs.c.num_submitted + jobs.c.num_running > sa.func.sum(job_counts.c.done),
            )
        )
        .cte("sums")
    )
    # The same rows: parts of one statement see the same state.
    gone = sa.delete(job_counts).where(job_counts.c.job_id == sums.c.job_id).cte("gone")
    changed: dict[Any, Any] = {
        name: sa.func.least(jobs.c[name] + sums.c[name], sa.literal(MAX_BYTES, sa.BigInteger())) for name in _SIZES
    }
    changed |= {
        "num_running": jobs.c.num_running - sums.c.done,
        "num_done": jobs.c.num_done + sums.c.done,
        "already_there": jobs.c.already_there + sums.c.already_there,
    }
    return sa.update(jobs).where(jobs.c.id == sums.c.job_id).values(changed).add_cte(gone)


_ADDED_UP = _added_up()


def added_up(columns: Sequence[sa.ColumnElement[Any]]) -> sa.Update:
    """The statement that adds such rows to the counters of ``numbers``, jobs that this transaction has locked.

    It returns ``columns`` of the jobs that it has changed. Without ``to_the_end`` it leaves out jobs of which nothing
    would be open any more: who locks a job need not derive its status, and nothing would derive it later.
    """
    return _ADDED_UP.returning(*columns)


def jobs_with_counts(session: Session, among: Collection[int] | None = None) -> list[int]:
    """Jobs with such rows, `_MOST_JOBS` at most; ``among``: only of these."""
    found = sa.select(job_counts.c.job_id).distinct().limit(_MOST_JOBS)
    if among is not None:
        found = found.where(job_counts.c.job_id.in_(among))
    return sorted(session.scalars(found))

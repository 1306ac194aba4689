"""What waits for what now: unfinished jobs by user and route, and their totals."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.limits import Route
from pdm.workqueue.store import nodes, users
from pdm.workqueue.store.records import columns_of, credentials, elements, jobs, workers
from pdm.workqueue.WorkqueueDB import HAS_HELD, HAS_HOLD, HAS_LISTING, HAS_RUNNING, HAS_WORK, IS_RUNNING, UtcDateTime

#: Unfinished jobs that are counted at most.
MOST_OPEN_JOBS = 100_000

_COLUMNS = columns_of(jobs, "id", "user_id", "src_siteid", "dst_siteid", "num_submitted", "num_running", "num_held")


def _open_jobs(columns: Collection[sa.ColumnElement[Any]]) -> Any:
    """Unfinished jobs, found by partial indexes, which have no other jobs; a job may be in several."""
    parts = (
        sa.select(sa.select(*columns).where(sa.text(condition)).limit(MOST_OPEN_JOBS).subquery())
        for condition in (HAS_WORK, HAS_LISTING, HAS_RUNNING, HAS_HELD, HAS_HOLD)
    )
    return sa.union(*parts).subquery("open_jobs").c


_OPEN = _open_jobs(_COLUMNS)
_IS_WAITING = sa.and_(_OPEN.num_running == 0, _OPEN.num_submitted > 0)
_ROUTE_OF_USER = (_OPEN.user_id, _OPEN.src_siteid, _OPEN.dst_siteid)
_SHARES = (
    sa.select(
        *_ROUTE_OF_USER,
        sa.func.count().label("num_jobs"),
        *(sa.func.sum(_OPEN[name]).label(name) for name in ("num_submitted", "num_running", "num_held")),
        sa.func.min(sa.case((_IS_WAITING, _OPEN.id))).label("oldest_waiting"),
    )
    .group_by(*_ROUTE_OF_USER)
    .order_by(sa.func.min(_OPEN.id))
)


@frozen(kw_only=True)
class QueueShare:
    """Unfinished jobs of one user on one route; ``waiting``, ``running`` and ``held`` are elements.

    Attributes:
        oldest_waiting: the oldest job of which something waits and nothing runs.
    """

    user_id: int
    subject: str
    route: Route
    jobs: int
    waiting: int
    running: int
    held: int
    oldest_waiting: int | None


def queue_shares(session: Session) -> list[QueueShare]:
    """Unfinished jobs by user and route, the oldest first; those that wait for other jobs are left out.

    At most `MOST_OPEN_JOBS` are counted of those that wait, run or are held each.
    """
    rows = session.execute(_SHARES).all()
    subjects = users.subjects(session, {row.user_id for row in rows})
    return [
        QueueShare(
            user_id=row.user_id,
            subject=subjects[row.user_id],
            route=Route(row.src_siteid, row.dst_siteid),
            jobs=row.num_jobs,
            waiting=int(row.num_submitted),
            running=int(row.num_running),
            held=int(row.num_held),
            oldest_waiting=row.oldest_waiting,
        )
        for row in rows
    ]


@frozen
class RunningClaims:
    """Elements of a job that one daemon runs.

    Attributes:
        node: its name for people.
        is_live: whether its lease is valid.
        claimed_at: when the oldest of them was claimed.
    """

    node: str
    is_live: bool
    count: int
    claimed_at: datetime | None


def running_claims(session: Session, job_id: int, element_id: int | None = None) -> list[RunningClaims]:
    """Daemons that run elements of a job, or one element, the one with the most first."""
    statement = (
        sa.select(elements.c.worker_id, sa.func.count().label("number"), sa.func.min(elements.c.claimed_at).label("at"))
        .where(sa.text(IS_RUNNING), elements.c.job_id == job_id)
        .group_by(elements.c.worker_id)
        .order_by(sa.func.count().desc())
    )
    if element_id is not None:
        statement = statement.where(elements.c.id == element_id)
    rows = session.execute(statement).all()
    live = {node.id: node.name for node in nodes.live_nodes(session)}
    names: dict[Any, str] = {}
    if gone := {row.worker_id for row in rows} - live.keys():
        found = session.execute(sa.select(workers.c.id, workers.c.name).where(workers.c.id.in_(gone)))
        names = {row.id: row.name for row in found}
    return [
        RunningClaims(
            live.get(row.worker_id) or names.get(row.worker_id, "an unknown node"),
            row.worker_id in live,
            row.number,
            row.at,
        )
        for row in rows
    ]


@frozen(kw_only=True)
class QueueTotals:
    """All unfinished jobs, summed up; those that wait for other jobs are left out.

    Attributes:
        jobs: type and status → number.
        elements: type of the job, and ``waiting``, ``running`` or ``held`` → number of elements.
        oldest: ``listing`` or ``work`` → registration of the oldest job that could begin and has not begun.
        credentials: site (0 for every site) → when the first credential expires, of the users of these jobs.
        leases: name of a daemon → end of its lease, of those that have not stopped.
    """

    jobs: Mapping[tuple[JobType, JobStatus], int]
    elements: Mapping[tuple[JobType, str], int]
    oldest: Mapping[str, datetime]
    credentials: Mapping[int, datetime]
    leases: Mapping[str, datetime]


_TOTALS = _open_jobs(
    columns_of(
        jobs,
        *("id", "user_id", "type", "status", "src_siteid", "dst_siteid", "timestamp", "started_at"),
        *("list_due_at", "work_due_at", "num_submitted", "num_running", "num_held"),
    )
)
_now = sa.bindparam("now", type_=UtcDateTime())
_BEGINS = sa.and_(
    _TOTALS.started_at.is_(None),
    _TOTALS.user_id.not_in(sa.bindparam("users", expanding=True)),
    _TOTALS.src_siteid.not_in(sa.bindparam("sites", expanding=True)),
    sa.func.coalesce(_TOTALS.dst_siteid, 0).not_in(sa.bindparam("sites", expanding=True)),
)
_BY_STATE = sa.select(
    _TOTALS.type,
    _TOTALS.status,
    sa.func.count().label("jobs"),
    *(sa.func.sum(_TOTALS[f"num_{name}"]).label(name) for name in ("submitted", "running", "held")),
    sa.func.min(sa.case((sa.and_(_BEGINS, _TOTALS.list_due_at <= _now), _TOTALS.timestamp))).label("listing"),
    sa.func.min(sa.case((sa.and_(_BEGINS, _TOTALS.work_due_at <= _now), _TOTALS.timestamp))).label("work"),
).group_by(_TOTALS.type, _TOTALS.status)
_FIRST_EXPIRY = (
    sa.select(credentials.c.site_id, sa.func.min(credentials.c.valid_until).label("ends"))
    .where(credentials.c.valid_until.is_not(None), credentials.c.user_id.in_(sa.select(_TOTALS.user_id)))
    .group_by(credentials.c.site_id)
    .limit(1000)
)
_LEASES = sa.select(workers.c.name, workers.c.lease_until).where(workers.c.lease_until.is_not(None))


def queue_totals(session: Session, now: datetime, sites: Collection[int], users: Collection[int]) -> QueueTotals:
    """Sum up the unfinished jobs; at most `MOST_OPEN_JOBS` are counted of those that wait, run or are held each.

    ``sites``, ``users``: whose jobs cannot begin now.
    """
    found: dict[tuple[JobType, JobStatus], int] = {}
    sums: dict[tuple[JobType, str], int] = {}
    oldest: dict[str, datetime] = {}
    for row in session.execute(_BY_STATE, {"now": now, "sites": list(sites), "users": list(users)}):
        found[row.type, row.status] = row.jobs
        for state, number in (("waiting", row.submitted), ("running", row.running), ("held", row.held)):
            sums[row.type, state] = sums.get((row.type, state), 0) + int(number)
        for name, registered in (("listing", row.listing), ("work", row.work)):
            if registered is not None:
                oldest[name] = min(oldest.get(name, registered), registered)
    return QueueTotals(
        jobs=found,
        elements=sums,
        oldest=oldest,
        credentials={row.site_id: row.ends for row in session.execute(_FIRST_EXPIRY)},
        leases={row.name: row.lease_until for row in session.execute(_LEASES)},
    )

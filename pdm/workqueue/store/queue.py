"""Who waits for what now: unfinished jobs by user and route."""

from __future__ import annotations

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.limits import Route
from pdm.workqueue.store import users
from pdm.workqueue.store.records import columns_of, jobs
from pdm.workqueue.WorkqueueDB import HAS_HELD, HAS_LISTING, HAS_RUNNING, HAS_WORK

#: Unfinished jobs that are counted at most.
MOST_OPEN_JOBS = 100_000

_COLUMNS = columns_of(jobs, "id", "user_id", "src_siteid", "dst_siteid", "num_submitted", "num_running", "num_held")
#: Found by partial indexes, which have no other jobs; a job may be in several.
_OPEN = (
    sa.union(
        *(
            sa.select(sa.select(*_COLUMNS).where(sa.text(condition)).limit(MOST_OPEN_JOBS).subquery())
            for condition in (HAS_WORK, HAS_LISTING, HAS_RUNNING, HAS_HELD)
        )
    )
    .subquery("open_jobs")
    .c
)
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

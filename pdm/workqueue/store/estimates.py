"""What the estimate of a copy is taken from: earlier copies of its user between the same sites, and free space."""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.progress import FinishedCopy, RouteSpeed, route_speed
from pdm.workqueue.store import listings
from pdm.workqueue.store.records import columns_of, jobs

#: How far back copies count: servers and networks change.
_LONGEST_AGO = timedelta(days=14)
#: Copies that are used, and jobs of the user that are searched for them, the newest first.
_MOST_COPIES, _MOST_SEARCHED = 20, 200

_NEWEST = (
    sa.select(
        *columns_of(
            jobs,
            *("id", "type", "src_siteid", "dst_siteid", "started_at", "finished_at"),
            *("bytes_done", "bytes_already_there", "num_done", "already_there"),
        )
    )
    .where(jobs.c.user_id == bindparam("user"), jobs.c.status == JobStatus.DONE)
    .order_by(jobs.c.id.desc())
    .limit(_MOST_SEARCHED)
    .subquery()
)
FINISHED_COPIES = (
    sa.select(
        _NEWEST.c.started_at,
        _NEWEST.c.finished_at,
        (_NEWEST.c.bytes_done - _NEWEST.c.bytes_already_there).label("bytes_moved"),
        # The listing is not counted.
        (_NEWEST.c.num_done - _NEWEST.c.already_there - 1).label("elements"),
    )
    .where(
        _NEWEST.c.type == JobType.COPY,
        _NEWEST.c.src_siteid == bindparam("source"),
        _NEWEST.c.dst_siteid == bindparam("destination"),
        # Dry runs move nothing.
        _NEWEST.c.bytes_done > _NEWEST.c.bytes_already_there,
        _NEWEST.c.started_at.is_not(None),
        _NEWEST.c.finished_at > bindparam("since"),
    )
    .order_by(_NEWEST.c.id.desc())
    .limit(_MOST_COPIES)
)


@frozen
class EstimateBasis:
    """What an estimate is taken from; None for what is not known.

    Attributes:
        speed: of earlier copies of the route.
        free_bytes: at the destination when the copy was listed.
    """

    speed: RouteSpeed | None
    free_bytes: int | None


def estimate_basis(session: Session, job: JobRecord, now: datetime) -> EstimateBasis:
    """What the estimate of a copy is taken from."""
    asked = {
        "user": job.user_id,
        "source": job.src_siteid,
        "destination": job.dst_siteid,
        "since": now - _LONGEST_AGO,
    }
    copies = [
        FinishedCopy(row.bytes_moved, row.elements, (row.finished_at - row.started_at).total_seconds())
        for row in session.execute(FINISHED_COPIES, asked)
    ]
    return EstimateBasis(route_speed(copies), listings.free_bytes(session, job.id))

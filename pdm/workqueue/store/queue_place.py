"""Why a job of which nothing runs waits: its place in the queue, and the next try of what failed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord
from pdm.workqueue.store.due import LISTINGS, WORK
from pdm.workqueue.store.records import ELEMENT_COLUMNS, element_record
from pdm.workqueue.store.tables import elements, jobs
from pdm.workqueue.WorkqueueDB import IS_WAITING_WORK

#: Jobs, and users, that are counted at most: the cost of an answer does not grow with the queue.
MOST_COUNTED = 1000


@frozen
class QueuePlace:
    """Where a job stands among all that may be claimed.

    Attributes:
        listing: whether it waits for its listing; listings have a queue of their own.
        ahead: numbers of the jobs of the same user that come first, in their order; at most `MOST_COUNTED`.
        other_users: users with such jobs besides, at most `MOST_COUNTED`; users take turns.
    """

    listing: bool
    ahead: Sequence[int]
    other_users: int


@frozen
class Waiting:
    """Why a job waits.

    Attributes:
        place: None while nothing of it may be claimed.
        next_try: the first element that is put off after a failure; None where something may be claimed.
    """

    place: QueuePlace | None
    next_try: ElementRecord | None


_DUE = sa.select(jobs.c.list_due_at, jobs.c.work_due_at).where(jobs.c.id == bindparam("number"))
_AHEAD = {
    lane: sa.select(jobs.c.id)
    .where(
        sa.text(lane.condition),
        jobs.c.user_id == bindparam("user"),
        lane.due_at <= bindparam("now"),
        jobs.c.priority <= bindparam("at_priority"),
        sa.or_(jobs.c.priority < bindparam("at_priority"), jobs.c.id < bindparam("number")),
    )
    .order_by(jobs.c.priority, jobs.c.id)
    .limit(MOST_COUNTED)
    for lane in (LISTINGS, WORK)
}
_USERS = {
    lane: sa.select(sa.func.count()).select_from(lane.users.limit(MOST_COUNTED + 1).subquery())
    for lane in (LISTINGS, WORK)
}
_FIRST_PHASE = sa.select(sa.func.min(elements.c.phase)).where(
    sa.text(IS_WAITING_WORK), elements.c.job_id == bindparam("number")
)
_FIRST_WORK = (
    sa.select(*ELEMENT_COLUMNS)
    .where(
        sa.text(IS_WAITING_WORK), elements.c.job_id == bindparam("number"), elements.c.phase == bindparam("in_phase")
    )
    .order_by(elements.c.due_at, elements.c.id)
    .limit(1)
)
_LISTING = sa.select(*ELEMENT_COLUMNS).where(
    elements.c.job_id == bindparam("number"), elements.c.id == 0, elements.c.status == JobStatus.SUBMITTED
)


def waiting(session: Session, job: JobRecord, now: datetime) -> Waiting:
    """Why a job waits of which nothing runs.

    Args:
        session: of the database.
        job: with elements that are SUBMITTED.
        now: the present moment, UTC.
    """
    due = session.execute(_DUE, {"number": job.id}).one_or_none()
    if due is None or (due.list_due_at is None and due.work_due_at is None):
        return Waiting(None, None)
    lane = WORK if due.list_due_at is None else LISTINGS
    first = _first_waiting(session, job.id, listing=lane is LISTINGS)
    if first is not None and first.not_before is not None and first.not_before > now:
        return Waiting(None, first)
    if (due.work_due_at if lane is WORK else due.list_due_at) > now:
        # Put off as a whole, such as a large retry of which the elements are being put back.
        return Waiting(None, None)
    named = {"user": job.user_id, "now": now, "at_priority": job.priority, "number": job.id}
    ahead = session.scalars(_AHEAD[lane], named).all()
    users = session.scalar(_USERS[lane]) or 0
    return Waiting(QueuePlace(lane is LISTINGS, ahead, max(users - 1, 0)), None)


def _first_waiting(session: Session, job_id: int, *, listing: bool) -> ElementRecord | None:
    if listing:
        row = session.execute(_LISTING, {"number": job_id}).one_or_none()
    else:
        phase = session.scalar(_FIRST_PHASE, {"number": job_id})
        row = session.execute(_FIRST_WORK, {"number": job_id, "in_phase": phase}).one_or_none()
    return None if row is None else element_record(row)

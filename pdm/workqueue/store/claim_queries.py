"""Queries for what may be claimed: users, their jobs, elements; and the position of a job in the queue.

The cost of each query grows with its answer, not with the queue. ``list_due_at`` and ``work_due_at`` of a job say when
it may have something to claim; they may be too early, never too late. A claim that finds nothing corrects them, so that
no job is read twice for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord
from pdm.workqueue.store.job_changes import cancel_later_phases
from pdm.workqueue.store.locks import LockedJob, lock_jobs
from pdm.workqueue.store.records import ELEMENT_COLUMNS, element_record, elements, jobs, matched
from pdm.workqueue.WorkqueueDB import AT_ONCE, HAS_LISTING, HAS_WORK, IS_HELD, IS_RUNNING, IS_WAITING_WORK, NEVER

#: Due jobs of a user that are looked at, at most, to find some that no limit keeps out.
MOST_PASSED_OVER = 5000


class ClaimQueue:
    """Jobs that wait for their listing, or for all other work.

    Args:
        due_at: the column of a job that says when it has something.
        condition: of the partial indexes over that column.
    """

    def __init__(self, due_at: sa.Column[Any], condition: str) -> None:
        self.due_at = due_at
        self.condition = condition
        waits = sa.text(condition)
        # Each user with such jobs is found by one jump in an index that begins with the user.
        first = sa.select(sa.func.min(jobs.c.user_id).label("id")).where(waits).cte("active", recursive=True)
        following = sa.select(sa.func.min(jobs.c.user_id)).where(waits, jobs.c.user_id > first.c.id).scalar_subquery()
        active = first.union_all(sa.select(following).where(first.c.id.is_not(None)))
        self.users = sa.select(active.c.id).where(active.c.id.is_not(None))
        self._due_of_user = (
            sa.select(jobs.c.id, jobs.c.num_submitted)
            .where(waits, jobs.c.user_id == bindparam("user"), due_at <= bindparam("now"))
            .order_by(jobs.c.priority, jobs.c.id)
        )
        self.jobs_of_user = self._due_of_user.limit(bindparam("most"))
        self.earliest = sa.select(due_at).where(waits).order_by(due_at).limit(1)

    def open_jobs_of_user(
        self,
        start_conditions: Sequence[sa.ColumnElement[bool]],
        conditions: Callable[[Any], Sequence[sa.ColumnElement[bool]]],
    ) -> sa.Select[Any]:
        """As ``jobs_of_user``, without those that do not meet conditions.

        Args:
            start_conditions: conditions on jobs. What does not meet them may wait for days: all of it is passed over.
            conditions: on number and sites. What does not meet them has its turn soon: where many jobs wait for one
                closed route, only so many are passed over to find others, which bounds the cost.
        """
        allowed = self._due_of_user.where(*start_conditions)
        if not conditions(jobs.c):
            return allowed.limit(bindparam("most"))
        first = (
            allowed.add_columns(jobs.c.priority, jobs.c.src_siteid, jobs.c.dst_siteid)
            .limit(MOST_PASSED_OVER)
            .subquery("first_jobs")
            .c
        )
        return (
            sa.select(first.id, first.num_submitted)
            .where(*conditions(first))
            .order_by(first.priority, first.id)
            .limit(bindparam("most"))
        )


LISTING_QUEUE = ClaimQueue(jobs.c.list_due_at, HAS_LISTING)
WORK_QUEUE = ClaimQueue(jobs.c.work_due_at, HAS_WORK)


def next_due(session: Session, now: datetime) -> datetime | None:
    """When it is worth claiming again; never before ``now``, None when nothing waits."""
    timestamps = [session.scalar(queue.earliest) for queue in (LISTING_QUEUE, WORK_QUEUE)]
    known = [timestamp for timestamp in timestamps if timestamp is not None and timestamp < NEVER]
    return max(min(known), now) if known else None


_LISTING_ELEMENTS = sa.select(*ELEMENT_COLUMNS).where(
    elements.c.job_id.in_(bindparam("numbers", expanding=True)),
    elements.c.id == 0,
    elements.c.type == JobType.LIST,
    elements.c.status == JobStatus.SUBMITTED,
)


def due_listings(session: Session, locked: Collection[LockedJob], now: datetime) -> dict[int, Sequence[sa.Row[Any]]]:
    """The LIST elements of some jobs that are due, by job; jobs are told when to look for theirs again."""
    found: dict[int, sa.Row[Any]] = {}
    for element in session.execute(_LISTING_ELEMENTS, {"numbers": [job.id for job in locked]}):
        found[element.job_id] = element
    due: dict[int, Sequence[sa.Row[Any]]] = {}
    for job in locked:
        row: sa.Row[Any] | None = found.get(job.id)
        if row is None:
            job.list_due_at = None
        elif row.due_at > now:
            job.list_due_at = row.due_at
        else:
            due[job.id] = (row,)
    return due


_WAITING = sa.select(*ELEMENT_COLUMNS).where(
    sa.text(IS_WAITING_WORK), elements.c.phase == bindparam("in_phase"), elements.c.due_at <= bindparam("now")
)
#: Fresh elements in the order of the listing, then those put off, the first due first.
WORK_OF_JOB = (
    _WAITING.where(elements.c.job_id == bindparam("number"))
    .order_by(elements.c.due_at, elements.c.id)
    .limit(bindparam("most"))
    .offset(bindparam("offset"))
)
_WORK_OF_JOBS = _WAITING.where(elements.c.job_id.in_(bindparam("numbers", expanding=True))).order_by(
    elements.c.job_id, elements.c.due_at, elements.c.id
)
_NEXT_WORK = (
    sa.select(elements.c.due_at)
    .where(
        sa.text(IS_WAITING_WORK), elements.c.job_id == bindparam("number"), elements.c.phase == bindparam("in_phase")
    )
    .order_by(elements.c.due_at)
    .limit(1)
)


def due_work_of_small_jobs(
    session: Session, locked: Collection[LockedJob], now: datetime
) -> dict[int, Sequence[sa.Row[Any]]]:
    """All that is due in some jobs, by job, in one query; for jobs of few elements that know no phases."""
    found: dict[int, list[sa.Row[Any]]] = {job.id: [] for job in locked}
    parameters = {"in_phase": 0, "now": now, "numbers": list(found)}
    for row in session.execute(_WORK_OF_JOBS, parameters):
        found[row.job_id].append(row)
    return dict(found)


def due_work(session: Session, job: LockedJob, most: int, offset: int, now: datetime) -> Sequence[sa.Row[Any]]:
    """The first elements of a job that are due, without its listing; ``offset`` of them are passed over."""
    phase = open_phase(session, job)
    if phase is None:
        return ()
    parameters = {"number": job.id, "in_phase": phase, "now": now, "most": most, "offset": offset}
    return session.execute(WORK_OF_JOB, parameters).all()


def update_due_at(session: Session, job: LockedJob, now: datetime) -> None:
    """Tell a job, of which all that was due is taken, when it has work again."""
    phase = open_phase(session, job) if job.counters.submitted else None
    if phase is None and job.counters.submitted and _is_never_complete(session, job):
        more = cancel_later_phases(session, job)
        job.work_due_at = AT_ONCE if more else None
        job.roll_up(now)
        return
    # Without an open phase, whatever ends the one before sets the job going again.
    job.work_due_at = None if phase is None else session.scalar(_NEXT_WORK, {"number": job.id, "in_phase": phase})


_FIRST_PHASE = (
    sa.select(elements.c.phase)
    .where(sa.text(IS_WAITING_WORK), elements.c.job_id == bindparam("number"))
    .order_by(elements.c.phase)
    .limit(1)
)
_LISTING_STATUS = sa.select(elements.c.status).where(elements.c.job_id == bindparam("number"), elements.c.id == 0)
_EARLIER_RUNNING, _EARLIER_HELD = (
    sa.select(elements.c.id)
    .where(sa.text(condition), elements.c.job_id == bindparam("number"), elements.c.phase < bindparam("than_phase"))
    .limit(1)
    for condition in (IS_RUNNING, IS_HELD)
)


def _is_never_complete(session: Session, job: LockedJob) -> bool:
    """Whether what waits of a job waits for a listing that has ended without success."""
    if job.record.type is not JobType.REMOVE or not session.scalar(_FIRST_PHASE, {"number": job.id}):
        return False
    listing: JobStatus | None = session.scalar(_LISTING_STATUS, {"number": job.id})
    return listing is not None and listing.is_final and listing is not JobStatus.DONE


def open_phase(session: Session, job: LockedJob) -> int | None:
    """The phase of which elements may run now; None while an earlier one is not complete. Only a REMOVE has several.

    What is removed last waits for the whole listing, too: a folder may only go once all in it is known and gone.
    """
    if job.record.type is not JobType.REMOVE:
        return 0
    phase: int | None = session.scalar(_FIRST_PHASE, {"number": job.id})
    if not phase:
        return phase
    if session.scalar(_LISTING_STATUS, {"number": job.id}) is not JobStatus.DONE:
        return None
    earlier = {"number": job.id, "than_phase": phase}
    if session.scalar(_EARLIER_RUNNING, earlier) is not None:
        return None
    if job.counters.held and session.scalar(_EARLIER_HELD, earlier) is not None:
        return None
    return phase


def bring_forward(session: Session, since: datetime, now: datetime) -> int:
    """The clock was set back: what was put off until a moment of the old time is due now, not hours later.

    Args:
        session: of the database.
        since: the present moment by the old time; nothing else is put off for so long.
        now: the present moment, UTC.

    Returns:
        How many elements that were.
    """
    jobs_late = sa.or_(
        sa.and_(sa.text(HAS_WORK), jobs.c.work_due_at >= since, jobs.c.work_due_at < NEVER),
        sa.and_(sa.text(HAS_LISTING), jobs.c.list_due_at >= since),
    )
    late = [job.id for job in lock_jobs(session, session.scalars(sa.select(jobs.c.id).where(jobs_late)).all())]
    if not late:
        return 0
    for column in (jobs.c.work_due_at, jobs.c.list_due_at):
        session.execute(
            sa.update(jobs).where(jobs.c.id.in_(late), column >= since, column < NEVER).values({column: now})
        )
    return matched(
        session,
        sa.update(elements)
        .where(elements.c.job_id.in_(late), elements.c.status == JobStatus.SUBMITTED, elements.c.due_at >= since)
        .values(due_at=now),
    )


#: Jobs, and users, that are counted at most: the cost of an answer does not grow with the queue.
MOST_COUNTED = 1000


@frozen
class QueuePosition:
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
class WaitReason:
    """Why a job waits.

    Attributes:
        place: None while nothing of it may be claimed.
        next_try: the first element that is put off after a failure; None where something may be claimed.
    """

    place: QueuePosition | None
    next_try: ElementRecord | None


_DUE = sa.select(jobs.c.list_due_at, jobs.c.work_due_at).where(jobs.c.id == bindparam("number"))
_AHEAD = {
    queue: sa.select(jobs.c.id)
    .where(
        sa.text(queue.condition),
        jobs.c.user_id == bindparam("user"),
        queue.due_at <= bindparam("now"),
        jobs.c.priority <= bindparam("at_priority"),
        sa.or_(jobs.c.priority < bindparam("at_priority"), jobs.c.id < bindparam("number")),
    )
    .order_by(jobs.c.priority, jobs.c.id)
    .limit(MOST_COUNTED)
    for queue in (LISTING_QUEUE, WORK_QUEUE)
}
_USERS = {
    queue: sa.select(sa.func.count()).select_from(queue.users.limit(MOST_COUNTED + 1).subquery())
    for queue in (LISTING_QUEUE, WORK_QUEUE)
}
_LOWEST_PHASE = sa.select(sa.func.min(elements.c.phase)).where(
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


def wait_reason(session: Session, job: JobRecord, now: datetime) -> WaitReason:
    """Why a job waits of which nothing runs.

    Args:
        session: of the database.
        job: with elements that are SUBMITTED.
        now: the present moment, UTC.
    """
    due = session.execute(_DUE, {"number": job.id}).one_or_none()
    if due is None or (due.list_due_at is None and due.work_due_at is None):
        return WaitReason(None, None)
    queue = WORK_QUEUE if due.list_due_at is None else LISTING_QUEUE
    first = _first_waiting(session, job.id, listing=queue is LISTING_QUEUE)
    if first is not None and first.not_before is not None and first.not_before > now:
        return WaitReason(None, first)
    if (due.work_due_at if queue is WORK_QUEUE else due.list_due_at) > now:
        # Put off as a whole, such as a large retry of which the elements are being put back.
        return WaitReason(None, None)
    named = {"user": job.user_id, "now": now, "at_priority": job.priority, "number": job.id}
    ahead = session.scalars(_AHEAD[queue], named).all()
    users = session.scalar(_USERS[queue]) or 0
    return WaitReason(QueuePosition(queue is LISTING_QUEUE, ahead, max(users - 1, 0)), None)


def _first_waiting(session: Session, job_id: int, *, listing: bool) -> ElementRecord | None:
    if listing:
        row = session.execute(_LISTING, {"number": job_id}).one_or_none()
    else:
        phase = session.scalar(_LOWEST_PHASE, {"number": job_id})
        row = session.execute(_FIRST_WORK, {"number": job_id, "in_phase": phase}).one_or_none()
    return None if row is None else element_record(row)

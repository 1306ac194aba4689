"""Queries for what may be claimed: users, their jobs, elements; and the position of a job in the queue.

The cost of each query grows with its result, not with the queue. ``list_due_at`` and ``work_due_at`` of a job may be
too early, never too late. A claim that finds nothing due corrects them, so that no job is read twice in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord
from pdm.workqueue.domain.limits import Route
from pdm.workqueue.store.job_changes import cancel_later_phases
from pdm.workqueue.store.locks import LockedJob, lock_jobs
from pdm.workqueue.store.records import ELEMENT_COLUMNS, element_record, elements, jobs, matched
from pdm.workqueue.WorkqueueDB import (
    AT_ONCE,
    HAS_LISTING,
    HAS_WORK,
    IS_HELD,
    IS_RUNNING,
    IS_SET_ASIDE,
    IS_WAITING_WORK,
    NEVER,
)

#: Limit of the due jobs of a user that are scanned for some that no limit excludes.
MOST_PASSED_OVER = 5000


#: Of jobs: what conditions of a claim are about.
_CONDITION_COLUMNS = tuple(
    jobs.c[name] for name in ("priority", "user_id", "type", "protocol", "src_siteid", "dst_siteid", "extra_opts")
)


class ClaimQueue:
    """Jobs that wait for their listing, or for all other work.

    Args:
        due_at: column with the time at which a job may have something to claim.
        condition: of the partial indexes over that column.
    """

    def __init__(self, due_at: sa.Column[Any], condition: str) -> None:
        self.due_at = due_at
        self.condition = condition
        waits = sa.text(condition)
        # Loose index scan: one lookup per user in an index that begins with the user.
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
        """Like ``jobs_of_user``, without the jobs that violate conditions.

        ``start_conditions``: conditions on jobs. Jobs that violate them may wait for days: all are skipped.
        ``conditions``: on id and sites. Jobs that violate them are due soon: at most `MOST_PASSED_OVER` are scanned,
        which bounds the cost where many jobs wait for one route.
        """
        allowed = self._due_of_user.where(*start_conditions)
        if not conditions(jobs.c):
            return allowed.limit(bindparam("most"))
        first = allowed.add_columns(*_CONDITION_COLUMNS).limit(MOST_PASSED_OVER).subquery("first_jobs").c
        return (
            sa.select(first.id, first.num_submitted)
            .where(*conditions(first))
            .order_by(first.priority, first.id)
            .limit(bindparam("most"))
        )


LISTING_QUEUE = ClaimQueue(jobs.c.list_due_at, HAS_LISTING)
WORK_QUEUE = ClaimQueue(jobs.c.work_due_at, HAS_WORK)


def next_due(session: Session, now: datetime) -> datetime | None:
    """The time of the next useful claim, not before ``now``; None if nothing waits."""
    timestamps = [session.scalar(queue.earliest) for queue in (LISTING_QUEUE, WORK_QUEUE)]
    known = [timestamp for timestamp in timestamps if timestamp is not None and timestamp < NEVER]
    return max(min(known), now) if known else None


_LISTING_ELEMENTS = sa.select(*ELEMENT_COLUMNS).where(
    elements.c.job_id.in_(bindparam("numbers", expanding=True)),
    elements.c.id == 0,
    elements.c.type == JobType.LIST,
    elements.c.status == JobStatus.SUBMITTED,
)


def due_listings(session: Session, locked: Collection[LockedJob], now: datetime) -> dict[int, list[ElementRecord]]:
    """The due LIST elements of some jobs, by job, as they are once claimed. Sets ``list_due_at`` of the other jobs."""
    found = {row.job_id: row for row in session.execute(_LISTING_ELEMENTS, {"numbers": [job.id for job in locked]})}
    due: dict[int, list[ElementRecord]] = {}
    for job in locked:
        row = found.get(job.id)
        if row is None:
            job.list_due_at = None
        elif row.due_at > now:
            job.list_due_at = row.due_at
        else:
            due[job.id] = [element_record(row, claimed=True)]
    return due


_WAITING = sa.select(*ELEMENT_COLUMNS).where(
    sa.text(IS_WAITING_WORK), elements.c.phase == bindparam("in_phase"), elements.c.due_at <= bindparam("now")
)
#: First attempts in the order of the listing, then retries in the order of their due time.
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
) -> dict[int, list[ElementRecord]]:
    """All due elements of some jobs in one query, by job, as they are once claimed. Not for jobs with phases."""
    found: dict[int, list[ElementRecord]] = {job.id: [] for job in locked}
    parameters = {"in_phase": 0, "now": now, "numbers": list(found)}
    for row in session.execute(_WORK_OF_JOBS, parameters).all():
        element = element_record(row, claimed=True)
        found[element.job_id].append(element)
    return found


def due_work(session: Session, job: LockedJob, most: int, offset: int, now: datetime) -> list[ElementRecord]:
    """The first due elements of a job except its listing, as they are once claimed; skips ``offset`` of them."""
    phase = open_phase(session, job)
    if phase is None:
        return []
    parameters = {"number": job.id, "in_phase": phase, "now": now, "most": most, "offset": offset}
    return [element_record(row, claimed=True) for row in session.execute(WORK_OF_JOB, parameters).all()]


def update_due_at(session: Session, job: LockedJob, now: datetime) -> None:
    """Set when a job has work again, after all its due elements were taken."""
    gate = _gate(session, job) if job.counters.submitted else _CLOSED
    if gate.is_shut_for_good:
        more = cancel_later_phases(session, job)
        job.work_due_at = AT_ONCE if more else None
        job.roll_up(now)
        return
    # Without an open phase, the end of the previous phase schedules the job again.
    phase = gate.phase
    job.work_due_at = None if phase is None else session.scalar(_NEXT_WORK, {"number": job.id, "in_phase": phase})


_FIRST_PHASE = (
    sa.select(elements.c.phase)
    .where(sa.text(IS_WAITING_WORK), elements.c.job_id == bindparam("number"))
    .order_by(elements.c.phase)
    .limit(1)
)
_RUNNING_LISTINGS = sa.select(elements.c.job_id).where(
    elements.c.job_id.in_(bindparam("numbers", expanding=True)),
    elements.c.id == 0,
    elements.c.type == JobType.LIST,
    elements.c.status == JobStatus.RUNNING,
)


def running_listings(session: Session, numbers: Collection[int]) -> frozenset[int]:
    """Those of some jobs whose listing runs."""
    return frozenset(session.scalars(_RUNNING_LISTINGS, {"numbers": list(numbers)}))


_LISTING_STATUS = sa.select(elements.c.status).where(elements.c.job_id == bindparam("number"), elements.c.id == 0)
_EARLIER_RUNNING, _EARLIER_HELD = (
    sa.select(elements.c.id)
    .where(sa.text(condition), elements.c.job_id == bindparam("number"), elements.c.phase < bindparam("than_phase"))
    .limit(1)
    for condition in (IS_RUNNING, IS_HELD)
)


#: Elements are numbered as they were planned, and removals come last: the first that has failed tells.
_FIRST_FAILED_PHASE = (
    sa.select(elements.c.phase)
    .where(
        sa.text(IS_SET_ASIDE),
        elements.c.job_id == bindparam("number"),
        elements.c.status == JobStatus.FAILED,
        elements.c.id > 0,
    )
    .order_by(elements.c.id)
    .limit(1)
)


def _has_failed_copies(session: Session, job: LockedJob) -> bool:
    """Whether nothing may be removed at the destination, because not all of the source is there."""
    if not job.record.deletes_extra or not job.counters.failed:
        return False
    return session.scalar(_FIRST_FAILED_PHASE, {"number": job.id}) == 0


class _Gate(NamedTuple):
    """The phase whose elements may run now, None for none; whether those that wait never may."""

    phase: int | None
    is_shut_for_good: bool = False


_CLOSED = _Gate(None)


def _gate(session: Session, job: LockedJob) -> _Gate:
    if not job.record.has_phases:
        return _Gate(0)
    phase: int | None = session.scalar(_FIRST_PHASE, {"number": job.id})
    if not phase:
        return _Gate(phase)
    listing: JobStatus | None = session.scalar(_LISTING_STATUS, {"number": job.id})
    if listing is not JobStatus.DONE:
        return _Gate(None, is_shut_for_good=listing is not None and listing.is_final)
    if _has_failed_copies(session, job):
        return _Gate(None, is_shut_for_good=True)
    earlier = {"number": job.id, "than_phase": phase}
    if session.scalar(_EARLIER_RUNNING, earlier) is not None:
        return _CLOSED
    if job.counters.held and session.scalar(_EARLIER_HELD, earlier) is not None:
        return _CLOSED
    return _Gate(phase)


def open_phase(session: Session, job: LockedJob) -> int | None:
    """The phase whose elements may run now; None while an earlier phase is not complete. Only removals have several.

    Phases after the first also wait for the whole listing: a directory may be removed only once all its entries are
    known and removed.
    """
    return _gate(session, job).phase


def bring_forward(session: Session, since: datetime, now: datetime) -> int:
    """After the clock was set back: make due what was postponed to a time of the old clock.

    ``since``: the present time by the old clock; no other element is postponed that far.

    Returns:
        The number of elements.
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


class WaitingWork(NamedTuple):
    """Due work of a user on a route: the first of its jobs, and elements of all that were counted."""

    user_id: int
    protocol: JobProtocol
    route: Route
    job_id: int
    elements: int


_FIRST_DUE = (
    sa.select(jobs.c.id, jobs.c.user_id, jobs.c.protocol, jobs.c.src_siteid, jobs.c.dst_siteid, jobs.c.num_submitted)
    .where(sa.text(HAS_WORK), jobs.c.work_due_at <= bindparam("now"))
    .order_by(jobs.c.work_due_at)
    .limit(bindparam("most"))
    .subquery()
    .c
)
_WAITING_WORK = sa.select(
    _FIRST_DUE.user_id,
    _FIRST_DUE.protocol,
    _FIRST_DUE.src_siteid,
    _FIRST_DUE.dst_siteid,
    sa.func.min(_FIRST_DUE.id),
    sa.func.sum(_FIRST_DUE.num_submitted),
).group_by(_FIRST_DUE.user_id, _FIRST_DUE.protocol, _FIRST_DUE.src_siteid, _FIRST_DUE.dst_siteid)


def waiting_work(session: Session, now: datetime, most: int) -> list[WaitingWork]:
    """The due work of all users, by route and protocol; ``most`` jobs are counted."""
    return [
        WaitingWork(user, protocol, Route(source, destination), job_id, int(count))
        for user, protocol, source, destination, job_id, count in session.execute(
            _WAITING_WORK, {"now": now, "most": most}
        )
    ]


#: Limit of the jobs and users that are counted, so that the cost does not grow with the queue.
MOST_COUNTED = 1000


@frozen
class QueuePosition:
    """The position of a job among all that may be claimed.

    Attributes:
        listing: whether it waits for its listing, which has a queue of its own.
        ahead: ids of jobs of the same user that come first, in order; at most `MOST_COUNTED`.
        other_users: number of other users with such jobs, at most `MOST_COUNTED`; users take turns.
    """

    listing: bool
    ahead: Sequence[int]
    other_users: int


@frozen
class WaitReason:
    """Why a job waits.

    Attributes:
        place: None while nothing of it may be claimed.
        next_try: the first element that waits for a retry; None if something may be claimed.
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
    """Why a job waits that has SUBMITTED elements and no running ones; ``now`` is UTC."""
    due = session.execute(_DUE, {"number": job.id}).one_or_none()
    if due is None or (due.list_due_at is None and due.work_due_at is None):
        return WaitReason(None, None)
    queue = WORK_QUEUE if due.list_due_at is None else LISTING_QUEUE
    first = _first_waiting(session, job.id, listing=queue is LISTING_QUEUE)
    if first is not None and first.not_before is not None and first.not_before > now:
        return WaitReason(None, first)
    if (due.work_due_at if queue is WORK_QUEUE else due.list_due_at) > now:
        # The whole job is postponed, such as a large retry that is being put back in parts.
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

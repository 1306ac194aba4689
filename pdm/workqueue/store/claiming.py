"""Claims: what is due goes to a daemon, fairly, in batches, many in one transaction.

Between users: who has the fewest elements running comes next. Within a user: strictly by priority, then the older job.
Within a job: fresh elements in the order of the listing, then those put off: what fails must not hold up what may
succeed. Listings have a lane of their own.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.store import due
from pdm.workqueue.store.leases import live_worker
from pdm.workqueue.store.locks import LockedJob, lock_due_jobs, save_jobs
from pdm.workqueue.store.records import claimed_record
from pdm.workqueue.store.room import ClaimLimits, Room
from pdm.workqueue.store.tables import elements

_Rows = Sequence[sa.Row[Any]]


def claim(session: Session, worker: str, limits: ClaimLimits, now: datetime) -> list[Batch]:
    """Take what is due: SUBMITTED becomes RUNNING, with one attempt more.

    Args:
        session: of the database.
        worker: who takes it; without a lease it gets nothing.
        limits: how much.
        now: the present moment, UTC.

    Returns:
        Batches of elements of one job and one type; listings first.
    """
    worker_id = live_worker(session, worker, now)
    if worker_id is None:
        return []
    room = Room.measure(session, limits)
    batches: list[Batch] = []
    if JobType.LIST in limits.types:
        batches += _claim_lane(session, due.LISTINGS, _Listings, worker_id, room, now)
    if JobType.COPY in limits.types:
        batches += _claim_lane(session, due.WORK, _Work, worker_id, room, now)
    return batches


def _claim_lane(
    session: Session,
    lane: due.Lane,
    make_stock: Callable[[Session, Sequence[LockedJob], Room, datetime], _Stock],
    worker_id: int,
    room: Room,
    now: datetime,
) -> list[Batch]:
    # First what no other daemon is busy with; only if that is nothing, wait for the others.
    for skip_locked in (True, False):
        candidates = _candidates(session, lane, room, now) if room.is_left else []
        if not candidates:
            return []
        by_number = {
            job.id: job for job in lock_due_jobs(session, lane.due_at, candidates, now, skip_locked=skip_locked)
        }
        locked = [by_number[number] for number in candidates if number in by_number]
        stock = make_stock(session, locked, room, now)
        batches = _take_in_turn(stock, locked, room, now)
        _begin(session, batches, worker_id, now)
        stock.look_again(locked)
        save_jobs(session, locked)
        if batches or len(locked) == len(candidates):
            return batches
    return []


def _candidates(session: Session, lane: due.Lane, room: Room, now: datetime) -> list[int]:
    """Numbers of jobs to look at: each user's in order, the users in turn, twice as many as there may be batches."""
    users = [user for user in session.scalars(lane.users) if room.user_is_open(user)]
    # Chance decides between equals; else the first would always win where work is done as soon as it is claimed.
    random.shuffle(users)
    users.sort(key=room.running_of_user)
    closed = room.closed()
    statement = lane.jobs_of_user.where(*closed) if closed else lane.jobs_of_user
    columns = [
        session.scalars(statement, {"user": user, "now": now, "most": 2 * room.batches}).all()
        for user in users[: 2 * room.batches]
    ]
    turns = [column[turn] for turn in range(2 * room.batches) for column in columns if turn < len(column)]
    return turns[: 2 * room.batches]


def _take_in_turn(stock: _Stock, locked: Sequence[LockedJob], room: Room, now: datetime) -> list[Batch]:
    """Batch by batch, always of the user with the fewest elements running."""
    queues: dict[int, deque[LockedJob]] = {}
    for job in locked:
        queues.setdefault(job.record.user_id, deque()).append(job)
    batches = []
    while queues and room.is_left:
        user = min(queues, key=room.running_of_user)
        queue = queues[user]
        job = queue[0]
        rows = stock.take(job, room.for_job(job), len(queues))
        if rows:
            batches.append(_batch(job, rows, now))
            room.take(job, len(rows))
        else:
            # Nothing is due in it, or a cap is reached; the next job may be of another site.
            queue.popleft()
        if not queue:
            del queues[user]
    return batches


def _batch(job: LockedJob, rows: _Rows, now: datetime) -> Batch:
    job.move(JobStatus.SUBMITTED, JobStatus.RUNNING, len(rows))
    job.started_at = job.started_at or now
    job.roll_up(now)
    claimed = tuple(claimed_record(row) for row in rows)
    return Batch(job.record, claimed[0].type, claimed)


# By primary key, one by one: of any wider condition PostgreSQL may think wrong while a large job is younger than its
# statistics, and then read the whole job for each batch.
_BEGIN = (
    sa.update(elements)
    .where(elements.c.job_id == bindparam("of_job"), elements.c.id == bindparam("number"))
    .values(
        status=JobStatus.RUNNING,
        attempts=elements.c.attempts + 1,
        worker_id=bindparam("claimed_by"),
        claimed_at=bindparam("claimed_now"),
    )
)


def _begin(session: Session, batches: Sequence[Batch], worker_id: int, now: datetime) -> None:
    if batches:
        session.execute(
            _BEGIN,
            [
                {"of_job": element.job_id, "number": element.id, "claimed_by": worker_id, "claimed_now": now}
                for batch in batches
                for element in batch.elements
            ],
        )


# -- what is due, read once and handed out in batches


class _Listings:
    """One LIST element for each job."""

    def __init__(self, session: Session, locked: Sequence[LockedJob], room: Room, now: datetime) -> None:
        self._due = due.due_listings(session, locked, now)

    def take(self, job: LockedJob, allowed: int, sharers: int) -> _Rows:
        if allowed < 1 or job.id not in self._due:
            return ()
        job.list_due_at = None
        return self._due.pop(job.id)

    def look_again(self, locked: Sequence[LockedJob]) -> None:
        """Nothing to do: what was read has told the jobs."""


class _Work:
    """All other elements: of jobs with few, all are read at once; of the others, as many as are a user's share."""

    def __init__(self, session: Session, locked: Sequence[LockedJob], room: Room, now: datetime) -> None:
        self._session = session
        self._room = room
        self._now = now
        self._due: dict[int, deque[sa.Row[Any]]] = {}
        # Jobs of which there may be more due than was read, and how many that was.
        self._read_on: dict[int, int] = {}
        left = room.elements
        small = []
        for job in locked:
            if job.record.type is not JobType.REMOVE and job.counters.submitted <= left:
                left -= job.counters.submitted
                small.append(job)
        for job_id, rows in due.due_work_of_small(session, small, now).items() if small else ():
            self._due[job_id] = deque(rows)

    def take(self, job: LockedJob, allowed: int, sharers: int) -> _Rows:
        if job.id not in self._due:
            self._due[job.id] = deque()
            self._read_on[job.id] = 0
        waiting = self._due[job.id]
        if not waiting and job.id in self._read_on and allowed > 0:
            share = -(-self._room.batches // sharers) * self._room.limits.batch_elements
            most = min(share, self._room.elements)
            offset = self._read_on.pop(job.id)
            waiting.extend(due.due_work(self._session, job, most, offset, self._now))
            if len(waiting) == most:
                self._read_on[job.id] = offset + most
        return _packed(waiting, allowed, self._room.limits.batch_bytes)

    def look_again(self, locked: Sequence[LockedJob]) -> None:
        """Tell jobs of which all is taken that was due when they have work again."""
        for job in locked:
            if job.id in self._due and not self._due[job.id] and job.id not in self._read_on:
                due.look_again(self._session, job)


_Stock = _Listings | _Work


def _packed(waiting: deque[sa.Row[Any]], allowed: int, most_bytes: int) -> _Rows:
    """Take the first rows of one type off, up to a number and up to a number of bytes; a larger one goes alone."""
    packed: list[sa.Row[Any]] = []
    passed_over: list[sa.Row[Any]] = []
    total = 0
    while waiting and len(packed) < allowed:
        row = waiting[0]
        if packed and row.type is not packed[0].type:
            passed_over.append(waiting.popleft())
            continue
        total += row.size
        if packed and total > most_bytes:
            break
        packed.append(waiting.popleft())
    waiting.extendleft(reversed(passed_over))
    return packed

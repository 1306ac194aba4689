"""Claims: what is due goes to a daemon, fairly, in batches, many in one transaction.

Between users: weighted turns, by the work that each was given (`pdm.workqueue.domain.turns`). Within a user: strictly
by priority, then the older job, as far as limits leave room for its route and sites. Within a job: fresh elements in
the order of the listing, then those put off: what fails must not hold up what may succeed. Listings have a lane of
their own.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.batching import goes_alone, kind_of
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.store import due
from pdm.workqueue.store.leases import live_worker
from pdm.workqueue.store.locks import LockedJob, lock_due_jobs, save_jobs
from pdm.workqueue.store.records import claimed_record
from pdm.workqueue.store.room import ClaimLimits, Room
from pdm.workqueue.store.tables import elements, jobs

#: Jobs that one claim locks, so that many small ones fill its batches.
_MOST_CANDIDATES = 500
#: Small jobs that it counts, to know how many elements wait for all agents.
_MOST_COUNTED = 2000
#: Users of whom it finds nothing that may be taken, at most, before it gives up.
_MOST_PASSED_OVER = 100


def claim(session: Session, worker: str, limits: ClaimLimits, now: datetime) -> list[Batch]:
    """Take what is due: SUBMITTED becomes RUNNING, with one attempt more.

    Args:
        session: of the database.
        worker: the incarnation that takes it; without a lease it gets nothing.
        limits: how much.
        now: the present moment, UTC.

    Returns:
        Batches; listings first.
    """
    worker_id = live_worker(session, worker)
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
    # First what no other daemon is busy with; only if that is nothing, wait for the others, and not for long: one of
    # them may hang.
    for skip_locked in (True, False):
        candidates = _candidates(session, lane, room, now) if room.is_left else _Candidates()
        numbers = candidates.numbers
        if not numbers:
            return []
        by_number = {job.id: job for job in lock_due_jobs(session, lane.due_at, numbers, now, skip_locked=skip_locked)}
        if not by_number:
            continue
        locked = [by_number[number] for number in numbers if number in by_number]
        stock = make_stock(session, locked, room, now)
        packed = _take_in_turn(stock, locked, room, candidates.beyond)
        batches = _begun(session, packed, worker_id, now)
        stock.look_again(locked)
        save_jobs(session, [job for job in locked if job.is_changed])
        if batches or len(locked) == len(numbers):
            return batches
    return []


@frozen
class _Candidates:
    """Jobs to look at.

    Attributes:
        numbers: of the jobs.
        beyond: elements that wait in further jobs, as far as they were counted, by user.
    """

    numbers: Sequence[int] = ()
    beyond: Mapping[int, int] = {}


def _candidates(session: Session, lane: due.Lane, room: Room, now: datetime) -> _Candidates:
    """Jobs to look at: each user's in order, the users in turn.

    Twice as many as there may be batches; where those would not fill the batches, because they are small, as many as
    the batches can take.
    """
    # Limits are for work: listings wait for none.
    limited = lane is due.WORK
    users = room.in_turn(user for user in session.scalars(lane.users) if room.user_is_open(user, limited=limited))
    begins, conditions = room.begins(), room.conditions if limited else _no_conditions
    closed = bool(begins or conditions(jobs.c))
    statement = lane.open_jobs_of_user(begins, conditions) if closed else lane.jobs_of_user
    few = 2 * room.batches
    sharers = max(min(len(users), few), 1)
    counted = _MOST_COUNTED // sharers
    columns: list[deque[int]] = []
    beyond = {}
    users_due = 0
    # Users of whom all is kept out hide nobody, however many they are: chance finds the others in time.
    others = users[few:]
    random.shuffle(others)
    for user in [*users[:few], *others[:_MOST_PASSED_OVER]]:
        if len(columns) == few:
            # Further users get nothing now, but their work is something for other agents.
            if users_due >= room.limits.sharers:
                break
            users_due += session.execute(statement, {"user": user, "now": now, "most": 1}).first() is not None
            continue
        rows = session.execute(statement, {"user": user, "now": now, "most": few}).all()
        if limited and len(rows) == few < counted and _waiting_in(rows) < room.elements:
            rows = session.execute(statement, {"user": user, "now": now, "most": counted}).all()
            could_be_taken = room.most_elements(_waiting_in(rows), sharers)
            most = max(min(could_be_taken, _MOST_CANDIDATES // sharers), few)
            beyond[user] = _waiting_in(rows[most:])
            rows = rows[:most]
        if rows:
            users_due += 1
            columns.append(deque(row.id for row in rows))
    turns: list[int] = []
    while columns:
        turns += [column.popleft() for column in columns if column]
        columns = [column for column in columns if column]
    room.users = users_due
    return _Candidates(turns, beyond)


def _waiting_in(rows: Sequence[sa.Row[Any]]) -> int:
    return sum(row.num_submitted for row in rows)


def _no_conditions(_columns: Any) -> list[sa.ColumnElement[bool]]:
    return []


def _take_in_turn(stock: _Stock, locked: Sequence[LockedJob], room: Room, beyond: Mapping[int, int]) -> list[_Packing]:
    """Batch by batch, always of the user whose turn it is."""
    queues: dict[int, list[LockedJob]] = {}
    for job in locked:
        queues.setdefault(job.record.user_id, []).append(job)
    batches = []
    while queues and room.is_left:
        user = min(queues, key=room.turn)
        packing, queues[user] = _next_batch(stock, queues[user], room, len(queues), beyond.get(user, 0))
        if packing.rows:
            batches.append(packing)
            room.take_batch(packing.jobs.values(), packing.rows[0].type, len(packing.rows), packing.bytes)
        if not queues[user]:
            del queues[user]
    return batches


def _next_batch(
    stock: _Stock, queue: list[LockedJob], room: Room, sharers: int, beyond: int
) -> tuple[_Packing, list[LockedJob]]:
    """A batch for a user's first job and those like it, and the jobs that may have more.

    Where it has no elements, nothing is due in the first job, or a limit is reached; the next may be of another site.
    """
    first = queue[0]
    waiting = beyond + sum(job.counters.submitted for job in queue if _are_alike(first, job))
    packing = _Packing(room.for_batch(first.record, waiting), room.limits.batch_bytes)
    remaining: list[LockedJob] = []
    for at, job in enumerate(queue):
        if packing.is_full:
            return packing, remaining + queue[at:]
        if not _are_alike(first, job):
            remaining.append(job)
            continue
        allowed = stock.allowed(job)
        rows = stock.waiting(job, allowed, sharers)
        count = packing.fill(job, rows, allowed)
        room.take(job, count)
        job.move(JobStatus.SUBMITTED, JobStatus.RUNNING, count)
        # Without a row of this one: there may be some of another type; but the first job has had its chance.
        if (rows and allowed > 0 and packing.rows) or (count and stock.may_have_more(job)):
            remaining.append(job)
    return packing, remaining


def _are_alike(one: LockedJob, other: LockedJob) -> bool:
    """Whether elements of two jobs of a user may share a batch."""
    if one is other:
        return True
    first, second = one.record, other.record
    return kind_of(first) == kind_of(second) and first.priority == second.priority and first.options == second.options


class _Packing:
    """A batch that is being put together.

    Args:
        most: elements.
        most_bytes: of all elements; a larger one goes alone.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.rows: list[sa.Row[Any]] = []
        self.jobs: dict[int, LockedJob] = {}
        self.is_full = most < 1
        self.bytes = 0
        self._most = most
        self._most_bytes = most_bytes

    def fill(self, job: LockedJob, waiting: deque[sa.Row[Any]], allowed: int) -> int:
        """Take rows of a job off, the first ones that fit; returns how many."""
        passed_over: list[sa.Row[Any]] = []
        before = len(self.rows)
        while waiting and not self.is_full and len(self.rows) - before < allowed:
            row = waiting[0]
            if self.rows and row.type is not self.rows[0].type:
                passed_over.append(waiting.popleft())
                continue
            alone = row.type is JobType.LIST or goes_alone(row.attempts, row.failure_code)
            if self.rows and (alone or self.bytes + row.size > self._most_bytes):
                self.is_full = True
                break
            self.rows.append(waiting.popleft())
            self.bytes += row.size
            self.is_full = alone or len(self.rows) == self._most
        waiting.extendleft(reversed(passed_over))
        count = len(self.rows) - before
        if count:
            self.jobs[job.id] = job
        return count


def _begun(session: Session, packed: Sequence[_Packing], worker_id: int, now: datetime) -> list[Batch]:
    """The batches, with their elements RUNNING."""
    if not packed:
        return []
    session.execute(
        _BEGIN,
        [
            {"of_job": row.job_id, "number": row.id, "claimed_by": worker_id, "claimed_now": now}
            for packing in packed
            for row in packing.rows
        ],
    )
    for job in {number: job for packing in packed for number, job in packing.jobs.items()}.values():
        job.started_at = job.started_at or now
        job.roll_up(now)
    return [
        Batch(
            {number: job.record for number, job in packing.jobs.items()},
            packing.rows[0].type,
            tuple(claimed_record(row) for row in packing.rows),
        )
        for packing in packed
    ]


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


# -- what is due, read once and handed out in batches


class _Listings:
    """One LIST element for each job."""

    def __init__(self, session: Session, locked: Sequence[LockedJob], room: Room, now: datetime) -> None:
        self._room = room
        self._due = {number: deque(rows) for number, rows in due.due_listings(session, locked, now).items()}

    def allowed(self, job: LockedJob) -> int:
        """How many elements of a job may be taken."""
        return self._room.for_listing(job)

    def waiting(self, job: LockedJob, allowed: int, sharers: int) -> deque[sa.Row[Any]]:
        if allowed < 1 or job.id not in self._due:
            return deque()
        job.list_due_at = None
        return self._due[job.id]

    def may_have_more(self, job: LockedJob) -> bool:
        return False

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

    def allowed(self, job: LockedJob) -> int:
        """How many elements of a job may be taken."""
        return self._room.for_work(job)

    def waiting(self, job: LockedJob, allowed: int, sharers: int) -> deque[sa.Row[Any]]:
        """What is due of a job, as far as it is known; more is read when that is nothing."""
        if job.id not in self._due:
            self._due[job.id] = deque()
            self._read_on[job.id] = 0
        waiting = self._due[job.id]
        if not waiting and job.id in self._read_on and allowed > 0:
            share = -(-self._room.batches // sharers) * self._room.limits.batch_size(job.record)
            most = min(share, self._room.elements)
            offset = self._read_on.pop(job.id)
            waiting.extend(due.due_work(self._session, job, most, offset, self._now))
            if len(waiting) == most:
                self._read_on[job.id] = offset + most
        return waiting

    def may_have_more(self, job: LockedJob) -> bool:
        return job.id in self._read_on

    def look_again(self, locked: Sequence[LockedJob]) -> None:
        """Tell jobs of which all is taken that was due when they have work again."""
        for job in locked:
            if job.id in self._due and not self._due[job.id] and job.id not in self._read_on:
                due.look_again(self._session, job, self._now)


_Stock = _Listings | _Work

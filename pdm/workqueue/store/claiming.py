"""Claims: give due elements to a daemon, fairly, in batches, many in one transaction.

Between users: weighted fair queueing (`pdm.workqueue.domain.limits`). Within a user: by priority, then the older job,
as long as limits allow its route and sites. Within a job: first attempts in the order of the listing, then retries, so
that failures do not delay what may succeed. Listings have a queue of their own.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import Batch, ElementRecord
from pdm.workqueue.domain.limits import runs_alone, work_kind
from pdm.workqueue.store import claim_queries
from pdm.workqueue.store.claim_limits import ClaimBudget, ClaimLimits
from pdm.workqueue.store.leases import live_worker
from pdm.workqueue.store.locks import LockedJob, lock_due_jobs, save_jobs
from pdm.workqueue.store.records import columns_of, elements, jobs
from pdm.workqueue.store.row_statements import RowStatement

#: Jobs that one claim locks at most, so that many small ones fill its batches.
_MOST_CANDIDATES = 500
#: Small jobs that are counted to estimate how many elements wait for all agents.
_MOST_COUNTED = 2000
#: Users without claimable jobs that are scanned before the claim gives up.
_MOST_PASSED_OVER = 100


def claim(session: Session, worker: str, limits: ClaimLimits, now: datetime) -> list[Batch]:
    """Claim due elements: SUBMITTED becomes RUNNING, with one attempt more.

    ``worker``: incarnation of the daemon; without a lease it gets nothing.

    Returns:
        Batches; listings first.
    """
    return [batch for batches in claim_each(session, worker, [limits], now) for batch in batches]


def claim_each(session: Session, worker: str, several: Sequence[ClaimLimits], now: datetime) -> list[list[Batch]]:
    """Like `claim` with each of several limits in turn, in one transaction; returns the batches of each.

    Jobs are locked in the order of their ids only within each claim. That leads to no deadlock: a claim waits for a
    lock only briefly.
    """
    worker_id = live_worker(session, worker)
    return [[] if worker_id is None else _claim(session, worker_id, limits, now) for limits in several]


def _claim(session: Session, worker_id: int, limits: ClaimLimits, now: datetime) -> list[Batch]:
    budget = ClaimBudget.measure(session, limits)
    batches: list[Batch] = []
    if JobType.LIST in limits.types:
        batches += _claim_queue(session, claim_queries.LISTING_QUEUE, _DueListings, worker_id, budget, now)
    if JobType.COPY in limits.types:
        batches += _claim_queue(session, claim_queries.WORK_QUEUE, _DueWork, worker_id, budget, now)
    return batches


def _claim_queue(
    session: Session,
    queue: claim_queries.ClaimQueue,
    read_due_elements: Callable[[Session, Sequence[LockedJob], ClaimBudget, datetime], _DueElements],
    worker_id: int,
    budget: ClaimBudget,
    now: datetime,
) -> list[Batch]:
    # First only jobs that no other daemon has locked. If that gives nothing, wait for the locks, briefly: the other
    # session may hang.
    candidates: _Candidates | None = None
    for skip_locked in (True, False):
        if candidates is None:
            candidates = _candidates(session, queue, budget, now) if budget.has_capacity else _Candidates()
        numbers = candidates.numbers
        if not numbers:
            return []
        by_number = {job.id: job for job in lock_due_jobs(session, queue.due_at, numbers, now, skip_locked=skip_locked)}
        if not by_number:
            continue
        locked = [by_number[number] for number in numbers if number in by_number]
        due_elements = read_due_elements(session, locked, budget, now)
        builders = _take_in_turn(due_elements, locked, budget, candidates.beyond)
        batches = _begin_batches(session, builders, worker_id, now)
        due_elements.update_due_at(locked)
        save_jobs(session, [job for job in locked if job.is_changed])
        if batches or len(locked) == len(numbers):
            return batches
        # The quota may be used up by what was locked.
        candidates = None
    return []


@frozen
class _Candidates:
    """Jobs that a claim locks and reads.

    Attributes:
        beyond: user → elements that wait in further jobs; at most `_MOST_COUNTED` jobs are counted.
    """

    numbers: Sequence[int] = ()
    beyond: Mapping[int, int] = {}


def _candidates(session: Session, queue: claim_queries.ClaimQueue, budget: ClaimBudget, now: datetime) -> _Candidates:
    """Candidates: the jobs of each user in order, the users in turn.

    Twice as many jobs as batches; more where small jobs would not fill the batches.
    """
    # The quota is for work: listings are not limited by it.
    limited = queue is claim_queries.WORK_QUEUE
    users = budget.in_fair_order(
        session, (user for user in session.scalars(queue.users) if budget.may_claim_for(user, limited=limited))
    )
    start_conditions, conditions = budget.start_conditions(), budget.conditions if limited else _no_conditions
    closed = bool(start_conditions or conditions(jobs.c))
    statement = queue.open_jobs_of_user(start_conditions, conditions) if closed else queue.jobs_of_user
    few = 2 * budget.batches
    sharers = max(min(len(users), few), 1)
    counted = _MOST_COUNTED // sharers
    columns: list[deque[int]] = []
    beyond = {}
    users_due = 0
    # Users whose jobs are all excluded must not hide others: a random choice finds the others in time.
    others = users[few:]
    random.shuffle(others)
    for user in [*users[:few], *others[:_MOST_PASSED_OVER]]:
        if len(columns) == few:
            # Further users get nothing now, but their work keeps other agents busy.
            if users_due >= budget.limits.sharers:
                break
            users_due += session.execute(statement, {"user": user, "now": now, "most": 1}).first() is not None
            continue
        rows = session.execute(statement, {"user": user, "now": now, "most": few}).all()
        if limited and len(rows) == few < counted and _count_submitted(rows) < budget.elements:
            rows = session.execute(statement, {"user": user, "now": now, "most": counted}).all()
            could_be_taken = budget.most_elements(_count_submitted(rows), sharers, budget.batches)
            most = max(min(could_be_taken, _MOST_CANDIDATES // sharers), few)
            beyond[user] = _count_submitted(rows[most:])
            rows = rows[:most]
        if rows:
            users_due += 1
            columns.append(deque(row.id for row in rows))
    turns: list[int] = []
    while columns:
        turns += [column.popleft() for column in columns if column]
        columns = [column for column in columns if column]
    budget.users = users_due
    return _Candidates(turns, beyond)


def _count_submitted(rows: Sequence[sa.Row[Any]]) -> int:
    return sum(row.num_submitted for row in rows)


def _no_conditions(_columns: Any) -> list[sa.ColumnElement[bool]]:
    return []


def _take_in_turn(
    due_elements: _DueElements, locked: Sequence[LockedJob], budget: ClaimBudget, beyond: Mapping[int, int]
) -> list[_BatchBuilder]:
    """Build batches one by one, each for the user who is next."""
    queues: dict[int, list[LockedJob]] = {}
    for job in locked:
        queues.setdefault(job.record.user_id, []).append(job)
    batches = []
    while queues and budget.has_capacity:
        user = min(queues, key=budget.order_key)
        builder, queues[user] = _next_batch(due_elements, queues[user], budget, len(queues), beyond.get(user, 0))
        if builder.elements:
            batches.append(builder)
            budget.take_batch(builder.jobs.values(), builder.elements[0].type, len(builder.elements), builder.bytes)
        if not queues[user]:
            del queues[user]
    return batches


def _next_batch(
    due_elements: _DueElements, queue: list[LockedJob], budget: ClaimBudget, sharers: int, beyond: int
) -> tuple[_BatchBuilder, list[LockedJob]]:
    """A batch for a user's first job and similar ones, and the jobs that may have more elements.

    It is empty if nothing of the first job is due or a limit is reached; the next job may be of another site.
    """
    first = queue[0]
    waiting = beyond + sum(job.counters.submitted for job in queue if _can_share_batch(first, job))
    most = budget.batch_allowance(first.record, waiting)
    builder = _BatchBuilder(most, budget.limits.batch_bytes_of(first.record))
    remaining: list[LockedJob] = []
    for at, job in enumerate(queue):
        if builder.is_full:
            return builder, remaining + queue[at:]
        if not _can_share_batch(first, job):
            remaining.append(job)
            continue
        allowed = due_elements.allowed(job)
        due = due_elements.waiting(job, allowed, sharers, most)
        count = builder.fill(job, due, allowed)
        budget.take(job, count)
        job.move(JobStatus.SUBMITTED, JobStatus.RUNNING, count)
        # If the batch is empty, elements of another type may remain: they wait for the next claim.
        if (due and allowed > 0 and builder.elements) or (count and due_elements.may_have_more(job)):
            remaining.append(job)
    return builder, remaining


def _can_share_batch(one: LockedJob, other: LockedJob) -> bool:
    """Whether elements of two jobs of a user may share a batch."""
    if one is other:
        return True
    first, second = one.record, other.record
    return (
        work_kind(first) == work_kind(second) and first.priority == second.priority and first.options == second.options
    )


class _BatchBuilder:
    """A batch under construction.

    Args:
        most: elements.
        most_bytes: sum of all elements; a larger element gets a batch of its own.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.elements: list[ElementRecord] = []
        self.jobs: dict[int, LockedJob] = {}
        self.is_full = most < 1
        self.bytes = 0
        self._most = most
        self._most_bytes = most_bytes

    def fill(self, job: LockedJob, waiting: deque[ElementRecord], allowed: int) -> int:
        """Take the first due elements of a job that fit; returns how many."""
        passed_over: list[ElementRecord] = []
        before = len(self.elements)
        while waiting and not self.is_full and len(self.elements) - before < allowed:
            element = waiting[0]
            if self.elements and element.type is not self.elements[0].type:
                passed_over.append(waiting.popleft())
                continue
            failure = element.failure
            alone = element.type is JobType.LIST or (
                failure is not None and runs_alone(element.attempts - 1, failure.code.value)
            )
            if self.elements and (alone or self.bytes + element.work_bytes > self._most_bytes):
                self.is_full = True
                break
            self.elements.append(waiting.popleft())
            self.bytes += element.work_bytes
            self.is_full = alone or len(self.elements) == self._most
        waiting.extendleft(reversed(passed_over))
        count = len(self.elements) - before
        if count:
            self.jobs[job.id] = job
        return count


def _begin_batches(session: Session, builders: Sequence[_BatchBuilder], worker_id: int, now: datetime) -> list[Batch]:
    """Mark the elements RUNNING and return the batches."""
    if not builders:
        return []
    claimed = sorted((element.job_id, element.id) for builder in builders for element in builder.elements)
    mark_running(session, claimed, worker_id, now)
    for job in {number: job for builder in builders for number, job in builder.jobs.items()}.values():
        job.started_at = job.started_at or now
        job.roll_up(now)
    return [
        Batch(
            {number: job.record for number, job in builder.jobs.items()},
            builder.elements[0].type,
            tuple(builder.elements),
        )
        for builder in builders
    ]


def mark_running(session: Session, claimed: Sequence[tuple[int, int]], worker_id: int, now: datetime) -> None:
    """Mark elements RUNNING that were read as SUBMITTED under the lock of their jobs.

    ``claimed``: job and number of each, sorted.
    """
    _MARK_RUNNING.execute(session, _ranges(claimed), worker_id, now)


def _ranges(claimed: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Ranges of consecutive numbers: job, first and last number. ``claimed``: job and number, sorted."""
    first = last = claimed[0]
    for job_id, number in claimed[1:]:
        if (job_id, number - 1) != last:
            yield *first, last[1]
            first = (job_id, number)
        last = (job_id, number)
    yield *first, last[1]


#: Fresh elements are claimed in the order of their numbers, and a range of them costs an eighth of so many rows; all
#: ranges are one statement, for many jobs of one element are claimed together.
_MARK_RUNNING = RowStatement(
    """
    WITH claimed (job_id, lowest, highest) AS (VALUES {rows})
    UPDATE job_elements SET status = 'RUNNING', attempts = job_elements.attempts + 1, worker_id = ?, claimed_at = ?
    FROM claimed WHERE job_elements.job_id = claimed.job_id
        AND job_elements.id BETWEEN claimed.lowest AND claimed.highest
    """,
    columns_of(elements, "job_id", "id", "id"),
    columns_of(elements, "worker_id", "claimed_at"),
)


# -- due elements, read once and handed out in batches


class _DueListings:
    """One LIST element for each job."""

    def __init__(self, session: Session, locked: Sequence[LockedJob], budget: ClaimBudget, now: datetime) -> None:
        self._budget = budget
        self._due = {job_id: deque(due) for job_id, due in claim_queries.due_listings(session, locked, now).items()}

    def allowed(self, job: LockedJob) -> int:
        return self._budget.listing_allowance(job)

    def waiting(self, job: LockedJob, allowed: int, sharers: int, size: int) -> deque[ElementRecord]:
        if allowed < 1 or job.id not in self._due:
            return deque()
        job.list_due_at = None
        return self._due[job.id]

    def may_have_more(self, job: LockedJob) -> bool:
        return False

    def update_due_at(self, locked: Sequence[LockedJob]) -> None:
        """Does nothing: reading the listings has updated the jobs."""


class _DueWork:
    """All other elements. Small jobs are read at once; of a large job, as many elements as a user's share."""

    def __init__(self, session: Session, locked: Sequence[LockedJob], budget: ClaimBudget, now: datetime) -> None:
        self._session = session
        self._budget = budget
        self._now = now
        self._due: dict[int, deque[ElementRecord]] = {}
        # Jobs with more due elements than were read → number of those read.
        self._read_on: dict[int, int] = {}
        # Jobs with a limit of their own whose listing runs, which does not count.
        limited = [job.id for job in locked if job.record.max_active is not None]
        self._listed = claim_queries.running_listings(session, limited) if limited else frozenset()
        batches = budget.batches_of(job.record for job in locked)
        left = budget.most_elements(sum(job.counters.submitted for job in locked), 1, batches)
        small = []
        for job in locked:
            if not job.record.has_phases and job.counters.submitted <= left:
                left -= job.counters.submitted
                small.append(job)
        for job_id, due in claim_queries.due_work_of_small_jobs(session, small, now).items() if small else ():
            self._due[job_id] = deque(due)

    def allowed(self, job: LockedJob) -> int:
        allowance = self._budget.work_allowance(job)
        most = job.record.max_active
        return allowance if most is None else min(allowance, most - self._active(job))

    def _active(self, job: LockedJob) -> int:
        return job.counters.running - (job.id in self._listed)

    def waiting(self, job: LockedJob, allowed: int, sharers: int, size: int) -> deque[ElementRecord]:
        """Due elements of a job; reads more when all known ones are taken, for batches of a size."""
        if job.id not in self._due:
            self._due[job.id] = deque()
            self._read_on[job.id] = 0
        waiting = self._due[job.id]
        if not waiting and job.id in self._read_on and allowed > 0:
            batches = min(-(-self._budget.batches // sharers), self._budget.batches_of([job.record]))
            most = min(max(batches, 1) * size, self._budget.elements)
            offset = self._read_on.pop(job.id)
            waiting.extend(claim_queries.due_work(self._session, job, most, offset, self._now))
            if len(waiting) == most:
                self._read_on[job.id] = offset + most
        return waiting

    def may_have_more(self, job: LockedJob) -> bool:
        return job.id in self._read_on

    def update_due_at(self, locked: Sequence[LockedJob]) -> None:
        """Reschedule the jobs whose due elements are all taken, and those of which no more may run at once."""
        for job in locked:
            if job.record.max_active is not None and self._active(job) >= job.record.max_active:
                # The end of one of those that run schedules it.
                job.work_due_at = None
            elif job.id in self._due and not self._due[job.id] and job.id not in self._read_on:
                claim_queries.update_due_at(self._session, job, self._now)


_DueElements = _DueListings | _DueWork

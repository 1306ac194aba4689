"""Limits of a claim: in all, for a route, a site, a user, a job; and the order of the users."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from attrs import define, field, frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.jobs import Batch, JobRecord
from pdm.workqueue.domain.limits import (
    FIRST_BATCH_SIZE,
    ClaimExclusions,
    FairQueue,
    LimitKey,
    LimitKind,
    Route,
    StreamQuota,
    WorkKind,
    batch_work,
    common_keys,
    fair_share,
    work_kind,
)
from pdm.workqueue.store.locks import LockedJob
from pdm.workqueue.store.records import jobs
from pdm.workqueue.WorkqueueDB import HAS_RUNNING

_LISTINGS = frozenset({JobType.LIST})
_WORK = frozenset(JobType) - _LISTINGS


@frozen
class ClaimLimits:
    """How much a claim may take.

    Attributes:
        elements: at most so many in all.
        batches: at most so many.
        batch_elements: at most so many in a batch.
        batch_sizes: kind of work → the same for that kind, never more than ``batch_elements``; others begin with
            `FIRST_BATCH_SIZE`. None for no such exclusions.
        sharers: how many batches there may be at once in all: no job is split coarser than lets all have a share. 0
            for no such care.
        batch_bytes: at most so many in a batch, unless it is of one element.
        types: ``{LIST}`` for the lane of listings, all others for the lane of work, or all for both.
        quota: how many batches for a route, a site, a user, a job; listings are not counted.
        exclusions: what may not begin, listings neither.
        turns: what users were given before; a claim leaves it as it is.
    """

    elements: int
    batches: int
    batch_elements: int
    batch_bytes: int
    types: frozenset[JobType] = field(default=frozenset(JobType))
    batch_sizes: Mapping[WorkKind, int] | None = None
    sharers: int = 0
    quota: StreamQuota = field(factory=StreamQuota)
    exclusions: ClaimExclusions = field(factory=ClaimExclusions)
    fair_queue: FairQueue = field(factory=FairQueue)

    @types.validator
    def _whole_lanes(self, attribute: object, types: frozenset[JobType]) -> None:
        if types not in (_LISTINGS, _WORK, _LISTINGS | _WORK):
            raise ValueError("a claim takes listings, or all but listings, or all")

    def batch_size(self, job: JobRecord) -> int:
        """How many elements a batch with work of this job's kind may have."""
        if self.batch_sizes is None:
            return self.batch_elements
        return min(self.batch_sizes.get(work_kind(job), FIRST_BATCH_SIZE), self.batch_elements)

    def note(self, fair_queue: FairQueue, batches: Iterable[Batch]) -> None:
        """Count what a claim under these limits took."""
        for batch in batches:
            work = 1.0
            if batch.type is not JobType.LIST:
                total_bytes = sum(element.size for element in batch.elements)
                work = batch_work(len(batch.elements), self.batch_size(batch.job), total_bytes, self.batch_bytes)
            fair_queue.charge(batch.job.user_id, work)


#: What runs, by user: as many rows as jobs run, however many wait or have ended.
RUNNING = (
    sa.select(jobs.c.user_id, sa.func.sum(jobs.c.num_running).label("running"))
    .where(sa.text(HAS_RUNNING))
    .group_by(jobs.c.user_id)
)
#: The routes of that, for sites that may be back.
_RUNNING_BY_ROUTE = (
    sa.select(jobs.c.protocol, jobs.c.src_siteid, jobs.c.dst_siteid)
    .where(sa.text(HAS_RUNNING))
    .group_by(jobs.c.protocol, jobs.c.src_siteid, jobs.c.dst_siteid)
)


@define
class ClaimBudget:
    """What may still be taken.

    Attributes:
        limits: of the claim.
        elements: left.
        batches: left.
        users: how many have something due, counted as far as it matters.
    """

    limits: ClaimLimits
    elements: int
    batches: int
    users: int = field(init=False, default=0)
    # Elements running, by user, in all daemons.
    _running: dict[int, int]
    _fair_queue: FairQueue
    # Sites at which one element may run by a protocol, and one runs.
    _probing: set[tuple[int, JobProtocol]] = field(factory=set)
    _batches_taken: dict[LimitKey, int] = field(factory=dict)

    @classmethod
    def measure(cls, session: Session, limits: ClaimLimits) -> ClaimBudget:
        """The room under some limits, with what runs at present."""
        running = {row.user_id: int(row.running) for row in session.execute(RUNNING)}
        tried: set[tuple[int, JobProtocol]] = set()
        if limits.exclusions.probed:
            for row in session.execute(_RUNNING_BY_ROUTE):
                tried |= limits.exclusions.probed & {(site, row.protocol) for site in (row.src_siteid, row.dst_siteid)}
        return cls(limits, limits.elements, limits.batches, running, limits.fair_queue.copy(), tried)

    @property
    def has_capacity(self) -> bool:
        return self.elements > 0 and self.batches > 0

    def order_key(self, user_id: int) -> tuple[float, float]:
        """Who has the least comes next: by the work that users were given, then by what they have running."""
        running = self._running.get(user_id, 0) / self._fair_queue.weight(user_id)
        return self._fair_queue.virtual_time(user_id), running

    def in_fair_order(self, users: Iterable[int]) -> list[int]:
        """Users, the next one first."""
        # Chance decides between equals; else the first would always win where work is done as soon as it is claimed.
        shuffled = list(users)
        random.shuffle(shuffled)
        return sorted(shuffled, key=self.order_key)

    def may_claim_for(self, user_id: int, *, limited: bool) -> bool:
        """Whether anything of a user may be taken; ``limited`` by openings, as all but listings are."""
        return user_id not in self.limits.exclusions.banned and (
            not limited or self._left((LimitKind.USER, user_id)) > 0
        )

    def batch_allowance(self, job: JobRecord, waiting: int) -> int:
        """How many elements one more batch may have.

        Args:
            job: one that it is of.
            waiting: elements of its user that could go into it.
        """
        return min(self.elements, self.limits.batch_size(job), self._share(waiting, self.users))

    def most_elements(self, waiting: int, users: int) -> int:
        """How many of a user's waiting elements, of any kind, the batches that are left could take."""
        sizes = self.limits.batch_sizes
        most = self.limits.batch_elements
        if sizes is not None:
            most = min(max(FIRST_BATCH_SIZE, *sizes.values()) if sizes else FIRST_BATCH_SIZE, most)
        batches = -(-self.batches // users)
        return min(self.elements, batches * min(most, self._share(waiting, users)))

    def _share(self, waiting: int, users: int) -> int:
        """What one batch may take so that all have something to the end; other users' work is something, too."""
        if not self.limits.sharers:
            return self.elements
        return fair_share(waiting, -(-self.limits.sharers // max(users, 1)))

    def listing_allowance(self, job: LockedJob) -> int:
        """How many elements of a job may be taken, as far as it may begin at all."""
        exclusions, record = self.limits.exclusions, job.record
        if record.user_id in exclusions.banned or exclusions.excludes(record.protocol, record.sites):
            return 0
        probed = self._probed(record)
        if not probed:
            return self.elements
        # One element is a probe: it tells as much as many would.
        return min(self.elements, 1) if self._probing.isdisjoint(probed) else 0

    def work_allowance(self, job: LockedJob) -> int:
        """How many elements of a job may go into a batch, as far as limits say; none if one more may not be."""
        keys = (*common_keys(job.record), (LimitKind.JOB, job.id))
        return self.listing_allowance(job) if all(self._left(key) > 0 for key in keys) else 0

    def take(self, job: LockedJob, count: int) -> None:
        """Count elements that go into a batch."""
        self.elements -= count
        self._running[job.record.user_id] = self._running.get(job.record.user_id, 0) + count
        if count:
            self._probing |= self._probed(job.record)

    def take_batch(self, members: Iterable[LockedJob], type_: JobType, elements: int, total_bytes: int) -> None:
        """Count a batch of some jobs that are alike."""
        self.batches -= 1
        records = [job.record for job in members]
        first, work = records[0], 1.0
        if type_ is not JobType.LIST:
            work = batch_work(elements, self.limits.batch_size(first), total_bytes, self.limits.batch_bytes)
            for key in (*common_keys(first), *((LimitKind.JOB, record.id) for record in records)):
                self._batches_taken[key] = self._batches_taken.get(key, 0) + 1
        self._fair_queue.charge(first.user_id, work)

    def start_conditions(self) -> list[sa.ColumnElement[bool]]:
        """Conditions that keep out jobs of which nothing may begin, so that they hide no others."""
        exclusions = self.limits.exclusions
        conditions = []
        if exclusions.drained:
            conditions.append(_not_at(exclusions.drained))
        closed = exclusions.paused | self._probing
        for protocol in sorted({protocol for _, protocol in closed}):
            away = {site for site, by in closed if by is protocol}
            conditions.append(sa.or_(jobs.c.protocol != protocol, _not_at(away)))
        return conditions

    def conditions(self, columns: Any) -> list[sa.ColumnElement[bool]]:
        """Conditions that keep out jobs of which limits let no work be taken, so that they hide no others.

        Args:
            columns: of jobs: id, src_siteid, dst_siteid.
        """
        closed: dict[LimitKind, list[Any]] = {kind: [] for kind in LimitKind}
        for kind, named in self.limits.quota.left:
            if self._left((kind, named)) <= 0:
                closed[kind].append(named)
        conditions = [_not_on(route, columns) for route in closed[LimitKind.ROUTE]]
        if sites := closed[LimitKind.INTO]:
            conditions.append(sa.func.coalesce(columns.dst_siteid, columns.src_siteid).not_in(sites))
        if sites := closed[LimitKind.OUT_OF]:
            conditions.append(sa.or_(columns.dst_siteid.is_(None), columns.src_siteid.not_in(sites)))
        if numbers := closed[LimitKind.JOB]:
            conditions.append(columns.id.not_in(numbers))
        return conditions

    def _probed(self, job: JobRecord) -> frozenset[tuple[int, JobProtocol]]:
        """The ends of a job of which nobody knows whether they are back."""
        probed = self.limits.exclusions.probed
        return probed & {(site, job.protocol) for site in job.sites} if probed else probed

    def _left(self, key: LimitKey) -> int:
        return self.limits.quota.of(key) - self._batches_taken.get(key, 0)


def _not_at(sites: Iterable[int]) -> sa.ColumnElement[bool]:
    numbers = sorted(sites)
    destination = jobs.c.dst_siteid
    return sa.and_(jobs.c.src_siteid.not_in(numbers), sa.or_(destination.is_(None), destination.not_in(numbers)))


def _not_on(route: Route, columns: Any) -> sa.ColumnElement[bool]:
    destination = columns.dst_siteid
    if route.destination is None:
        return sa.or_(columns.src_siteid != route.source, destination.is_not(None))
    return sa.or_(columns.src_siteid != route.source, destination.is_(None), destination != route.destination)

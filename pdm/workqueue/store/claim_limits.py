"""Limits of a claim: in total, per route, site, user and job; and the fair order of the users."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from attrs import define, field, frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import TOOL_PROTOCOLS, JobProtocol, JobType
from pdm.workqueue.domain.jobs import Batch, JobRecord
from pdm.workqueue.domain.limits import (
    ALL_SERVICES,
    FIRST_BATCH_SIZE,
    NO_HAND_OVERS,
    OWN_STREAMS,
    ClaimExclusions,
    FairQueue,
    HandOvers,
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

#: More than any batch has.
_NO_LIMIT_BYTES = 2**62
_LISTINGS = frozenset({JobType.LIST})
_WORK = frozenset(JobType) - _LISTINGS


@frozen(kw_only=True)
class ClaimLimits:
    """How much a claim may take.

    Attributes:
        batch_sizes: kind of work → elements that take as long as a batch shall; a batch has at most ``batch_elements``.
            `FIRST_BATCH_SIZE` for kinds that are missing. None: no limit by kind.
        sharers: batches that run at once in total. Work is split so that all of them get a share; 0 turns that off.
        batch_bytes: of a batch with more than one element.
        types: ``{LIST}`` for the queue of listings, all others for the queue of work, or all for both.
        quota: batches per route, site, user and job; listings are not counted.
        exclusions: what may not start, listings included.
        fair_queue: work that users were given so far; a claim does not change it.
        hand_overs: copies that take no streams.
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
    hand_overs: HandOvers = NO_HAND_OVERS

    @types.validator
    def _whole_lanes(self, attribute: object, types: frozenset[JobType]) -> None:
        if types not in (_LISTINGS, _WORK, _LISTINGS | _WORK):
            raise ValueError("a claim takes listings, or all but listings, or all")

    def whole_size(self, job: JobRecord) -> int:
        """Elements of this job's kind that take as long as a batch shall."""
        service = self.hand_overs.service_of(job)
        if service is not None:
            return self.hand_overs.sizes.get(service, 1)
        if self.batch_sizes is None:
            return self.batch_elements
        return self.batch_sizes.get(work_kind(job), FIRST_BATCH_SIZE)

    def batch_size(self, job: JobRecord) -> int:
        """Elements that a batch of this job's kind may have."""
        whole = self.whole_size(job)
        return whole if self.hand_overs.service_of(job) is not None else min(whole, self.batch_elements)

    def batch_bytes_of(self, job: JobRecord) -> int:
        """Bytes that a batch of this job's kind may have."""
        return self.batch_bytes if self.hand_overs.service_of(job) is None else _NO_LIMIT_BYTES

    def work(self, job: JobRecord, elements: int, total_bytes: int) -> float:
        """How much work a batch of a job is: `batch_work`."""
        return batch_work(elements, self.batch_size(job), total_bytes, self.batch_bytes_of(job))

    def note(self, fair_queue: FairQueue, batches: Iterable[Batch]) -> None:
        """Charge the users for claimed batches."""
        for batch in batches:
            work = 1.0
            if batch.type is not JobType.LIST:
                total_bytes = sum(element.work_bytes for element in batch.elements)
                work = self.work(batch.job, len(batch.elements), total_bytes)
            fair_queue.charge(batch.job.user_id, work)


#: Running elements per user. Partial index: reads only jobs with running elements.
RUNNING = (
    sa.select(jobs.c.user_id, sa.func.sum(jobs.c.num_running).label("running"))
    .where(sa.text(HAS_RUNNING))
    .group_by(jobs.c.user_id)
)
#: Routes with running elements, for sites that are being probed.
_RUNNING_BY_ROUTE = (
    sa.select(jobs.c.protocol, jobs.c.src_siteid, jobs.c.dst_siteid)
    .where(sa.text(HAS_RUNNING))
    .group_by(jobs.c.protocol, jobs.c.src_siteid, jobs.c.dst_siteid)
)


@define(kw_only=True)
class ClaimBudget:
    """What a claim may still take.

    Attributes:
        users: users with due work, counted up to ``limits.sharers``.
    """

    limits: ClaimLimits
    elements: int
    batches: int
    users: int = field(init=False, default=0)
    _fair_queue: FairQueue
    # Running elements per user, of all daemons; only needed to choose between users.
    _running: dict[int, int] = field(factory=dict)
    # Sites and protocols whose single probe is running.
    _probing: set[tuple[int, JobProtocol]] = field(factory=set)
    _batches_taken: dict[LimitKey, int] = field(factory=dict)

    @classmethod
    def measure(cls, session: Session, limits: ClaimLimits) -> ClaimBudget:
        """Start with the limits, and with the probes that run now."""
        tried: set[tuple[int, JobProtocol]] = set()
        if limits.exclusions.probed:
            for row in session.execute(_RUNNING_BY_ROUTE):
                tried |= limits.exclusions.probed & {(site, row.protocol) for site in (row.src_siteid, row.dst_siteid)}
        return cls(
            limits=limits,
            elements=limits.elements,
            batches=limits.batches,
            fair_queue=limits.fair_queue.copy(),
            probing=tried,
        )

    @property
    def has_capacity(self) -> bool:
        return self.elements > 0 and self.batches > 0

    def order_key(self, user_id: int) -> tuple[float, float]:
        """Sort key: the user who was given the least work first, then the one with the fewest running elements."""
        running = self._running.get(user_id, 0) / self._fair_queue.weight(user_id)
        return self._fair_queue.virtual_time(user_id), running

    def in_fair_order(self, session: Session, users: Iterable[int]) -> list[int]:
        """The users in the order in which they are served; reads what they run."""
        # Ties are broken at random: otherwise the first user always wins where work ends as soon as it is claimed.
        shuffled = list(users)
        if len(shuffled) > 1:
            self._running = {row.user_id: int(row.running) for row in session.execute(RUNNING)}
            random.shuffle(shuffled)
        return sorted(shuffled, key=self.order_key)

    def may_claim_for(self, user_id: int, *, limited: bool) -> bool:
        """Whether any job of a user may be claimed. ``limited``: the quota applies, as for all but listings."""
        if user_id in self.limits.exclusions.banned:
            return False
        # What is handed over takes no streams of the user.
        return not limited or bool(self.limits.hand_overs.sites) or self._left((LimitKind.USER, user_id)) > 0

    def batch_allowance(self, job: JobRecord, waiting: int) -> int:
        """Elements that the next batch may have.

        ``job``: the first job of the batch. ``waiting``: elements of its user that could go into the batch.
        """
        limits = self.limits
        most = min(self.elements, limits.batch_size(job))
        if self._service_of(job) is not None:
            return most
        return min(most, self._share(waiting, self.users, limits.whole_size(job)))

    def batches_of(self, jobs_of: Iterable[JobRecord]) -> int:
        """Upper bound of the batches that some jobs may have."""
        keys = {self._common_keys(job) for job in jobs_of}
        return min(self.batches, sum(max(min(self._left(key) for key in of_one), 0) for of_one in keys))

    def most_elements(self, waiting: int, users: int, batches: int) -> int:
        """Upper bound of the waiting elements of a user, of any kind, that some batches for all users can take."""
        sizes = self.limits.batch_sizes
        whole = self.limits.batch_elements if sizes is None else max(FIRST_BATCH_SIZE, *sizes.values(), 0)
        most = min(whole, self.limits.batch_elements)
        if handed := self.limits.hand_overs.sizes:
            return min(self.elements, batches * max(most, *handed.values()))
        return min(self.elements, -(-batches // users) * min(most, self._share(waiting, users, whole)))

    def _share(self, waiting: int, users: int, size: int) -> int:
        """Elements of one batch such that all agents have work until the end; work of other users counts as well."""
        if not self.limits.sharers:
            return self.elements
        return fair_share(waiting, -(-self.limits.sharers // max(users, 1)), size)

    def listing_allowance(self, job: LockedJob) -> int:
        """Elements of a job that may start; exclusions and probes only, without the quota."""
        exclusions, record = self.limits.exclusions, job.record
        if record.user_id in exclusions.banned or exclusions.excludes(record.protocol, record.sites):
            return 0
        probed = self._probed(record)
        if not probed:
            return self.elements
        # A probe is a single element: more would not give more information.
        return min(self.elements, 1) if self._probing.isdisjoint(probed) else 0

    def work_allowance(self, job: LockedJob) -> int:
        """Elements of a job that may go into a batch under all limits; 0 if no further batch may start."""
        keys = self._keys([job.record])
        return self.listing_allowance(job) if all(self._left(key) > 0 for key in keys) else 0

    def _service_of(self, job: JobRecord) -> str | None:
        return self.limits.hand_overs.service_of(job)

    def _keys(self, members: Sequence[JobRecord]) -> Sequence[LimitKey]:
        """The keys that a batch of similar jobs counts for."""
        common = self._common_keys(members[0])
        if self._service_of(members[0]) is not None:
            return common
        return *common, *((LimitKind.JOB, record.id) for record in members)

    def _common_keys(self, job: JobRecord) -> tuple[LimitKey, ...]:
        """Those of all jobs that may share a batch."""
        service = self._service_of(job)
        return (*common_keys(job), OWN_STREAMS) if service is None else ((LimitKind.SERVICE, service), ALL_SERVICES)

    def take(self, job: LockedJob, count: int) -> None:
        """Count elements that were put into a batch."""
        self.elements -= count
        self._running[job.record.user_id] = self._running.get(job.record.user_id, 0) + count
        if count:
            self._probing |= self._probed(job.record)

    def take_batch(self, members: Iterable[LockedJob], type_: JobType, elements: int, total_bytes: int) -> None:
        """Count a batch of similar jobs."""
        self.batches -= 1
        records = [job.record for job in members]
        first, work = records[0], 1.0
        if type_ is not JobType.LIST:
            work = self.limits.work(first, elements, total_bytes)
            for key in self._keys(records):
                self._batches_taken[key] = self._batches_taken.get(key, 0) + 1
        self._fair_queue.charge(first.user_id, work)

    def start_conditions(self) -> list[sa.ColumnElement[bool]]:
        """SQL conditions that exclude jobs of which nothing may start, so that they do not fill the candidates."""
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
        """SQL conditions that exclude jobs whose quota is used up, so that they do not fill the candidates.

        ``columns``: of jobs: id, user_id, type, protocol, src_siteid, dst_siteid, extra_opts.
        """
        sites = self.limits.hand_overs.sites
        handed = _handed_over(columns, sites.values()) if sites else sa.false()
        conditions = [sa.or_(condition, handed) for condition in self._stream_conditions(columns)]
        closed = [url for url in sites if self._left((LimitKind.SERVICE, url)) <= 0]
        if sites and self._left(ALL_SERVICES) <= 0:
            closed = list(sites)
        if closed:
            conditions.append(sa.not_(_handed_over(columns, [sites[url] for url in closed])))
        return conditions

    def _stream_conditions(self, columns: Any) -> list[sa.ColumnElement[bool]]:
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
        if closed[LimitKind.OWN]:
            conditions.append(sa.false())
        return conditions

    def _probed(self, job: JobRecord) -> frozenset[tuple[int, JobProtocol]]:
        """Sites of a job that are being probed."""
        probed = self.limits.exclusions.probed
        return probed & {(site, job.protocol) for site in job.sites} if probed else probed

    def _left(self, key: LimitKey) -> int:
        return self.limits.quota.of(key) - self._batches_taken.get(key, 0)


def _handed_over(columns: Any, sites: Iterable[Collection[tuple[int, int | None]]]) -> sa.ColumnElement[bool]:
    """Jobs whose copies are handed over, roughly: only for the choice of candidates. Each site is with its user."""
    by_owner: dict[int | None, set[int]] = {}
    for named in sites:
        for site, owner in named:
            by_owner.setdefault(owner, set()).add(site)
    at = [
        sa.and_(
            sa.true() if owner is None else columns.user_id == owner,
            sa.or_(columns.src_siteid.in_(numbers), columns.dst_siteid.in_(numbers)),
        )
        for owner, numbers in by_owner.items()
    ]
    return sa.and_(
        columns.type == JobType.COPY,
        columns.protocol.in_(TOOL_PROTOCOLS),
        columns.extra_opts["mover"].as_string().is_(None),
        sa.or_(*at),
    )


def _not_at(sites: Iterable[int]) -> sa.ColumnElement[bool]:
    numbers = sorted(sites)
    destination = jobs.c.dst_siteid
    return sa.and_(jobs.c.src_siteid.not_in(numbers), sa.or_(destination.is_(None), destination.not_in(numbers)))


def _not_on(route: Route, columns: Any) -> sa.ColumnElement[bool]:
    destination = columns.dst_siteid
    if route.destination is None:
        return sa.or_(columns.src_siteid != route.source, destination.is_not(None))
    return sa.or_(columns.src_siteid != route.source, destination.is_(None), destination != route.destination)

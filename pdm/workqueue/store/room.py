"""How much a claim may take: in all, for a user, for a job, for a site."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import sqlalchemy as sa
from attrs import define, field, frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.batching import FIRST_SIZE, WorkKind, fair_share, kind_of
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.store.locks import LockedJob
from pdm.workqueue.store.tables import jobs
from pdm.workqueue.WorkqueueDB import HAS_RUNNING

_LISTINGS = frozenset({JobType.LIST})
_WORK = frozenset(JobType) - _LISTINGS
_NO_CAP = 2**62


@frozen
class ClaimLimits:
    """How much a claim may take.

    Attributes:
        elements: at most so many in all.
        batches: at most so many.
        batch_elements: at most so many in a batch.
        batch_sizes: kind of work → the same for that kind, never more than ``batch_elements``; others begin with
            `FIRST_SIZE`. None for no such bounds.
        sharers: how many batches there may be at once in all: no job is split coarser than lets all have a share. 0
            for no such care.
        batch_bytes: at most so many in a batch, unless it is of one element.
        types: ``{LIST}`` for the lane of listings, all others for the lane of work, or all for both.
        job_caps: job → how many of its elements may run; jobs that are not named have no cap.
        user_caps: the same for users.
        site_caps: the same for what reads from or writes to a site; 0 pauses it.
        paused: sites that nothing reads from or writes to by a protocol.
    """

    elements: int
    batches: int
    batch_elements: int
    batch_bytes: int
    types: frozenset[JobType] = field(default=frozenset(JobType))
    batch_sizes: Mapping[WorkKind, int] | None = None
    sharers: int = 0
    job_caps: Mapping[int, int] | None = None
    user_caps: Mapping[int, int] | None = None
    site_caps: Mapping[int, int] | None = None
    paused: Collection[tuple[int, JobProtocol]] = ()

    @types.validator
    def _whole_lanes(self, attribute: object, types: frozenset[JobType]) -> None:
        if types not in (_LISTINGS, _WORK, _LISTINGS | _WORK):
            raise ValueError("a claim takes listings, or all but listings, or all")


#: What runs, by user and route: as many rows as jobs run, however many wait or have ended.
RUNNING = (
    sa.select(jobs.c.user_id, jobs.c.src_siteid, jobs.c.dst_siteid, sa.func.sum(jobs.c.num_running).label("running"))
    .where(sa.text(HAS_RUNNING))
    .group_by(jobs.c.user_id, jobs.c.src_siteid, jobs.c.dst_siteid)
)


@define
class Room:
    """What may still be taken.

    Attributes:
        limits: of the claim.
        elements: left.
        batches: left.
    """

    limits: ClaimLimits
    elements: int
    batches: int
    # Elements running, by user and by site; jobs know their own.
    _users: dict[int, int]
    _sites: dict[int, int]

    @classmethod
    def measure(cls, session: Session, limits: ClaimLimits) -> Room:
        """The room under some limits, with what runs at present."""
        users: dict[int, int] = {}
        sites: dict[int, int] = {}
        for row in session.execute(RUNNING):
            running = int(row.running)
            users[row.user_id] = users.get(row.user_id, 0) + running
            for site in _touched(row.src_siteid, row.dst_siteid):
                sites[site] = sites.get(site, 0) + running
        return cls(limits, limits.elements, limits.batches, users, sites)

    @property
    def is_left(self) -> bool:
        return self.elements > 0 and self.batches > 0

    def running_of_user(self, user_id: int) -> int:
        return self._users.get(user_id, 0)

    def user_is_open(self, user_id: int) -> bool:
        return _left(self.limits.user_caps, user_id, self.running_of_user(user_id)) > 0

    def batch_size(self, job: JobRecord) -> int:
        """How many elements a batch with work of this job's kind may have."""
        limits = self.limits
        if limits.batch_sizes is None:
            return limits.batch_elements
        return min(limits.batch_sizes.get(kind_of(job), FIRST_SIZE), limits.batch_elements)

    def for_batch(self, job: JobRecord, waiting: int) -> int:
        """How many elements one more batch may have.

        Args:
            job: one that it is of.
            waiting: elements that could go into it.
        """
        most = min(self.elements, self.batch_size(job))
        return min(most, fair_share(waiting, self.limits.sharers)) if self.limits.sharers else most

    def for_job(self, job: LockedJob) -> int:
        """How many elements of a job may go into one more batch, as far as caps say."""
        record, limits = job.record, self.limits
        if limits.job_caps is None and limits.user_caps is None and limits.site_caps is None:
            return self.elements
        return min(
            self.elements,
            _left(limits.job_caps, record.id, job.counters.running),
            _left(limits.user_caps, record.user_id, self.running_of_user(record.user_id)),
            *(
                _left(limits.site_caps, site, self._sites.get(site, 0))
                for site in _touched(record.src_siteid, record.dst_siteid)
            ),
        )

    def take(self, job: LockedJob, count: int) -> None:
        """Count elements that go into a batch."""
        record = job.record
        self.elements -= count
        self._users[record.user_id] = self.running_of_user(record.user_id) + count
        for site in _touched(record.src_siteid, record.dst_siteid):
            self._sites[site] = self._sites.get(site, 0) + count

    def closed(self) -> list[sa.ColumnElement[bool]]:
        """Conditions that keep out jobs of which nothing may be taken, so that they hide no others."""
        limits = self.limits
        conditions: list[sa.ColumnElement[bool]] = []
        sites = [site for site, cap in (limits.site_caps or {}).items() if self._sites.get(site, 0) >= cap]
        if sites:
            conditions = [
                jobs.c.src_siteid.not_in(sites),
                sa.or_(jobs.c.dst_siteid.is_(None), jobs.c.dst_siteid.not_in(sites)),
            ]
        for protocol in sorted({protocol for _, protocol in limits.paused}):
            away = sorted(site for site, by in limits.paused if by is protocol)
            reached = sa.or_(jobs.c.dst_siteid.is_(None), jobs.c.dst_siteid.not_in(away))
            conditions.append(sa.or_(jobs.c.protocol != protocol, sa.and_(jobs.c.src_siteid.not_in(away), reached)))
        for job_id, cap in (limits.job_caps or {}).items():
            conditions.append(sa.or_(jobs.c.id != job_id, jobs.c.num_running < cap))
        return conditions


def _left(caps: Mapping[int, int] | None, key: int, running: int) -> int:
    return _NO_CAP if caps is None else caps.get(key, _NO_CAP) - running


def _touched(source: int, destination: int | None) -> set[int]:
    return {source} if destination is None else {source, destination}

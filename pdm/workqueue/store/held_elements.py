"""HELD elements: which jobs have them, and how they are resumed when a credential or a program has come."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.credentials import ALL_SITES, CredentialKind
from pdm.workqueue.domain.enums import JobProtocol, JobStatus
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.holds import POLLED_CODES
from pdm.workqueue.store.job_changes import CHANGED_AT_ONCE, move_elements, waiting_listings
from pdm.workqueue.store.locks import lock_jobs, save_jobs
from pdm.workqueue.store.records import UPDATE_ELEMENT, credentials, elements, jobs
from pdm.workqueue.WorkqueueDB import (
    AT_ONCE,
    CLOCK_SKEW,
    HAS_HELD,
    IS_HELD,
    MAX_BYTES,
)

#: Jobs that one transaction scans for HELD elements.
_HELD_JOBS_AT_ONCE = 500
#: Jobs with HELD elements that are scanned for a credential stored since.
_MOST_HELD_JOBS = 5000

_HELD_JOBS = (
    sa.select(jobs.c.id, jobs.c.num_held, jobs.c.src_siteid, jobs.c.dst_siteid, jobs.c.protocol)
    .where(sa.text(HAS_HELD), jobs.c.user_id == bindparam("user"), jobs.c.id >= bindparam("first"))
    .order_by(jobs.c.id)
    .limit(_HELD_JOBS_AT_ONCE)
)
_RESUME = UPDATE_ELEMENT.values(status=JobStatus.SUBMITTED, due_at=AT_ONCE)
#: Not by a wait, which puts them back by itself.
_IS_FOR_CREDENTIAL = sa.func.coalesce(elements.c.failure_code, "").not_in([code.value for code in POLLED_CODES])
_HELD_AFTER = (
    sa.select(elements.c.id)
    .where(
        elements.c.job_id == bindparam("of_job"),
        sa.text(IS_HELD),
        _IS_FOR_CREDENTIAL,
        elements.c.id > bindparam("after"),
    )
    .order_by(elements.c.id)
    .limit(bindparam("most"))
)


@frozen
class Resumed:
    """Result of `resume_held`.

    Attributes:
        count: elements that went back to the queue.
        after: job and element of the last one, to continue from; None if there are no more.
    """

    count: int
    after: tuple[int, int] | None


class HeldRoute(NamedTuple):
    """A user and a route with HELD elements."""

    user_id: int
    protocol: JobProtocol
    source: int
    destination: int | None


def resume_held(
    session: Session,
    user_id: int,
    now: datetime,
    site_id: int = ALL_SITES,
    protocols: Collection[JobProtocol] | None = None,
    after: tuple[int, int] = (0, -1),
) -> Resumed:
    """Put HELD elements of a user back into the queue, a part at a time.

    ``site_id``: only jobs that read from or write to this site. ``protocols``: only jobs with one of these protocols.
    ``after``: where the last call ended: each element is resumed once, even if it is HELD again at once.
    """
    first = after[0] + (after[1] == MAX_BYTES)
    rows = session.execute(_HELD_JOBS, {"user": user_id, "first": first}).all()
    more, seen = len(rows) == _HELD_JOBS_AT_ONCE, first
    chosen, expected = [], 0
    for row in rows:
        if expected >= CHANGED_AT_ONCE:
            more = True
            break
        seen = row.id
        if site_id in (ALL_SITES, row.src_siteid, row.dst_siteid) and (protocols is None or row.protocol in protocols):
            chosen.append(row.id)
            expected += row.num_held
    last: tuple[int, int] | None = (seen, MAX_BYTES) if more else None
    left, count = CHANGED_AT_ONCE, 0
    resumed = []
    for job in lock_jobs(session, chosen):
        if not left or job.record.cancel_requested or not job.counters.held:
            continue
        parameters = {"of_job": job.id, "after": after[1] if job.id == after[0] else -1, "most": left}
        numbers = session.scalars(_HELD_AFTER, parameters).all()
        if not numbers:
            continue
        move_elements(session, _RESUME, job, numbers, JobStatus.HELD, JobStatus.SUBMITTED)
        job.schedule_work()
        resumed.append(job)
        left, count = left - len(numbers), count + len(numbers)
        if not left:
            last = (job.id, numbers[-1])
    if resumed:
        listings = waiting_listings(session, [job.id for job in resumed])
        for job in resumed:
            if job.id in listings:
                job.schedule_listing()
            job.roll_up(now)
        save_jobs(session, resumed)
    return Resumed(count, last)


_FIRST_HELD = (
    sa.select(elements.c.claimed_at)
    .where(elements.c.job_id == jobs.c.id, sa.text(IS_HELD), _IS_FOR_CREDENTIAL)
    .order_by(elements.c.id)
    .limit(1)
    .correlate(jobs)
    .scalar_subquery()
)
_NEWEST_CREDENTIAL = (
    sa.select(sa.func.max(credentials.c.stored_at))
    .where(
        credentials.c.user_id == jobs.c.user_id,
        credentials.c.kind == bindparam("of_kind"),
        sa.or_(credentials.c.site_id == ALL_SITES, credentials.c.site_id.in_([jobs.c.src_siteid, jobs.c.dst_siteid])),
    )
    .correlate(jobs)
    .scalar_subquery()
)
_HELD_DESPITE_CREDENTIAL = (
    sa.select(jobs.c.user_id, _FIRST_HELD.label("claimed_at"), _NEWEST_CREDENTIAL.label("stored_at"))
    .where(
        sa.text(HAS_HELD),
        sa.not_(jobs.c.cancel_requested),
        jobs.c.protocol.in_(bindparam("by_protocols", expanding=True)),
    )
    .limit(_MOST_HELD_JOBS)
)


def held_despite_credential(session: Session, kind: CredentialKind, protocols: Collection[JobProtocol]) -> list[int]:
    """Users with HELD elements who have stored a credential since these were claimed.

    The daemon may have stopped before it had resumed all, or a verdict arrived at the same time as the credential.

    ``protocols``: of jobs that may wait for such a credential.
    """
    rows = session.execute(_HELD_DESPITE_CREDENTIAL, {"of_kind": kind.value, "by_protocols": list(protocols)})
    return sorted(
        {
            row.user_id
            for row in rows
            if row.claimed_at is not None and row.stored_at is not None and row.stored_at >= row.claimed_at - CLOCK_SKEW
        }
    )


def held_routes(session: Session, code: FailureCode) -> list[HeldRoute]:
    """Users and routes with elements HELD for a failure code."""
    rows = session.execute(
        sa.select(jobs.c.user_id, jobs.c.protocol, jobs.c.src_siteid, jobs.c.dst_siteid)
        .where(
            sa.text(HAS_HELD),
            sa.exists().where(
                elements.c.job_id == jobs.c.id,
                elements.c.status == JobStatus.HELD,
                elements.c.failure_code == code.value,
            ),
        )
        .distinct()
    )
    return [HeldRoute(row.user_id, row.protocol, row.src_siteid, row.dst_siteid) for row in rows]

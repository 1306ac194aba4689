"""What became of the elements of a job: when their attempts began and ended, and their failures in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.store.jobs import ended_attempts
from pdm.workqueue.store.records import elements
from pdm.workqueue.WorkqueueDB import IS_SET_ASIDE, IS_WAITING_WORK


@frozen
class FailureGroup:
    """FAILED and HELD elements of a job with one code and scope, and the first of them as an example.

    Attributes:
        held: number of those that are HELD.
        element: number of the first.
    """

    code: FailureCode
    scope: FailureScope
    count: int
    held: int
    element: int
    src_filepath: str
    dst_filepath: str | None
    message: str


def attempt_times(
    session: Session, job_id: int, first: int, last: int
) -> Mapping[int, tuple[datetime | None, datetime | None]]:
    """When the first attempt of each element from one to another began, and its last one ended, by element."""
    times: dict[int, tuple[datetime | None, datetime | None]] = {}
    for attempt in ended_attempts(session, job_id, first, last):
        began, _ = times.get(attempt.element_id, (attempt.started_at, None))
        times[attempt.element_id] = (began, attempt.ended_at)
    return times


_GROUPED = (
    sa.select(
        elements.c.failure_scope.label("scope"),
        elements.c.failure_code.label("code"),
        sa.func.count().label("count"),
        sa.func.sum(sa.case((elements.c.status == JobStatus.HELD, 1), else_=0)).label("held"),
        sa.func.min(elements.c.id).label("first"),
    )
    .where(
        elements.c.job_id == bindparam("of_job"),
        # The partial index has FAILED ones by job and status.
        sa.text(IS_SET_ASIDE),
        elements.c.status.in_([JobStatus.FAILED, JobStatus.HELD]),
        elements.c.failure_code.is_not(None),
    )
    .group_by(elements.c.failure_scope, elements.c.failure_code)
    .subquery()
)
_FAILURE_GROUPS = (
    sa.select(
        *(_GROUPED.c.scope, _GROUPED.c.code, _GROUPED.c.count, _GROUPED.c.held, _GROUPED.c.first),
        *(elements.c.src_filepath, elements.c.dst_filepath, elements.c.failure_message),
    )
    .join_from(_GROUPED, elements, elements.c.id == _GROUPED.c.first)
    .where(elements.c.job_id == bindparam("of_job"))
    .order_by(_GROUPED.c.count.desc(), _GROUPED.c.first)
)


def failure_groups(session: Session, job_id: int) -> Sequence[FailureGroup]:
    """The failures of a job by code and scope, the most frequent first."""
    groups = []
    # Unpacked: a row has methods of the names `count` and `first`.
    for scope, code, count, held, first, source, destination, message in session.execute(
        _FAILURE_GROUPS, {"of_job": job_id}
    ):
        groups.append(
            FailureGroup(
                FailureCode(code), FailureScope(scope), count, int(held), first, source, destination, message or ""
            )
        )
    return groups


_SIZES_SET_ASIDE = (
    sa.select(elements.c.status, sa.func.sum(elements.c.size))
    .where(
        elements.c.job_id == bindparam("of_job"),
        sa.text(IS_SET_ASIDE),
        elements.c.status.in_([JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.HELD]),
    )
    .group_by(elements.c.status)
)


def sizes_set_aside(session: Session, job_id: int) -> Mapping[JobStatus, int]:
    """Bytes of the elements of a job that are FAILED, CANCELLED or HELD, by status."""
    return {status: int(size or 0) for status, size in session.execute(_SIZES_SET_ASIDE, {"of_job": job_id})}


@frozen
class WaitingRetries:
    """Elements of a job that wait for a retry.

    Attributes:
        size: bytes of them.
        first: when the first of them is due; None for none.
        last: when the last one is.
    """

    count: int
    size: int
    first: datetime | None
    last: datetime | None


NOTHING_RETRIED = WaitingRetries(0, 0, None, None)
#: Elements that are counted at most.
_MOST_RETRIES = 20_000
_OPEN_PHASE = (
    sa.select(sa.func.min(elements.c.phase))
    .where(sa.text(IS_WAITING_WORK), elements.c.job_id == bindparam("of_job"))
    .scalar_subquery()
)
_POSTPONED = (
    sa.select(elements.c.due_at, elements.c.size)
    .where(
        sa.text(IS_WAITING_WORK),
        elements.c.job_id == bindparam("of_job"),
        elements.c.phase == _OPEN_PHASE,
        elements.c.due_at > bindparam("now"),
    )
    .order_by(elements.c.due_at)
    .limit(_MOST_RETRIES)
    .subquery()
)
_WAITING_RETRIES = sa.select(
    sa.func.count(), sa.func.sum(_POSTPONED.c.size), sa.func.min(_POSTPONED.c.due_at), sa.func.max(_POSTPONED.c.due_at)
)


def waiting_retries(session: Session, job_id: int, now: datetime) -> WaitingRetries:
    """The elements of a job but its listing that wait for a retry; the first `_MOST_RETRIES` of them."""
    count, size, first, last = session.execute(_WAITING_RETRIES, {"of_job": job_id, "now": now}).one()
    return WaitingRetries(count, int(size or 0), first, last)

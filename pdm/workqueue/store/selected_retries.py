"""Retry some of the failed elements of a job: by code, or those that a retry can help."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from types import MappingProxyType

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import MEANINGS, FailureCode, Remedy
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.store.job_changes import (
    CHANGED_AT_ONCE,
    ELEMENTS_SET_ASIDE,
    begin_retry,
    end_retry_part,
    is_being_cancelled,
    locked,
    requeue,
)
from pdm.workqueue.store.locks import LockedJob, lock_job
from pdm.workqueue.store.records import elements
from pdm.workqueue.WorkqueueDB import IS_SET_ASIDE, NEVER

_PERMANENT = frozenset(code for code, meaning in MEANINGS.items() if meaning.remedy is Remedy.GIVE_UP)


@frozen
class RetrySelection:
    """Which elements are retried.

    Attributes:
        codes: FAILED ones with one of these codes; empty for all, and all that are CANCELLED.
        permanent: also those whose failure a retry cannot help.
    """

    codes: Collection[FailureCode] = frozenset()
    permanent: bool = True

    @property
    def takes(self) -> frozenset[FailureCode]:
        """The codes of FAILED elements that are retried."""
        wanted = frozenset(self.codes or FailureCode)
        return wanted if self.permanent else wanted - _PERMANENT

    @property
    def leaves(self) -> frozenset[FailureCode]:
        """The codes that were asked for, and that a retry cannot help."""
        return frozenset(self.codes or FailureCode) - self.takes


@frozen
class Retried:
    """Result of a retry.

    Attributes:
        count: elements that go back to the queue.
        left: number of those that a retry cannot help, by code.
        more: whether `continue_retry` has to put back the rest.
    """

    job: JobRecord
    count: int
    left: Mapping[str, int] = MappingProxyType({})
    more: bool = False


_FAILED = (elements.c.job_id == bindparam("of_job"), sa.text(IS_SET_ASIDE), elements.c.status == JobStatus.FAILED)
_FAILED_BY_CODE = (
    sa.select(elements.c.failure_code, sa.func.count())
    .where(*_FAILED)
    .group_by(elements.c.failure_code)
    .order_by(elements.c.failure_code)
)
_SELECTED = (
    sa.select(elements.c.id)
    .where(*_FAILED, elements.c.failure_code.in_(bindparam("codes", expanding=True)))
    .order_by(elements.c.id)
    .limit(bindparam("most"))
)


def retry_selected(session: Session, job_id: int, now: datetime, selection: RetrySelection) -> Retried:
    """Put some elements back into the queue; a retry of all is `pdm.workqueue.store.job_changes.retry`.

    Of a large job, `continue_retry` puts back the rest; until then nothing of it is claimed. A daemon that is killed in
    between completes it as a retry of all.

    Raises:
        LookupError: there is no such job.
    """
    job = locked(session, job_id)
    if is_being_cancelled(job):
        return Retried(job.record, 0)
    failed = {code: count for code, count in session.execute(_FAILED_BY_CODE, {"of_job": job_id}) if code is not None}
    count = sum(failed.get(code.value, 0) for code in selection.takes)
    count += 0 if selection.codes else job.counters.cancelled
    left = {code: number for code, number in failed.items() if code in selection.leaves}
    if not count:
        return Retried(job.record, 0, left)
    begin_retry(session, job, now)
    more = _retry_part(session, job, now, selection)
    return Retried(job.record, count, left, more)


def continue_retry(session: Session, job_id: int, now: datetime, selection: RetrySelection) -> bool:
    """Put back more of a large job; returns whether there is still more."""
    job = lock_job(session, job_id)
    if job is None or job.record.cancel_requested or job.work_due_at != NEVER:
        return False
    return _retry_part(session, job, now, selection)


def _retry_part(session: Session, job: LockedJob, now: datetime, selection: RetrySelection) -> bool:
    codes = [code.value for code in selection.takes]
    chosen = {"of_job": job.id, "codes": codes, "most": CHANGED_AT_ONCE}
    numbers = session.scalars(_SELECTED, chosen).all() if codes else []
    requeue(session, job, numbers, JobStatus.FAILED, now)
    left = CHANGED_AT_ONCE - len(numbers)
    if left and not selection.codes:
        cancelled = {"of_job": job.id, "in_status": JobStatus.CANCELLED, "most": left}
        numbers = session.scalars(ELEMENTS_SET_ASIDE, cancelled).all()
        requeue(session, job, numbers, JobStatus.CANCELLED, now)
        left -= len(numbers)
    end_retry_part(session, job, now, more=not left)
    return not left

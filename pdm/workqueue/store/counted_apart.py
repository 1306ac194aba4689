"""Which jobs need not be locked to store results, and the end of what is counted apart from them: see `job_counts`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import JobRecord, Verdict
from pdm.workqueue.store import job_counts
from pdm.workqueue.store.locks import LockedJob, is_shared, lock_jobs, read_jobs, save_jobs
from pdm.workqueue.store.records import WORKER_ID


def worker_and_jobs_apart(
    session: Session, worker: str, verdicts: Mapping[int, Sequence[Verdict]], *, may_count_apart: bool
) -> tuple[int | None, dict[int, LockedJob]]:
    """The id of a worker, and the jobs of its verdicts that are not locked, because they have other open elements.

    ``verdicts``: by job. ``may_count_apart``: without it there are no such jobs.
    """
    if not (may_count_apart and is_shared(session)):
        return session.scalar(WORKER_ID, {"of_incarnation": worker}), {}
    worker_id, may_count_apart = job_counts.worker_that_appends(session, worker)
    plain = [number for number, of_job in verdicts.items() if all(map(_is_plain, of_job))] if may_count_apart else []
    apart = {}
    for job in read_jobs(session, plain) if plain else ():
        counters = job.counters
        is_last = counters.submitted + counters.running <= len(verdicts[job.id])
        # The end of an element makes room for another one of such a job, or is the last that ran of one that is held.
        is_bounded = job.max_active is not None or job.hold is not None
        if not (is_last or is_bounded or job.has_phases or job.archives or job.cancel_requested):
            apart[job.id] = LockedJob(job, None, None)
    return worker_id, apart


def _is_plain(verdict: Verdict) -> bool:
    """Whether a verdict changes nothing but its element and counters; the first element may be a listing."""
    return verdict.status is JobStatus.DONE and verdict.failure is None and verdict.token.element_id > 0


@frozen
class AddedUp:
    """Result of `add_up`.

    Attributes:
        finished: jobs that became final.
        left: jobs that another session has locked.
    """

    finished: tuple[JobRecord, ...] = ()
    left: frozenset[int] = frozenset()


def add_up(session: Session, now: datetime, among: Collection[int] | None = None) -> AddedUp:
    """Add what is counted apart to the counters of its jobs, and derive their status.

    ``among``: only of these jobs.
    """
    numbers = job_counts.jobs_with_counts(session, among)
    locked = lock_jobs(session, numbers, skip_locked=True, to_the_end=True)
    finished = tuple(job.record for job in locked if job.roll_up(now))
    save_jobs(session, locked)
    return AddedUp(finished, frozenset(numbers).difference(job.id for job in locked))

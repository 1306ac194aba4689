"""Claims of a single element in the transaction that adds it, for a daemon that has a free place and nothing due.

Such an element need not wait for a further transaction, nor for a look at the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import Batch, ClaimToken, JobRecord, NewElement
from pdm.workqueue.store.leases import live_worker
from pdm.workqueue.store.locks import LockedJob, lock_job, save_jobs
from pdm.workqueue.store.records import ELEMENT_COLUMNS, UPDATE_ELEMENT, element_record, elements
from pdm.workqueue.store.results import add_elements


@frozen
class FirstClaim:
    """Permission to claim an element as it is added.

    Attributes:
        worker: incarnation of the daemon that claims; without a lease it gets nothing.
        now: time of the claim.
    """

    worker: str
    now: datetime


_ELEMENT = sa.select(*ELEMENT_COLUMNS).where(
    elements.c.job_id == bindparam("of_job"), elements.c.id == bindparam("number")
)
_MARK_RUNNING = UPDATE_ELEMENT.values(
    status=JobStatus.RUNNING,
    attempts=elements.c.attempts + 1,
    worker_id=bindparam("claimed_by"),
    claimed_at=bindparam("claimed_now"),
)


def claim_first_element(session: Session, job: JobRecord, claim: FirstClaim) -> Batch | None:
    """Claim element 0 of a job that this transaction has inserted; None without a lease."""
    # It has no other element: nothing of it is due once this one runs.
    return _claim(session, LockedJob(job, None, None), 0, claim)


def add_and_claim(
    session: Session, worker: str, token: ClaimToken, new: Sequence[NewElement], claim: FirstClaim | None
) -> tuple[bool, Batch | None]:
    """Add elements as `results.add_elements` does; with ``claim``, claim the last of them.

    Returns:
        Whether they were added, and the claimed batch, if any.
    """
    if not add_elements(session, worker, token, new):
        return False, None
    job = None if claim is None else lock_job(session, token.job_id)
    if claim is None or job is None:
        return True, None
    return True, _claim(session, job, job.counters.elements - 1, claim)


def _claim(session: Session, job: LockedJob, number: int, claim: FirstClaim) -> Batch | None:
    worker_id = live_worker(session, claim.worker)
    if worker_id is None:
        return None
    place = {"of_job": job.id, "number": number}
    added = element_record(session.execute(_ELEMENT, place).one())
    session.execute(_MARK_RUNNING, [place | {"claimed_by": worker_id, "claimed_now": claim.now}])
    job.move(JobStatus.SUBMITTED, JobStatus.RUNNING)
    job.started_at = job.started_at or claim.now
    job.roll_up(claim.now)
    save_jobs(session, [job])
    running = added._replace(status=JobStatus.RUNNING, attempts=added.attempts + 1, not_before=None)
    return Batch.of_one(job.record, added.type, (running,))

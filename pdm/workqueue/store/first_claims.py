"""Claims of a single element in the transaction that adds it, for a daemon that has free capacity and nothing due.

Such an element needs neither a further transaction nor a query of the queue.
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
from pdm.workqueue.store.locks import LockedJob, save_jobs
from pdm.workqueue.store.records import ELEMENT_COLUMNS, element_record, elements
from pdm.workqueue.store.results import add_elements, extend_job


@frozen
class FirstClaim:
    """Permission to claim an element as it is added.

    Attributes:
        worker: incarnation of the daemon that claims; without a lease it gets nothing.
        now: time of the claim.
    """

    worker: str
    now: datetime


#: Reads what it marks: one statement instead of two.
_CLAIM = (
    sa.update(elements)
    .where(elements.c.job_id == bindparam("of_job"), elements.c.id == bindparam("number"))
    .values(
        status=JobStatus.RUNNING,
        attempts=elements.c.attempts + 1,
        worker_id=bindparam("of_worker"),
        claimed_at=bindparam("now"),
    )
    .returning(*ELEMENT_COLUMNS)
)


def claim_first_element(session: Session, job: JobRecord, claim: FirstClaim) -> Batch | None:
    """Claim element 0 of a job that this transaction has inserted; None without a lease."""
    # It has no other element: once this one runs, nothing of it is due.
    inserted = LockedJob(job, None, None)
    batch = _claim(session, inserted, 0, claim)
    if batch is not None:
        save_jobs(session, [inserted])
    return batch


def add_and_claim(
    session: Session, worker: str, token: ClaimToken, new: Sequence[NewElement], claim: FirstClaim | None
) -> tuple[bool, Batch | None]:
    """Add elements as `results.add_elements` does; with ``claim``, claim the last of them.

    Returns:
        Whether they were added, and the claimed batch, if any.
    """
    if claim is None:
        return add_elements(session, worker, token, new), None
    job = extend_job(session, worker, token, new)
    if job is None:
        return False, None
    batch = (
        None
        if job.record.stages or job.record.hold is not None
        else _claim(session, job, job.counters.elements - 1, claim)
    )
    save_jobs(session, [job])
    return True, batch


def _claim(session: Session, job: LockedJob, number: int, claim: FirstClaim) -> Batch | None:
    """Claim an element of a job, which the caller saves."""
    worker_id = live_worker(session, claim.worker)
    if worker_id is None:
        return None
    values = {"of_job": job.id, "number": number, "of_worker": worker_id, "now": claim.now}
    claimed = element_record(session.connection().execute(_CLAIM, values).one())
    job.move(JobStatus.SUBMITTED, JobStatus.RUNNING)
    job.started_at = job.started_at or claim.now
    job.roll_up(claim.now)
    return Batch.of_one(job.record, claimed.type, (claimed,))

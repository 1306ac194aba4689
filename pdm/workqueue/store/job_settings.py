"""Change what is asked of a job that exists: its priority, and how many of its elements may run at once."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from attrs import evolve
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.holds import JobEdit, Unchanged
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.node_reports import SignalKind
from pdm.workqueue.store import chains, signals
from pdm.workqueue.store.job_changes import locked
from pdm.workqueue.store.locks import save_jobs
from pdm.workqueue.store.records import jobs

_CHANGE = sa.update(jobs).where(jobs.c.id == bindparam("number"))


def change(session: Session, job_id: int, changes: JobEdit, now: datetime) -> JobRecord:
    """Change a job from its next claim on; what runs continues. A job that has ended is not changed.

    Raises:
        LookupError: there is no such job.
    """
    job = locked(session, job_id)
    if job.record.status.is_final:
        return job.record
    values: dict[str, Any] = {} if changes.priority is None else {"priority": changes.priority}
    if not isinstance(changes.max_active, Unchanged):
        values["max_active"] = changes.max_active
    job.record = evolve(job.record, **values)
    if values:
        session.execute(_CHANGE.values(**values), {"number": job_id})
    if "max_active" in values and job.counters.submitted and not chains.awaited_jobs(session, job_id):
        # More may begin; if not, the next claim finds that.
        job.schedule_work()
    job.roll_up(now)
    save_jobs(session, [job])
    signals.note(session, SignalKind.WORK)
    return job.record

"""Lines of the daemon's log about a job: that it was submitted, and how it ended."""

from __future__ import annotations

from typing import Any

from twisted.logger import Logger

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import JobRecord

_log = Logger()


def log_submitted(job: JobRecord) -> None:
    """A job was registered: by whom, and what it asks for. Paths stand in the logs of its attempts."""
    where = f"{job.src_siteid}" if job.dst_siteid is None else f"{job.src_siteid} -> {job.dst_siteid}"
    _log.info(
        "job {job} of user {user} submitted: {type} by {protocol}, site {where}, priority {priority}",
        **_fields(job),
        protocol=job.protocol.name,
        where=where,
        priority=job.priority,
    )


def log_ended(job: JobRecord) -> None:
    """A job has become final: how, with how many elements and bytes, after how long; what failed is a warning."""
    counters = job.counters
    seconds = (job.finished_at - job.timestamp).total_seconds() if job.finished_at is not None else 0.0
    write = _log.warn if job.status is JobStatus.FAILED else _log.info
    write(
        "job {job} of user {user} ended {outcome}: {type}, {done} of {elements} elements done, {failed} failed,"
        " {cancelled} cancelled, {bytes} bytes in {seconds:.1f} s",
        **_fields(job),
        outcome=job.status.name,
        elements=counters.elements,
        done=counters.done,
        failed=counters.failed,
        cancelled=counters.cancelled,
        bytes=job.bytes_done,
        seconds=round(seconds, 3),
    )


def _fields(job: JobRecord) -> dict[str, Any]:
    return {"job": job.id, "user": job.user_id, "type": job.type.name}

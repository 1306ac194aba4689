"""Records of jobs and elements as the database returns them, new jobs, and verdicts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from attrs import evolve

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.jobs import ClaimToken, Counters, ElementRecord, JobRecord, NewElement, NewJob, Verdict

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def job_record(**changes: Any) -> JobRecord:
    """A running COPY from ``/a`` at site 1 to ``/b`` at site 2."""
    record = JobRecord(
        id=1,
        user_id=1,
        type=JobType.COPY,
        status=JobStatus.RUNNING,
        protocol=JobProtocol.DUMMY,
        src_siteid=1,
        src_filepath="/a",
        dst_siteid=2,
        dst_filepath="/b",
        options={},
        priority=5,
        max_tries=2,
        label=None,
        log_uid="0123abcd",
        timestamp=NOW,
        finished_at=None,
        cancel_requested=False,
        counters=Counters(),
        bytes_total=0,
        bytes_done=0,
        skipped=0,
    )
    return evolve(record, **changes)


def element_record(**changes: Any) -> ElementRecord:
    """A file of `job_record` in its first attempt."""
    record = ElementRecord(
        job_id=1,
        id=1,
        type=JobType.COPY,
        status=JobStatus.RUNNING,
        src_filepath="/a",
        dst_filepath="/b",
        size=1,
        is_directory=False,
        attempts=1,
        lost=0,
        max_tries=2,
        timestamp=NOW,
        not_before=None,
        transferred=None,
        elapsed_s=None,
        checksum=None,
        failure=None,
    )
    return record._replace(**changes)


def new_job(user: int, type_: JobType = JobType.MKDIR, **changes: Any) -> NewJob:
    """A job of ``/src`` at site 1, and for a COPY of ``/dst`` at site 2."""
    listed = type_ not in (JobType.MKDIR, JobType.RENAME)
    new = NewJob(
        user_id=user,
        type=type_,
        protocol=JobProtocol.DUMMY,
        src_siteid=1,
        src_filepath="/src",
        dst_siteid=2 if type_ is JobType.COPY else None,
        dst_filepath="/dst" if type_ is JobType.COPY else None,
        options={},
        priority=5,
        max_tries=2,
        label=None,
        log_uid="0123abcd",
        first=NewElement(JobType.LIST if listed else type_, "/src"),
    )
    return evolve(new, **changes)


def verdict(token: ClaimToken, status: JobStatus = JobStatus.DONE, at: datetime = NOW, **more: Any) -> Verdict:
    """A verdict of an attempt of two seconds."""
    return Verdict(token, status, at, at + timedelta(seconds=2), **more)

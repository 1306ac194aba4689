"""From records to what the API gives out."""

from __future__ import annotations

from datetime import datetime

from msgspec import UNSET

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord
from pdm.workqueue.execution.progress import Progress
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.wire.responses import (
    ElementStatusView,
    ElementView,
    FailureView,
    JobView,
    SiteView,
)


def whole_seconds(moment: datetime | None) -> datetime | None:
    """A moment as the API gives it out."""
    return None if moment is None else moment.replace(microsecond=0)


def job_view(job: JobRecord) -> JobView:
    """A job as the API gives it out."""
    counters = job.counters
    return JobView(
        id=job.id,
        user_id=job.user_id,
        src_siteid=job.src_siteid,
        dst_siteid=UNSET if job.dst_siteid is None else job.dst_siteid,
        src_filepath=job.src_filepath,
        dst_filepath=UNSET if job.dst_filepath is None else job.dst_filepath,
        type=job.type.name,
        status=job.status.name,
        extra_opts=dict(job.options),
        priority=job.priority,
        protocol=job.protocol.name,
        log_uid=job.log_uid,
        timestamp=job.timestamp.replace(microsecond=0),
        finished_at=whole_seconds(job.finished_at),
        label=job.label,
        max_tries=job.max_tries,
        cancel_requested=job.cancel_requested,
        num_elements=counters.elements,
        num_new=0,
        # The reference knows no held elements: for its clients they wait, like those that wait for their turn.
        num_submitted=counters.submitted + counters.held,
        num_running=counters.running,
        num_done=counters.done,
        num_failed=counters.failed,
        num_cancelled=counters.cancelled,
        held=counters.held,
        skipped=job.skipped,
        bytes_total=job.bytes_total,
        bytes_done=job.bytes_done,
    )


def failure_view(failure: AttemptFailure) -> FailureView:
    """Why an attempt failed, as the API gives it out."""
    return FailureView(
        scope=failure.scope.value,
        code=failure.code.value,
        retryable=failure.retryable,
        hint=failure.hint,
        message=failure.message,
    )


def element_view(element: ElementRecord) -> ElementView:
    """An element as the API gives it out, its listing left empty."""
    return ElementView(
        id=element.id,
        job_id=element.job_id,
        src_filepath=element.src_filepath,
        dst_filepath=UNSET if element.dst_filepath is None else element.dst_filepath,
        size=element.size,
        max_tries=element.max_tries,
        attempts=element.attempts,
        type=element.type.name,
        status=element.status.name,
        timestamp=element.timestamp.replace(microsecond=0),
        not_before=whole_seconds(element.not_before),
        checksum=element.checksum,
        failure=None if element.failure is None or element.status is JobStatus.DONE else failure_view(element.failure),
    )


def element_status_view(element: ElementRecord, progress: Progress | None) -> ElementStatusView:
    """Where an element stands: from its running transfer, else from what the database keeps of its last attempt."""
    if progress is not None and element.status is JobStatus.RUNNING:
        transferred: int | None = progress.transferred
        instant: float | None = progress.instant
        average: float | None = progress.average
        elapsed: float | None = progress.elapsed
    else:
        transferred, elapsed, instant = element.transferred, element.elapsed_s, None
        average = transferred / elapsed if transferred is not None and elapsed else None
    return ElementStatusView(
        jobid=element.job_id,
        elementid=element.id,
        status=element.status.name,
        attempts=element.attempts,
        transferred=transferred,
        instant=instant,
        average=average,
        elapsed=elapsed,
    )


def site_view(site: Site) -> SiteView:
    """A site as the API gives it out."""
    return SiteView(
        id=site.id,
        name=site.name,
        description=site.description,
        default_folder=site.default_folder,
        protocols=[protocol.name for protocol in sorted(site.endpoints)],
        endpoints={protocol.name: site.endpoints[protocol] for protocol in sorted(site.endpoints)},
    )

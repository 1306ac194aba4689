"""How far a job is: its record, what this daemon runs of it, and whether its listing still goes on."""

from __future__ import annotations

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.progress import JobProgress, job_progress, listing_status
from pdm.workqueue.http import lookups
from pdm.workqueue.http.context import ApiContext


async def with_progress(api: ApiContext, job: JobRecord) -> tuple[JobRecord, JobProgress, list[str]]:
    """A job with its progress, and why it has to wait.

    That a listing is done stays true, so it is looked up once for each job; until then the job is read again along
    with it, for its numbers and the end of its listing must be of the same moment.

    Args:
        api: what is known.
        job: as it was just found.
    """
    known = listing_status(job)
    if known is not None:
        listing = known
    elif api.progress.is_listed(job.id, job.counters.elements):
        listing = JobStatus.DONE
    else:
        job, listing = await api.database.read("where a listing stands", lookups.job_and_listing, job.id)
        if listing is JobStatus.DONE:
            api.progress.remember_listed(job.id, job.counters.elements)
    now = api.clock()
    progress = job_progress(job, listing, api.progress.of_job(job.id, job.bytes_done), now)
    return job, progress, api.catalogue.waits(job, now)

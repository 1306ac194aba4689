"""Jobs are looked at, cancelled and retried."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import UTC, datetime

import attrs
import msgspec
from msgspec import UNSET

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.progress import JobProgress
from pdm.workqueue.http import lookups
from pdm.workqueue.http.access import Caller, Role
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.decoding import words
from pdm.workqueue.http.endpoint import JsonStream, endpoint
from pdm.workqueue.http.json_pieces import array, joined
from pdm.workqueue.http.lasting import outlasted_by
from pdm.workqueue.http.listings import skipped_entries
from pdm.workqueue.http.problems import ForbiddenError, InvalidInputError, JobNotFoundError
from pdm.workqueue.http.progress import why_waiting, with_progress
from pdm.workqueue.http.submission import needs_of
from pdm.workqueue.http.views import hold_view, job_progress_view, job_view
from pdm.workqueue.store import listings, users
from pdm.workqueue.store.jobs import IdempotencyKey, JobFilter
from pdm.workqueue.telemetry.job_lines import log_ended
from pdm.workqueue.wire.requests import LARGEST_ID, JobQuery, SkippedQuery
from pdm.workqueue.wire.responses import JobStatusView, JobView, RetriedJobView, SkippedView


@endpoint(
    "GET",
    "/jobs",
    summary="All registered jobs of the caller",
    query=JobQuery,
    result=list[JobView],
    errors=(InvalidInputError, ForbiddenError),
)
async def list_jobs(api: ApiContext, caller: Caller, query: JobQuery) -> JsonStream:
    """The newest last, or first (``order``); an empty array where there are none.

    Operators can ask for the jobs of others (``user``), and are told whose they are.
    """
    wanted = JobFilter(
        owner_id=_owner(caller, query.user),
        statuses=words(JobStatus, query.status, "status"),
        types=words(JobType, query.type, "type"),
        site=None if query.site is None else site_number(api, caller, query.site),
        label=query.label,
        since=moment(query.since),
        limit=None,
        after=query.after,
        before=query.before,
        newest_first=query.order == "newest",
    )
    return JsonStream(array(_jobs(api, wanted, query.limit, with_owners=query.user is not None)))


async def _jobs(api: ApiContext, wanted: JobFilter, limit: int | None, *, with_owners: bool) -> AsyncGenerator[bytes]:
    while True:
        size = lookups.PAGE if limit is None else min(lookups.PAGE, limit)
        page, owners = await api.database.read(
            "page of jobs", lookups.job_page, attrs.evolve(wanted, limit=size), with_owners
        )
        if page:
            yield joined([job_view(job, owner=owners.get(job.user_id)) for job in page])
        limit = None if limit is None else limit - len(page)
        if len(page) < size or limit == 0:
            return
        last = page[-1].id
        wanted = attrs.evolve(wanted, before=last) if wanted.newest_first else attrs.evolve(wanted, after=last)


def _owner(caller: Caller, user: str | None) -> int | None:
    if user is None:
        return caller.user_id
    if user != "all" and not (user.isascii() and user.isdecimal() and len(user) < 19):
        raise InvalidInputError("the number of a user or 'all' is expected", "?user")
    owner = None if user == "all" else int(user)
    if caller.role is not Role.OPERATOR and owner != caller.user_id:
        raise ForbiddenError("only operators may list the jobs of others", "?user")
    return owner


def site_number(api: ApiContext, caller: Caller, word: str) -> int:
    """The number of a site that a query names; one that is not known is no error, for old jobs may name it.

    Raises:
        InvalidInputError: a name that no site has.
    """
    if word.isascii() and word.isdecimal() and len(word) < 19:
        return min(int(word), LARGEST_ID)
    named = [site for site in api.sites.all() if site.name == word and api.may_see(caller.user_id, caller.scope, site)]
    if named:
        # One's own, where another one is of the same name.
        return max(named, key=lambda site: site.owner_id == caller.user_id).id
    raise InvalidInputError(f"there is no site {word[:100]!r}; GET /sites lists those there are", "?site")


def moment(value: datetime | None) -> datetime | None:
    """A moment of a query in UTC; without a time zone it is UTC already.

    Raises:
        InvalidInputError: it lies outside of what a calendar has.
    """
    if value is None or value.tzinfo is None:
        return value if value is None else value.replace(tzinfo=UTC)
    try:
        return value.astimezone(UTC)
    except OverflowError as error:
        raise InvalidInputError("that moment is outside of the calendar", "?since") from error


@endpoint("GET", "/jobs/{job_id}", summary="One job", result=JobView, errors=(JobNotFoundError,))
async def get_job(api: ApiContext, caller: Caller, job_id: int) -> JobView:
    """The job with its counters, how far it is and how fast it goes, and why it waits or elements of it are held."""
    job, progress, waiting = await with_progress(api, await api.job(job_id, caller.scope))
    first = None
    if job.counters.held:
        first = await api.database.read("why elements are held", lookups.first_held, job.id)
    found, sentences = await why_waiting(api, job, api.clock(), waiting)
    owner = None
    if job.user_id != caller.user_id:
        owner = (await api.database.read("whose a job is", users.subjects, [job.user_id])).get(job.user_id, "")
    skipped_by_code = await _skipped_by_code(api, job)
    view = job_view(
        job,
        progress,
        sentences,
        hold_view(job, first),
        skipped_by_code=skipped_by_code,
        found=found,
        owner=owner,
    )
    warning = await _outlasted(api, job, progress)
    return view if warning is None else msgspec.structs.replace(view, warnings=[warning])


async def _skipped_by_code(api: ApiContext, job: JobRecord) -> dict[str, int] | None:
    return await api.database.read("count notes", listings.count_notes, job.id) if job.skipped else None


async def _outlasted(api: ApiContext, job: JobRecord, progress: JobProgress) -> str | None:
    """Whether the job will take longer than its credential lasts."""
    if progress.eta is None:
        return None
    now, key = api.clock(), (job.user_id, job.src_siteid, job.dst_siteid, job.protocol)
    known = api.known_ends.find(key, now)
    if known is None:
        needs = needs_of(api, job)
        end = None
        if needs:
            end = await api.database.read("when does a credential end", lookups.first_end, job.user_id, needs, now)
        api.known_ends.note(key, now, end)
        known = (end,)
    return outlasted_by(progress, known[0], now)


@endpoint(
    "GET", "/jobs/{job_id}/status", summary="Where a job stands", result=JobStatusView, errors=(JobNotFoundError,)
)
async def get_job_status(api: ApiContext, caller: Caller, job_id: int) -> JobStatusView:
    """The status, how far it is, and what it waits for."""
    job, progress, waiting = await with_progress(api, await api.job(job_id, caller.scope))
    _, sentences = await why_waiting(api, job, api.clock(), waiting)
    return JobStatusView(
        jobid=job.id,
        status=job.status.name,
        skipped=job.skipped,
        skipped_by_code=await _skipped_by_code(api, job) or UNSET,
        already_there=job.already_there,
        progress=job_progress_view(progress),
        waiting=list(sentences) or UNSET,
    )


@endpoint(
    "GET",
    "/jobs/{job_id}/skipped",
    summary="What a job leaves out of its source",
    query=SkippedQuery,
    result=list[SkippedView],
    errors=(InvalidInputError, JobNotFoundError),
)
async def list_skipped(api: ApiContext, caller: Caller, job_id: int, query: SkippedQuery) -> JsonStream:
    """Each entry with its reason, in the order in which they were found; all of them, or a page.

    While a listing that failed is repeated, what the attempt before had found is gone.
    """
    job = await api.job(job_id, caller.scope)
    return JsonStream(array(skipped_entries(api, job.id, query.after or 0, query.limit)))


@endpoint("DELETE", "/jobs/{job_id}", summary="Cancel a job", result=JobView, errors=(JobNotFoundError,))
async def cancel_job(api: ApiContext, caller: Caller, job_id: int) -> JobView:
    """What waits is cancelled at once, what runs is ended within a second.

    A job that has ended stays as it is and is given out: so the request may be repeated.
    """
    now = api.clock()

    def tell(job: JobRecord) -> None:
        if job.status.is_final and job.finished_at == now:
            log_ended(job)
        api.cancelled(job.id)
        api.wake()

    job = await api.commit("cancel a job", lookups.cancel, job_id, caller.scope, now, then=tell)
    return job_view(*await with_progress(api, job))


@endpoint(
    "POST",
    "/jobs/{job_id}/retry",
    summary="Try again what has failed",
    result=RetriedJobView,
    errors=(InvalidInputError, JobNotFoundError),
)
async def retry_job(
    api: ApiContext,
    caller: Caller,
    job_id: int,
    key: IdempotencyKey | None,
) -> RetriedJobView:
    """Failed and cancelled elements get new attempts; what is done stays done.

    Needs no key to be repeated: that puts back only what has failed since.
    """

    def wake(result: tuple[JobRecord, int]) -> None:
        api.steered(result[0].id)
        api.wake()

    job, retried = await api.commit("retry a job", lookups.retry, job_id, caller.scope, api.clock(), then=wake)
    view = job_view(*await with_progress(api, job))
    return RetriedJobView(**msgspec.structs.asdict(view), retried=retried)

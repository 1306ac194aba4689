"""Endpoints of jobs: list, show, cancel, retry and submit them, with their progress and the reasons for waiting."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import attrs
import msgspec
from msgspec import UNSET

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Caller, Role
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.credential_checks import CredentialNeeds
from pdm.workqueue.http.decoding import credential_needs, enum_members, job_from_request, stored_sites
from pdm.workqueue.http.endpoint import JsonStream, endpoint, json_array, json_items
from pdm.workqueue.http.endpoints.receipts import failure_codes
from pdm.workqueue.http.listings import skipped_entries
from pdm.workqueue.http.plans import estimate_view, estimate_warnings, plan_view, skipped_by_code
from pdm.workqueue.http.problems import (
    DelegationNeededError,
    ForbiddenError,
    IdempotencyKeyReusedError,
    InvalidInputError,
    JobNotFoundError,
)
from pdm.workqueue.http.views import hold_view, job_progress_view, job_view
from pdm.workqueue.http.waiting import waiting_reasons, with_progress
from pdm.workqueue.store import mail, selected_retries, users
from pdm.workqueue.store.chains import NoPredecessorError
from pdm.workqueue.store.idempotency import IdempotencyConflictError, IdempotencyKey
from pdm.workqueue.store.jobs import JobFilter
from pdm.workqueue.store.outages import expect_rows
from pdm.workqueue.store.selected_retries import Retried, RetrySelection
from pdm.workqueue.telemetry.logging import log_ended, log_submitted
from pdm.workqueue.wire.requests import (
    LARGEST_ID,
    JobQuery,
    RetryQuery,
    SkippedQuery,
    SubmitCopy,
    SubmitJob,
    SubmitList,
    SubmitMkdir,
    SubmitRemove,
    SubmitRename,
    WaitQuery,
)
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
    """The newest last, or first (``order``); an empty array if there are none.

    Operators can list the jobs of other users (``user``); these have an ``owner``.
    """
    wanted = JobFilter(
        owner_id=requested_owner(caller, query.user),
        statuses=enum_members(JobStatus, query.status, "status"),
        types=enum_members(JobType, query.type, "type"),
        site=None if query.site is None else site_number(api, caller, query.site),
        label=query.label,
        since=utc_timestamp(query.since),
        limit=None,
        after=query.after,
        before=query.before,
        newest_first=query.order == "newest",
    )
    return JsonStream(json_array(_job_pages(api, wanted, query.limit, with_owners=query.user is not None)))


async def _job_pages(
    api: ApiContext, wanted: JobFilter, limit: int | None, *, with_owners: bool
) -> AsyncGenerator[bytes]:
    while True:
        size = transactions.PAGE_SIZE if limit is None else min(transactions.PAGE_SIZE, limit)
        page, owners = await api.database.read(
            "page of jobs", transactions.job_page, attrs.evolve(wanted, limit=size), with_owners
        )
        if page:
            yield json_items([job_view(job, owner=owners.get(job.user_id)) for job in page])
        limit = None if limit is None else limit - len(page)
        if len(page) < size or limit == 0:
            return
        last = page[-1].id
        wanted = attrs.evolve(wanted, before=last) if wanted.newest_first else attrs.evolve(wanted, after=last)


def requested_owner(caller: Caller, user: str | None) -> int | None:
    """The user whose jobs are asked for, None for all: by default the caller.

    Raises:
        InvalidInputError: it is no number, and not ``all``.
        ForbiddenError: only operators see the jobs of other users.
    """
    if user is None:
        return caller.user_id
    if user != "all" and not (user.isascii() and user.isdecimal() and len(user) < 19):
        raise InvalidInputError("expected the number of a user, or 'all'", "?user")
    owner = None if user == "all" else int(user)
    if caller.role is not Role.OPERATOR and owner != caller.user_id:
        raise ForbiddenError("only operators may list the jobs of other users", "?user")
    return owner


def site_number(api: ApiContext, caller: Caller, word: str) -> int:
    """The number of a site in a query, by number (known or not: old jobs may have it) or by name.

    Raises:
        InvalidInputError: no site has the name.
    """
    if word.isascii() and word.isdecimal() and len(word) < 19:
        return min(int(word), LARGEST_ID)
    named = [site for site in api.sites.all() if site.name == word and api.may_see(caller.user_id, caller.scope, site)]
    if named:
        # The caller's own site is preferred to others of the same name.
        return max(named, key=lambda site: site.owner_id == caller.user_id).id
    raise InvalidInputError(f"there is no site {word[:100]!r}; GET /sites lists all", "?site")


def utc_timestamp(value: datetime | None) -> datetime | None:
    """Convert a timestamp of a query to UTC, which is also the default time zone.

    Raises:
        InvalidInputError: the timestamp is out of range.
    """
    if value is None or value.tzinfo is None:
        return value if value is None else value.replace(tzinfo=UTC)
    try:
        return value.astimezone(UTC)
    except OverflowError as error:
        raise InvalidInputError("the timestamp is out of range", "?since") from error


@endpoint(
    "GET",
    "/jobs/{job_id}",
    summary="One job",
    query=WaitQuery,
    result=JobView,
    errors=(InvalidInputError, JobNotFoundError),
)
async def get_job(api: ApiContext, caller: Caller, job_id: int, query: WaitQuery) -> JobView:
    """The job with its counters, progress and rate, and the reasons why it waits or its elements are held."""
    found_job = await api.awaited_job(job_id, caller.scope, query.wait)
    job, progress, waiting = await with_progress(api, found_job)
    first = None
    if job.counters.held:
        first = await api.database.read("why elements are held", transactions.first_held_element, job.id)
    found, sentences = await waiting_reasons(api, job, api.clock(), waiting)
    owner = None
    if job.user_id != caller.user_id:
        owner = (await api.database.read("whose a job is", users.subjects, [job.user_id])).get(job.user_id, "")
    plan = await plan_view(api, job)
    estimate = await estimate_view(api, job, progress, plan)
    view = job_view(
        job,
        progress,
        sentences,
        hold_view(job, first),
        skipped_by_code=await skipped_by_code(api, job),
        found=found,
        owner=owner,
        plan=plan,
        estimate=estimate,
    )
    warnings = await estimate_warnings(api, job, progress, estimate)
    return msgspec.structs.replace(view, warnings=warnings) if warnings else view


@endpoint(
    "GET",
    "/jobs/{job_id}/status",
    summary="Status of a job",
    query=WaitQuery,
    result=JobStatusView,
    errors=(InvalidInputError, JobNotFoundError),
)
async def get_job_status(api: ApiContext, caller: Caller, job_id: int, query: WaitQuery) -> JobStatusView:
    """The status, the progress, and the reasons why the job waits."""
    found_job = await api.awaited_job(job_id, caller.scope, query.wait)
    job, progress, waiting = await with_progress(api, found_job)
    _, sentences = await waiting_reasons(api, job, api.clock(), waiting)
    if job.hold is not None:
        sentences = [job.hold.sentence, *sentences]
    return JobStatusView(
        jobid=job.id,
        status=job.status.name,
        skipped=job.skipped,
        skipped_by_code=await skipped_by_code(api, job) or UNSET,
        already_there=job.already_there,
        progress=job_progress_view(progress),
        waiting=list(sentences) or UNSET,
    )


@endpoint(
    "GET",
    "/jobs/{job_id}/skipped",
    summary="Source entries that a job skips",
    query=SkippedQuery,
    result=list[SkippedView],
    errors=(InvalidInputError, JobNotFoundError),
)
async def list_skipped(api: ApiContext, caller: Caller, job_id: int, query: SkippedQuery) -> JsonStream:
    """Each entry with its reason, in the order in which they were found; all of them, or a page.

    While a failed listing is repeated, the entries of the earlier attempt are removed.
    """
    job = await api.job(job_id, caller.scope)
    return JsonStream(json_array(skipped_entries(api, job.id, query.after or 0, query.limit)))


@endpoint("DELETE", "/jobs/{job_id}", summary="Cancel a job", result=JobView, errors=(JobNotFoundError,))
async def cancel_job(api: ApiContext, caller: Caller, job_id: int) -> JobView:
    """Waiting elements are cancelled at once, running ones are terminated within a second.

    A job that has ended is returned unchanged, so the request may be repeated.
    """
    now = api.clock()

    def after_commit(job: JobRecord) -> None:
        if job.status.is_final and job.finished_at == now:
            log_ended(job)
        api.cancelled(job.id)
        api.wake()

    job = await api.commit("cancel a job", transactions.cancel, job_id, caller.scope, now, then=after_commit)
    return job_view(*await with_progress(api, job))


@endpoint(
    "POST",
    "/jobs/{job_id}/retry",
    summary="Retry failed and cancelled elements of a job",
    query=RetryQuery,
    result=RetriedJobView,
    errors=(InvalidInputError, JobNotFoundError),
)
async def retry_job(
    api: ApiContext, caller: Caller, job_id: int, query: RetryQuery, key: IdempotencyKey | None
) -> RetriedJobView:
    """Failed and cancelled elements get new attempts; those that are done are not repeated.

    With ``code`` only what failed with one of these codes; with ``force=0`` only what a retry can help. The request may
    be repeated without a key: it then retries only what has failed since.
    """
    if query.code or not query.force:
        return await _retry_selected(api, caller, job_id, RetrySelection(failure_codes(query.code), query.force))

    def wake(result: tuple[JobRecord, int]) -> None:
        api.job_retried(result[0].id)
        api.wake()

    job, retried = await api.commit("retry a job", transactions.retry, job_id, caller.scope, api.clock(), then=wake)
    view = job_view(*await with_progress(api, job))
    return RetriedJobView(**msgspec.structs.asdict(view), retried=retried)


async def _retry_selected(api: ApiContext, caller: Caller, job_id: int, selection: RetrySelection) -> RetriedJobView:
    async def in_parts(name: str, function: Callable[..., Retried], *args: Any) -> Retried:
        retried = await api.database.run(name, function, *args)
        more = retried.more
        try:
            while more:
                more = await api.database.run(
                    "retry a part of a job", selected_retries.continue_retry, job_id, api.clock(), selection
                )
        finally:
            if more:
                # Nothing of the job is claimed until all is put back: that is completed, as a retry of all.
                api.job_retried(job_id)
        return retried

    retried: Retried = await api.commit(
        "retry a job",
        transactions.retry_selected,
        job_id,
        caller.scope,
        api.clock(),
        selection,
        then=lambda _: api.wake(),
        run=in_parts,
    )
    view = job_view(*await with_progress(api, await api.job(job_id, caller.scope) if retried.more else retried.job))
    return RetriedJobView(**msgspec.structs.asdict(view), retried=retried.count, left=dict(retried.left))


async def _require_address(api: ApiContext, caller: Caller) -> None:
    """Refuse mail that would never be sent.

    Raises:
        InvalidInputError: the caller has no confirmed address.
    """
    found = await api.database.read("find a mail subscription", mail.fetch, caller.user_id)
    if found is None or found.confirmed_at is None:
        raise InvalidInputError(
            "mail needs a confirmed address: 'pdm mail set ADDRESS' and 'pdm mail confirm CODE'", "$.extra_opts.notify"
        )


_SUBMISSION_ERRORS = (InvalidInputError, DelegationNeededError, IdempotencyKeyReusedError)


async def _submit(api: ApiContext, caller: Caller, submission: SubmitJob, key: IdempotencyKey | None) -> JobView:
    given = submission.extra_opts or {}
    if given.get("items") or given.get("filters"):
        # A hundred thousand paths take seconds, and a thousand patterns a tenth of one.
        new = await api.in_thread(job_from_request, api, caller.user_id, submission)
    else:
        new = job_from_request(api, caller.user_id, submission)
    expect_rows(len(new.more))
    if new.options.get("notify"):
        await _require_address(api, caller)
    needs = credential_needs(api, new)
    needed = CredentialNeeds(needs, api.lifetimes) if needs else None

    def log(registered: tuple[JobRecord, list[str]]) -> None:
        # A repeated request returns the job of the first one.
        if registered[0].log_uid == new.log_uid:
            log_submitted(registered[0])
            if new.deadline is not None:
                api.deadline_added()

    try:
        job, warnings = await api.commit(
            "register a job",
            transactions.register_and_claim,
            new,
            key,
            api.clock(),
            needed,
            stored_sites(api, new),
            then=log,
            # A job that waits for others is not claimed at once.
            run=partial(api.add_element, None if new.after else new, new.first.type),
        )
    except IdempotencyConflictError as error:
        raise IdempotencyKeyReusedError from error
    except NoPredecessorError as error:
        index = 0 if new.after is None else new.after.jobs.index(error.job_id)
        raise InvalidInputError(f"{error}; GET /jobs lists yours", f"$.after[{index}]") from error
    view = job_view(*await with_progress(api, job))
    return msgspec.structs.replace(view, warnings=warnings) if warnings else view


def _with_type(type_: JobType, body: msgspec.Struct) -> SubmitJob:
    """Convert the body of a type's own route to one of ``POST /jobs``."""
    return SubmitJob(type=type_.value, **msgspec.structs.asdict(body))


@endpoint(
    "POST", "/jobs", summary="Register a job of any type", body=SubmitJob, result=JobView, errors=_SUBMISSION_ERRORS
)
async def submit_job(api: ApiContext, caller: Caller, body: SubmitJob, key: IdempotencyKey | None) -> JobView:
    """``type`` is a number, a string of digits or a name."""
    return await _submit(api, caller, body, key)


@endpoint("POST", "/list", summary="Register a listing job", body=SubmitList, result=JobView, errors=_SUBMISSION_ERRORS)
async def submit_list(api: ApiContext, caller: Caller, body: SubmitList, key: IdempotencyKey | None) -> JobView:
    """Lists a file or directory, down to the option ``depth`` (default: all levels)."""
    return await _submit(api, caller, _with_type(JobType.LIST, body), key)


@endpoint("POST", "/copy", summary="Register a copy job", body=SubmitCopy, result=JobView, errors=_SUBMISSION_ERRORS)
async def submit_copy(api: ApiContext, caller: Caller, body: SubmitCopy, key: IdempotencyKey | None) -> JobView:
    """Copies a file, or the content of a directory, to another place; options ``overwrite`` and ``verify``."""
    return await _submit(api, caller, _with_type(JobType.COPY, body), key)


@endpoint(
    "POST", "/remove", summary="Register a remove job", body=SubmitRemove, result=JobView, errors=_SUBMISSION_ERRORS
)
async def submit_remove(api: ApiContext, caller: Caller, body: SubmitRemove, key: IdempotencyKey | None) -> JobView:
    """Removes a file, or a directory with all its content (option ``recursive``)."""
    return await _submit(api, caller, _with_type(JobType.REMOVE, body), key)


@endpoint(
    "POST", "/rename", summary="Register a rename job", body=SubmitRename, result=JobView, errors=_SUBMISSION_ERRORS
)
async def submit_rename(api: ApiContext, caller: Caller, body: SubmitRename, key: IdempotencyKey | None) -> JobView:
    """Gives a file or directory a new name at its site; option ``overwrite``."""
    return await _submit(api, caller, _with_type(JobType.RENAME, body), key)


@endpoint("POST", "/mkdir", summary="Register a mkdir job", body=SubmitMkdir, result=JobView, errors=_SUBMISSION_ERRORS)
async def submit_mkdir(api: ApiContext, caller: Caller, body: SubmitMkdir, key: IdempotencyKey | None) -> JobView:
    """Makes a directory; with the option ``parents`` also missing parents."""
    return await _submit(api, caller, _with_type(JobType.MKDIR, body), key)

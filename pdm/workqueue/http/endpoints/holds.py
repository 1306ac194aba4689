"""Endpoints that change how a job runs: hold and resume it, its priority, how much of it runs at once."""

from __future__ import annotations

from msgspec import UNSET

from pdm.workqueue.domain.holds import HoldBy, JobEdit, JobHold, Unchanged
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.lifecycle import deadline_from_text
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.endpoints.sites import actor, checked_message
from pdm.workqueue.http.problems import ForbiddenError, InvalidInputError, JobNotFoundError
from pdm.workqueue.http.views import job_view
from pdm.workqueue.http.waiting import with_progress
from pdm.workqueue.store.holds import OperatorHoldError
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.wire.requests import ChangeJob, HoldRequest
from pdm.workqueue.wire.responses import JobView


@endpoint(
    "POST",
    "/jobs/{job_id}/hold",
    summary="Hold a job: nothing more of it begins",
    body=HoldRequest,
    result=JobView,
    errors=(InvalidInputError, ForbiddenError, JobNotFoundError),
)
async def hold_job(
    api: ApiContext, caller: Caller, job_id: int, body: HoldRequest, key: IdempotencyKey | None
) -> JobView:
    """What runs ends by itself, then the job is ``HELD``; what was claimed and has not begun goes back to the queue.

    A held job can be cancelled. An operator can hold the jobs of all users, with a message; only operators end that
    hold. Holding it again replaces message and end. A job that has ended is returned unchanged.
    """
    now = api.clock()
    job = await api.job(job_id, caller.scope)
    by = _as_whom(caller, job)
    message = body.message or ""
    if message or by is HoldBy.OPERATOR:
        message = checked_message(message)
    until = None
    if body.until is not None:
        try:
            until = deadline_from_text(body.until, now, "the end of a hold")
        except ValueError as error:
            raise InvalidInputError(str(error), "$.until") from error
    new = JobHold(by=by, subject=caller.subject, message=message, since=now, until=until)

    def after_commit(held: JobRecord) -> None:
        if held.hold is not None:
            api.held(held)

    try:
        job = await api.commit(
            "hold a job", transactions.hold, job_id, caller.scope, new, actor(caller), then=after_commit
        )
    except OperatorHoldError as error:
        raise ForbiddenError(f"only operators change the hold of an operator: {error}") from error
    return job_view(*await with_progress(api, job))


@endpoint(
    "POST",
    "/jobs/{job_id}/resume",
    summary="End the hold of a job",
    result=JobView,
    errors=(ForbiddenError, JobNotFoundError),
)
async def resume_job(api: ApiContext, caller: Caller, job_id: int, key: IdempotencyKey | None) -> JobView:
    """It is no error if the job is not held by a person. What waits for a credential or for tape still waits."""
    job = await api.job(job_id, caller.scope)

    def after_commit(_job: JobRecord) -> None:
        api.wake()

    try:
        job = await api.commit(
            "resume a job",
            transactions.resume,
            job_id,
            caller.scope,
            _as_whom(caller, job),
            actor(caller),
            api.clock(),
            then=after_commit,
        )
    except OperatorHoldError as error:
        raise ForbiddenError(f"only operators resume it: {error}") from error
    return job_view(*await with_progress(api, job))


@endpoint(
    "PATCH",
    "/jobs/{job_id}",
    summary="Change the priority of a job, or how much of it may run at once",
    body=ChangeJob,
    result=JobView,
    errors=(InvalidInputError, JobNotFoundError),
)
async def change_job(api: ApiContext, caller: Caller, job_id: int, body: ChangeJob) -> JobView:
    """From the next claim on; what runs continues. A job that has ended is returned unchanged."""
    changes = JobEdit(
        priority=None if body.priority is UNSET else body.priority,
        max_active=Unchanged.UNCHANGED if body.max_active is UNSET else body.max_active,
    )

    def after_commit(_job: JobRecord) -> None:
        api.wake()

    job = await api.commit(
        "change a job", transactions.change_job, job_id, caller.scope, changes, api.clock(), then=after_commit
    )
    return job_view(*await with_progress(api, job))


def _as_whom(caller: Caller, job: JobRecord) -> HoldBy:
    """As whom a caller acts on a job that they may see: users see their own ones only."""
    return HoldBy.OWNER if caller.user_id == job.user_id else HoldBy.OPERATOR

"""Endpoints of schedules: list, create, show, pause, resume and remove them; and what a run of one submits."""

from __future__ import annotations

from datetime import datetime

import msgspec
from attrs import evolve
from msgspec import UNSET

from pdm.workqueue.domain.jobs import NewJob
from pdm.workqueue.domain.schedules import NewSchedule, ScheduleEdit, ScheduleRecord, ScheduleRun
from pdm.workqueue.domain.sites import RestrictionKind
from pdm.workqueue.execution.recurrence import Recurrence, recurrence
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import AccessList, Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.decoding import job_from_request, stored_sites
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.problems import (
    ConflictError,
    ForbiddenError,
    IdempotencyKeyReusedError,
    InvalidInputError,
    NotFoundError,
)
from pdm.workqueue.http.views import hold_view, whole_seconds
from pdm.workqueue.store import schedules
from pdm.workqueue.store.idempotency import IdempotencyConflictError, IdempotencyKey
from pdm.workqueue.store.schedules import PlannedRun, TooManySchedulesError
from pdm.workqueue.wire.requests import SubmitJob
from pdm.workqueue.wire.responses import HoldView
from pdm.workqueue.wire.schedules import NewScheduleBody, ScheduleChanges, ScheduleRunView, ScheduleView

#: Bytes of the submission of a schedule, as JSON: it is validated at each run, and a user has many.
_LARGEST_JOB = 16384


def planned_run(api: ApiContext, schedule: ScheduleRecord, owner: str, access: AccessList) -> PlannedRun:
    """What a schedule submits now: its submission is validated again, for much may have changed since.

    A credential that is missing or has expired is no reason against it: the job is HELD until it is renewed.
    ``owner``: subject of its user, whom ``access`` must still admit.
    """
    if access.role_of(owner) is None:
        return PlannedRun(None, message=f"{owner} is not a user of this service any more")
    try:
        submission = msgspec.convert(schedule.submission, SubmitJob)
        new = job_from_request(api, schedule.user_id, submission)
    except (InvalidInputError, msgspec.ValidationError) as error:
        return PlannedRun(None, message=str(error))
    if (why := _restriction(api, new)) is not None:
        return PlannedRun(None, message=why)
    return PlannedRun(evolve(new, schedule_id=schedule.id), stored_sites(api, new))


def _restriction(api: ApiContext, new: NewJob) -> str | None:
    banned = api.site_directory.restriction(RestrictionKind.USER, new.user_id)
    if banned is not None:
        return f"an operator has banned its user: {banned.message}"
    for number in sorted(new.sites):
        drained = api.site_directory.restriction(RestrictionKind.SITE, number)
        if drained is not None:
            return f"site {number} is drained: {drained.message}"
    return None


@endpoint("GET", "/schedules", summary="All schedules of the caller", result=list[ScheduleView])
async def list_schedules(api: ApiContext, caller: Caller) -> list[ScheduleView]:
    """In order of their numbers, each with its last run."""
    found = await api.database.read("list schedules", transactions.schedules_of_user, caller.user_id)
    return [_view(schedule, last) for schedule, last in found]


@endpoint(
    "POST",
    "/schedules",
    summary="Create a schedule",
    body=NewScheduleBody,
    result=ScheduleView,
    status=201,
    errors=(InvalidInputError, ConflictError, IdempotencyKeyReusedError),
)
async def create_schedule(
    api: ApiContext, caller: Caller, body: NewScheduleBody, key: IdempotencyKey | None
) -> ScheduleView:
    """Submits the job at each time of the recurrence, as the caller.

    A job of which an earlier run has not ended is not submitted again; of times that were missed because the service
    did not run, one is made up for. A job whose credential has expired is HELD until that is renewed.
    """
    now = api.clock()
    timezone = body.timezone or "UTC"
    times = _recurrence(body.recurrence, timezone)
    _check_job(api, caller, body.job)
    first = times.after(now, now)
    if first is None:
        raise InvalidInputError("it would never run", "$.recurrence")
    new = NewSchedule(
        user_id=caller.user_id,
        recurrence=times.text,
        timezone=timezone,
        submission=msgspec.to_builtins(body.job),
        next_due=first,
    )

    def then(_record: ScheduleRecord) -> None:
        api.schedules_changed()

    try:
        record = await api.commit("create a schedule", schedules.create, new, key, now, then=then)
    except IdempotencyConflictError as error:
        raise IdempotencyKeyReusedError from error
    except TooManySchedulesError as error:
        raise ConflictError(str(error)) from error
    return _view(record, None)


def _check_job(api: ApiContext, caller: Caller, job: SubmitJob) -> None:
    if len(msgspec.json.encode(job)) > _LARGEST_JOB:
        raise InvalidInputError(f"the job of a schedule has at most {_LARGEST_JOB} bytes of JSON", "$.job")
    try:
        job_from_request(api, caller.user_id, job)
    except InvalidInputError as error:
        pointer = (error.pointer or "$").removeprefix("$")
        raise InvalidInputError(error.detail, f"$.job{pointer}") from error
    if job.after is not None:
        raise InvalidInputError("a schedule cannot wait for other jobs: leave it out", "$.job.after")


def _recurrence(text: str, timezone: str) -> Recurrence:
    try:
        return recurrence(text, timezone)
    except ValueError as error:
        pointer = "$.timezone" if str(error).startswith("there is no time zone") else "$.recurrence"
        raise InvalidInputError(str(error), pointer) from error


@endpoint("GET", "/schedules/{schedule_id}", summary="One schedule", result=ScheduleView, errors=(NotFoundError,))
async def get_schedule(api: ApiContext, caller: Caller, schedule_id: int) -> ScheduleView:
    """With its last 100 runs, the newest first."""
    found = await api.database.read("fetch a schedule", transactions.fetch_schedule, schedule_id, caller.scope)
    last = found.runs[0] if found.runs else None
    hold = None if found.held is None else hold_view(*found.held)
    view = _view(found.schedule, last, hold)
    return msgspec.structs.replace(view, runs=[_run_view(run) for run in found.runs])


@endpoint(
    "PATCH",
    "/schedules/{schedule_id}",
    summary="Change, pause or resume a schedule",
    body=ScheduleChanges,
    result=ScheduleView,
    errors=(InvalidInputError, ForbiddenError, NotFoundError),
)
async def change_schedule(api: ApiContext, caller: Caller, schedule_id: int, body: ScheduleChanges) -> ScheduleView:
    """A resumed schedule, and one with other times, continues with the next of them; ``every`` counts as before.

    The jobs of its runs are not changed. An operator can pause and resume the schedules of others, and no more.
    """
    found = await api.database.read("fetch a schedule", transactions.fetch_schedule, schedule_id, caller.scope)
    record, now = found.schedule, api.clock()
    times = None
    if body.recurrence is not None or body.timezone is not None or body.job is not None:
        if record.user_id != caller.user_id:
            raise ForbiddenError("only its user changes what a schedule submits, and when")
        times = _recurrence(body.recurrence or record.recurrence, body.timezone or record.timezone)
    elif body.paused is None:
        raise InvalidInputError("nothing is to be changed: give paused, recurrence, timezone or job", "$")
    if body.job is not None:
        _check_job(api, caller, body.job)

    def following(changed: ScheduleRecord) -> datetime | None:
        due = _recurrence(changed.recurrence, changed.timezone).after(now, changed.created_at)
        if due is None:
            raise InvalidInputError("it would never run", "$.recurrence")
        return due

    changes = ScheduleEdit(
        recurrence=None if times is None else times.text,
        timezone=body.timezone,
        submission=None if body.job is None else msgspec.to_builtins(body.job),
        paused=body.paused,
    )

    def then(_changed: ScheduleRecord) -> None:
        api.schedules_changed()

    changed = await api.commit(
        "change a schedule", transactions.change_schedule, schedule_id, caller.scope, changes, following, then=then
    )
    return _view(changed, found.runs[0] if found.runs else None)


@endpoint(
    "DELETE", "/schedules/{schedule_id}", summary="Remove a schedule", result=None, status=204, errors=(NotFoundError,)
)
async def delete_schedule(api: ApiContext, caller: Caller, schedule_id: int) -> None:
    """With its history; the jobs of its runs stay."""
    await api.database.run("remove a schedule", transactions.remove_schedule, schedule_id, caller.scope)


def _view(schedule: ScheduleRecord, last: ScheduleRun | None, hold: HoldView | None = None) -> ScheduleView:
    return ScheduleView(
        id=schedule.id,
        user_id=schedule.user_id,
        recurrence=schedule.recurrence,
        timezone=schedule.timezone,
        paused=schedule.next_due is None,
        created_at=schedule.created_at.replace(microsecond=0),
        next_due=whole_seconds(schedule.next_due),
        job=dict(schedule.submission),
        last_run=None if last is None else _run_view(last),
        hold=UNSET if hold is None else hold,
    )


def _run_view(run: ScheduleRun) -> ScheduleRunView:
    return ScheduleRunView(
        due_at=run.due_at.replace(microsecond=0),
        made_at=run.made_at.replace(microsecond=0),
        outcome=run.outcome.value,
        job=run.job_id,
        status=None if run.job_status is None else run.job_status.name,
        message=run.message,
    )

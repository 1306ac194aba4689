"""Jobs are registered."""

from __future__ import annotations

import msgspec

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.http import lookups
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.problems import DelegationNeededError, InvalidInputError, KeyUsedBeforeError
from pdm.workqueue.http.progress import with_progress
from pdm.workqueue.http.submission import job_from, needs_of
from pdm.workqueue.http.views import job_view
from pdm.workqueue.store.jobs import IdempotencyConflictError, IdempotencyKey
from pdm.workqueue.telemetry.job_lines import log_submitted
from pdm.workqueue.wire.requests import (
    SubmitCopy,
    SubmitJob,
    SubmitList,
    SubmitMkdir,
    SubmitRemove,
    SubmitRename,
)
from pdm.workqueue.wire.responses import JobView

_ERRORS = (InvalidInputError, DelegationNeededError, KeyUsedBeforeError)


async def _submit(api: ApiContext, caller: Caller, asked: SubmitJob, key: IdempotencyKey | None) -> JobView:
    new = job_from(api, caller.user_id, asked)
    needs = needs_of(api, new)
    needed = lookups.Needed(needs, api.lifetimes) if needs else None

    def wake(registered: tuple[JobRecord, list[str]]) -> None:
        # A repeated request comes back with the job that was there.
        if registered[0].log_uid == new.log_uid:
            log_submitted(registered[0])
        api.wake()

    try:
        numbers = {new.src_siteid} if new.dst_siteid is None else {new.src_siteid, new.dst_siteid}
        stored = [number for number in numbers if not api.sites.is_of_file(number)]
        job, warnings = await api.commit(
            "register a job", lookups.register, new, key, api.clock(), needed, stored, then=wake
        )
    except IdempotencyConflictError as error:
        raise KeyUsedBeforeError(
            "this Idempotency-Key was sent with another request: use a new one for each request", "Idempotency-Key"
        ) from error
    view = job_view(*await with_progress(api, job))
    return msgspec.structs.replace(view, warnings=warnings) if warnings else view


def _typed(type_: JobType, body: msgspec.Struct) -> SubmitJob:
    """The request of a type's own route as one of ``POST /jobs``."""
    return SubmitJob(type=type_.value, **msgspec.structs.asdict(body))


@endpoint("POST", "/jobs", summary="Register a job of any type", body=SubmitJob, result=JobView, errors=_ERRORS)
async def submit_job(api: ApiContext, caller: Caller, body: SubmitJob, key: IdempotencyKey | None) -> JobView:
    """Registers a new job. ``type`` is a number, a string of digits or a name."""
    return await _submit(api, caller, body, key)


@endpoint("POST", "/list", summary="Register a listing job", body=SubmitList, result=JobView, errors=_ERRORS)
async def submit_list(api: ApiContext, caller: Caller, body: SubmitList, key: IdempotencyKey | None) -> JobView:
    """Lists what is at a path, down to the option ``depth`` (all levels without it)."""
    return await _submit(api, caller, _typed(JobType.LIST, body), key)


@endpoint("POST", "/copy", summary="Register a copy job", body=SubmitCopy, result=JobView, errors=_ERRORS)
async def submit_copy(api: ApiContext, caller: Caller, body: SubmitCopy, key: IdempotencyKey | None) -> JobView:
    """Copies a file, or the content of a directory, to another place; options ``overwrite`` and ``verify``."""
    return await _submit(api, caller, _typed(JobType.COPY, body), key)


@endpoint("POST", "/remove", summary="Register a remove job", body=SubmitRemove, result=JobView, errors=_ERRORS)
async def submit_remove(api: ApiContext, caller: Caller, body: SubmitRemove, key: IdempotencyKey | None) -> JobView:
    """Removes a file, or a directory with all that is in it (option ``recursive``)."""
    return await _submit(api, caller, _typed(JobType.REMOVE, body), key)


@endpoint("POST", "/rename", summary="Register a rename job", body=SubmitRename, result=JobView, errors=_ERRORS)
async def submit_rename(api: ApiContext, caller: Caller, body: SubmitRename, key: IdempotencyKey | None) -> JobView:
    """Gives a file or directory a new name at its site; option ``overwrite``."""
    return await _submit(api, caller, _typed(JobType.RENAME, body), key)


@endpoint("POST", "/mkdir", summary="Register a mkdir job", body=SubmitMkdir, result=JobView, errors=_ERRORS)
async def submit_mkdir(api: ApiContext, caller: Caller, body: SubmitMkdir, key: IdempotencyKey | None) -> JobView:
    """Makes a directory; with the option ``parents`` those above it, too."""
    return await _submit(api, caller, _typed(JobType.MKDIR, body), key)

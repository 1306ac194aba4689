"""Jobs of FTS3: submit, show, list, cancel, and change their priority."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec
from attrs import evolve
from twisted.internet.task import deferLater

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.fts import FINAL_STATES, element_of_file, file_state, job_priority, job_state
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import JsonStream, json_array
from pdm.workqueue.http.endpoints.delegations import delegation_id
from pdm.workqueue.http.fts import submission
from pdm.workqueue.http.fts.calls import FtsAnswer, FtsCall
from pdm.workqueue.http.fts.documents import read_document, read_submission
from pdm.workqueue.http.fts.views import TIMES, file_object, fts_reason, fts_time, job_object
from pdm.workqueue.http.problems import ForbiddenError, InvalidInputError, NotFoundError
from pdm.workqueue.store import fts, jobs
from pdm.workqueue.store.fts import FtsFilter, FtsJob
from pdm.workqueue.telemetry.logging import log_ended

#: Jobs and files that are read in one transaction.
_PAGE = 500
_MOST_LISTED = 500
#: Jobs that one request names.
_MOST_NAMED = 1000
#: Jobs that a list with a limit looks at, most of which may be in other states.
_MOST_SCANNED = 20_000

#: For which the end of what is cancelled is awaited.
_CANCEL_WAIT_S = 5.0
#: Seconds between two looks at files that are being ended.
_CANCEL_LOOK_S = 0.1

_OK, _NOT_MODIFIED = "200 Ok", "304 Not Modified"
_OKAY: Mapping[str, Any] = {"http_status": _OK}
_NOT_FOUND, _FORBIDDEN = "404 Not Found", "403 Forbidden"


async def submit_job(call: FtsCall) -> FtsAnswer:
    """Register a job; its id."""
    wanted = await call.api.in_thread(read_submission, call.body)
    return FtsAnswer({"job_id": await submission.submit(call.api, call.caller, call.user.vo_name, wanted)})


# -- jobs by their ids


def _ids(call: FtsCall) -> list[str]:
    ids = [each for each in call.values["job_ids"].split(",") if each]
    if not ids or len(ids) > _MOST_NAMED:
        raise InvalidInputError(f"1 to {_MOST_NAMED} ids are expected")
    return ids


async def _found(api: ApiContext, caller: Caller, ids: Collection[str]) -> dict[str, FtsJob | str]:
    """The jobs by their ids; instead of one that is not for the caller, the status that says so."""
    known = await api.database.read("find jobs of FTS", fts.find, [each for each in ids if len(each) <= 36])
    found: dict[str, FtsJob | str] = dict.fromkeys(ids, _NOT_FOUND)
    for job in known:
        if job.user_id == caller.user_id or (caller.scope is None and isinstance(found[job.fts_id], str)):
            found[job.fts_id] = job
        elif found[job.fts_id] == _NOT_FOUND:
            found[job.fts_id] = _FORBIDDEN
    return found


def _missing(fts_id: str, status: str) -> dict[str, Any]:
    return {"job_id": fts_id, "http_status": status, "http_message": _words(fts_id, status)}


def _words(fts_id: str, status: str) -> str:
    if status == _FORBIDDEN:
        return f'Not enough permissions to check the job "{fts_id[:100]}"'
    return f'No job with the id "{fts_id[:100]}" has been found'


async def own_job(api: ApiContext, caller: Caller, fts_id: str) -> FtsJob:
    """A job that the caller may see.

    Raises:
        NotFoundError: there is no such job.
        ForbiddenError: it is another user's.
    """
    found = (await _found(api, caller, [fts_id]))[fts_id]
    if isinstance(found, FtsJob):
        return found
    raise (ForbiddenError if found == _FORBIDDEN else NotFoundError)(_words(fts_id, found))


def _one_or_all(call: FtsCall, results: Sequence[Mapping[str, Any]]) -> FtsAnswer:
    """One object for one id, with its status; an array for several, with status 207 if one has failed."""
    good = (_OK, _NOT_MODIFIED)
    if "," in call.values["job_ids"]:
        return FtsAnswer(list(results), 200 if all(each["http_status"] in good for each in results) else 207)
    (only,) = results
    status = only["http_status"]
    if status in good:
        return FtsAnswer(only)
    # Rucio reads this as a job, CERN's client as an error.
    return FtsAnswer({**only, "status": status, "message": only["http_message"]}, int(status[:3]))


async def show_jobs(call: FtsCall) -> FtsAnswer:
    """Jobs, with fields of their files if ``files`` names some."""
    ids = _ids(call)
    found = await _found(call.api, call.caller, ids)
    service = call.api.service_name()
    fields = [each for each in call.query().get("files", "").split(",") if each]
    if not fields or (len(ids) == 1 and isinstance(found[ids[0]], str)):
        objects = [
            _missing(each, job) if isinstance(job := found[each], str) else {**job_object(job, service), **_OKAY}
            for each in ids
        ]
        return _one_or_all(call, objects)

    async def each_job() -> AsyncGenerator[bytes | AsyncGenerator[bytes]]:
        for each in ids:
            job = found[each]
            if isinstance(job, str):
                yield msgspec.json.encode(_missing(each, job))
            else:
                yield _with_files(call.api, job, {**job_object(job, service), **_OKAY}, fields)

    status = 207 if any(isinstance(job, str) for job in found.values()) else 200
    if "," in call.values["job_ids"]:
        return FtsAnswer(JsonStream(json_array(each_job())), status)
    (job,) = (job for job in found.values() if not isinstance(job, str))
    return FtsAnswer(JsonStream(_with_files(call.api, job, {**job_object(job, service), **_OKAY}, fields)), status)


async def _with_files(
    api: ApiContext, job: FtsJob, value: Mapping[str, Any], fields: Sequence[str]
) -> AsyncGenerator[bytes]:
    yield msgspec.json.encode(value)[:-1] + b',"files":'
    async for piece in json_array(_files(api, job, fields)):
        yield piece
    yield b"}"


async def _files(api: ApiContext, job: FtsJob, fields: Sequence[str]) -> AsyncGenerator[bytes | AsyncGenerator[bytes]]:
    """The files of a job, encoded; all fields if none is named."""
    read_page = partial(fts.files, with_times=not fields or not TIMES.isdisjoint(fields))
    for part in job.parts:
        after = -1
        while True:
            page = await api.database.read("files of a job of FTS", read_page, part, after, _PAGE)
            for found in page:
                yield msgspec.json.encode(file_object(job, found, fields))
            if len(page) < _PAGE:
                break
            after = page[-1].element.id


async def show_files(call: FtsCall) -> FtsAnswer:
    """The files of a job, with all their fields."""
    job = await own_job(call.api, call.caller, call.values["job_id"])
    return FtsAnswer(JsonStream(json_array(_files(call.api, job, ()))))


async def show_data_management(call: FtsCall) -> FtsAnswer:
    """Deletions of a job: none ever."""
    await own_job(call.api, call.caller, call.values["job_id"])
    return FtsAnswer([])


async def show_field(call: FtsCall) -> FtsAnswer:
    """One field of a job."""
    job = await own_job(call.api, call.caller, call.values["job_id"])
    value = job_object(job, call.api.service_name())
    if call.values["field"] not in value:
        raise NotFoundError("No such field")
    return FtsAnswer(value[call.values["field"]])


async def show_retries(call: FtsCall) -> FtsAnswer:
    """The failed attempts of a file after which it was tried again."""
    job = await own_job(call.api, call.caller, call.values["job_id"])
    text = call.values["file_id"]
    number, element_id = element_of_file(int(text)) if _is_file_id(text) else _NO_FILE
    element = None
    if number in [part.id for part in job.parts]:
        element = await call.api.database.read("a file", jobs.fetch_element, number, element_id)
    if element is None:
        raise NotFoundError(f'No file with the id "{text[:20]}" has been found')
    ended = await call.api.database.read("attempts of a file", jobs.attempts, number, element_id)
    return FtsAnswer(
        [
            {
                "file_id": int(text),
                "attempt": each.attempt,
                "datetime": fts_time(each.ended_at),
                "reason": fts_reason(each.failure),
            }
            for each in ended
            if each.failure is not None and each.attempt < element.attempts
        ]
    )


# -- lists


async def list_jobs(call: FtsCall) -> FtsAnswer:
    """Jobs by filters; without a state those that have not ended."""
    query, caller = call.query(), call.caller
    _check_filters(caller, query)
    limit = _limit(query.get("limit"))
    states = frozenset(each for each in query.get("state_in", "").split(",") if each)
    window = _time_window(query.get("time_window"))
    is_open = not states or (limit is None and window is None)
    wanted = FtsFilter(
        owner_id=caller.user_id if query.get("dlg_id") or query.get("user_dn") else caller.scope,
        vo_name=query.get("vo_name") or None,
        is_open=is_open,
        ended_since=None if is_open or limit is not None or window is None else call.api.clock() - window,
    )

    def matches(value: Mapping[str, Any]) -> bool:
        return (
            (not states or value["job_state"] in states)
            and query.get("source_se") in (None, "", value["source_se"])
            and query.get("dest_se") in (None, "", value["dest_se"])
        )

    fields = [each for each in query.get("fields", "").split(",") if each]
    return FtsAnswer(JsonStream(json_array(_listed(call.api, wanted, limit, matches, fields))))


def _check_filters(caller: Caller, query: Mapping[str, str]) -> None:
    dlg_id, subject = query.get("dlg_id"), query.get("user_dn")
    if dlg_id and dlg_id != delegation_id(caller.subject):
        raise ForbiddenError("The provided delegation id does not match your delegation id")
    if subject and subject != caller.subject:
        raise InvalidInputError("The provided DN and delegation id do not correspond to the same user")


def _limit(text: str | None) -> int | None:
    if not text:
        return None
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal()):
        return None
    if len(digits) > 4 or not 0 <= int(text) <= _MOST_LISTED:
        raise InvalidInputError("The limit must be positive and less or equal than 500")
    return int(text) or None


def _time_window(text: str | None) -> timedelta | None:
    if not text:
        return None
    hours, _, minutes = text.partition(":")
    if not all(each.isascii() and each.isdecimal() and len(each) < 6 for each in (hours, minutes or "0")):
        raise InvalidInputError("time_window: HOURS or HOURS:MINUTES is expected")
    return timedelta(hours=int(hours), minutes=int(minutes or 0))


async def _listed(
    api: ApiContext,
    wanted: FtsFilter,
    limit: int | None,
    matches: Callable[[Mapping[str, Any]], bool],
    fields: Sequence[str],
) -> AsyncGenerator[bytes | AsyncGenerator[bytes]]:
    scanned = given = 0
    service = api.service_name()
    while limit is None or (given < limit and scanned < _MOST_SCANNED):
        page = await api.database.read("page of jobs of FTS", fts.page, wanted, _PAGE)
        for job in page:
            value = job_object(job, service)
            if matches(value) and (limit is None or given < limit):
                given += 1
                yield msgspec.json.encode({name: value[name] for name in fields if name in value} if fields else value)
        scanned += len(page)
        if not page:
            return
        wanted = evolve(wanted, before=page[-1].number)


# -- changes


async def cancel_jobs(call: FtsCall) -> FtsAnswer:
    """Cancel jobs; each with the state in which that leaves it."""
    ids = _ids(call)
    found = await _found(call.api, call.caller, ids)
    going = [job for job in found.values() if isinstance(job, FtsJob) and job_state(job.parts) not in FINAL_STATES]
    numbers = [part.id for job in going for part in job.parts]
    await cancel_parts(call.api, numbers)
    until = call.api.reactor.seconds() + _CANCEL_WAIT_S
    for number in numbers:
        # Running copies are terminated within a second.
        while not (await call.api.job(number, None)).status.is_final and call.api.reactor.seconds() < until:
            await call.api.awaited_job(number, None, until - call.api.reactor.seconds())
    return await _changed(call, ids, going)


async def cancel_parts(api: ApiContext, numbers: Collection[int]) -> None:
    """Cancel the jobs that carry out jobs of FTS."""
    now = api.clock()

    def then(cancelled: Sequence[JobRecord]) -> None:
        for job in cancelled:
            if job.status.is_final and job.finished_at == now:
                log_ended(job)
            api.cancelled(job.id)
        api.wake()

    if numbers:
        await api.commit("cancel jobs of FTS", fts.cancel, numbers, now, then=then)


async def _changed(call: FtsCall, ids: Sequence[str], going: Sequence[FtsJob]) -> FtsAnswer:
    fresh, changed = await _found(call.api, call.caller, ids), {job.fts_id for job in going}
    service = call.api.service_name()
    results: list[Mapping[str, Any]] = []
    for each in ids:
        job = fresh[each]
        if isinstance(job, str):
            results.append(_missing(each, job))
        elif each in changed:
            results.append(job_object(job, service) | {"http_status": _OK, "http_message": None})
        else:
            results.append(
                job_object(job, service)
                | {"http_status": _NOT_MODIFIED, "http_message": "The job is in a terminal state"}
            )
    return _one_or_all(call, results)


async def cancel_files(call: FtsCall) -> FtsAnswer:
    """Cancel files; the state of each.

    One that another daemon is copying continues, unless all others of its job that have not ended are named as well.
    """
    api = call.api
    job = await own_job(api, call.caller, call.values["job_id"])
    if job.details.get("job_type") != "N":
        raise InvalidInputError("Multihop or reuse jobs must be cancelled at once (R)")
    texts = call.values["file_ids"].split(",")
    chosen: dict[int, set[int]] = {part.id: set() for part in job.parts}
    places = [element_of_file(int(text)) if _is_file_id(text) else _NO_FILE for text in texts]
    for place in places:
        if place[0] in chosen:
            chosen[place[0]].add(place[1])
    now = api.clock()

    def then(changed: tuple[Sequence[JobRecord], Mapping[tuple[int, int], JobStatus]]) -> None:
        for part in changed[0]:
            if part.status.is_final and part.finished_at == now:
                log_ended(part)
        api.wake()

    changed, found = await api.commit("cancel files of FTS", fts.cancel_elements, chosen, now, then=then)
    statuses: dict[tuple[int, int], JobStatus] = dict(found)
    named = {place for place, status in statuses.items() if status is JobStatus.RUNNING}
    counts = [part.counters for part in changed]
    if named and len(named) == sum(each.running + each.submitted + each.held for each in counts):
        # Nothing else of the job runs, so that the running ones can be ended with it.
        await cancel_parts(api, [part.id for part in changed if part.counters.running])
        statuses |= dict.fromkeys(named, JobStatus.CANCELLED)
    elif named:
        statuses |= await _end_running(api, named)
    states = [
        file_state(statuses[place]) if place in statuses else "File does not belong to the job" for place in places
    ]
    return FtsAnswer(states if len(states) > 1 else states[0])


async def _end_running(api: ApiContext, places: Collection[tuple[int, int]]) -> Mapping[tuple[int, int], JobStatus]:
    """End elements that run; the status in which that leaves each after some seconds at most."""
    numbers: dict[int, list[int]] = {}
    for job_id, number in places:
        numbers.setdefault(job_id, []).append(number)
    run_here = [api.cancel_elements(job_id, some) for job_id, some in numbers.items()]
    until = api.reactor.seconds() + (_CANCEL_WAIT_S if any(run_here) else 0.0)
    while True:
        found = await api.database.read("statuses of elements", fts.statuses, numbers)
        if JobStatus.RUNNING not in found.values() or api.reactor.seconds() >= until:
            return found
        await deferLater(api.reactor, _CANCEL_LOOK_S, lambda: None)


#: No job has this number.
_NO_FILE = (0, 0)


def _is_file_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 19


async def modify_jobs(call: FtsCall) -> FtsAnswer:
    """Change the priority of jobs that have not ended."""
    ids = _ids(call)
    params = read_document(call.body).get("params")
    priority = params.get("priority") if isinstance(params, dict) else None
    if priority is not None:
        try:
            priority = int(priority)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidInputError("Invalid priority value") from error
    found = await _found(call.api, call.caller, ids)
    going = [job for job in found.values() if isinstance(job, FtsJob) and job_state(job.parts) not in FINAL_STATES]
    if priority and going:
        numbers = [part.id for job in going for part in job.parts]
        await call.api.commit(
            "change a priority", fts.set_priority, numbers, job_priority(priority), then=lambda _: call.api.wake()
        )
    return await _changed(call, ids, going)

"""Endpoints of elements: list and show them, with their status, and with the logs and listings of their attempts.

An output exists as soon as an attempt has ended. While an attempt runs, the one before it is the latest with an output;
a client that passes ``live`` also reads the log of a running attempt, piece by piece.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import datetime

import attrs
import msgspec
from attrs import frozen
from msgspec import UNSET, UnsetType

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord
from pdm.workqueue.execution.cluster import LogElsewhereError
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.decoding import enum_members
from pdm.workqueue.http.endpoint import JsonStream, endpoint, json_array, json_items
from pdm.workqueue.http.endpoints.jobs import site_number, utc_timestamp
from pdm.workqueue.http.endpoints.receipts import failure_codes
from pdm.workqueue.http.listings import has_listing, with_listing
from pdm.workqueue.http.problems import (
    AttemptLogMissingError,
    ElementNotFoundError,
    InvalidInputError,
    JobNotFoundError,
    OutputNotReadyError,
)
from pdm.workqueue.http.transactions import EndedAttempt, OutputPage
from pdm.workqueue.http.views import element_status_view, element_view, process_view
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.reader import LogMissingError as LogFileMissingError
from pdm.workqueue.logstore.reader import LogPiece
from pdm.workqueue.store import jobs
from pdm.workqueue.store.jobs import ElementFilter
from pdm.workqueue.wire.requests import ElementQuery, OutputQuery
from pdm.workqueue.wire.responses import ElementStatusView, ElementView, OutputView


@endpoint(
    "GET",
    "/jobs/{job_id}/elements",
    summary="The elements of a job",
    query=ElementQuery,
    result=list[ElementView],
    errors=(InvalidInputError, JobNotFoundError),
)
async def list_elements(api: ApiContext, caller: Caller, job_id: int, query: ElementQuery) -> JsonStream:
    """In order of their numbers. Read pages (``limit``, ``after``) of jobs that may have many."""
    wanted = ElementFilter(
        statuses=enum_members(JobStatus, query.status, "status"),
        types=enum_members(JobType, query.type, "type"),
        limit=_page_size(query.limit),
        after=query.after,
        codes=failure_codes(query.code),
    )
    site = None if query.site is None else site_number(api, caller, query.site)
    since = utc_timestamp(query.since)
    job, page = await api.database.read("page of elements", transactions.element_page, job_id, caller.scope, wanted)
    if (site is not None and site not in (job.src_siteid, job.dst_siteid)) or query.label not in (None, job.label):
        page = []
    return JsonStream(json_array(_element_pages(api, job, page, wanted, since, query.limit)))


def _page_size(limit: int | None) -> int:
    return transactions.PAGE_SIZE if limit is None else min(transactions.PAGE_SIZE, limit)


async def _element_pages(
    api: ApiContext,
    job: JobRecord,
    page: list[ElementRecord],
    wanted: ElementFilter,
    since: datetime | None,
    limit: int | None,
) -> AsyncGenerator[bytes | AsyncGenerator[bytes]]:
    while True:
        chosen = [element for element in page if since is None or element.timestamp >= since][:limit]
        plain: list[ElementView] = []
        for element in chosen:
            if job.type is JobType.LIST and has_listing(element):
                if plain:
                    yield json_items(plain)
                    plain = []
                yield with_listing(api, job, element, element_view(element, job), in_list=True)
            else:
                plain.append(element_view(element, job))
        if plain:
            yield json_items(plain)
        if limit is not None:
            limit -= len(chosen)
            if limit == 0:
                return
        if wanted.limit is None or len(page) < wanted.limit:
            return
        wanted = attrs.evolve(wanted, after=page[-1].id, limit=_page_size(limit))
        page = await api.database.read("page of elements", jobs.page_elements, job.id, wanted)


@endpoint(
    "GET",
    "/jobs/{job_id}/elements/{element_id}",
    summary="One element of a job",
    result=ElementView,
    errors=(JobNotFoundError, ElementNotFoundError),
)
async def get_element(api: ApiContext, caller: Caller, job_id: int, element_id: int) -> ElementView | JsonStream:
    """A LIST element that is DONE includes its listing."""
    job, element = await api.database.read(
        "fetch an element", transactions.fetch_element, job_id, element_id, caller.scope
    )
    if not has_listing(element):
        return element_view(element, job)
    return JsonStream(with_listing(api, job, element, element_view(element, job), in_list=True))


@endpoint(
    "GET",
    "/jobs/{job_id}/elements/{element_id}/status",
    summary="Status of an element",
    result=ElementStatusView,
    errors=(JobNotFoundError, ElementNotFoundError),
)
async def get_element_status(api: ApiContext, caller: Caller, job_id: int, element_id: int) -> ElementStatusView:
    """The status, and of a transfer also its progress and rate."""
    _, element = await api.database.read(
        "fetch an element", transactions.fetch_element, job_id, element_id, caller.scope
    )
    motion = None
    if element.status is JobStatus.RUNNING:
        motion = (await api.cluster.of_elements(job_id, [element_id])).get(element_id)
    return element_status_view(element, motion)


#: Bytes of a job's output before the response starts: a missing log among them becomes the status code.
_BUFFERED_BYTES = 1024**2
#: Maximum bytes of a log in one live response.
_LIVE_BYTES = 256 * 1024

_ERRORS = (InvalidInputError, OutputNotReadyError, JobNotFoundError, ElementNotFoundError, AttemptLogMissingError)


@endpoint(
    "GET",
    "/jobs/{job_id}/output",
    summary="The latest output of all elements of a job",
    result=list[OutputView],
    errors=(JobNotFoundError, AttemptLogMissingError),
)
async def get_job_output(api: ApiContext, caller: Caller, job_id: int) -> JsonStream:
    """One object for each element with an ended attempt.

    A log that was deleted from disk is status 500, or, if a part of a long response has been sent already, a ``log`` of
    null.
    """
    first = await api.database.read("page of outputs", transactions.latest_attempts, job_id, caller.scope, None)
    sent = _ByteCounter()
    return JsonStream(sent.count(json_array(_outputs(api, caller, job_id, first, sent))), _BUFFERED_BYTES)


class _ByteCounter:
    """Counts the bytes of a streamed response."""

    def __init__(self) -> None:
        self.size = 0

    async def count(self, pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        async with aclosing(pieces) as source:
            async for piece in source:
                self.size += len(piece)
                yield piece


async def _outputs(
    api: ApiContext, caller: Caller, job_id: int, page: OutputPage, sent: _ByteCounter
) -> AsyncGenerator[bytes | AsyncGenerator[bytes]]:
    while True:
        for ended in page.attempts:
            try:
                log: _Log = await _read_log(api, ended)
            except AttemptLogMissingError:
                # Before the first byte is sent, the status code can still be the one that the reference requires.
                if sent.size < _BUFFERED_BYTES:
                    raise
                log = _Log(None)
            yield _output(api, ended, log)
        if page.after is None:
            return
        page = await api.database.read(
            "page of outputs", transactions.latest_attempts, job_id, caller.scope, page.after
        )


@frozen
class _Log:
    """A log, or a sentence why it cannot be read; `silent` says on which node it is that does not answer."""

    text: str | None
    silent: str | UnsetType = UNSET


def _silent_log(error: LogElsewhereError) -> _Log:
    return _Log(f"the log is {error}\n", str(error))


async def _read_log(api: ApiContext, ended: EndedAttempt) -> _Log:
    try:
        ref = LogRef(ended.job.log_uid, ended.element.id, ended.attempt)
        return _Log(await api.logs.read(ref, ended.worker, ended.log))
    except LogElsewhereError as error:
        return _silent_log(error)
    except LogFileMissingError as error:
        if ended.failure is not None and ended.failure.code is FailureCode.CRASHED:
            # A daemon that was killed may not have started the log.
            return _Log(f"there is no log: {ended.failure.message}\n")
        raise AttemptLogMissingError(
            f"the log of job {ended.job.id}, element {ended.element.id}, attempt {ended.attempt} was deleted from disk:"
            " the service removes old logs"
        ) from error


def _output(api: ApiContext, ended: EndedAttempt, log: _Log) -> bytes | AsyncGenerator[bytes]:
    element = ended.element
    listed = ended.is_latest and has_listing(element)
    view = OutputView(
        jobid=element.job_id,
        elementid=element.id,
        attempt=ended.attempt,
        type=element.type.name,
        status=ended.status.name,
        log=log.text,
        silent=log.silent,
        process=process_view(log.text, ended.failure),
        listing={} if element.type is JobType.LIST and not listed else UNSET,
    )
    if listed:
        return with_listing(api, ended.job, element, view, in_list=False)
    return msgspec.json.encode(view)


@endpoint(
    "GET",
    "/jobs/{job_id}/elements/{element_id}/output",
    summary="The latest output of an element",
    query=OutputQuery,
    result=OutputView,
    errors=_ERRORS,
)
async def get_element_output(
    api: ApiContext, caller: Caller, job_id: int, element_id: int, query: OutputQuery
) -> OutputView | JsonStream:
    """Of the latest ended attempt; with ``live``, the log of the latest attempt even while it runs."""
    return await _requested_output(api, caller, job_id, element_id, -1, query)


@endpoint(
    "GET",
    "/jobs/{job_id}/elements/{element_id}/output/{attempt}",
    summary="The output of one attempt",
    query=OutputQuery,
    result=OutputView,
    errors=_ERRORS,
)
async def get_attempt_output(
    api: ApiContext, caller: Caller, job_id: int, element_id: int, attempt: int, query: OutputQuery
) -> OutputView | JsonStream:
    """Attempts count from 1; -1 is the latest ended one, -2 the one before it.

    With ``live`` also the log of a running attempt, up to what has been written: call again with the ``offset`` of the
    response for the rest, until ``end`` is true. Negative numbers then count from the latest, running or not.
    """
    return await _requested_output(api, caller, job_id, element_id, attempt, query)


async def _requested_output(
    api: ApiContext, caller: Caller, job_id: int, element_id: int, number: int, query: OutputQuery
) -> OutputView | JsonStream:
    if query.live:
        return await _live_output(api, caller, job_id, element_id, number, query.offset or 0)
    if query.offset is not None:
        raise InvalidInputError("an offset requires live=1", "?offset")
    return await _chosen_output(api, caller, job_id, element_id, number)


async def _live_output(
    api: ApiContext, caller: Caller, job_id: int, element_id: int, number: int, offset: int
) -> OutputView:
    found = await api.database.read("an attempt", transactions.fetch_attempt, job_id, element_id, caller.scope, number)
    job, element, attempt, status = found.job, found.element, found.attempt, found.status
    if status is None:
        place = f"element {element.id} of job {job.id}"
        raise OutputNotReadyError(f"{place} has no attempt {number}: {element.attempts} were started")
    # The database is read before the log: the log of an attempt that has ended is complete.
    ended = status is not JobStatus.RUNNING
    ref = LogRef(job.log_uid, element.id, attempt)
    silent: str | UnsetType = UNSET
    try:
        piece = await api.logs.read_piece(ref, offset, _LIVE_BYTES, found.worker, found.log)
    except LogElsewhereError as error:
        # While the attempt runs, a client asks again, from the same offset on.
        unread = _silent_log(error)
        piece, silent = LogPiece(unread.text if ended else None, offset, is_last=True), unread.silent
    except LogFileMissingError:
        piece = LogPiece(None, offset, is_last=True)
    return OutputView(
        jobid=job.id,
        elementid=element.id,
        attempt=attempt,
        type=element.type.name,
        status=status.name,
        # An element that was claimed but waits within its batch has no log yet.
        log=piece.text if ended else piece.text or "",
        offset=piece.end,
        end=ended and piece.is_last,
        silent=silent,
        process=UNSET if offset else process_view(piece.text, found.failure),
    )


async def _chosen_output(api: ApiContext, caller: Caller, job_id: int, element_id: int, number: int) -> JsonStream:
    element, attempts = await api.database.read(
        "attempts of an element", transactions.ended_attempts, job_id, element_id, caller.scope
    )
    if number < 0:
        ended = attempts[number] if -number <= len(attempts) else None
    else:
        ended = next((candidate for candidate in attempts if candidate.attempt == number), None)
    if ended is None:
        raise OutputNotReadyError(_not_ready_reason(element, attempts, number))
    item = _output(api, ended, await _read_log(api, ended))
    return JsonStream(_single_piece(item) if isinstance(item, bytes) else item)


async def _single_piece(item: bytes) -> AsyncGenerator[bytes]:
    yield item


def _not_ready_reason(element: ElementRecord, attempts: Sequence[EndedAttempt], number: int) -> str:
    place = f"element {element.id} of job {element.job_id}"
    if element.status is JobStatus.RUNNING and number == element.attempts:
        return f"attempt {number} of {place} is still running"
    if not attempts:
        return f"no attempt of {place} has ended yet: it is {element.status.name}"
    ended = ", ".join(str(candidate.attempt) for candidate in attempts)
    return f"{place} has no output of attempt {number}; it has outputs of {ended}"

"""The elements of a job in pages, and the log of each of their attempts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

import msgspec
from attrs import frozen
from msgspec import UNSET, Meta, UnsetType

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord
from pdm.workqueue.execution.cluster import LogElsewhereError
from pdm.workqueue.http import transactions
from pdm.workqueue.http.decoding import enum_members
from pdm.workqueue.http.endpoints.receipts import failure_codes
from pdm.workqueue.http.problems import OutputNotReadyError
from pdm.workqueue.http.transactions import KnownAttempt
from pdm.workqueue.http.views import element_status_view, failure_view, process_view
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.reader import LogMissingError, LogTail
from pdm.workqueue.store.jobs import ElementFilter
from pdm.workqueue.web.jobs import Number, with_query
from pdm.workqueue.web.pages import Download, Page, Visit, page
from pdm.workqueue.wire.requests import LARGEST_ID
from pdm.workqueue.wire.responses import ProcessView

#: Elements on a page, and numbers of elements that one request searches for a name or a status.
_PAGE_SIZE, _SEARCHED = 100, 200_000
#: Bytes of a log that are shown first, and of a piece of a download.
_TAIL_BYTES, _PIECE_BYTES = 64 * 1024, 256 * 1024
#: Enough for the first line of a log, or for its begin.
_FIRST_BYTES = 16 * 1024


class ElementListQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which elements; `name` is any part of the path."""

    status: str | None = None
    name: Annotated[str, Meta(max_length=1000)] | None = None
    code: str | None = None
    after: Number | None = None

    def url(self, job_id: int, **changes: object) -> str:
        """The address of the elements with these fields."""
        return with_query(f"/web/jobs/{job_id}/elements", {**msgspec.structs.asdict(self), **changes})


class AttemptQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which attempt; without a number, the newest."""

    attempt: Annotated[int, Meta(ge=1, le=LARGEST_ID)] | None = None


@frozen
class ElementRow:
    """An element in a table.

    Attributes:
        average: bytes per second; None where it is unknown.
    """

    element: ElementRecord
    average: float | None
    failure: AttemptFailure | None


async def element_rows(visit: Visit, job: JobRecord, found: Sequence[ElementRecord]) -> list[ElementRow]:
    """Elements with their rates, those of running ones from the memory of the nodes."""
    rows = []
    running = [element.id for element in found if element.status is JobStatus.RUNNING]
    motions = await visit.api.cluster.of_elements(job.id, running) if running else {}
    for element in found:
        status = element_status_view(element, motions.get(element.id))
        failure = None if element.status is JobStatus.DONE else element.failure
        rows.append(ElementRow(element, status.instant or status.average, failure))
    return rows


@page("GET", "/web/jobs/<number:job_id>/elements", query=ElementListQuery)
async def show_elements(visit: Visit, job_id: int, query: ElementListQuery) -> Page:
    """A page of elements, in the order of their numbers."""
    after = -1 if query.after is None else query.after
    # A search that finds little would read all elements of a large job: each page reads a part.
    until = min(after + _SEARCHED, LARGEST_ID)
    wanted = ElementFilter(
        statuses=enum_members(JobStatus, (query.status,) if query.status else (), "status"),
        codes=failure_codes([query.code] if query.code else []),
        name_part=query.name,
        limit=_PAGE_SIZE + 1,
        after=query.after,
        until=until,
    )
    job, found = await visit.api.database.read(
        "page of elements", transactions.element_page, job_id, visit.caller.scope, wanted
    )
    shown = found[:_PAGE_SIZE]
    following = None
    if len(found) > _PAGE_SIZE:
        following = shown[-1].id
    elif until < job.counters.elements - 1:
        following = until
    context: dict[str, Any] = {
        "job_id": job_id,
        "rows": await element_rows(visit, job, shown),
        "query": query,
        "statuses": [status.name for status in JobStatus if status is not JobStatus.NEW],
        "codes": list(FailureCode),
        "total": job.counters.elements,
        "following": None if following is None else query.url(job_id, after=following),
        "first": None if query.after is None else query.url(job_id, after=None),
        "searched": until if following == until else None,
    }
    return Page(template="elements.html", context=context)


@page("GET", "/web/jobs/<number:job_id>/elements/<number:element_id>/log", query=AttemptQuery)
async def show_log(visit: Visit, job_id: int, element_id: int, query: AttemptQuery) -> Page:
    """The end of the log of an attempt; ``live.js`` follows it while the attempt runs."""
    element, ended = await visit.api.database.read(
        "attempts of an element", transactions.ended_attempts, job_id, element_id, visit.caller.scope
    )
    number = query.attempt or max(element.attempts, 1)
    known = await _attempt(visit, job_id, element_id, number)
    tail, silent = None, None
    try:
        tail = None if known.status is None else await _tail(visit, known)
    except LogElsewhereError as error:
        silent = str(error)
    process: ProcessView | UnsetType = UNSET
    if known.status is not None and silent is None:
        process = await _process(visit, known)
    statuses = {each.attempt: each.status for each in ended}
    failures = {each.attempt: each.failure for each in ended if each.failure is not None}
    failure = failures.get(number)
    context: dict[str, Any] = {
        "job_id": job_id,
        "element": element,
        "number": number,
        "status": known.status,
        "worker": known.worker,
        "process": process or None,
        "attempts": [
            (each, statuses.get(each, JobStatus.RUNNING))
            for each in range(element.attempts, max(element.attempts - 20, 0), -1)
        ],
        "failure": None if failure is None else failure_view(failure, known.job.type),
        "tail": tail,
        "silent": silent,
    }
    if known.status is None and query.attempt is not None:
        raise OutputNotReadyError(f"element {element_id} has no attempt {number}: {element.attempts} were begun")
    return Page(template="log.html", context=context)


async def _attempt(visit: Visit, job_id: int, element_id: int, number: int) -> KnownAttempt:
    return await visit.api.database.read(
        "an attempt", transactions.fetch_attempt, job_id, element_id, visit.caller.scope, number
    )


async def _tail(visit: Visit, known: KnownAttempt) -> LogTail | None:
    ref = LogRef(known.job.log_uid, known.element.id, known.attempt)
    try:
        return await visit.api.logs.read_tail(ref, _TAIL_BYTES, known.worker, known.log)
    except LogMissingError:
        return None


async def _process(visit: Visit, known: KnownAttempt) -> ProcessView | UnsetType:
    ref = LogRef(known.job.log_uid, known.element.id, known.attempt)
    try:
        first = await visit.api.logs.read_piece(ref, 0, _FIRST_BYTES, known.worker, known.log)
    except (LogMissingError, LogElsewhereError):
        return UNSET
    return process_view(first.text, known.failure)


@page("GET", "/web/jobs/<number:job_id>/elements/<number:element_id>/log/download", query=AttemptQuery)
async def download_log(visit: Visit, job_id: int, element_id: int, query: AttemptQuery) -> Download:
    """The log of an attempt up to what is written."""
    known = await _attempt(visit, job_id, element_id, query.attempt or -1)
    if known.status is None:
        raise OutputNotReadyError(f"element {element_id} has no such attempt: {known.element.attempts} were begun")
    name = f"job-{job_id}-element-{element_id}-attempt-{known.attempt}.log"
    return Download(pieces=_log_pieces(visit, known), name=name, media_type="text/plain; charset=utf-8")


async def _log_pieces(visit: Visit, known: KnownAttempt) -> AsyncGenerator[bytes]:
    ref, offset = LogRef(known.job.log_uid, known.element.id, known.attempt), 0
    while True:
        try:
            piece = await visit.api.logs.read_piece(ref, offset, _PIECE_BYTES, known.worker, known.log)
        except LogMissingError as error:
            raise OutputNotReadyError("the log of this attempt is not on disk") from error
        except LogElsewhereError as error:
            raise OutputNotReadyError(f"the log of this attempt is {error}: try again later") from error
        yield (piece.text or "").encode()
        if piece.is_last or piece.end == offset:
            return
        offset = piece.end

"""What attempts said: their logs, and what was listed.

There is an output as soon as an attempt has ended; while one runs, the one before it is the latest available. Who asks
for it expressly (``live``) reads the log of a running attempt too, piece by piece.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
from msgspec import UNSET

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.jobs import ElementRecord
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import JsonStream, endpoint, json_array
from pdm.workqueue.http.listings import has_listing, with_listing
from pdm.workqueue.http.problems import (
    AttemptLogMissingError,
    ElementNotFoundError,
    InvalidInputError,
    JobNotFoundError,
    OutputNotReadyError,
)
from pdm.workqueue.http.transactions import EndedAttempt, OutputPage
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.store import LogMissingError as LogFileMissingError
from pdm.workqueue.logstore.store import LogPiece
from pdm.workqueue.wire.requests import OutputQuery
from pdm.workqueue.wire.responses import OutputView

#: Of a job's output, so that a log that is missing is told by the status wherever the answer is not very long.
_BUFFERED_BYTES = 1024**2
#: Bytes of a log in one live answer at most.
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
    """One object for each element that has had an attempt.

    A log that is gone from disk is status 500; in a long answer, of which a part has been sent by then, its ``log`` is
    null.
    """
    first = await api.database.read("page of outputs", transactions.latest_attempts, job_id, caller.scope, None)
    sent = _ByteCounter()
    return JsonStream(sent.count(json_array(_outputs(api, caller, job_id, first, sent))), _BUFFERED_BYTES)


class _ByteCounter:
    """How many bytes of an answer have been handed over."""

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
                log: str | None = await _read_log(api, ended)
            except AttemptLogMissingError:
                # Before the first byte is out this still can become the status that the reference asks for.
                if sent.size < _BUFFERED_BYTES:
                    raise
                log = None
            yield _output(api, ended, log)
        if page.after is None:
            return
        page = await api.database.read(
            "page of outputs", transactions.latest_attempts, job_id, caller.scope, page.after
        )


async def _read_log(api: ApiContext, ended: EndedAttempt) -> str:
    try:
        return await api.logstore.read(LogRef(ended.job.log_uid, ended.element.id, ended.attempt))
    except LogFileMissingError as error:
        if ended.failure is not None and ended.failure.code is FailureCode.CRASHED:
            # A daemon that is killed has written no log of what it was about to begin, or has it on another machine.
            return f"there is no log: {ended.failure.message}\n"
        raise AttemptLogMissingError(
            f"the log of job {ended.job.id}, element {ended.element.id}, attempt {ended.attempt} is gone from disk: "
            "old logs are tidied away"
        ) from error


def _output(api: ApiContext, ended: EndedAttempt, log: str | None) -> bytes | AsyncGenerator[bytes]:
    element = ended.element
    listed = ended.is_latest and has_listing(element)
    view = OutputView(
        jobid=element.job_id,
        elementid=element.id,
        attempt=ended.attempt,
        type=element.type.name,
        status=ended.status.name,
        log=log,
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
    """Of the latest attempt that has ended; with ``live``, the log of the latest one even while it runs."""
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
    """Attempts count from 1; -1 is the latest that has ended, -2 the one before it.

    With ``live`` also the log of a running attempt, as far as it is written: call again with the ``offset`` of the
    answer for what follows, until ``end`` is true. Negative numbers then count from the latest, running or not.
    """
    return await _requested_output(api, caller, job_id, element_id, attempt, query)


async def _requested_output(
    api: ApiContext, caller: Caller, job_id: int, element_id: int, number: int, query: OutputQuery
) -> OutputView | JsonStream:
    if query.live:
        return await _live_output(api, caller, job_id, element_id, number, query.offset or 0)
    if query.offset is not None:
        raise InvalidInputError("an offset goes with live=1", "?offset")
    return await _chosen_output(api, caller, job_id, element_id, number)


async def _live_output(
    api: ApiContext, caller: Caller, job_id: int, element_id: int, number: int, offset: int
) -> OutputView:
    job, element, attempt, status = await api.database.read(
        "an attempt", transactions.fetch_attempt, job_id, element_id, caller.scope, number
    )
    if status is None:
        place = f"element {element.id} of job {job.id}"
        raise OutputNotReadyError(f"{place} has no attempt {number}: {element.attempts} were begun")
    # The database was asked first: of an attempt that had ended by then, the log is complete.
    ended = status is not JobStatus.RUNNING
    try:
        piece = await api.logstore.read_piece(LogRef(job.log_uid, element.id, attempt), offset, _LIVE_BYTES)
    except LogFileMissingError:
        # One that is claimed and waits for its turn in a batch has written nothing yet.
        piece = LogPiece(None if ended else "", offset, is_last=True)
    return OutputView(
        jobid=job.id,
        elementid=element.id,
        attempt=attempt,
        type=element.type.name,
        status=status.name,
        log=piece.text,
        offset=piece.end,
        end=ended and piece.is_last,
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
    return f"{place} has no output of an attempt {number}: there is one of {ended}"

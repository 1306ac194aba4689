"""Endpoints of what became of a job: its receipt, and its failures in groups."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from pdm.workqueue.domain.failures import MEANINGS, FailureCode, Remedy, hint_for
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import JsonStream, endpoint
from pdm.workqueue.http.problems import InvalidInputError, JobNotFoundError, JobPurgedError, NotAcceptableError
from pdm.workqueue.http.receipts import kept_receipt_pieces, receipt_pieces
from pdm.workqueue.store.outcomes import FailureGroup
from pdm.workqueue.wire.receipts import CSV, NDJSON, ErrorGroupView


def failure_codes(values: Sequence[str]) -> frozenset[FailureCode]:
    """Parse the values of the query parameter ``code``.

    Raises:
        InvalidInputError: a value is no code.
    """
    try:
        return frozenset(FailureCode(value.strip().upper()) for value in values)
    except ValueError as error:
        raise InvalidInputError(f"not a failure code; known are {', '.join(FailureCode)}", "?code") from error


@endpoint(
    "GET",
    "/jobs/{job_id}/receipt",
    summary="The receipt of a job",
    result=str,
    errors=(JobNotFoundError, NotAcceptableError),
    media_types=(NDJSON, CSV),
)
async def get_receipt(api: ApiContext, caller: Caller, job_id: int, media_type: str) -> JsonStream:
    """What the job did to every file, with proof.

    As lines of JSON, the last of which is signed by the service, or as CSV, which is not signed. While the job runs,
    each element is given out as it is when it is read. A job that was purged may have a stored receipt.
    """
    try:
        first = await api.database.read("page of a receipt", transactions.receipt_page, job_id, caller.scope, None)
    except JobPurgedError as error:
        if not error.job.receipt_pieces:
            raise
        return JsonStream(kept_receipt_pieces(api.database, error.job, media_type), media_type=media_type)
    return JsonStream(receipt_pieces(api, first, media_type), media_type=media_type)


@endpoint(
    "GET",
    "/jobs/{job_id}/errors",
    summary="The failures of a job by code and scope",
    result=list[ErrorGroupView],
    errors=(JobNotFoundError,),
)
async def list_errors(api: ApiContext, caller: Caller, job_id: int) -> list[ErrorGroupView]:
    """Elements that failed or are held, the most frequent code first, each with the first element as an example.

    The elements of one code: ``GET /jobs/N/elements?status=FAILED&code=CODE``.
    """
    job, groups = await api.database.read("failures of a job", transactions.failure_groups, job_id, caller.scope)
    return [_group_view(job, group) for group in groups]


def _group_view(job: JobRecord, group: FailureGroup) -> ErrorGroupView:
    return ErrorGroupView(
        code=group.code.value,
        scope=group.scope.value,
        count=group.count,
        held=group.held,
        retryable=MEANINGS[group.code].remedy is not Remedy.GIVE_UP,
        hint=hint_for(group.code, job.type),
        element=group.element,
        src_filepath=group.src_filepath,
        dst_filepath=UNSET if group.dst_filepath is None else group.dst_filepath,
        message=group.message,
    )

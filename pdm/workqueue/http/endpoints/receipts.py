"""Endpoints of why a job does not move, and of what became of it: reasons, receipt, failures in groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import UNSET

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import MEANINGS, FailureCode, Remedy, hint_for
from pdm.workqueue.domain.formatting import display_duration
from pdm.workqueue.domain.holds import WaitKind
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Caller, Role
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import JsonStream, endpoint
from pdm.workqueue.http.problems import (
    ElementNotFoundError,
    InvalidInputError,
    JobNotFoundError,
    JobPurgedError,
    NotAcceptableError,
)
from pdm.workqueue.http.receipts import kept_receipt_pieces, receipt_pieces
from pdm.workqueue.http.views import element_hold_view
from pdm.workqueue.http.waiting import limit_sentences, queue_sentences, with_progress
from pdm.workqueue.store import nodes, queue, wait_visits
from pdm.workqueue.store.nodes import NodeRecord
from pdm.workqueue.store.outcomes import FailureGroup
from pdm.workqueue.store.queue import RunningClaims
from pdm.workqueue.wire.activity import ReasonView, WhyQuery, WhyView
from pdm.workqueue.wire.receipts import CSV, NDJSON, ErrorGroupView


@endpoint(
    "GET",
    "/jobs/{job_id}/why",
    summary="Why a job or an element does not move",
    query=WhyQuery,
    result=WhyView,
    errors=(InvalidInputError, JobNotFoundError, ElementNotFoundError),
)
async def get_why(api: ApiContext, caller: Caller, job_id: int, query: WhyQuery) -> WhyView:
    """All reasons that are known; operators see nodes, too.

    Codes: ``ENDED``, ``CANCELLING``, ``RUNNING``, ``SERVICE`` (this node starts nothing), ``NODES`` (no node starts
    anything), ``HELD``, ``LIMIT`` (why no more of it runs at once), ``WAITS`` (sites, other jobs, a ban, the next try)
    and ``QUEUE``.
    """
    job = await api.job(job_id, caller.scope)
    element = None
    if query.element is not None:
        job, element = await api.database.read(
            "fetch an element", transactions.fetch_element, job_id, query.element, caller.scope
        )
    status = job.status if element is None else element.status
    claims = await api.database.read("find running claims", queue.running_claims, job_id, query.element)
    is_operator = caller.role is Role.OPERATOR
    found = [*_end_reasons(job, element), *_claim_reasons(api, claims, names=is_operator)]
    if not status.is_final:
        found += await _service_reasons(api, names=is_operator)
        found += await (_job_reasons(api, job) if element is None else _element_reasons(api, job, element))
    return WhyView(job=job_id, element=query.element, status=status.name, reasons=found)


def _end_reasons(job: JobRecord, element: ElementRecord | None) -> Iterator[ReasonView]:
    if element is not None and element.failure is not None and element.status is JobStatus.FAILED:
        code = element.failure.code
        text = f"it has failed: {code}: {' '.join(element.failure.message.split())}"
        yield ReasonView(code="ENDED", reason=text, hint=hint_for(code, job.type))
    elif (job.status if element is None else element.status).is_final:
        status = job.status if element is None else element.status
        failed = f", {job.counters.failed} elements have failed" if element is None and job.counters.failed else ""
        yield ReasonView(code="ENDED", reason=f"it has ended: {status.name}{failed}")
    elif job.cancel_requested:
        yield ReasonView(
            code="CANCELLING",
            reason=f"it is being cancelled; {job.counters.running} elements still run",
            hint="They end within seconds, or with the lease of their node.",
        )


def _claim_reasons(api: ApiContext, claims: Sequence[RunningClaims], *, names: bool) -> Iterator[ReasonView]:
    for claim in claims:
        where = f" on node {claim.node}" if names else ""
        seconds = 0.0 if claim.claimed_at is None else (api.clock() - claim.claimed_at).total_seconds()
        since = f", the oldest was claimed {display_duration(max(seconds, 0))} ago"
        elements = "1 element runs" if claim.count == 1 else f"{claim.count} elements run"
        if claim.is_live:
            yield ReasonView(code="RUNNING", reason=f"{elements}{where}{since}")
        else:
            yield ReasonView(
                code="RUNNING",
                reason=f"{elements}{where}, whose lease has ended{since}",
                hint="A node takes them over within seconds; if none does, start one.",
            )


async def _service_reasons(api: ApiContext, *, names: bool) -> list[ReasonView]:
    found = []
    if not api.may_claim():
        parts = ", ".join(fault.part.value for fault in api.faults())
        found.append(
            ReasonView(
                code="SERVICE",
                reason=f"this node starts nothing because of its own fault: {parts}",
                hint="See its log, and 'pdm admin check'.",
            )
        )
    live = await api.database.read("find live nodes", nodes.live_nodes)
    stopped = [words for node in live if (words := _stopped(node)) is not None]
    if len(stopped) == len(live):
        which = f" ({'; '.join(stopped)})" if names and stopped else ""
        found.append(ReasonView(code="NODES", reason=f"no node starts anything{which}", hint="Start or resume a node."))
    return found


def _stopped(node: NodeRecord) -> str | None:
    if node.sick is not None:
        return f"{node.name} is sick: {node.sick}"
    return None if node.drain is None else f"{node.name} is drained: {node.drain}"


async def _job_reasons(api: ApiContext, job: JobRecord) -> list[ReasonView]:
    found = []
    if job.hold is not None:
        running = f"; {job.counters.running} elements still run" if job.counters.running else ""
        found.append(ReasonView(code="HELD", reason=f"{job.hold.sentence}{running}", hint=job.hold.hint))
    if job.counters.held:
        first = await api.database.read("why elements are held", transactions.first_held_element, job.id)
        hold = element_hold_view(job, first)
        if hold is not None:
            found.append(
                ReasonView(
                    code="HELD", reason=f"{hold.count} elements are held: {hold.code}: {hold.reason}", hint=hold.hint
                )
            )
        found += await _tape_reasons(api, job)
    limits = [] if job.hold is not None else limit_sentences(api, job)
    found += [ReasonView(code="LIMIT", reason=sentence) for sentence in limits]
    job, _, waits = await with_progress(api, job)
    found += [ReasonView(code="WAITS", reason=sentence) for sentence in waits]
    if job.counters.submitted and not job.cancel_requested and job.hold is None:
        due, place = await queue_sentences(api, job, api.clock())
        found += [ReasonView(code="WAITS", reason=sentence) for sentence in due]
        found += [ReasonView(code="QUEUE", reason=sentence) for sentence in place if sentence not in limits]
    return found


async def _tape_reasons(api: ApiContext, job: JobRecord) -> list[ReasonView]:
    """What the tape systems have said last, and when they are asked again."""
    if not (job.stages or job.archives):
        return []
    found = []
    for one in await api.database.read("why a job waits for tape", wait_visits.summaries, job.id):
        what = "staging from tape" if one.kind is WaitKind.STAGE else "archiving on tape"
        requests = f"{one.requests} requests are accepted, " if one.requests else ""
        text = f"{what}: {requests}the site is asked again at {one.next_due:%Y-%m-%dT%H:%M:%SZ}"
        if one.message is not None:
            text += f"; it gave no answer: {' '.join(one.message.split())[:300]}"
        found.append(ReasonView(code="WAITS", reason=text))
    return found


async def _element_reasons(api: ApiContext, job: JobRecord, element: ElementRecord) -> list[ReasonView]:
    if element.status is JobStatus.RUNNING:
        return []
    if element.status is JobStatus.HELD and element.failure is not None:
        code = element.failure.code
        text = f"it is held: {code}: {' '.join(element.failure.message.split())}"
        return [ReasonView(code="HELD", reason=text, hint=hint_for(code, job.type))]
    found = []
    if element.not_before is not None and element.not_before > api.clock():
        failure = element.failure
        because = "" if failure is None else f", after {failure.code}: {' '.join(failure.message.split())[:300]}"
        when = f"{element.not_before:%Y-%m-%dT%H:%M:%SZ} (try {element.next_try} of {element.max_tries})"
        found.append(ReasonView(code="WAITS", reason=f"it is tried again at {when}{because}"))
    if job.counters.running:
        found.append(ReasonView(code="QUEUE", reason=f"{job.counters.running} other elements of its job run"))
    return [*found, *await _job_reasons(api, job)]


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

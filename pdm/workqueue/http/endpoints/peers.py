"""Endpoints for the other nodes of the service: what this node alone knows of what it runs. They ask no other node."""

from __future__ import annotations

from pdm.workqueue.domain.jobs import LogSpan
from pdm.workqueue.execution.cluster import history_view, motion_view
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import Allow, endpoint
from pdm.workqueue.http.problems import InvalidInputError, NotFoundError
from pdm.workqueue.http.views import route_view
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.reader import LogMissingError
from pdm.workqueue.wire.peers import (
    MOST_JOBS,
    ElementMotionView,
    ElementsQuery,
    HistoryView,
    LogPartView,
    LogQuery,
    NodeProgressView,
)
from pdm.workqueue.wire.sites import RouteView

#: Of an answer; each has some hundred bytes.
_MOST_ROUTES = 500


@endpoint(
    "GET", "/peers/progress", summary="What this node moves of each job", result=NodeProgressView, allow=Allow.NODES
)
async def get_peer_progress(api: ApiContext) -> NodeProgressView:
    """For other nodes: jobs that run here, and those that ran here in the last minute."""
    return NodeProgressView(
        incarnation=api.cluster.peers.incarnation,
        jobs=[motion_view(motion) for motion in api.progress.motions(MOST_JOBS)],
    )


@endpoint("GET", "/peers/routes", summary="Routes of this node", result=list[RouteView], allow=Allow.NODES)
async def get_peer_routes(api: ApiContext) -> list[RouteView]:
    """For other nodes: the most used first, as many as an answer has."""
    states = sorted(api.routes(), key=lambda state: -state.running)[:_MOST_ROUTES]
    return [route_view(state, None) for state in states]


@endpoint(
    "GET",
    "/peers/jobs/{job_id}/elements",
    summary="Progress of elements that this node runs",
    query=ElementsQuery,
    result=list[ElementMotionView],
    allow=Allow.NODES,
    errors=(InvalidInputError, NotFoundError),
)
async def get_peer_elements(api: ApiContext, job_id: int, query: ElementsQuery) -> list[ElementMotionView]:
    """For other nodes; those that do not run here are left out."""
    found = [(element, api.progress.of_element(job_id, element)) for element in query.element]
    return [
        ElementMotionView(
            element=element,
            transferred=progress.transferred,
            instant=progress.instant,
            average=progress.average,
            elapsed=progress.elapsed,
        )
        for element, progress in found
        if progress is not None
    ]


@endpoint(
    "GET",
    "/peers/jobs/{job_id}/history",
    summary="What this node has moved of a job over time",
    result=list[HistoryView],
    allow=Allow.NODES,
    errors=(NotFoundError,),
)
async def get_peer_history(api: ApiContext, job_id: int) -> list[HistoryView]:
    """For other nodes: one history, or none if nothing of the job has run here lately."""
    history = api.progress.history_of(job_id)
    return [] if history is None else [history_view(history)]


@endpoint(
    "GET",
    "/peers/logs/{log_uid}/{element_id}/{attempt}",
    summary="A part of a log that this node has",
    query=LogQuery,
    result=LogPartView,
    allow=Allow.NODES,
    errors=(InvalidInputError, NotFoundError),
)
async def get_peer_log(api: ApiContext, log_uid: str, element_id: int, attempt: int, query: LogQuery) -> LogPartView:
    """For other nodes, which check who may read it."""
    try:
        ref = LogRef(log_uid, element_id, attempt)
    except ValueError:
        raise InvalidInputError("expected the log_uid of a job, and an attempt from 1 on") from None
    if (query.begin is None) != (query.length is None):
        raise InvalidInputError("begin and length belong together", "?begin")
    span = None if query.begin is None or query.length is None else LogSpan(query.begin, query.length)
    own = api.logs.store
    try:
        if query.part == "tail":
            tail = await own.read_tail(ref, query.most, span=span)
            return LogPartView(found=True, text=tail.text, end=tail.end, is_cut=tail.is_cut)
        if query.part == "piece":
            piece = await own.read_piece(ref, query.offset or 0, query.most, span=span)
            return LogPartView(found=True, text=piece.text, end=piece.end, is_last=piece.is_last)
        return LogPartView(found=True, text=await own.read(ref, span=span))
    except LogMissingError:
        return LogPartView(found=False)

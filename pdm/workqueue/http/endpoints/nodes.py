"""Endpoints of the nodes of the service: who works on the queue, draining one, and what nodes ask each other."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pdm.workqueue.domain.jobs import LogSpan
from pdm.workqueue.domain.lifecycle import deadline_from_text
from pdm.workqueue.execution.cluster import history_view, motion_view
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import Allow, endpoint
from pdm.workqueue.http.endpoints.sites import actor, checked_message, log_audit, require_operator
from pdm.workqueue.http.problems import ConflictError, InvalidInputError, NotFoundError
from pdm.workqueue.http.views import route_view, whole_seconds
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.reader import LogMissingError
from pdm.workqueue.store import node_work
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.store.nodes import NodeRecord
from pdm.workqueue.wire.activity import DrainRequest, NodeView
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


@endpoint("GET", "/nodes", summary="Nodes: the daemons that work on the queue", result=list[NodeView])
async def list_nodes(api: ApiContext, caller: Caller) -> list[NodeView]:
    """For operators; those that work first, then those that are away, by name."""
    require_operator(caller)
    return [_node_view(node) for node in await api.database.read("list nodes", node_work.node_states, api.clock())]


@endpoint(
    "POST",
    "/nodes/{node}/drain",
    summary="Drain a node: it starts nothing more",
    body=DrainRequest,
    result=NodeView,
    errors=(InvalidInputError, NotFoundError, ConflictError),
)
async def drain_node(
    api: ApiContext, caller: Caller, node: str, body: DrainRequest, key: IdempotencyKey | None
) -> NodeView:
    """For operators. What runs finishes; at the deadline, if there is one, the rest goes back to the queue.

    The drain lasts until the node is resumed, also when it is restarted. Its API stays open.
    """
    require_operator(caller)
    until = None
    if body.deadline is not None:
        try:
            until = deadline_from_text(body.deadline, api.clock())
        except ValueError as error:
            raise InvalidInputError(str(error), "$.deadline") from error
    return await _change(api, caller, node, checked_message(body.message), until)


@endpoint(
    "POST",
    "/nodes/{node}/resume",
    summary="End the drain of a node",
    result=NodeView,
    errors=(NotFoundError, ConflictError),
)
async def resume_node(api: ApiContext, caller: Caller, node: str, key: IdempotencyKey | None) -> NodeView:
    """For operators. It is no error if the node is not drained."""
    require_operator(caller)
    return await _change(api, caller, node, None, None)


async def _change(api: ApiContext, caller: Caller, name: str, message: str | None, until: datetime | None) -> NodeView:
    found = await api.database.read("find a node", node_work.nodes_named, name, api.clock())
    if not found:
        raise NotFoundError(f"there is no node {name[:100]!r}; GET /nodes lists all")
    if len(found) > 1:
        workers = ", ".join(each.worker for each in found[:5])
        raise ConflictError(f"{len(found)} nodes have the name {name}: name one by its worker ({workers})")
    chosen = found[0]

    def then(changed: Any) -> None:
        if changed:
            target = f"node {chosen.name} ({chosen.worker})"
            log_audit(api, caller, "node.resume" if message is None else "node.drain", target, message or "")
        api.drain_changed()

    await api.commit(
        "drain a node", node_work.change_drain, chosen, message, until, actor(caller), api.clock(), then=then
    )
    states = await api.database.read("list nodes", node_work.node_states, api.clock())
    return next(_node_view(each) for each in states if each.id == chosen.id)


def _node_view(node: NodeRecord) -> NodeView:
    return NodeView(
        name=node.name,
        worker=node.worker,
        host=node.host,
        address=node.address,
        version=node.version,
        since=whole_seconds(node.started_at),
        seen=whole_seconds(node.seen_at),
        alive=node.alive,
        lease_until=whole_seconds(node.lease_until),
        running=node.running,
        drain=node.drain,
        drain_until=whole_seconds(node.drain_until),
        sick=node.sick,
    )


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

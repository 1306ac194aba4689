"""Endpoints of the nodes of the service: who works on the queue, and draining one."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pdm.workqueue.domain.lifecycle import deadline_from_text
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.endpoints.sites import actor, checked_message, log_audit, require_operator
from pdm.workqueue.http.problems import ConflictError, InvalidInputError, NotFoundError
from pdm.workqueue.http.views import whole_seconds
from pdm.workqueue.store import node_work
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.store.nodes import NodeRecord
from pdm.workqueue.wire.activity import DrainRequest, NodeView


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

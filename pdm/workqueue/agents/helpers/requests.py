"""Which function carries out which request, for every helper that works on a storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pdm.workqueue.agents.helpers import copying, listing, operations
from pdm.workqueue.agents.helpers.channel import Batch
from pdm.workqueue.agents.helpers.lanes import Lanes

_OPERATIONS: Mapping[str, Callable[[Batch, Lanes, int], None]] = {
    "copy": copying.copy,
    "remove": operations.remove,
    "rename": operations.rename,
    "mkdir": operations.make,
    "discard": operations.discard,
}


def carry_out(batch: Batch, lanes: Lanes, list_lanes: int, items_a_lane: int) -> None:
    """Carry out a request.

    Args:
        batch: the request.
        lanes: where the work is done.
        list_lanes: how many of them a listing may use.
        items_a_lane: from so many items on, one more lane.
    """
    operation = batch.request["op"]
    if operation == "list":
        listing.list_tree(batch, lanes, list_lanes)
    else:
        _OPERATIONS[operation](batch, lanes, 1 + len(batch.request["items"]) // items_a_lane)

"""Which function carries out which request, for every helper that works on a storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pdm.workqueue.agents.helpers import copying, operations
from pdm.workqueue.agents.helpers.channel import Batch
from pdm.workqueue.agents.helpers.lanes import Lanes

_OPERATIONS: Mapping[str, Callable[[Batch, Sequence[dict[str, Any]], Lanes, int], None]] = {
    "copy": copying.copy,
    "remove": operations.remove,
    "rename": operations.rename,
    "mkdir": operations.make,
    "discard": operations.discard,
}


def carry_out_items(batch: Batch, items: Sequence[dict[str, Any]], lanes: Lanes, items_a_lane: int) -> None:
    """Carry out a request that has items.

    Args:
        batch: of the request.
        items: those that have no outcome so far.
        lanes: where the work is done.
        items_a_lane: from so many items on, one more lane.
    """
    _OPERATIONS[batch.request["op"]](batch, items, lanes, 1 + len(items) // items_a_lane)

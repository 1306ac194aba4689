"""Removes and makes many things at once over one control channel: the fast way, for all that goes well."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

from pdm.workqueue.agents.helpers.channel import Batch
from pdm.workqueue.agents.helpers.connections import Connections, can_be_said, path_of, place_of
from pdm.workqueue.agents.helpers.control_channel import ChannelError, ControlChannel, Reply, SilentServerError
from pdm.workqueue.agents.helpers.operations import check_listed, must_look
from pdm.workqueue.agents.helpers.pipeline import BrokenError, SilenceError, Waker, carry_on
from pdm.workqueue.agents.helpers.replies import thing_in
from pdm.workqueue.agents.helpers.storage import StoppedError, StorageError

#: Commands that may be under way at once.
_MOST_UNDER_WAY = 256


def carry_out(
    batch: Batch, items: Iterable[dict[str, Any]], connections: Connections, waker: Waker
) -> list[dict[str, Any]]:
    """Carry out as much of a ``remove`` or ``mkdir`` request as goes well.

    Args:
        batch: of the request.
        items: of the request that have no outcome so far.
        connections: to the servers.
        waker: is woken when the batch is stopped.

    Returns:
        The items that are left for the careful way; those of which it is not known whether they are done have ``again``
        set.
    """
    left: list[dict[str, Any]] = []
    places: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        if can_be_said(path_of(item["url"])):
            places.setdefault(place_of(item["url"]), []).append(item)
        else:
            left.append(item)
    for place, some in places.items():
        left += _Run(batch, some).on(connections, place, waker)
    return left


class _Run:
    def __init__(self, batch: Batch, items: Iterable[dict[str, Any]]) -> None:
        self._batch = batch
        self._removes = batch.request["op"] == "remove"
        self._waiting = collections.deque(items)
        self._under_way: collections.deque[dict[str, Any]] = collections.deque()
        #: By key: those that are looked at before they are removed.
        self._looked_at: dict[int, dict[str, Any]] = {}
        self._left: list[dict[str, Any]] = []

    def on(self, connections: Connections, place: str, waker: Waker) -> list[dict[str, Any]]:
        stall_s = float(self._batch.request["limits"].get("stall_s", 120.0))
        try:
            channel = connections.single(place)
        except SilentServerError as error:
            for item in self._waiting:
                self._batch.failed(item["key"], error.trouble("source"))
            return []
        except ChannelError:
            return list(self._waiting)
        try:
            carry_on((channel,), waker, lambda: self._batch.stopped, lambda: self._refill(channel), lambda: stall_s)
        except (ChannelError, BrokenError, SilenceError, StoppedError):
            connections.drop(channel)
            for item in self._under_way:
                item["again"] = True
        return [*self._left, *self._looked_at.values(), *self._under_way, *self._waiting]

    def _refill(self, channel: ControlChannel) -> None:
        while self._waiting and len(self._under_way) + len(self._looked_at) < _MOST_UNDER_WAY:
            item = self._waiting.popleft()
            if not self._batch.started(item["key"]):
                continue
            if self._removes and must_look(item):
                self._look(channel, item)
            else:
                self._carry_out(channel, item)

    def _look(self, channel: ControlChannel, item: dict[str, Any]) -> None:
        self._looked_at[item["key"]] = item

        def looked(reply: Reply) -> None:
            del self._looked_at[item["key"]]
            there = thing_in(reply)
            try:
                if there is None:
                    raise StorageError(reply.text)
                check_listed(item, there)
            except StorageError:
                # The careful way finds out, and says, what is wrong.
                self._left.append(item)
            else:
                self._carry_out(channel, item)

        channel.send(b"MLST " + path_of(item["url"]), looked)

    def _carry_out(self, channel: ControlChannel, item: dict[str, Any]) -> None:
        self._under_way.append(item)
        channel.send(self._command(item) + path_of(item["url"]), self._answered)

    def _command(self, item: dict[str, Any]) -> bytes:
        if not self._removes:
            return b"MKD "
        return b"RMD " if item.get("directory", False) else b"DELE "

    def _answered(self, reply: Reply) -> None:
        item = self._under_way.popleft()
        if reply.good:
            self._batch.done(item["key"])
        else:
            self._left.append(item)

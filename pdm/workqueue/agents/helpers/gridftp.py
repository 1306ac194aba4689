"""The GridFTP helper: third-party transfers, checksums and listings over control channels that are kept.

Its environment tells the credential (``X509_USER_PROXY``) and the trusted authorities (``X509_CERT_DIR``).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Started by its path: the folder of the helpers must not be on the path, the project must.
    sys.path[0] = str(Path(__file__).resolve().parents[4])

from pdm.workqueue.agents.helpers import (
    copying,
    listing,
    pipelined_copy,
    pipelined_operations,
    pipelined_tree,
    requests,
)
from pdm.workqueue.agents.helpers.channel import Batch, serve
from pdm.workqueue.agents.helpers.connections import Connections
from pdm.workqueue.agents.helpers.control_channel import LOGIN_S
from pdm.workqueue.agents.helpers.gsi import LIBRARY, PACKAGE, Gsi, GsiError
from pdm.workqueue.agents.helpers.lanes import Lanes
from pdm.workqueue.agents.helpers.pipeline import Waker
from pdm.workqueue.agents.helpers.storage import StorageError
from pdm.workqueue.helpers.gridftp.storage import GridFtpStorage

_MOST_LANES = 4
#: From so many items on, one more lane: a login costs as much as a hundred small files.
_ITEMS_A_LANE = 100


class _Agent:
    """Carries out batches: the fast way what goes well, the careful way the rest."""

    def __init__(self, gsi: Gsi) -> None:
        self._gsi = gsi
        self._connections = Connections(gsi)
        self._waker = Waker()
        self._lanes = Lanes(self._opened, _MOST_LANES)
        self._is_shared = False

    def _opened(self) -> GridFtpStorage:
        if self._is_shared:
            return GridFtpStorage(Connections(self._gsi))
        # The first lane works on the thread of the batch, once the fast way is done: it has the same channels.
        self._is_shared = True
        return GridFtpStorage(self._connections)

    def carry_out(self, batch: Batch) -> None:
        batch.on_stop(self._wake)
        limits = batch.request["limits"]
        self._connections.login_s = min(LOGIN_S, *(float(limits.get(name, LOGIN_S)) for name in ("stall_s", "total_s")))
        if batch.request["op"] != "list":
            batch.ends_items(lambda keys: self._waker.wake())
        if batch.request["op"] == "list":
            listing.carry_out(batch, lambda: self._list(batch))
            return
        items = batch.request["items"]
        if batch.request["op"] in ("copy", "discard"):
            _add_ways(items)
        items = self._fast(batch, items)
        if batch.request["op"] == "copy":
            for item in items:
                item["temporary"] = copying.temporary_of(item["temporary"], pipelined_copy.WAYS - 1)
        if items:
            requests.carry_out_items(batch, items, self._lanes, _ITEMS_A_LANE)

    def _wake(self) -> None:
        self._connections.interrupt()
        self._waker.wake()

    def _fast(self, batch: Batch, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Carry out what can be done the fast way; returns the items that are left."""
        try:
            if batch.request["op"] == "copy":
                return pipelined_copy.copy(batch, items, self._connections, self._waker)
            # Whether a directory was there before is to be seen first, unless that makes no difference.
            if batch.request["op"] == "remove" or (batch.request["op"] == "mkdir" and batch.request["parents"]):
                return pipelined_operations.carry_out(batch, items, self._connections, self._waker)
        except Exception:
            # One item may be to blame, and which is not known here: the careful way fails each by itself.
            traceback.print_exc()
            self._connections.drop_all()
            opened = set(batch.open_keys())
            items = [item for item in items if item["key"] in opened]
            for item in items:
                if batch.request["op"] == "copy":
                    ways = range(pipelined_copy.WAYS - 1)
                    item["stale"] += [copying.temporary_of(item["temporary"], way) for way in ways]
                else:
                    item["again"] = True
        return items

    def _list(self, batch: Batch) -> None:
        left = pipelined_tree.list_tree(batch, self._connections, self._waker)
        if left is None or left:
            listing.list_tree(batch, self._lanes, _MOST_LANES, left)


def _add_ways(items: Sequence[dict[str, Any]]) -> None:
    """Let what earlier attempts may have left be removed under each name that they may have used."""
    ways = range(pipelined_copy.WAYS)
    for item in items:
        known = item["stale"] if "stale" in item else [item["url"]]
        item["stale"] = [copying.temporary_of(name, way) for name in known for way in ways]


def _agent_or_reason() -> _Agent | StorageError:
    try:
        return _Agent(Gsi())
    except (OSError, GsiError) as error:
        why = f"the Globus security library cannot be used ({error}): install the package {PACKAGE}"
        return StorageError(why, code="DEPENDENCY_MISSING", scope="service")


def main() -> None:
    """Serve until the requests end."""
    agent = _agent_or_reason()

    def carry_out(batch: Batch) -> None:
        nonlocal agent
        if isinstance(agent, StorageError):
            # It may have been installed since.
            agent = _agent_or_reason()
        if isinstance(agent, StorageError):
            for key in batch.open_keys():
                batch.failed(key, agent)
        else:
            agent.carry_out(batch)

    serve(agent.message if isinstance(agent, StorageError) else LIBRARY, carry_out)


if __name__ == "__main__":
    main()

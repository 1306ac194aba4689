"""GridFTP helper: third-party transfers, checksums and listings on persistent connections.

The environment names the credential (``X509_USER_PROXY``) and the trusted authorities (``X509_CERT_DIR``).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Started by its path: the folder of the helpers must not be on the path, the project must.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from pdm.workqueue.helpers import copying, listing, operations
from pdm.workqueue.helpers.channel import ActiveBatch, serve
from pdm.workqueue.helpers.gridftp import pipelined_copy, pipelined_operations, pipelined_tree
from pdm.workqueue.helpers.gridftp.connections import ChannelPool, Waker
from pdm.workqueue.helpers.gridftp.control import LOGIN_S
from pdm.workqueue.helpers.gridftp.gsi import LIBRARY, PACKAGE, Gsi, GsiError
from pdm.workqueue.helpers.gridftp.storage import GridFtpStorage
from pdm.workqueue.helpers.storage import StorageError
from pdm.workqueue.helpers.threads import WorkerThreads

_MAX_WORKERS = 4
#: From so many items on, one more lane: a login costs as much as a hundred small files.
_ITEMS_PER_WORKER = 100


class _GridftpHelper:
    """Carries out batches: the fast way what goes well, the careful way the rest."""

    def __init__(self, gsi: Gsi) -> None:
        self._gsi = gsi
        self._connections = ChannelPool(gsi)
        self._waker = Waker()
        self._workers = WorkerThreads(self._opened, _MAX_WORKERS)
        self._shares_pool = False

    def _opened(self) -> GridFtpStorage:
        if self._shares_pool:
            return GridFtpStorage(ChannelPool(self._gsi))
        # The first worker runs on the thread of the batch, after the pipelined commands: it uses the same channels.
        self._shares_pool = True
        return GridFtpStorage(self._connections)

    def carry_out(self, batch: ActiveBatch) -> None:
        batch.on_stop(self._wake)
        limits = batch.request["limits"]
        self._connections.login_s = min(LOGIN_S, *(float(limits.get(name, LOGIN_S)) for name in ("stall_s", "total_s")))
        if batch.request["op"] != "list":
            batch.ends_items(lambda keys: self._waker.wake())
        if batch.request["op"] == "list":
            listing.report_listing(batch, lambda: self._list(batch))
            return
        items = batch.request["items"]
        if batch.request["op"] in ("copy", "discard"):
            _add_temporary_names(items)
        items = self._run_pipelined(batch, items)
        if batch.request["op"] == "copy":
            for item in items:
                item["temporary"] = copying.temporary_name(item["temporary"], pipelined_copy.TEMPORARY_NAMES - 1)
        if items:
            operations.carry_out_items(batch, items, self._workers, _ITEMS_PER_WORKER)

    def _wake(self) -> None:
        self._connections.interrupt()
        self._waker.wake()

    def _run_pipelined(self, batch: ActiveBatch, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
                    ways = range(pipelined_copy.TEMPORARY_NAMES - 1)
                    item["stale"] += [copying.temporary_name(item["temporary"], way) for way in ways]
                else:
                    item["again"] = True
        return items

    def _list(self, batch: ActiveBatch) -> None:
        left = pipelined_tree.list_tree(batch, self._connections, self._waker)
        if left is None or left:
            listing.list_tree(batch, self._workers, _MAX_WORKERS, left)


def _add_temporary_names(items: Sequence[dict[str, Any]]) -> None:
    """Let what earlier attempts may have left be removed under each name that they may have used."""
    ways = range(pipelined_copy.TEMPORARY_NAMES)
    for item in items:
        known = item["stale"] if "stale" in item else [item["url"]]
        item["stale"] = [copying.temporary_name(name, way) for name in known for way in ways]


def _helper_or_error() -> _GridftpHelper | StorageError:
    try:
        return _GridftpHelper(Gsi())
    except (OSError, GsiError) as error:
        why = f"the Globus security library cannot be used ({error}): install the package {PACKAGE}"
        return StorageError(why, code="DEPENDENCY_MISSING", scope="service")


def main() -> None:
    """Serve until the requests end."""
    agent = _helper_or_error()

    def carry_out(batch: ActiveBatch) -> None:
        nonlocal agent
        if isinstance(agent, StorageError):
            # It may have been installed since.
            agent = _helper_or_error()
        if isinstance(agent, StorageError):
            for key in batch.open_keys():
                batch.failed(key, agent)
        else:
            agent.carry_out(batch)

    serve(agent.message if isinstance(agent, StorageError) else LIBRARY, carry_out)


if __name__ == "__main__":
    main()

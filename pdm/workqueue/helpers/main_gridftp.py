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
from pdm.workqueue.helpers.gridftp.globus import PACKAGE, Globus, GlobusError
from pdm.workqueue.helpers.gridftp.globus_storage import GridFtpStorage
from pdm.workqueue.helpers.gridftp.gsi import Gsi, GsiError
from pdm.workqueue.helpers.storage import StorageError
from pdm.workqueue.helpers.threads import WorkerThreads

_MAX_WORKERS = 4
#: From so many items on, one more lane: a login costs as much as a hundred small files.
_ITEMS_PER_WORKER = 100


class _GridftpHelper:
    """Carries out batches: the fast way what goes well, the careful way the rest."""

    def __init__(self, globus: Globus, connections: ChannelPool | None) -> None:
        self._globus = globus
        self._connections = connections
        self._waker = Waker()
        self._storages: list[GridFtpStorage] = []
        self._workers = WorkerThreads(self._opened, _MAX_WORKERS)

    def _opened(self) -> GridFtpStorage:
        storage = GridFtpStorage(self._globus)
        self._storages.append(storage)
        return storage

    def carry_out(self, batch: ActiveBatch) -> None:
        self._globus.destroy_buried()
        batch.on_stop(self._wake)
        if self._connections is not None:
            self._connections.login_s = min(LOGIN_S, float(batch.request["limits"].get("stall_s", LOGIN_S)))
        if batch.request["op"] != "list":
            batch.ends_items(lambda keys: self._waker.wake())
        try:
            if batch.request["op"] == "list":
                listing.report_listing(batch, lambda: self._list(batch))
            else:
                items = batch.request["items"]
                if batch.request["op"] in ("copy", "discard"):
                    _add_temporary_names(items)
                items = self._run_pipelined(batch, items)
                if batch.request["op"] == "copy":
                    for item in items:
                        item["temporary"] = copying.temporary_name(
                            item["temporary"], pipelined_copy.TEMPORARY_NAMES - 1
                        )
                if items:
                    operations.carry_out_items(batch, items, self._workers, _ITEMS_PER_WORKER)
        finally:
            if self._globus.abandoned:
                self._cut()

    def _wake(self) -> None:
        if self._connections is not None:
            self._connections.interrupt()
        self._waker.wake()

    def _run_pipelined(self, batch: ActiveBatch, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Carry out what can be done the fast way; returns the items that are left."""
        if self._connections is None:
            return items
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
        left: list[str] | None = None
        if self._connections is not None:
            left = pipelined_tree.list_tree(batch, self._connections, self._waker)
        if left is None or left:
            listing.list_tree(batch, self._workers, _MAX_WORKERS, left)

    def _cut(self) -> None:
        """Cut the connections of handles that were left to themselves; the others make new ones."""
        self._globus.abandoned = False
        self._globus.cut()
        for storage in self._storages:
            storage.drop()


def _add_temporary_names(items: Sequence[dict[str, Any]]) -> None:
    """Let what earlier attempts may have left be removed under each name that they may have used."""
    ways = range(pipelined_copy.TEMPORARY_NAMES)
    for item in items:
        known = item["stale"] if "stale" in item else [item["url"]]
        item["stale"] = [copying.temporary_name(name, way) for name in known for way in ways]


def _channel_pool() -> ChannelPool | None:
    """What the fast way needs; None where it cannot be had, so that all goes the careful way."""
    try:
        return ChannelPool(Gsi())
    except (OSError, GsiError) as error:
        print(f"the fast way cannot be used: {error}", file=sys.stderr, flush=True)
        return None


def _helper_or_error() -> _GridftpHelper | StorageError:
    try:
        return _GridftpHelper(Globus(), _channel_pool())
    except (OSError, GlobusError) as error:
        why = f"the Globus client library cannot be used ({error}): install the package {PACKAGE}"
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

    serve(agent.message if isinstance(agent, StorageError) else "libglobus_ftp_client.so.2", carry_out)


if __name__ == "__main__":
    main()

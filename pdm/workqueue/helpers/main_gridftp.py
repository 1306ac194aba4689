"""GridFTP helper: third-party transfers, checksums and listings on persistent connections.

The environment names the credential (``X509_USER_PROXY``) and the trusted authorities (``X509_CERT_DIR``).
"""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

if not __package__:
    # When started as a script, sys.path has the directory of the helpers instead of the project's.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers import copying, listing, operations
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.gridftp import pipelined_copy, pipelined_operations
from pdm.workqueue.helpers.gridftp.connections import ChannelPool
from pdm.workqueue.helpers.gridftp.control import LOGIN_S
from pdm.workqueue.helpers.gridftp.event_loop import Waker
from pdm.workqueue.helpers.gridftp.gsi import LIBRARY, PACKAGE, Gsi, GsiError
from pdm.workqueue.helpers.gridftp.storage import GridFtpStorage
from pdm.workqueue.helpers.request_loop import serve
from pdm.workqueue.helpers.storage import StorageError
from pdm.workqueue.helpers.threads import WorkerThreads
from pdm.workqueue.wire.agent_requests import (
    CopyItem,
    CopyRequest,
    ItemRequest,
    ListRequest,
    MkdirRequest,
    PathItem,
    RemoveRequest,
)

_Item = TypeVar("_Item", CopyItem, PathItem)
_LAST_WAY = pipelined_copy.TEMPORARY_NAMES - 1
_MAX_WORKERS = 4
#: Items for each further worker: a login costs as much as a hundred small files.
_ITEMS_PER_WORKER = 100


class _GridftpHelper:
    """Works on batches: pipelined first, then the fallback, one operation at a time."""

    def __init__(self, gsi: Gsi) -> None:
        self._gsi = gsi
        self._connections = ChannelPool(gsi)
        self._waker = Waker()
        self._workers = WorkerThreads(self._opened, _MAX_WORKERS)
        self._shares_pool = False

    def _opened(self) -> GridFtpStorage:
        if self._shares_pool:
            return GridFtpStorage(ChannelPool(self._gsi))
        # The first worker runs on the batch's thread, after the pipelined commands: both use the same channels.
        self._shares_pool = True
        return GridFtpStorage(self._connections)

    def carry_out(self, batch: ActiveBatch) -> None:
        request = batch.request
        batch.on_stop(self._wake)
        self._connections.login_s = min(LOGIN_S, request.limits.stall_s, request.limits.total_s)
        if isinstance(request, ListRequest):
            list_one = partial(self._list, batch)
            listing.report_listing(
                batch, request, lambda: listing.list_both_ends(batch, request, self._workers, list_one)
            )
        else:
            batch.ends_items(lambda keys: self._waker.wake())
            self._carry_out_items(batch, request)

    def _wake(self) -> None:
        self._connections.interrupt()
        self._waker.wake()

    def _carry_out_items(self, batch: ActiveBatch, request: ItemRequest) -> None:
        """Run the pipelined operations, then the remaining items one by one."""
        left = request
        if isinstance(request, CopyRequest):
            left = replace(request, items=self._copy_pipelined(batch, request))
        elif isinstance(request, RemoveRequest) or (isinstance(request, MkdirRequest) and request.parents):
            # Whether a directory already exists must be checked first, unless it makes no difference.
            left = replace(
                request,
                items=self._left_of(
                    batch,
                    lambda: pipelined_operations.carry_out(batch, request, self._connections, self._waker),
                    lambda: [replace(item, again=True) for item in request.items],
                ),
            )
        if left.items:
            operations.carry_out_items(
                batch, left, self._workers, _ITEMS_PER_WORKER, ways=pipelined_copy.TEMPORARY_NAMES
            )

    def _copy_pipelined(self, batch: ActiveBatch, request: CopyRequest) -> list[CopyItem]:
        """Copy pipelined; returns the remaining items, with new temporary names."""
        # Earlier attempts may have left a temporary file under each name.
        named = [replace(item, stale=list(_names(item.stale))) for item in request.items]
        items = [item for item in named if item.is_plain]
        left = self._left_of(
            batch,
            lambda: pipelined_copy.copy(batch, request, items, self._connections, self._waker),
            lambda: [
                replace(item, stale=[*item.stale, *itertools.islice(_names([item.temporary]), _LAST_WAY)])
                for item in items
            ],
        )
        left += [item for item in named if not item.is_plain]
        return [replace(item, temporary=copying.temporary_name(item.temporary, _LAST_WAY)) for item in left]

    def _left_of(
        self, batch: ActiveBatch, pipelined: Callable[[], list[_Item]], broken: Callable[[], list[_Item]]
    ) -> list[_Item]:
        """The items that the pipelined run has left; if it failed as a whole, those of ``broken`` that are open."""
        try:
            return pipelined()
        except Exception:
            # One of the items may be the cause: one by one, each fails by itself.
            traceback.print_exc()
            self._connections.drop_all()
            opened = set(batch.open_keys())
            return [item for item in broken() if item.key in opened]

    def _list(self, batch: ActiveBatch, request: ListRequest) -> None:
        left = pipelined_operations.list_tree(batch, request, self._connections, self._waker)
        if left is None or left:
            listing.list_tree(batch, request, self._workers, _MAX_WORKERS, left)


def _names(temporary_names: Iterable[str]) -> Iterator[str]:
    """All temporary names that attempts with these ones may have used."""
    for name in temporary_names:
        for way in range(pipelined_copy.TEMPORARY_NAMES):
            yield copying.temporary_name(name, way)


def _helper_or_error() -> _GridftpHelper | StorageError:
    try:
        return _GridftpHelper(Gsi())
    except (OSError, GsiError) as error:
        why = f"the Globus security library cannot be used ({error}): install the package {PACKAGE}"
        return StorageError(why, code=FailureCode.DEPENDENCY_MISSING, scope=FailureScope.SERVICE)


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

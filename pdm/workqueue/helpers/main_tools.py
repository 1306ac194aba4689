"""The tools helper: runs the field's own commands, and verifies their results.

globus-url-copy copies between GridFTP servers, a list of files with one process; gfal-copy, gfal-ls, gfal-rm,
gfal-rename and gfal-mkdir do everything else. Each line that they print goes to the log of its item at once.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import cast

if not __package__:
    # When started as a script, sys.path has the directory of the helpers instead of the project's.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import msgspec

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import listing, operations
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.copying import FileCopier, FileCopy, PendingCopy
from pdm.workqueue.helpers.request_loop import serve
from pdm.workqueue.helpers.storage import StoppedError, Storage, StorageError, Timeouts
from pdm.workqueue.helpers.threads import WorkerThreads
from pdm.workqueue.helpers.tools.globus_url_copy import PROGRAM, UrlPair
from pdm.workqueue.helpers.tools.native_clients import NativeClients
from pdm.workqueue.helpers.tools.storage import GRIDFTP_SCHEMES, Removals, ToolStorage
from pdm.workqueue.wire.agent_requests import (
    CheckRequest,
    CopyItem,
    CopyRequest,
    DiscardRequest,
    ListRequest,
    PathItem,
    RemoveRequest,
)

#: Each worker has its own processes; more would only compete for the service's cores.
_MAX_WORKERS = 4
_ITEMS_PER_WORKER = 4
#: Items for each further worker where our own client works: a login costs as much as a hundred requests.
_ITEMS_PER_NATIVE_WORKER = 50
#: Number of files from which one process removes them all.
_LEAST_LIST = 2
#: Files of one globus-url-copy process.
_LONGEST_LIST = 1000


class _ToolsHelper:
    """Works on batches."""

    def __init__(self) -> None:
        natives = NativeClients()
        #: Stat results of removal lists, kept until they are used.
        self._removals: Removals = {}
        self._workers = WorkerThreads(lambda: ToolStorage(natives, self._removals), _MAX_WORKERS)

    def carry_out(self, batch: ActiveBatch) -> None:
        request = batch.request
        storages = cast(list[ToolStorage], self._workers.storages(_MAX_WORKERS))
        # Our own client does the small steps around a copy; and only it distinguishes links from their targets
        # before a removal.
        native = isinstance(request, CopyRequest | CheckRequest | DiscardRequest)
        if isinstance(request, ListRequest):
            native = not request.follow
        for storage in storages:
            storage.acts_natively = native
        self._removals.clear()
        if isinstance(request, ListRequest):
            self._list(batch, request)
            return
        if isinstance(request, CopyRequest):
            in_lists = [item for item in request.items if _is_between_gridftp_servers(item)]
            if in_lists:
                _ListCopy(batch, request, self._workers).carry_out(in_lists)
            left = [item for item in request.items if not _is_between_gridftp_servers(item)]
            request = msgspec.structs.replace(request, items=left)
        elif isinstance(request, RemoveRequest):
            _remove_in_lists(batch, request, self._workers)
        if request.items:
            operations.carry_out_items(batch, request, self._workers, _ITEMS_PER_WORKER)

    def _list(self, batch: ActiveBatch, request: ListRequest) -> None:
        def list_one(one: ListRequest) -> None:
            listing.list_tree(batch, one, self._workers, _MAX_WORKERS)

        listing.report_listing(batch, request, lambda: listing.list_both_ends(batch, request, self._workers, list_one))


def _is_between_gridftp_servers(item: CopyItem) -> bool:
    return {StorageUrl(url).scheme for url in (item.source, item.destination)} <= GRIDFTP_SCHEMES


class _ListCopy:
    """Copies between GridFTP servers: check all files, transfer them with as few processes as possible, verify each.

    Args:
        batch: of the request.
        request: the request.
        workers: threads that check and verify files.
    """

    def __init__(self, batch: ActiveBatch, request: CopyRequest, workers: WorkerThreads) -> None:
        self._batch = batch
        self._limits = request.limits
        self._workers = workers
        self._copier = FileCopier(batch, request, request.items)
        self._pending: dict[int, PendingCopy] = {}
        self._outcomes: dict[int, StorageError | StoppedError | None] = {}
        self._guard = threading.Lock()
        self._current: int | None = None
        #: Whether the process was ended because of single items.
        self._is_broken_off = False

    def carry_out(self, items: Sequence[CopyItem]) -> None:
        """Copy some of the items; each has its outcome afterwards."""
        self._workers.share(self._batch, items, _workers_for(items), self._begin)
        self._transfer()
        left = [item for item in items if item.key in self._pending]
        self._workers.share(self._batch, left, _workers_for(left), self._conclude, begun=True)

    def _begin(self, storage: Storage, item: CopyItem) -> None:
        pending = self._copier.begin(storage, FileCopy.of(item))
        if pending is not None:
            with self._guard:
                self._pending[item.key] = pending

    def _transfer(self) -> None:
        storage = cast(ToolStorage, self._workers.storages(1)[0])
        storage.resume()
        self._batch.ends_items(lambda keys: self._break_off(storage, keys))
        self._batch.on_stop(storage.interrupt)
        left = list(self._pending.values())
        # One pair of servers a list, so that an error of a login concerns all of it.
        while left and not self._batch.stopped:
            route = _route(left[0].item)
            pairs = [_pair(one.item) for one in left if _route(one.item) == route][:_LONGEST_LIST]
            storage.timeouts = Timeouts.of(self._limits)
            try:
                self._outcomes |= storage.transfer_list(pairs, self._batch.log, self._begun, self._arrived)
            except StorageError as error:
                self._outcomes |= dict.fromkeys((pair.key for pair in pairs), error)
            except StoppedError:
                self._outcomes |= self._stopped(storage)
            self._ended()
            left = [
                one for one in left if one.item.key not in self._outcomes and not self._batch.is_ended(one.item.key)
            ]

    def _stopped(self, storage: Storage) -> dict[int, StoppedError]:
        """Report the items after we ended the process: the current file is incomplete, the others are tried again."""
        with self._guard:
            current, self._current = self._current, None
            if self._is_broken_off and not self._batch.stopped:
                self._is_broken_off = False
                storage.resume()
        return {} if current is None else {current: StoppedError()}

    def _break_off(self, storage: Storage, keys: set[int]) -> None:
        """End the process if a cancelled item is its current file."""
        with self._guard:
            if self._current in keys:
                self._is_broken_off = True
                storage.interrupt()

    def _begun(self, pair: UrlPair) -> Timeouts:
        self._ended()
        with self._guard:
            self._current = pair.key
        self._pending[pair.key].reporter.restart()
        return Timeouts.of(self._limits, pair.size)

    def _ended(self) -> None:
        """Clear the current file."""
        with self._guard:
            if self._current is not None:
                self._pending[self._current].reporter.end()
            self._current = None

    def _arrived(self, key: int, transferred: int) -> None:
        self._pending[key].reporter.update(transferred)

    def _conclude(self, storage: Storage, item: CopyItem) -> None:
        pending, outcome = self._pending[item.key], self._outcomes.get(item.key, StoppedError())
        if self._batch.is_ended(item.key):
            outcome = StoppedError()
        if not isinstance(outcome, StoppedError):
            outcome = cast(ToolStorage, storage).confirmed(outcome, _pair(pending.item))
        if outcome is None:
            self._copier.complete(storage, pending, None)
        else:
            self._copier.give_up(storage, pending, outcome)


def _workers_for(items: Sequence[CopyItem | PathItem]) -> int:
    return 1 + len(items) // _ITEMS_PER_NATIVE_WORKER


def _pair(item: FileCopy) -> UrlPair:
    return UrlPair(item.key, item.source, item.temporary, item.size)


def _route(item: FileCopy) -> tuple[str, str]:
    return item.source.server, item.temporary.server


def _remove_in_lists(batch: ActiveBatch, request: RemoveRequest, workers: WorkerThreads) -> None:
    """Remove many files with one gfal-rm; the result for each is checked afterwards, one by one."""
    items = [item for item in request.items if not item.directory]
    if len(items) < _LEAST_LIST:
        return
    allowed: list[StorageUrl] = []

    def check(storage: Storage, item: PathItem) -> None:
        url = StorageUrl(item.url)
        # Files that must not be removed are reported later, one by one.
        with contextlib.suppress(StorageError):
            if operations.must_recheck(item):
                operations.check_unchanged_since_listing(item, storage.stat(url))
            allowed.append(url)

    workers.share(batch, items, _workers_for(items), check)
    keys = {item.url: item.key for item in items}
    storage = cast(ToolStorage, workers.storages(1)[0])
    storage.timeouts = Timeouts.of(request.limits)
    storage.log_to(lambda line: batch.log(keys.get(line.rpartition("\t")[0], items[0].key), line))
    with contextlib.suppress(StorageError, StoppedError):
        storage.remove_files(allowed)


def main() -> None:
    """Serve until the requests end."""
    helper = _ToolsHelper()
    missing = [program for program in (PROGRAM, "gfal-copy") if shutil.which(program) is None]
    tools = f"without {' and '.join(missing)}" if missing else f"{PROGRAM} and gfal-*"
    serve(tools, helper.carry_out)


if __name__ == "__main__":
    main()

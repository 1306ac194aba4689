"""The tools helper: the field's own commands do the work, and our proof says what became of it.

globus-url-copy copies between GridFTP servers, a list of files by one process; gfal-copy, gfal-ls, gfal-rm, gfal-rename
and gfal-mkdir do all else. Each line that they print goes to the log of the item that it is about, as it comes.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

if not __package__:
    # Started by its path: the folder of the helpers must not be on the path, the project must.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from pdm.workqueue.helpers import listing, operations
from pdm.workqueue.helpers.channel import ActiveBatch, serve
from pdm.workqueue.helpers.copying import FileCopier, PendingCopy
from pdm.workqueue.helpers.storage import StoppedError, Storage, StorageError, Timeouts
from pdm.workqueue.helpers.threads import WorkerThreads, timeouts
from pdm.workqueue.helpers.tools.globus_url_copy import PROGRAM, UrlPair
from pdm.workqueue.helpers.tools.storage import GRIDFTP_SCHEMES, Natives, Removals, ToolStorage

#: Each has its own processes; more of them only share the cores of the service.
_MAX_WORKERS = 4
_ITEMS_PER_WORKER = 4
#: Where our own client does the work: a login costs as much as a hundred requests.
_ITEMS_PER_NATIVE_WORKER = 50
#: From so many files on, one process removes them all.
_LEAST_LIST = 2
#: Files of which one globus-url-copy is told.
_LONGEST_LIST = 1000
#: Operations around which our own client does the small steps.
_NATIVE_STEPS = frozenset({"copy", "discard"})
_Items = Sequence[dict[str, Any]]


class _ToolsHelper:
    """Carries out batches."""

    def __init__(self) -> None:
        natives = Natives()
        #: What lists of removals have told of files, until they are asked for.
        self._removals: Removals = {}
        self._workers = WorkerThreads(lambda: ToolStorage(natives, self._removals), _MAX_WORKERS)

    def carry_out(self, batch: ActiveBatch) -> None:
        operation = batch.request["op"]
        storages = cast(list[ToolStorage], self._workers.storages(_MAX_WORKERS))
        # Of what is to be removed only our own client tells links from what they lead to.
        native = operation in _NATIVE_STEPS or not batch.request.get("follow", True)
        for storage in storages:
            storage.acts_natively = native
        self._removals.clear()
        if operation == "list":
            listing.report_listing(batch, lambda: listing.list_tree(batch, self._workers, _MAX_WORKERS))
            return
        items = batch.request["items"]
        if operation == "copy":
            in_lists = [item for item in items if _is_between_gridftp_servers(item)]
            if in_lists:
                _ListCopy(batch, items, self._workers).carry_out(in_lists)
            items = [item for item in items if item["key"] in set(batch.open_keys())]
        elif operation == "remove":
            _remove_in_lists(batch, [item for item in items if not item.get("directory", False)], self._workers)
        if items:
            operations.carry_out_items(batch, items, self._workers, _ITEMS_PER_WORKER)


def _is_between_gridftp_servers(item: dict[str, Any]) -> bool:
    return {item[end].partition("://")[0] for end in ("source", "destination")} <= GRIDFTP_SCHEMES


class _ListCopy:
    """Copies between GridFTP servers: all files are looked at, then sent by as few processes as do it, then proven.

    Args:
        batch: of the request.
        items: all of the batch.
        workers: where files are looked at and proven.
    """

    def __init__(self, batch: ActiveBatch, items: _Items, workers: WorkerThreads) -> None:
        self._batch = batch
        self._workers = workers
        self._copier = FileCopier(batch, items)
        self._pending: dict[int, PendingCopy] = {}
        self._outcomes: dict[int, StorageError | StoppedError | None] = {}
        self._guard = threading.Lock()
        self._current: int | None = None
        #: Whether the process was ended because of single items.
        self._is_broken_off = False

    def carry_out(self, items: _Items) -> None:
        """Copy some of the items; each has its outcome then."""
        self._workers.share(self._batch, items, _workers_for(items), self._begin)
        self._transfer()
        left = [pending.item for pending in self._pending.values()]
        self._workers.share(self._batch, left, _workers_for(left), self._conclude, begun=True)

    def _begin(self, storage: Storage, item: dict[str, Any]) -> None:
        pending = self._copier.begin(storage, item)
        if pending is not None:
            with self._guard:
                self._pending[item["key"]] = pending

    def _transfer(self) -> None:
        storage = cast(ToolStorage, self._workers.storages(1)[0])
        storage.resume()
        self._batch.ends_items(lambda keys: self._break_off(storage, keys))
        self._batch.on_stop(storage.interrupt)
        left = list(self._pending.values())
        # One pair of servers a list: what the tool says of its logins is then about all of it.
        while left and not self._batch.stopped:
            route = _route(left[0].item)
            pairs = [_pair(one.item) for one in left if _route(one.item) == route][:_LONGEST_LIST]
            try:
                self._outcomes |= storage.transfer_list(pairs, self._batch.log, self._begun, self._arrived)
            except StorageError as error:
                self._outcomes |= dict.fromkeys((pair.key for pair in pairs), error)
            except StoppedError:
                self._outcomes |= self._stopped(storage)
            self._ended()
            left = [
                one
                for one in left
                if one.item["key"] not in self._outcomes and not self._batch.is_ended(one.item["key"])
            ]

    def _stopped(self, storage: Storage) -> dict[int, StoppedError]:
        """What the end of the process by us means: the file under way is not whole, those not begun are tried again."""
        with self._guard:
            current, self._current = self._current, None
            if self._is_broken_off and not self._batch.stopped:
                self._is_broken_off = False
                storage.resume()
        return {} if current is None else {current: StoppedError()}

    def _break_off(self, storage: Storage, keys: set[int]) -> None:
        """End the process for the sake of the item that it is at."""
        with self._guard:
            if self._current in keys:
                self._is_broken_off = True
                storage.interrupt()

    def _begun(self, pair: UrlPair) -> Timeouts:
        self._ended()
        with self._guard:
            self._current = pair.key
        self._pending[pair.key].reporter.restart()
        return timeouts(self._batch.request["limits"], pair.size)

    def _ended(self) -> None:
        """The file that was under way is under way no more."""
        with self._guard:
            if self._current is not None:
                self._pending[self._current].reporter.end()
            self._current = None

    def _arrived(self, key: int, transferred: int) -> None:
        self._pending[key].reporter.update(transferred)

    def _conclude(self, storage: Storage, item: dict[str, Any]) -> None:
        pending, outcome = self._pending[item["key"]], self._outcomes.get(item["key"], StoppedError())
        if self._batch.is_ended(item["key"]):
            outcome = StoppedError()
        if not isinstance(outcome, StoppedError):
            outcome = cast(ToolStorage, storage).confirmed(outcome, _pair(item))
        if outcome is None:
            self._copier.complete(storage, pending, None)
        else:
            self._copier.give_up(storage, pending, outcome)


def _workers_for(items: _Items) -> int:
    return 1 + len(items) // _ITEMS_PER_NATIVE_WORKER


def _pair(item: dict[str, Any]) -> UrlPair:
    return UrlPair(item["key"], item["source"], item["temporary"], item["size"])


def _route(item: dict[str, Any]) -> tuple[str, str]:
    return "/".join(item["source"].split("/")[:3]), "/".join(item["temporary"].split("/")[:3])


def _remove_in_lists(batch: ActiveBatch, items: _Items, workers: WorkerThreads) -> None:
    """Have one gfal-rm remove many files; what became of each is looked at afterwards, one by one."""
    if len(items) < _LEAST_LIST:
        return
    allowed: list[str] = []

    def check(storage: Storage, item: dict[str, Any]) -> None:
        # What must not be removed is told when it is its turn.
        with contextlib.suppress(StorageError):
            if operations.must_recheck(item):
                operations.check_unchanged_since_listing(item, storage.stat(item["url"]))
            allowed.append(item["url"])

    workers.share(batch, items, _workers_for(items), check)
    keys: dict[str, int] = {item["url"]: item["key"] for item in items}
    first = next(iter(keys.values()))
    storage = cast(ToolStorage, workers.storages(1)[0])
    storage.log_to(lambda line: batch.log(keys.get(line.rpartition("\t")[0], first), line))
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

"""Recursive listings: depth first, a few directories in parallel; only pending directories are kept in memory."""

from __future__ import annotations

import contextlib
import errno
import functools
import threading
import time
from collections.abc import Callable
from urllib.parse import quote_from_bytes

import msgspec

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.storage import (
    FileStat,
    StoppedError,
    Storage,
    StorageError,
    Timeouts,
    at_destination,
    at_source,
    internal_error,
)
from pdm.workqueue.helpers.threads import WorkerThreads
from pdm.workqueue.wire.agent_events import RawEntry
from pdm.workqueue.wire.agent_requests import ListRequest

#: Maximum entries of an event, and about the maximum bytes of its paths.
_ENTRIES_PER_EVENT, _BYTES_PER_EVENT = 1000, 512 * 1024
#: Seconds that the entries of a small directory wait to be reported with others.
_COALESCE_S = 0.03
#: Pending directories: about 300 MB. A tree with more is not listed in one job.
_MOST_WAITING = 2_000_000
#: Pending directories for each further worker.
_WAITING_PER_WORKER = 16
#: Listed bytes from which the destination of a plain copy is asked for its free space: a smaller one ends sooner.
_LEAST_LISTED = 1 << 30
#: Seconds for the answer.
_SPACE_TIMEOUT_S = 5.0
#: About the bytes of an entry beside its path and target.
_BYTES_BESIDES = 90
_LARGEST_SIZE = 2**63 - 1
#: A percent-encoded path below the listed directory: no storage has a longer one, and an event must fit into a line.
_LONGEST_BELOW = 64 * 1024


def report_listing(batch: ActiveBatch, request: ListRequest, work: Callable[[], int | None]) -> None:
    """Run a ``list`` request by a function that raises its errors and returns the free bytes; report the outcome."""
    batch.started(request.key)
    try:
        free = work()
    except StoppedError:
        batch.cancelled(request.key)
    except StorageError as error:
        batch.failed(request.key, error.at(FailureScope.SOURCE))
    else:
        batch.done(request.key, free=free)


def list_both_ends(
    batch: ActiveBatch, request: ListRequest, workers: WorkerThreads, list_one: Callable[[ListRequest], None]
) -> int | None:
    """Run a ``list`` request: the destination first, if it has one, then the source; then ask for free space.

    Args:
        batch: of the request.
        request: the request.
        workers: threads to use.
        list_one: lists what is at the URL of a request without a destination.

    Returns:
        The bytes that are free at the destination of a copy, if they were asked for and are known.
    """
    source = msgspec.structs.replace(request, destination=None)
    if request.destination is not None:
        storage = workers.storages(1)[0]
        _prepare(storage, batch, request)
        what = at_source(storage.stat, StorageUrl(request.url).without_slash)
        if what is not None:
            with batch.listing_destination():
                at_destination(
                    _list_destination, batch, source, StorageUrl(request.destination), storage, what, list_one
                )
    list_one(source)
    if request.space_at is None or (request.destination is None and batch.listed_bytes < _LEAST_LISTED):
        return None
    storage = workers.storages(1)[0]
    _prepare(storage, batch, request)
    return _free_bytes(batch, request, storage, StorageUrl(request.space_at))


def _free_bytes(batch: ActiveBatch, request: ListRequest, storage: Storage, url: StorageUrl) -> int | None:
    """The bytes that are free at a URL, or where its directories will be made; an error is only logged."""
    storage.timeouts = Timeouts.within(min(_SPACE_TIMEOUT_S, request.limits.stall_s))
    directory = url.without_slash
    while True:
        try:
            free = storage.free_bytes(directory)
        except StorageError as error:
            above = directory.parent.without_slash
            if error.errno in (errno.ENOENT, errno.ENOTDIR) and above != directory:
                directory = above
                continue
            batch.log(request.key, f"the free space of the destination is not known: {error.message}")
            return None
        if free is not None:
            batch.log(request.key, f"the destination has {free} bytes free, at {directory.display}")
        return free


def _list_destination(
    batch: ActiveBatch,
    request: ListRequest,
    url: StorageUrl,
    storage: Storage,
    source: FileStat,
    list_one: Callable[[ListRequest], None],
) -> None:
    """List the destination of a copy, or show the place of a single file.

    ``request``: for the source. ``source``: what is there.
    """
    path = ""
    if not is_listed(request, source) and url.endswith("/"):
        path = quote_from_bytes(StorageUrl(request.url).name, safe="")
        url = url.below(path)
    there = _stat_or_none(storage, url)
    if there is None:
        return
    at_url = msgspec.structs.replace(request, url=str(url), depth=None, follow=True)
    if is_listed(request, source) and is_listed(at_url, there):
        list_one(at_url)
    else:
        batch.entries(request.key, [_entry(path, there)])


def _stat_or_none(storage: Storage, url: StorageUrl) -> FileStat | None:
    try:
        return storage.stat(url.without_slash)
    except StorageError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def _prepare(storage: Storage, batch: ActiveBatch, request: ListRequest) -> None:
    storage.resume()
    batch.on_stop(storage.interrupt)
    storage.log_to(functools.partial(batch.log, request.key))
    storage.timeouts = Timeouts.of(request.limits)


def list_tree(
    batch: ActiveBatch,
    request: ListRequest,
    workers: WorkerThreads,
    max_workers: int,
    directories: list[str] | None = None,
) -> None:
    """Run a ``list`` request, or the rest of one.

    Args:
        batch: of the request.
        request: the request.
        workers: threads to use.
        max_workers: how many of them.
        directories: percent-encoded paths below the URL that are left to list; None for all.
    """
    tree = _TreeListing(batch, request, workers, max_workers)
    if directories is None:
        tree.begin()
    else:
        tree.go_on(directories)


class EntryReporter:
    """Reports entries, of small directories together, because each event costs the daemon a transaction.

    Args:
        batch: of the listing.
        request: the request.
    """

    def __init__(self, batch: ActiveBatch, request: ListRequest) -> None:
        self.batch = batch
        self.request = request
        self._guard = threading.Lock()
        self._rows: list[RawEntry] = []
        self._bytes = 0
        self._since = 0.0

    def take(self, rows: list[RawEntry], size: int) -> None:
        """Add entries of about ``size`` bytes, to be reported soon."""
        with self._guard:
            if len(self._rows) + len(rows) > _ENTRIES_PER_EVENT or self._bytes + size > _BYTES_PER_EVENT:
                self._report()
            if not self._rows:
                self._since = time.monotonic()
            self._rows += rows
            self._bytes += size
            if time.monotonic() - self._since > _COALESCE_S:
                self._report()

    def flush(self) -> None:
        """Report the entries that wait."""
        with self._guard:
            self._report()

    def _report(self) -> None:
        if self._rows:
            self.batch.entries(self.request.key, self._rows)
            self._rows, self._bytes = [], 0


class DirectoryEntries:
    """The entries of one directory.

    Args:
        reporter: reports them.
        path: of the directory, percent-encoded, below the listed URL.

    Attributes:
        directories: sub-directories to list next.
        told: whether any entry was reported to the daemon.
    """

    def __init__(self, reporter: EntryReporter, path: str) -> None:
        self._reporter = reporter
        self._path = path
        self._deeper = is_deeper(reporter.request.depth, path)
        self._entries: list[RawEntry] = []
        self._bytes = 0
        self.directories: list[str] = []
        self.told = False

    def add(self, name: bytes, file_stat: FileStat) -> None:
        """Add one entry; raises `StorageError` if its name or type is invalid."""
        encoded = _checked_name(name)
        below = f"{self._path}/{encoded}" if self._path else encoded
        if len(below) > _LONGEST_BELOW or not 0 <= file_stat.size <= _LARGEST_SIZE:
            raise StorageError(
                f"the server's listing is not valid: {below[:200]} has {len(below)} characters and "
                f"{file_stat.size} bytes",
                code=FailureCode.BAD_LISTING,
            )
        self._entries.append(_entry(below, file_stat))
        self._bytes += len(below) + 3 * len(file_stat.target or b"") + _BYTES_BESIDES
        if self._deeper and file_stat.kind == "directory":
            self.directories.append(below)
        if len(self._entries) == _ENTRIES_PER_EVENT or self._bytes >= _BYTES_PER_EVENT:
            self._tell()

    def end(self, unnamed: int, unnamed_are: str = Storage.unnamed_are) -> None:
        """End the directory; ``unnamed``: number of entries that cannot be named, ``unnamed_are``: what they are."""
        if self._entries:
            self._tell()
        if unnamed:
            batch, request = self._reporter.batch, self._reporter.request
            batch.unnamed(request.key, self._path, unnamed)
            where = directory_url(request.url, self._path)
            batch.log(
                request.key,
                f"{unnamed} of the entries of {where} have no name here: most likely {unnamed_are}",
            )

    def _tell(self) -> None:
        self._reporter.take(self._entries, self._bytes)
        self._entries, self._bytes = [], 0
        self.told = True

    @staticmethod
    def check_room(waiting: int) -> None:
        """Raise `StorageError` if too many directories are pending."""
        if waiting > _MOST_WAITING:
            raise StorageError(
                f"more than {_MOST_WAITING} directories wait to be listed: list the tree in parts",
                code=FailureCode.UNSUPPORTED,
            )


def directory_url(root: str, path: str) -> StorageUrl:
    """URL of a directory below the listed one."""
    return StorageUrl(root).below(path)


def is_deeper(depth: int | None, path: str) -> bool:
    """Whether the content of a directory is within the requested depth."""
    return depth is None or (path.count("/") + 2 if path else 1) < depth


def is_listed(request: ListRequest, there: FileStat) -> bool:
    """Whether the URL is a directory whose content is listed, rather than an entry that is shown itself."""
    is_directory = there.kind == "directory" or (
        there.kind == "link" and there.target_kind == "directory" and request.follow
    )
    return is_directory and request.depth != 0


def report_alone(batch: ActiveBatch, request: ListRequest, there: FileStat) -> None:
    """Report what is at the URL as the only entry."""
    batch.entries(request.key, [_entry("", there)])


class _TreeListing:
    def __init__(self, batch: ActiveBatch, request: ListRequest, workers: WorkerThreads, max_workers: int) -> None:
        self._batch = batch
        self._request = request
        self._key = request.key
        self._root = StorageUrl(request.url)
        self._workers = workers
        self._max_workers = max_workers
        self._reporter = EntryReporter(batch, request)
        self._changed = threading.Condition()
        #: Pending directories, as percent-encoded paths below the root; the last one is next.
        self._waiting: list[str] = []
        self._busy = 0
        self._threads: list[threading.Thread] = []
        self._error: StorageError | StoppedError | None = None

    def begin(self) -> None:
        """List the whole tree."""
        first = self._workers.storages(1)[0]
        _prepare(first, self._batch, self._request)
        there = first.stat(self._root.without_slash)
        if there is None:
            raise StorageError(f"{self._root} does not exist", errno=errno.ENOENT, code=FailureCode.NOT_FOUND)
        if not is_listed(self._request, there):
            report_alone(self._batch, self._request, there)
            return
        self._batch.root(self._key, first.real_path(self._root.without_slash, there))
        # An error at the root fails the whole listing.
        self._directory(first, "")
        self._walk(first)

    def go_on(self, directories: list[str]) -> None:
        """List the remaining directories."""
        first = self._workers.storages(1)[0]
        _prepare(first, self._batch, self._request)
        self._remember(directories)
        self._walk(first)

    def _walk(self, first: Storage) -> None:
        self._worker(first)
        for thread in self._threads:
            thread.join()
        self._reporter.flush()
        if self._error is not None:
            raise self._error

    def _worker(self, storage: Storage) -> None:
        while True:
            with self._changed:
                while not self._waiting and self._busy and self._error is None:
                    self._changed.wait()
                if not self._waiting or self._error is not None:
                    return
                path = self._waiting.pop()
                self._busy += 1
            try:
                self._directory(storage, path)
            except StorageError as error:
                self._batch.unreadable(self._key, path, error)
            except StoppedError as stopped:
                self._error = stopped
            except Exception as error:
                self._error = internal_error(f"the helper failed: {type(error).__name__}: {error}")
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()

    def _directory(self, storage: Storage, path: str) -> None:
        """List one directory and add its sub-directories to the pending ones."""
        if self._batch.stopped:
            raise StoppedError
        # Each directory has a time limit of its own, the whole tree has none.
        storage.timeouts = Timeouts.of(self._request.limits)
        entries = DirectoryEntries(self._reporter, path)
        looked = self._request.follow
        with contextlib.closing(storage.entries(directory_url(self._root, path))) as found:
            for name, file_stat in found:
                if not looked and self._is_left_alone(storage, path):
                    return
                looked = True
                entries.add(name, file_stat)
                self._remember(entries.directories)
                entries.directories = []
        entries.end(storage.unnamed, storage.unnamed_are)

    def _is_left_alone(self, storage: Storage, path: str) -> bool:
        """Whether a directory is a link, which a removal must not follow; raises `StorageError` for the root."""
        link = storage.link_at(directory_url(self._root, path).without_slash, listed=bool(path))
        if link is None:
            return False
        if not path:
            raise StorageError(link, code=FailureCode.UNSUPPORTED)
        self._batch.log(self._key, link)
        return True

    def _remember(self, directories: list[str]) -> None:
        if not directories:
            return
        with self._changed:
            DirectoryEntries.check_room(len(self._waiting) + len(directories))
            self._waiting.extend(directories)
            workers = min(self._max_workers, 1 + len(self._waiting) // _WAITING_PER_WORKER)
            if len(self._threads) + 1 < workers:
                storage = self._workers.storages(len(self._threads) + 2)[-1]
                _prepare(storage, self._batch, self._request)
                thread = threading.Thread(target=self._worker, args=(storage,), name="lane")
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()


def _checked_name(name: bytes) -> str:
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise StorageError(
            f"the server's listing is not valid: {name[:200]!r} is no name of an entry", code=FailureCode.BAD_LISTING
        )
    return quote_from_bytes(name, safe="")


def _entry(path: str, file_stat: FileStat) -> RawEntry:
    return RawEntry(
        path,
        file_stat.kind,
        file_stat.size,
        file_stat.mode,
        file_stat.mtime,
        quote_from_bytes(file_stat.target, safe="/") if file_stat.target is not None else None,
        file_stat.target_kind == "file",
        file_stat.target_kind == "directory",
        file_stat.owner,
        file_stat.group,
    )

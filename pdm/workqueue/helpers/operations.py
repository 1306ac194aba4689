"""Remove, rename, create, discard and check items.

`carry_out_items` selects the function for a request, for every helper that works on a storage.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence

from pdm.workqueue.domain.enums import ChecksumAlgorithm, JobProtocol
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import copying
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.directories import ensure_directory
from pdm.workqueue.helpers.group_backend import GroupStorage
from pdm.workqueue.helpers.storage import (
    FRESH_S,
    FileKind,
    FileStat,
    StoppedError,
    Storage,
    StorageError,
    Timeouts,
    at_destination,
    at_source,
    scoped,
)
from pdm.workqueue.helpers.threads import WorkerThreads, may_begin
from pdm.workqueue.wire.agent_requests import (
    CheckItem,
    CheckRequest,
    CopyRequest,
    DiscardRequest,
    Fingerprint,
    FoundBefore,
    ItemRequest,
    MkdirRequest,
    PathItem,
    RemoveRequest,
    RenameItem,
    RenameRequest,
)

#: Protocols whose servers may rename by copying: the new name has another mtime.
_RENAMED_BY_COPY = (JobProtocol.HTTPS, JobProtocol.S3)
#: Protocols with a request that removes many files, and files of one at most.
_REMOVED_AT_ONCE, _MOST_AT_ONCE = (JobProtocol.S3,), 250
#: Age of a listing in seconds from which a file is checked again before it is removed.
_MAX_LISTING_AGE_S = 1800.0


def remove_items(batch: ActiveBatch, items: Sequence[PathItem], workers: WorkerThreads, count: int) -> None:
    """Run a ``remove`` request: files, links and empty directories."""

    def work(storage: Storage, item: PathItem) -> None:
        url = StorageUrl(item.url)
        try:
            if must_recheck(item):
                check_unchanged_since_listing(item, scoped(item.scope, storage.stat, url))
            scoped(item.scope, storage.remove, url, directory=item.directory)
        except StorageError as error:
            if item.again and error.errno == errno.ENOENT:
                batch.log(item.key, "it is gone: an earlier attempt has removed it")
            elif item.may_stay and error.errno == errno.ENOTEMPTY:
                batch.log(item.key, "it is not empty, and stays")
            else:
                raise
        scoped(item.scope, storage.sync_directory, url.parent)
        batch.done(item.key)

    if items and JobProtocol.of_scheme(StorageUrl(items[0].url).scheme) in _REMOVED_AT_ONCE:
        _remove_at_once(batch, items, workers, count, work)
        return
    workers.share(batch, items, count, work)


def _remove_at_once(
    batch: ActiveBatch,
    items: Sequence[PathItem],
    workers: WorkerThreads,
    count: int,
    remove_one: Callable[[Storage, PathItem], None],
) -> None:
    """Remove files by one request for many; then those that the server has not confirmed, and all else, one by one."""

    def together(storage: Storage, group: Sequence[PathItem]) -> Sequence[PathItem]:
        storage.timeouts = Timeouts.of(batch.request.limits)
        backend = storage.group_backend(StorageUrl(group[0].url)) if isinstance(storage, GroupStorage) else None
        if backend is None:
            return group
        begun = [item for item in group if may_begin(batch, item.key)]
        try:
            gone = backend.remove_at_once([StorageUrl(item.url) for item in begun])
        except (StoppedError, StorageError):
            # Which are gone is not known: each one shows it by itself.
            return begun
        for item, is_gone in zip(begun, gone, strict=True):
            if is_gone:
                batch.done(item.key)
        return [item for item, is_gone in zip(begun, gone, strict=True) if not is_gone]

    def alone(storage: Storage, item: PathItem) -> None:
        if may_begin(batch, item.key):
            remove_one(storage, item)

    plain = [item for item in items if not item.directory and not must_recheck(item)]
    others = [item for item in items if item.directory or must_recheck(item)]
    by_server: dict[str, list[PathItem]] = {}
    for item in plain:
        by_server.setdefault(StorageUrl(item.url).server, []).append(item)
    groups = [
        alike[start : start + _MOST_AT_ONCE]
        for alike in by_server.values()
        for start in range(0, len(alike), _MOST_AT_ONCE)
    ]
    workers.share_groups(batch, [*groups, *([item] for item in others)], count, together, alone)


def must_recheck(item: PathItem) -> bool:
    """Whether a file may have been replaced since its listing: after a pause, a lost attempt, or its copy.

    A lost attempt may have removed it, and its owner made a new one. Directories are removed only if they are empty.
    """
    if item.directory:
        return False
    if item.listed_at is None:
        return item.listed_size is not None
    return item.again or time.time() - item.listed_at > _MAX_LISTING_AGE_S


def check_unchanged_since_listing(item: PathItem, there: FileStat | None) -> None:
    """Raise `StorageError` if a file to remove is not the one that was listed, by what its storage reports."""
    if there is not None and (_is_another(item, there) or _is_later(item, there)):
        raise StorageError(
            f"{item.url} was written to after it was listed, or is another file: it was not removed",
            code=FailureCode.CHANGED,
            scope=item.scope,
        )


def _is_later(item: PathItem, there: FileStat) -> bool:
    return there.mtime is not None and item.listed_at is not None and there.mtime > item.listed_at + FRESH_S


def _is_another(item: PathItem, there: FileStat) -> bool:
    if item.listed_size is None or (there.kind == "link" and item.listed_mtime is None):
        # A link has no bytes of its own; what it leads to may be gone.
        return False
    has_other_time = None not in (there.mtime, item.listed_mtime) and there.mtime != item.listed_mtime
    return there.kind in ("directory", "other") or there.size != item.listed_size or has_other_time


def discard_items(
    batch: ActiveBatch, items: Sequence[PathItem], workers: WorkerThreads, count: int, *, ways: int
) -> None:
    """Run a ``discard`` request: a missing file counts as done.

    Args:
        batch: of the request.
        items: those without an outcome.
        workers: threads to use.
        count: how many of them.
        ways: how many temporary names an attempt may have used (`copying.temporary_name`).
    """

    def work(storage: Storage, item: PathItem) -> None:
        for way in range(ways):
            try:
                storage.remove(StorageUrl(copying.temporary_name(item.url, way)), directory=item.directory)
            except StorageError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise error.at(FailureScope.DESTINATION) from None
        batch.done(item.key)

    workers.share(batch, items, count, work)


def make_directories(
    batch: ActiveBatch, items: Sequence[PathItem], workers: WorkerThreads, count: int, *, parents: bool
) -> None:
    """Run a ``mkdir`` request."""

    def work(storage: Storage, item: PathItem) -> None:
        url = StorageUrl(item.url)
        if parents or item.again:
            at_destination(ensure_directory, storage, url)
        elif not _is_made(batch, storage, item, url):
            at_destination(storage.make_directory, url)
        at_destination(storage.sync_directory, url.parent)
        batch.done(item.key)

    workers.share(batch, items, count, work)


def _is_made(batch: ActiveBatch, storage: Storage, item: PathItem, url: StorageUrl) -> bool:
    """Whether an earlier attempt has made a directory; if not, the begin of this one was stored."""
    found = item.found
    there = at_destination(storage.stat, url)
    if there is not None:
        if found is not None and found["destination"] is None and there.kind == "directory":
            batch.log(item.key, "it exists: an earlier attempt, which had found nothing there, has made it")
            return True
        raise StorageError(f"{url} is there", errno=errno.EEXIST, scope=FailureScope.DESTINATION)
    batch.begin(item.key, FoundBefore(source=None, destination=None), storage.timeouts.stall_s)
    return False


def rename_items(
    batch: ActiveBatch, items: Sequence[RenameItem], workers: WorkerThreads, count: int, *, replace: bool
) -> None:
    """Run a ``rename`` request."""

    def work(storage: Storage, item: RenameItem) -> None:
        source, destination = StorageUrl(item.source), StorageUrl(item.destination)
        there = at_source(storage.stat, source)
        in_the_way = at_destination(storage.stat, destination)
        if there is None:
            if not _is_renamed(destination, item.found, in_the_way):
                raise StorageError(
                    f"{source} does not exist",
                    errno=errno.ENOENT,
                    code=FailureCode.NOT_FOUND,
                    scope=FailureScope.SOURCE,
                )
            batch.log(
                item.key, "it has its new name: an earlier attempt, which had found it at the source, has renamed it"
            )
            batch.done(item.key)
            return
        if (
            in_the_way is not None
            and _may_have_begun(item.found, there, in_the_way)
            and at_destination(storage.continue_rename, source, destination)
        ):
            batch.log(item.key, "an earlier attempt, which had found nothing at the destination, has renamed a part")
            batch.done(item.key)
            return
        if in_the_way is not None:
            _check_destination_free(destination, there.kind, in_the_way.kind, replace=replace)
        found = FoundBefore(source=_fingerprint(there), destination=_fingerprint(in_the_way))
        batch.begin(item.key, found, storage.timeouts.stall_s)
        at_destination(storage.rename, source, destination, replace=replace)
        for directory in {source.parent, destination.parent}:
            at_destination(storage.sync_directory, directory)
        batch.done(item.key)

    workers.share(batch, items, count, work)


def _may_have_begun(found: FoundBefore | None, there: FileStat, in_the_way: FileStat) -> bool:
    """Whether an earlier attempt may have made the directory at the destination, as a part of its rename."""
    return found is not None and found["destination"] is None and there.kind == in_the_way.kind == "directory"


def _fingerprint(file_stat: FileStat | None) -> Fingerprint | None:
    """Identifies an entry later: its kind, and size and mtime unless it is a directory."""
    if file_stat is None:
        return None
    return [file_stat.kind] if file_stat.kind == "directory" else [file_stat.kind, file_stat.size, file_stat.mtime]


def _is_renamed(destination: StorageUrl, found: FoundBefore | None, there: FileStat | None) -> bool:
    """Whether the entry at the destination is the one that an earlier attempt found at the source.

    Args:
        destination: its URL.
        found: state that the earlier attempt found; None if none had begun.
        there: what is at the destination now.
    """
    now, source = _fingerprint(there), None if found is None else found["source"]
    if found is None or now is None or source is None or now[:2] != source[:2]:
        return False
    if now == found["destination"] != source:
        # The destination is unchanged.
        return False
    keeps_mtime = JobProtocol.of_scheme(destination.scheme) not in _RENAMED_BY_COPY
    return not keeps_mtime or None in (*now[2:], *source[2:]) or now[2:] == source[2:]


def _check_destination_free(destination: StorageUrl, kind: FileKind, in_the_way: FileKind, *, replace: bool) -> None:
    if not replace:
        raise StorageError(
            f"{destination} is there", errno=errno.EEXIST, code=FailureCode.EXISTS, scope=FailureScope.DESTINATION
        )
    if in_the_way == "directory" and kind != "directory":
        raise StorageError(
            f"{destination} is a directory",
            errno=errno.EISDIR,
            code=FailureCode.IS_A_DIRECTORY,
            scope=FailureScope.DESTINATION,
        )


def check_items(batch: ActiveBatch, request: CheckRequest, workers: WorkerThreads, count: int) -> None:
    """Compare files with their known sizes and checksums in ``count`` threads; nothing is written."""

    def work(storage: Storage, item: CheckItem) -> None:
        scoped(request.at, _compare, storage, item, request.checksum)
        batch.log(item.key, f"{item.size} bytes, {item.checksum or 'no checksum given'}: as it must be")
        batch.done(item.key, item.size, 0, item.checksum, already_there=True)

    workers.share(batch, request.items, count, work)


def _compare(storage: Storage, item: CheckItem, algorithm: ChecksumAlgorithm) -> None:
    """Raise `StorageError` if a file is not what it must be."""
    url = StorageUrl(item.url)
    size = _size(storage, url)
    if size != item.size:
        raise StorageError(f"it has {size} bytes, and had {item.size}", code=FailureCode.DIFFERS)
    if item.checksum is None:
        return
    found = f"{algorithm}:{storage.checksum(url, algorithm)}"
    if found != item.checksum:
        raise StorageError(f"it has {found}, and had {item.checksum}", code=FailureCode.DIFFERS)


def _size(storage: Storage, url: StorageUrl) -> int:
    """Bytes of a file, links followed."""
    there = storage.existing(url)
    kind = there.target_kind if there.kind == "link" else there.kind
    if kind == "directory":
        raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
    if kind == "other":
        raise StorageError(f"{url} is no file", code=FailureCode.SPECIAL_FILE)
    return there.size if there.kind == "file" else storage.size(url)


def carry_out_items(
    batch: ActiveBatch, request: ItemRequest, workers: WorkerThreads, items_per_worker: int, *, ways: int = 1
) -> None:
    """Run a request that has items.

    Args:
        batch: of the request.
        request: with the items that have no outcome.
        workers: threads to use.
        items_per_worker: number of items for each further thread.
        ways: how many temporary names an attempt may have used (`copying.temporary_name`).
    """
    count = 1 + len(request.items) // items_per_worker
    match request:
        case CopyRequest():
            copying.copy(batch, request, request.items, workers, count)
        case CheckRequest():
            check_items(batch, request, workers, count)
        case RemoveRequest():
            remove_items(batch, request.items, workers, count)
        case RenameRequest():
            rename_items(batch, request.items, workers, count, replace=request.overwrite == "always")
        case MkdirRequest():
            make_directories(batch, request.items, workers, count, parents=request.parents)
        case DiscardRequest():
            discard_items(batch, request.items, workers, count, ways=ways)

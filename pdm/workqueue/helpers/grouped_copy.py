"""Copies of small files in groups: each step is done for all files of a group before the next step.

So a group costs as many round trips as one file. The bytes pass through memory. After any unexpected result a file is
left to `copying.FileCopier`, which copies it alone and finds the reason; a file is reported here only after it was
verified and renamed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.checksums import checksum_of
from pdm.workqueue.helpers.copying import CHANGED, CLEAN_UP_HURRY_S, SETTLE_S, FileCopier, FileCopy, discard
from pdm.workqueue.helpers.directories import TargetDirectory
from pdm.workqueue.helpers.group_backend import GroupBackend, GroupStorage
from pdm.workqueue.helpers.preserving import AttributeCopier
from pdm.workqueue.helpers.storage import (
    FileStat,
    FileVersion,
    StoppedError,
    Storage,
    StorageError,
    Timeouts,
    at_destination,
    at_source,
)
from pdm.workqueue.helpers.threads import WorkerThreads, may_begin
from pdm.workqueue.wire.agent_requests import CopyItem, CopyRequest, PreservedAttribute

#: Larger files are copied alone: their bytes take longer than their round trips.
_LARGEST = 256 * 1024
#: Files, and bytes, of a group. Each file may be an open handle at the server.
_MOST_FILES, _MOST_BYTES = 64, 4 * 1024 * 1024
#: Files of a group where a step lists directories: the group ends with a directory rather than in it.
_MOST_LISTED = 2 * _MOST_FILES
_LISTED = frozenset(JobProtocol.HTTPS.info.schemes)
#: Threads for small files: each has many requests under way, and more threads wait for the interpreter's lock.
_GROUP_THREADS = 2
#: Fewer files are not shared by threads: each step costs round trips, and of some servers a listing.
_FEWEST_FILES = 32


def copy(
    batch: ActiveBatch, request: CopyRequest, items: Sequence[CopyItem], workers: WorkerThreads, count: int
) -> None:
    """Run a ``copy`` request in ``count`` threads, small files in groups."""
    copier = GroupCopier(batch, request, items)
    if all(item.size <= _LARGEST for item in items):
        count = min(count, _GROUP_THREADS)
    groups = list(_groups(items, workers.limited(count)))
    workers.share_groups(batch, groups, count, copier.copy_group, copier.copy_one)


def _groups(items: Iterable[CopyItem], threads: int) -> Iterator[list[CopyItem]]:
    """Groups of small files with the same two servers, enough for all threads; larger files alone."""
    small: dict[tuple[str, str], list[CopyItem]] = {}
    for item in items:
        if item.is_plain and item.size <= _LARGEST:
            servers = StorageUrl(item.source).server, StorageUrl(item.destination).server
            small.setdefault(servers, []).append(item)
        else:
            yield [item]
    for servers, alike in small.items():
        is_listed = any(StorageUrl(server).scheme in _LISTED for server in servers)
        most = _MOST_LISTED if is_listed else _MOST_FILES
        most = min(max(-(-len(alike) // threads), _FEWEST_FILES), most)
        group: list[CopyItem] = []
        size = 0
        for item in alike:
            is_long = len(group) >= _FEWEST_FILES and is_listed
            if (
                len(group) == most
                or size + item.size > _MOST_BYTES
                or (is_long and _directory(item) != _directory(group[-1]))
            ):
                yield group
                group, size = [], 0
            group.append(item)
            size += item.size
        yield group


def _directory(item: CopyItem) -> str:
    return item.destination.rpartition("/")[0]


class _GroupedFile:
    """A file of a group.

    Attributes:
        key: of the item.
        source: its source.
        destination: its final name.
        temporary: its temporary name.
        size: bytes, as listed.
        directory: directory of the destination.
        content: its bytes, after they were read.
        version: of the source, before its bytes were read.
        attributes: of the source, if they are preserved.
        not_preserved: names of those that could not be.
        checksum: of the bytes, with its algorithm, if requested.
        began_at: when the copy began (`time.monotonic`).
    """

    def __init__(self, item: CopyItem, directory: TargetDirectory) -> None:
        self.key, self.source, self.destination, self.temporary, _, self.size, _ = FileCopy.of(item)
        self.directory = directory
        self.content = b""
        self.version = FileVersion(0)
        self.checksum: str | None = None
        self.attributes = FileStat("file")
        self.not_preserved: tuple[PreservedAttribute, ...] = ()
        self.began_at = time.monotonic()


class GroupCopier:
    """Copies the files of a batch, in groups or alone."""

    def __init__(self, batch: ActiveBatch, request: CopyRequest, items: Sequence[CopyItem]) -> None:
        self.batch = batch
        self.limits = request.limits
        self.replaces = request.overwrite != "never"
        # A file that is there may need other attributes: it is looked at alone.
        self.compares = request.overwrite == "different" and not request.preserve
        self.with_checksums = request.verify == "checksum"
        self.algorithm = request.checksum
        self.attributes = AttributeCopier(request.preserve)
        self.copier = FileCopier(batch, request, items)
        #: Keys of files whose temporary name may exist.
        self.written: set[int] = set()

    def copy_one(self, storage: Storage, item: CopyItem) -> None:
        """Copy a file alone, after removing what its group may have left."""
        copy = FileCopy.of(item)
        if item.key not in self.written:
            if may_begin(self.batch, item.key):
                self.copier.copy(storage, copy)
        elif self.batch.is_ended(item.key):
            leftover = self.copier.clean_up(storage, copy.temporary, StoppedError())
            self.batch.cancelled(item.key, leftover=leftover)
        else:
            try:
                at_destination(discard, storage, copy.temporary)
            except StoppedError:
                self.batch.cancelled(item.key, leftover=True)
            except StorageError as error:
                self.batch.failed(item.key, error, leftover=True)
            else:
                self.copier.copy(storage, copy)

    def copy_group(self, storage: Storage, items: Sequence[CopyItem]) -> Sequence[CopyItem]:
        """Copy the files of a group; returns those that must be copied alone."""
        if not isinstance(storage, GroupStorage):
            return items
        storage.timeouts = Timeouts.of(self.limits, sum(item.size for item in items))
        storage.log_to(lambda text: self.batch.log(items[0].key, text))
        first = FileCopy.of(items[0])
        try:
            source, destination = storage.group_backend(first.source), storage.group_backend(first.temporary)
            if source is None or destination is None or not (source.has_round_trips or destination.has_round_trips):
                return items
            if not destination.renames_groups(first.temporary, self.replaces):
                return items
        except (StoppedError, StorageError):
            return items
        _GroupCopy(self, storage, source, destination).carry_out(items)
        opened = set(self.batch.open_keys())
        return [item for item in items if item.key in opened]


class _GroupCopy:
    """The copy of one group.

    Args:
        copier: of the batch.
        storage: of the thread.
        source: backend of the sources.
        destination: backend of the destinations.
    """

    def __init__(self, copier: GroupCopier, storage: Storage, source: GroupBackend, destination: GroupBackend) -> None:
        self._copier = copier
        self._batch = copier.batch
        self._storage = storage
        self._source = source
        self._destination = destination
        #: Files that were started, and are neither left nor done.
        self._open: dict[int, _GroupedFile] = {}
        self._is_renaming = False

    def carry_out(self, items: Sequence[CopyItem]) -> None:
        """Copy; files without an outcome afterwards are left."""
        try:
            self._begin(items)
            for step in (
                *(self._read, self._read_attributes, self._check_unchanged, self._write, self._check_sizes),
                *(self._check_content, self._check_case, self._preserve, self._rename),
            ):
                if self._open:
                    step(list(self._open.values()))
        except StoppedError as stopped:
            self._end(list(self._open.values()), stopped)
        except StorageError as error:
            if self._is_renaming:
                # It is unknown which of them were renamed: the next attempt looks at each.
                self._end(list(self._open.values()), error)
            elif error.timed_out:
                # The other files are copied alone, which shows whether they fail, too.
                self._end(list(self._open.values())[:1], error)
            if error.lost:
                time.sleep(SETTLE_S)

    def _leave(self, file: _GroupedFile, why: str) -> None:
        self._batch.log(file.key, f"is copied alone: {why}")
        del self._open[file.key]

    # -- the steps

    def _begin(self, items: Sequence[CopyItem]) -> None:
        """Keep the files whose directory can be used and whose name is free."""
        unknown, existing = [], []
        for item in items:
            url = StorageUrl(item.destination)
            if not url.name.isascii():
                # The storage may treat it as the same name as another: check each file alone.
                continue
            try:
                directory = self._copier.copier.open_directory(self._storage, url)
            except StorageError as error:
                if error.is_of_server:
                    raise
                continue
            if any(directory.may_hold(StorageUrl(stale)) for stale in item.stale):
                continue
            there = directory.stat(self._storage, url) if directory.known is not None else None
            is_alike = there is not None and (there.kind, there.size) == ("file", item.size)
            if there is not None and not (is_alike and self._copier.compares):
                continue
            if not may_begin(self._batch, item.key):
                continue
            file = self._open[item.key] = _GroupedFile(item, directory)
            if directory.known is None:
                unknown.append(file)
            elif is_alike:
                existing.append(file)
        free = self._destination.are_free([file.destination for file in unknown]) if unknown else []
        for file, is_free in zip(unknown, free, strict=True):
            if not is_free:
                self._leave(file, "its destination exists")
        if existing:
            self._compare(existing)

    def _compare(self, files: Sequence[_GroupedFile]) -> None:
        """Report the files that the destination already has; others of the same size are replaced alone."""
        at_both = (
            at_source(self._source.read_group, [(file.source, file.size) for file in files]),
            at_destination(self._destination.read_group, [(file.destination, file.size) for file in files]),
        )
        for file, here, there in zip(files, *at_both, strict=True):
            if here is None or there is None or len(here.data) != file.size or here.data != there.data:
                self._leave(file, "its destination exists")
                continue
            del self._open[file.key]
            checksum = f"{self._copier.algorithm}:{checksum_of(self._copier.algorithm, [here.data])}"
            self._batch.log(file.key, f"already there: {file.destination} has the same size and {checksum}")
            self._batch.done(file.key, file.size, 0, checksum, already_there=True)

    def _read(self, files: Sequence[_GroupedFile]) -> None:
        asked_at = time.time()
        found = at_source(self._source.read_group, [(file.source, file.size) for file in files])
        for file, content in zip(files, found, strict=True):
            if content is None or len(content.data) != file.size:
                self._leave(file, "the source cannot be read, or has another size")
            elif content.version.may_hide_writes(asked_at):
                self._leave(file, "the source was written to recently")
            else:
                file.content, file.version = content

    def _read_attributes(self, files: Sequence[_GroupedFile]) -> None:
        for file in files:
            try:
                file.attributes = self._copier.attributes.read(self._storage, file.source)
            except StorageError as error:
                if error.is_of_server:
                    raise
                self._leave(file, error.message)

    def _check_unchanged(self, files: Sequence[_GroupedFile]) -> None:
        versions = at_source(self._source.group_versions, [file.source for file in files])
        for file, version in zip(files, versions, strict=True):
            if version != file.version:
                self._leave(file, CHANGED)

    def _write(self, files: Sequence[_GroupedFile]) -> None:
        self._copier.written.update(file.key for file in files)
        self._destination.expect_own({file.directory.url for file in files if file.directory.is_new})
        made = at_destination(self._destination.write_group, [(file.temporary, file.content) for file in files])
        for file, is_made in zip(files, made, strict=True):
            if is_made:
                elapsed_s = time.monotonic() - file.began_at
                self._batch.log(file.key, f"transferred to {file.temporary} in {elapsed_s:.3f} s, with others")
            else:
                self._leave(file, "it cannot be written")

    def _check_sizes(self, files: Sequence[_GroupedFile]) -> None:
        if self._copier.with_checksums:
            # Their bytes are compared next.
            return
        sizes = at_destination(self._destination.group_sizes, [file.temporary for file in files])
        for file, size in zip(files, sizes, strict=True):
            if size != file.size:
                self._leave(file, f"{size} of {file.size} bytes arrived")

    def _check_content(self, files: Sequence[_GroupedFile]) -> None:
        """Compare the written files with their sources."""
        if not self._copier.with_checksums:
            return
        arrived = at_destination(self._destination.read_group, [(file.temporary, file.size) for file in files])
        for file, content in zip(files, arrived, strict=True):
            if content is None or content.data != file.content:
                self._leave(file, "other bytes arrived")
            else:
                file.checksum = f"{self._copier.algorithm}:{checksum_of(self._copier.algorithm, [file.content])}"

    def _check_case(self, files: Sequence[_GroupedFile]) -> None:
        for file in files:
            if at_destination(file.directory.ignores_case, self._storage, file.temporary):
                self._leave(file, "the destination ignores case")

    def _preserve(self, files: Sequence[_GroupedFile]) -> None:
        for file in files:
            try:
                file.not_preserved = self._copier.attributes.apply(
                    self._storage, file.temporary, file.attributes, partial(self._batch.log, file.key)
                )
            except StorageError as error:
                if error.is_of_server:
                    raise
                self._leave(file, error.message)

    def _rename(self, files: Sequence[_GroupedFile]) -> None:
        self._is_renaming = True
        renames = [(file.temporary, file.destination, file.size) for file in files]
        named = at_destination(self._destination.rename_group, renames, replace=self._copier.replaces)
        for file, is_named in zip(files, named, strict=True):
            if not is_named:
                self._leave(file, "it cannot be renamed")
        for directory_url in {file.directory.url for file in self._open.values()}:
            at_destination(self._storage.sync_directory, directory_url)
        for file in list(self._open.values()):
            del self._open[file.key]
            proof = file.checksum or "no checksum asked for"
            self._batch.log(file.key, f"{file.size} bytes, {proof}: renamed to {file.destination}")
            self._batch.done(file.key, file.size, file.size, file.checksum, not_preserved=file.not_preserved)

    # -- failed files

    def _end(self, files: Sequence[_GroupedFile], error: StoppedError | StorageError) -> None:
        """Remove the temporary files of failed copies, and report the failures."""
        left = self._left_over([file for file in files if file.key in self._copier.written])
        for file in files:
            del self._open[file.key]
            if isinstance(error, StoppedError):
                self._batch.cancelled(file.key, leftover=file.key in left)
            else:
                self._batch.failed(file.key, error, leftover=file.key in left)

    def _left_over(self, files: Sequence[_GroupedFile]) -> set[int]:
        """Remove temporary files; returns the keys of those that may still exist."""
        if not files:
            return set()
        self._storage.resume()
        self._storage.timeouts = Timeouts.within(CLEAN_UP_HURRY_S)
        temporary = [file.temporary for file in files]
        try:
            self._destination.remove_group(temporary)
            # A server whose session was cut may still open its file shortly after.
            time.sleep(SETTLE_S)
            gone = self._destination.remove_group(temporary)
        except (StoppedError, StorageError):
            return {file.key for file in files}
        return {file.key for file, is_gone in zip(files, gone, strict=True) if not is_gone}

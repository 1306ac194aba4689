"""The checks before a transfer and the proof after it, of many files at once: each step for all before the next one.

At a server that takes commands one after the other without waiting for replies (GridFTP), a group costs as many round
trips as one file, and a third of the CPU for each. What is not as expected is left to `copying.FileCopier`, which looks
at the file alone and finds the reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.copying import FileCopier, FileCopy, PendingCopy
from pdm.workqueue.helpers.directories import TargetDirectory
from pdm.workqueue.helpers.group_backend import GroupBackend, GroupStorage
from pdm.workqueue.helpers.storage import (
    StoppedError,
    Storage,
    StorageError,
    Timeouts,
    at_destination,
    at_source,
)
from pdm.workqueue.helpers.threads import may_begin
from pdm.workqueue.wire.agent_requests import CopyItem, CopyRequest

#: Files, and bytes, of a group: a server reads all of them for their checksums.
_MOST_FILES, _MOST_BYTES = 100, 256 * 1024 * 1024


def groups(items: Sequence[CopyItem]) -> Iterator[list[CopyItem]]:
    """Groups of items with the same two servers."""
    alike: dict[tuple[str, str], list[CopyItem]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for item in items:
        servers = StorageUrl(item.source).server, StorageUrl(item.destination).server
        group = alike.setdefault(servers, [])
        if len(group) == _MOST_FILES or (group and sizes[servers] + item.size > _MOST_BYTES):
            yield group
            group = alike[servers] = []
        sizes[servers] = max(item.size, 0) + (sizes[servers] if group else 0)
        group.append(item)
    yield from alike.values()


class FileGroups:
    """Checks and proves the files of a batch in groups, whose items have the same two servers."""

    def __init__(self, batch: ActiveBatch, request: CopyRequest, copier: FileCopier) -> None:
        self._batch = batch
        self._limits = request.limits
        self._replaces = request.overwrite != "never"
        self._algorithm = request.checksum if request.verify == "checksum" else None
        self._preserves = bool(request.preserve)
        self._copier = copier

    # -- before the transfer

    def begin(self, storage: Storage, items: Sequence[CopyItem]) -> dict[int, PendingCopy]:
        """Check both ends of copies to names that are free; those by key that may be transferred."""
        try:
            return self._begin(storage, items)
        except (StoppedError, StorageError):
            # Each alone meets the error again.
            return {}

    def _begin(self, storage: Storage, items: Sequence[CopyItem]) -> dict[int, PendingCopy]:
        ends = self._ends(storage, [FileCopy.of(item) for item in items])
        if ends is None:
            return {}
        source, destination = ends
        files: list[tuple[FileCopy, TargetDirectory]] = []
        unknown: list[tuple[FileCopy, TargetDirectory]] = []
        for item in items:
            file = FileCopy.of(item)
            if not file.destination.name.isascii() or file.size < 0:
                # The storage may treat it as the same name as another.
                continue
            try:
                directory = self._copier.open_directory(storage, file.destination)
            except StorageError as error:
                if error.is_of_server:
                    raise
                continue
            if not any(directory.may_hold(stale) for stale in file.stale):
                if directory.known is None:
                    unknown.append((file, directory))
                elif directory.stat(storage, file.destination) is None:
                    files.append((file, directory))
        if unknown:
            free = at_destination(destination.are_free, [file.destination for file, _ in unknown])
            files += [each for each, is_free in zip(unknown, free, strict=True) if is_free]
        if not files:
            return {}
        asked_at = time.time()
        versions = at_source(source.group_versions, [file.source for file, _ in files])
        return {
            file.key: self._copier.pending(file, directory, version, asked_at, is_new=True)
            for (file, directory), version in zip(files, versions, strict=True)
            if version is not None and may_begin(self._batch, file.key)
        }

    # -- after it

    def prove(self, storage: Storage, files: Sequence[PendingCopy]) -> None:
        """Prove transferred files and rename them; those without an outcome afterwards are to be proven alone."""
        renaming: list[PendingCopy] = []
        try:
            self._prove(storage, files, renaming)
        except (StoppedError, StorageError) as error:
            # It is unknown which of them were renamed: the next attempt looks at each.
            for pending in renaming:
                if isinstance(error, StoppedError):
                    self._batch.cancelled(pending.item.key, leftover=True)
                else:
                    self._batch.failed(pending.item.key, error, leftover=True)

    def _prove(self, storage: Storage, files: Sequence[PendingCopy], renaming: list[PendingCopy]) -> None:
        ends = self._ends(storage, [pending.item for pending in files])
        if ends is None or self._preserves:
            return
        source, destination = ends
        left = [
            pending
            for pending in files
            # Without checksums, a source that was written to lately needs one; other names may be those of other files.
            if pending.is_new
            and (self._algorithm is not None or not pending.doubted)
            and pending.item.destination.name.isascii()
        ]
        sizes = at_destination(destination.group_sizes, [pending.item.temporary for pending in left]) if left else []
        left = [pending for pending, size in zip(left, sizes, strict=True) if size == pending.item.size]
        sums = self._sums(source, destination, left)
        left = [pending for pending in left if pending.item.key in sums]
        versions = at_source(source.group_versions, [pending.item.source for pending in left]) if left else []
        left = [pending for pending, version in zip(left, versions, strict=True) if version == pending.version]
        left = [
            pending
            for pending in left
            if not at_destination(pending.directory.ignores_case, storage, pending.item.temporary)
            and not self._batch.is_ended(pending.item.key)
        ]
        if left:
            renaming += left
            self._rename(storage, destination, left, sums)

    def _sums(
        self, source: GroupBackend, destination: GroupBackend, files: Sequence[PendingCopy]
    ) -> dict[int, str | None]:
        """By key, the checksum that both ends have; None if none is asked for."""
        algorithm = self._algorithm
        if algorithm is None or not files:
            return {pending.item.key: None for pending in files}
        ends = (
            at_source(source.group_checksums, [pending.item.source for pending in files], algorithm),
            at_destination(destination.group_checksums, [pending.item.temporary for pending in files], algorithm),
        )
        return {
            pending.item.key: f"{algorithm}:{here}"
            for pending, here, there in zip(files, *ends, strict=True)
            if here is not None and here == there and pending.item.checksum in (None, f"{algorithm}:{here}")
        }

    def _rename(
        self,
        storage: Storage,
        destination: GroupBackend,
        files: Sequence[PendingCopy],
        sums: dict[int, str | None],
    ) -> None:
        names = [(pending.item.temporary, pending.item.destination, pending.item.size) for pending in files]
        named = at_destination(destination.rename_group, names, replace=self._replaces)
        done = [pending for pending, is_named in zip(files, named, strict=True) if is_named]
        for directory_url in {pending.directory.url for pending in done}:
            at_destination(storage.sync_directory, directory_url)
        for pending in done:
            item, checksum = pending.item, sums[pending.item.key]
            proof = checksum or "no checksum asked for"
            self._batch.log(item.key, f"transferred to {item.temporary} in {pending.reporter.elapsed:.3f} s")
            self._batch.log(item.key, f"{item.size} bytes, {proof}: renamed to {item.destination}")
            self._batch.done(item.key, item.size, item.size, checksum)

    # -- both

    def _ends(self, storage: Storage, files: Sequence[FileCopy]) -> tuple[GroupBackend, GroupBackend] | None:
        """The backends of a group; None if they have no group operations."""
        if not isinstance(storage, GroupStorage) or len(files) < 2:
            return None
        storage.timeouts = Timeouts.of(self._limits, sum(max(file.size, 0) for file in files)).with_slack()
        first = files[0]
        storage.log_to(lambda text: self._batch.log(first.key, text))
        source, destination = storage.group_backend(first.source), storage.group_backend(first.temporary)
        if source is None or destination is None or not destination.renames_groups(first.temporary, self._replaces):
            return None
        return source, destination

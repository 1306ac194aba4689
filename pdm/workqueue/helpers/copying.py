"""Verified copies: transfer to a temporary name, compare size and checksum, then rename."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.directories import TargetDirectories, TargetDirectory
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
from pdm.workqueue.helpers.threads import WorkerThreads
from pdm.workqueue.wire.agent_requests import CopyItem, CopyRequest

#: Seconds for the removal of a temporary file after a failed transfer; fewer after a cancel, which must be quick, and
#: at a server that did not answer.
_CLEAN_UP_S, CLEAN_UP_HURRY_S = 10.0, 3.0
#: Errors that every new file in the same directory would have.
_DIRECTORY_ERRNOS = frozenset({errno.EACCES, errno.EROFS})
#: Message for a source whose copy cannot be trusted.
CHANGED = "the source was written to while it was copied"
#: A server whose session was cut may still open its file shortly after.
SETTLE_S = 0.05


def copy(
    batch: ActiveBatch, request: CopyRequest, items: Sequence[CopyItem], workers: WorkerThreads, count: int
) -> None:
    """Run a ``copy`` request in ``count`` threads."""
    copier = FileCopier(batch, request, items)
    workers.share(batch, items, count, lambda storage, item: copier.copy(storage, FileCopy.of(item)))


class FileCopy(NamedTuple):
    """A `CopyItem` with its URLs as values."""

    key: int
    source: StorageUrl
    destination: StorageUrl
    temporary: StorageUrl
    stale: Sequence[StorageUrl]
    size: int
    checksum: str | None

    @classmethod
    def of(cls, item: CopyItem) -> FileCopy:
        source, destination, temporary = map(StorageUrl, (item.source, item.destination, item.temporary))
        return cls(
            item.key, source, destination, temporary, [StorageUrl(url) for url in item.stale], item.size, item.checksum
        )


class PendingCopy(NamedTuple):
    """A copy between its first checks and its verification.

    Attributes:
        item: of the request.
        directory: directory of the destination.
        version: of the source before the transfer.
        reporter: reports progress to the daemon.
        doubted: whether a write may leave the version unchanged: then the bytes are compared.
        is_new: whether the destination name was free.
    """

    item: FileCopy
    directory: TargetDirectory
    version: FileVersion
    reporter: ProgressReporter
    doubted: bool
    is_new: bool


def _as_given(item: FileCopy, checksum: str) -> str:
    """A checksum that both ends have; refused if another one was given with the item."""
    if item.checksum not in (None, checksum):
        raise StorageError(
            f"{item.checksum} was given, and the file at the source has {checksum}",
            code=FailureCode.CHECKSUM_MISMATCH,
            scope=FailureScope.SOURCE,
        )
    return checksum


class FileCopier:
    """Copies the files of a batch, each in three steps: checks, transfer, verification."""

    def __init__(self, batch: ActiveBatch, request: CopyRequest, items: Sequence[CopyItem]) -> None:
        self._batch = batch
        self._overwrite = request.overwrite
        self._checksums = request.verify == "checksum"
        self._algorithm = request.checksum
        self._attributes = AttributeCopier(request.preserve)
        self._directories = TargetDirectories(items)
        #: Whether a source was unreadable: later ones are checked first, because a failed transfer costs logins.
        self._doubts_sources = False
        #: Directories in which no file can be made, with the reason.
        self._closed: dict[str, StorageError] = {}

    def copy(self, storage: Storage, item: FileCopy) -> None:
        """Copy one file, from the first check of its destination to its final name."""
        pending = self.begin(storage, item)
        if pending is None:
            return
        item = pending.item
        try:
            algorithm = self._algorithm if self._checksums or pending.doubted else None
            source_sum = storage.transfer(item.source, item.temporary, item.size, algorithm, pending.reporter.update)
        except (StoppedError, StorageError) as error:
            self.give_up(storage, pending, error)
        else:
            self.complete(storage, pending, source_sum)

    def open_directory(self, storage: Storage, destination: StorageUrl) -> TargetDirectory:
        """The directory of a destination; raises `StorageError` if it cannot be used."""
        directory = at_destination(self._directories.of, storage, destination)
        if directory.url in self._closed:
            raise self._closed[directory.url]
        return directory

    def begin(self, storage: Storage, item: FileCopy) -> PendingCopy | None:
        """Check both ends of a copy, and free the temporary name; None if it has its outcome already."""
        pending = None
        try:
            pending = self._begin(storage, item)
        finally:
            if pending is None:
                storage.forget_rename(item.temporary)
        return pending

    def _begin(self, storage: Storage, item: FileCopy) -> PendingCopy | None:
        destination = item.destination
        if item.size < 0:
            item = item._replace(size=at_source(storage.size, item.source))
            storage.timeouts = Timeouts.of(self._batch.request.limits, item.size)
        directory = at_destination(self._directories.of, storage, destination)
        stale_urls = [url for url in item.stale if directory.may_hold(url)]
        algorithm = self._algorithm if self._checksums else None
        at_destination(storage.expect_rename, item.temporary, destination, stale_urls, algorithm)
        for stale in stale_urls:
            at_destination(discard, storage, stale)
        there = at_destination(directory.stat, storage, destination)
        if there is not None:
            at_destination(directory.check_own_name, storage, destination)
            if self._is_there_already(storage, item, there):
                return None
        if directory.url in self._closed:
            raise self._closed[directory.url]
        if self._doubts_sources:
            at_source(storage.check_readable, item.source)
        try:
            asked_at = time.time()
            version = at_source(storage.version, item.source)
        except (StoppedError, StorageError) as error:
            self._fail(storage, item, directory, error)
            return None
        return self.pending(item, directory, version, asked_at, is_new=there is None)

    def pending(
        self, item: FileCopy, directory: TargetDirectory, version: FileVersion, asked_at: float, *, is_new: bool
    ) -> PendingCopy:
        """A copy whose checks have found this ``version`` of its source, which was asked for at ``asked_at``."""
        reporter = ProgressReporter(self._batch, item.key)
        return PendingCopy(item, directory, version, reporter, doubted=version.may_hide_writes(asked_at), is_new=is_new)

    def complete(self, storage: Storage, pending: PendingCopy, source_sum: str | None) -> None:
        """Verify a transferred file and rename it.

        Args:
            storage: of both ends.
            pending: result of `begin`.
            source_sum: checksum of the sent bytes, if they passed through this process.
        """
        item = pending.item
        try:
            self._batch.log(item.key, f"transferred to {item.temporary} in {pending.reporter.elapsed:.3f} s")
            try:
                checksum = self._prove(storage, item, source_sum)
            except StorageError as error:
                if error.code == FailureCode.CHECKSUM_MISMATCH:
                    # The source is probably being written to: an error of the transfer is less likely.
                    self._check_version(storage, item, pending.version)
                raise
            attributes = self._attributes.read(storage, item.source)
            self._check_unchanged(storage, item, pending.version, source_sum, doubted=pending.doubted)
            lacking = self._attributes.apply(storage, item.temporary, attributes, partial(self._batch.log, item.key))
            if self._overwrite == "never" or not pending.is_new:
                self._rename(storage, item, checksum)
            else:
                with pending.directory.alone(storage, item.temporary, item.destination):
                    at_destination(pending.directory.check_free, storage, item.destination)
                    self._rename(storage, item, checksum)
        except (StoppedError, StorageError) as error:
            self.give_up(storage, pending, error)
            return
        at_destination(storage.sync_directory, pending.directory.url)
        self._batch.done(item.key, item.size, item.size, checksum, not_preserved=lacking)

    def give_up(self, storage: Storage, pending: PendingCopy, error: StoppedError | StorageError) -> None:
        """Remove the temporary file of a failed copy, and report the failure."""
        self._fail(storage, pending.item, pending.directory, error)

    def _fail(
        self, storage: Storage, item: FileCopy, directory: TargetDirectory, error: StoppedError | StorageError
    ) -> None:
        leftover = self.clean_up(storage, item.temporary, error)
        if isinstance(error, StoppedError):
            self._batch.cancelled(item.key, leftover=leftover)
        else:
            self._learn_from(error, directory.url)
            self._batch.failed(item.key, error, leftover=leftover)

    def _learn_from(self, error: StorageError, directory_url: str) -> None:
        """Remember an error that later files of the batch would have as well."""
        if error.scope == FailureScope.SOURCE and error.errno is not None:
            self._doubts_sources = True
        elif error.scope == FailureScope.DESTINATION and error.errno in _DIRECTORY_ERRNOS:
            self._closed[directory_url] = error

    def _is_there_already(self, storage: Storage, item: FileCopy, there: FileStat) -> bool:
        """Decide about an existing destination; True if the copy is done."""
        destination = item.destination
        if "directory" in (there.kind, there.target_kind):
            raise StorageError(
                f"{destination} is a directory",
                errno=errno.EISDIR,
                code=FailureCode.IS_A_DIRECTORY,
                scope=FailureScope.DESTINATION,
            )
        if self._overwrite == "always":
            return False
        checksum = self._same(storage, item, there)
        if checksum is not None:
            self._batch.log(item.key, f"already there: {destination} has the same size and {checksum}")
            # What a link leads to may be another file of the user.
            attributes = self._attributes.read(storage, item.source) if there.kind == "file" else FileStat("file")
            lacking = self._attributes.apply(storage, destination, attributes, partial(self._batch.log, item.key))
            self._batch.done(item.key, item.size, 0, checksum, already_there=True, not_preserved=lacking)
            return True
        if self._overwrite == "never":
            raise _exists_error(destination, there.size)
        return False

    def _same(self, storage: Storage, item: FileCopy, there: FileStat) -> str | None:
        """The checksum that source and destination share, if they are identical."""
        if there.size != item.size:
            return None
        try:
            source_sum, destination_sum = storage.checksums(item.source, item.destination, item.size, self._algorithm)
        except StorageError as error:
            if error.code in (FailureCode.NO_CHECKSUM, FailureCode.UNSUPPORTED):
                # Without checksums they cannot be compared.
                return None
            raise
        return _as_given(item, f"{self._algorithm}:{source_sum}") if source_sum == destination_sum else None

    def _prove(self, storage: Storage, item: FileCopy, source_sum: str | None) -> str | None:
        """Compare the transferred file with its source.

        Returns:
            The checksum, if requested.
        """
        size = at_destination(storage.size, item.temporary)
        if size != item.size:
            source_size = at_source(storage.size, item.source)
            if source_size != item.size:
                raise StorageError(
                    f"the source had {item.size} bytes when it was listed and has {source_size} now",
                    code=FailureCode.SIZE_CHANGED,
                    scope=FailureScope.SOURCE,
                )
            raise StorageError(
                f"{size} of {source_size} bytes arrived",
                code=FailureCode.CHECKSUM_MISMATCH,
                scope=FailureScope.TRANSFER,
            )
        if not self._checksums:
            return None
        if source_sum is None:
            source_sum, arrived_sum = storage.checksums(item.source, item.temporary, size, self._algorithm)
        else:
            arrived_sum = at_destination(storage.checksum, item.temporary, self._algorithm)
        if source_sum != arrived_sum:
            raise StorageError(
                f"{self._algorithm} is {source_sum} at the source and {arrived_sum} at the destination",
                code=FailureCode.CHECKSUM_MISMATCH,
                scope=FailureScope.TRANSFER,
            )
        return _as_given(item, f"{self._algorithm}:{source_sum}")

    def _check_unchanged(
        self, storage: Storage, item: FileCopy, version: FileVersion, source_sum: str | None, *, doubted: bool
    ) -> None:
        """Fail a copy whose source was written to meanwhile: it may equal neither the old nor the new file.

        Args:
            storage: of both ends.
            item: the copy.
            version: of the source before the transfer.
            source_sum: checksum of the sent bytes, if they passed through this process.
            doubted: whether a write may leave the version unchanged.
        """
        source = item.source
        if doubted and (source_sum is not None or not self._checksums):
            # After a third-party copy, the verification has read the source already.
            try:
                sent = source_sum or at_destination(storage.checksum, item.temporary, self._algorithm)
                if at_source(storage.checksum, source, self._algorithm) != sent:
                    raise StorageError(CHANGED, code=FailureCode.SIZE_CHANGED, scope=FailureScope.SOURCE)
            except StorageError as error:
                if error.code != FailureCode.NO_CHECKSUM or self._checksums:
                    raise
        self._check_version(storage, item, version)

    @staticmethod
    def _check_version(storage: Storage, item: FileCopy, version: FileVersion) -> None:
        if at_source(storage.version, item.source) != version:
            raise StorageError(CHANGED, code=FailureCode.SIZE_CHANGED, scope=FailureScope.SOURCE)

    def _rename(self, storage: Storage, item: FileCopy, checksum: str | None) -> None:
        try:
            at_destination(
                storage.rename,
                item.temporary,
                item.destination,
                replace=self._overwrite != "never",
            )
        except StorageError as error:
            if error.errno == errno.EEXIST and self._overwrite == "never":
                raise _exists_error(item.destination, None) from None
            raise
        proof = checksum or "no checksum asked for"
        self._batch.log(item.key, f"{item.size} bytes, {proof}: renamed to {item.destination}")

    def clean_up(self, storage: Storage, temporary: StorageUrl, why: Exception) -> bool:
        """Remove the temporary file; True if it may still be there."""
        interrupted = self._batch.stopped
        storage.resume()
        hurry = interrupted or (isinstance(why, StorageError) and why.timed_out)
        longest_s = CLEAN_UP_HURRY_S if hurry else _CLEAN_UP_S
        storage.timeouts = Timeouts.within(longest_s)
        try:
            discard(storage, temporary)
            if interrupted:
                time.sleep(SETTLE_S)
                discard(storage, temporary)
        except StoppedError:
            return True
        except StorageError as error:
            # If nothing can be written there, there is no temporary file.
            return error.errno != errno.EROFS
        return False


def temporary_name(temporary: str, way: int) -> str:
    """The temporary name for the fallback number ``way`` of the same attempt; 0 is the first way.

    A session that was given up may open its file later, when a frozen server continues. With a name of its own it
    cannot overwrite a file that another way has verified.
    """
    return f"{temporary.removesuffix('.part')}.{way}.part" if way else temporary


def discard(storage: Storage, url: StorageUrl) -> None:
    try:
        storage.remove(url, directory=False)
    except StorageError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise


def _exists_error(destination: str, size: int | None) -> StorageError:
    what = "something is there" if size is None else f"another file of {size} bytes is there"
    return StorageError(
        f"{destination}: {what}", errno=errno.EEXIST, code=FailureCode.EXISTS, scope=FailureScope.DESTINATION
    )


class ProgressReporter:
    """Reports the progress of a transfer to the daemon."""

    def __init__(self, batch: ActiveBatch, key: int) -> None:
        self._batch = batch
        self._key = key
        self._began = self._last_at = time.monotonic()
        self._ended: float | None = None
        self._last = 0

    def restart(self) -> None:
        """Start the clock of the transfer."""
        self._began = self._last_at = time.monotonic()

    def end(self) -> None:
        """Stop the clock: the transfer has ended, and its verification waits for other files."""
        self._ended = time.monotonic()

    @property
    def elapsed(self) -> float:
        return (self._ended or time.monotonic()) - self._began

    def update(self, transferred: int) -> None:
        now = time.monotonic()
        instant = (transferred - self._last) / max(now - self._last_at, 1e-6)
        average = transferred / max(now - self._began, 1e-6)
        self._last, self._last_at = transferred, now
        self._batch.progress(self._key, transferred, instant, average, now - self._began)

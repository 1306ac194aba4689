"""Storage backends that run one operation for many files at once, in about the time of one."""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence
from typing import NamedTuple

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.storage import FileVersion, Storage
from pdm.workqueue.helpers.storage_backend import StorageBackend


class FileContent(NamedTuple):
    """The bytes of a small file.

    Attributes:
        data: the bytes; more than were requested if the file has grown.
        version: of the file before it was read.
    """

    data: bytes
    version: FileVersion


class GroupBackend(StorageBackend):
    """A backend with group operations: all URLs of a group are of one server, results are in the order of the URLs.

    A file that the server refuses has None or False in its place. `StorageError` and `StoppedError` concern the whole
    group, for example a lost connection.
    """

    #: Whether its operations cost round trips; a copy between two places of a backend without any is not grouped.
    has_round_trips: bool = True

    @abc.abstractmethod
    def renames_groups(self, url: StorageUrl, replace: bool) -> bool:
        """Whether `rename_group` is safe at the server of a URL."""

    @abc.abstractmethod
    def read_group(self, files: Sequence[tuple[StorageUrl, int]]) -> list[FileContent | None]:
        """Contents of files of known sizes, each with its version before it was read."""

    @abc.abstractmethod
    def group_versions(self, urls: Sequence[StorageUrl]) -> list[FileVersion | None]:
        """`Storage.version` of each file, comparable with those of `read_group`."""

    @abc.abstractmethod
    def write_group(self, files: Sequence[tuple[StorageUrl, bytes]]) -> list[bool]:
        """Write new files; True where the server took all bytes, like `StorageBackend.write`."""

    @abc.abstractmethod
    def group_sizes(self, urls: Sequence[StorageUrl]) -> list[int | None]:
        """Sizes in bytes."""

    def group_checksums(self, urls: Sequence[StorageUrl], algorithm: ChecksumAlgorithm) -> list[str | None]:
        """Checksums that the server computes, as `Storage.checksum`; None where it does not, or not for a group."""
        return [None] * len(urls)

    @abc.abstractmethod
    def are_free(self, urls: Sequence[StorageUrl]) -> list[bool]:
        """Whether each URL is free."""

    def expect_own(self, directories: Collection[StorageUrl]) -> None:  # few servers need it
        """Called before a group is written: of the directories of its files, those that were made for this batch."""

    @abc.abstractmethod
    def rename_group(self, files: Sequence[tuple[StorageUrl, StorageUrl, int]], *, replace: bool) -> list[bool]:
        """Rename files of known sizes within their directory, to names that were free when last checked.

        Without ``replace`` what is there by now is not replaced.
        """

    @abc.abstractmethod
    def remove_group(self, urls: Sequence[StorageUrl]) -> list[bool]:
        """Remove files; True where the name is free afterwards."""

    def remove_at_once(self, urls: Sequence[StorageUrl]) -> list[bool]:
        """Remove files by one request for many; True where the server says that the name is free now.

        Where the protocol or the server has no such request, none is removed.
        """
        return [False] * len(urls)


class GroupStorage(Storage):
    """A storage with backends, some of which have group operations."""

    @abc.abstractmethod
    def group_backend(self, url: StorageUrl) -> GroupBackend | None:
        """The backend of a URL; None if it has no group operations."""

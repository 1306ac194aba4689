"""Plan a job's elements: the first one from the request, all others from its listing.

A listing arrives in pieces and may be long. `plan_for` gives the planner of a job type; it takes each piece, gives the
elements that can run at once, and at the end those that had to wait for it (directories that turned out empty). It
remembers directories only, never files.
"""

from __future__ import annotations

import enum
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

from attrs import Factory, define, frozen

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ListedEntry, NewElement
from pdm.workqueue.domain.paths import is_inside, is_safe_path, joined

#: Phase of the top directory of a REMOVE; each level below runs one phase earlier, files run in phase 0.
LAST_PHASE = 1_000_000
#: The largest size a database integer holds.
LARGEST_SIZE = 2**63 - 1


class BadListingError(ValueError):
    """An impossible listing; the text names the entry."""


class SkipCode(enum.StrEnum):
    """Stable words for why an entry is left out; of a directory that cannot be listed, a `FailureCode` says it."""

    SPECIAL_FILE = "SPECIAL_FILE"
    DANGLING_LINK = "DANGLING_LINK"
    LINK_TO_DIRECTORY = "LINK_TO_DIRECTORY"
    LINK_OUTSIDE = "LINK_OUTSIDE"
    UNNAMED = "UNNAMED"


_SKIP_REASONS: Mapping[SkipCode, str] = MappingProxyType(
    {
        SkipCode.SPECIAL_FILE: "neither a file nor a directory: a pipe, a socket or a device",
        SkipCode.DANGLING_LINK: "a symbolic link that leads nowhere, or to where the site does not reach",
        SkipCode.LINK_TO_DIRECTORY: "a symbolic link to a directory",
        SkipCode.LINK_OUTSIDE: "a symbolic link to a file outside the tree",
        SkipCode.UNNAMED: (
            "the server counts more entries in this directory than it names:"
            " most likely symbolic links that lead nowhere"
        ),
    }
)


@frozen
class Skipped:
    """An entry that is left out, and why.

    Attributes:
        path: as of an element; of entries without a name, of the directory that holds them.
        type: ``file``, ``directory``, ``link`` or ``other``; ``unknown`` of entries without a name.
        count: number of entries; more than 1 only of those without a name.
    """

    path: str
    type: str
    code: str
    reason: str
    count: int = 1


def unnamed(path: str, count: int) -> Skipped:
    """Entries that the server of a directory counts and does not name."""
    return Skipped(path, "unknown", SkipCode.UNNAMED, _SKIP_REASONS[SkipCode.UNNAMED], count)


def unreadable(path: str, failure: AttemptFailure) -> Skipped:
    """A directory that could not be listed."""
    return Skipped(path, "directory", failure.code, f"{failure.code}: {failure.message}")


@frozen
class Planned:
    """Elements and skipped entries from a piece of a listing."""

    elements: tuple[NewElement, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    #: Why the job cannot be done at all.
    failure: AttemptFailure | None = None


class Plan(Protocol):
    """How a job type turns a listing into elements."""

    def locate(self, tree: str) -> None:
        """Note where the listed directory is, links resolved; comes before the entries in it, if at all."""
        ...

    def take(self, entries: Iterable[ListedEntry]) -> Planned:
        """Plan the next entries.

        Raises:
            BadListingError: an entry that no honest server gives.
        """
        ...

    def end(self, unreadable: Iterable[str]) -> Planned:
        """Plan the rest once the listing is complete; ``unreadable`` are directories that could not be listed."""
        ...


def first_element(type_: JobType, src_filepath: str, dst_filepath: str | None) -> NewElement:
    """Element 0: the listing, or the only operation of the job."""
    if type_ is JobType.RENAME:
        return NewElement(JobType.RENAME, src_filepath, dst_filepath)
    if type_ is JobType.MKDIR:
        return NewElement(JobType.MKDIR, src_filepath, is_directory=True)
    return NewElement(JobType.LIST, src_filepath)


def plan_for(type_: JobType, source: str, destination: str | None, tree: str, *, recursive: bool = True) -> Plan | None:
    """The plan of a job with a listing.

    Args:
        tree: absolute path of the source as its server names it; links are followed inside it only.

    Returns:
        None for a job whose listing is all that was asked.
    """
    if type_ is JobType.COPY:
        if destination is None:
            raise ValueError("a COPY has a destination")
        return _CopyPlan(source, destination, tree)
    if type_ is JobType.REMOVE:
        return _RemovePlan(source, recursive)
    return None


def _checked(entries: Iterable[ListedEntry]) -> Iterator[ListedEntry]:
    """The entries, each with names that stay inside the listed directory and a size that can be stored."""
    for entry in entries:
        if entry.path and not is_safe_path(entry.path):
            raise BadListingError(f"the listing names {entry.path[:200]!r}, which would leave the listed directory")
        if not 0 <= entry.size <= LARGEST_SIZE:
            raise BadListingError(f"the listing gives {entry.path[:200]!r} a size of {entry.size} bytes")
        yield entry


@define
class _CopyPlan:
    _source: str
    _destination: str
    _tree: str
    #: Directories in which nothing to copy has been seen yet.
    _childless: set[str] = Factory(set)
    _is_file: bool = False
    #: Why the source itself cannot be copied.
    _failure: AttemptFailure | None = None

    def __attrs_post_init__(self) -> None:
        self._childless.add("")

    def locate(self, tree: str) -> None:
        self._tree = tree

    def take(self, entries: Iterable[ListedEntry]) -> Planned:
        elements: list[NewElement] = []
        skipped: list[Skipped] = []
        for entry in _checked(entries):
            if entry.type == "directory":
                if entry.path:
                    self._childless.add(entry.path)
                    self._has_child(entry.path)
                continue
            if not entry.path and entry.type != "file" and not entry.target_is_file:
                self._failure = _failure_of_source(self._source, entry)
                continue
            # A link that is the source itself was named by the user: it is followed wherever it leads.
            if entry.type == "file" or (entry.type == "link" and (not entry.path or self._leads_inside(entry))):
                self._has_child(entry.path)
                elements.append(
                    NewElement(
                        JobType.COPY, joined(self._source, entry.path), self._place_of(entry.path), size=entry.size
                    )
                )
                continue
            code = _why_skipped(entry)
            skipped.append(Skipped(joined(self._source, entry.path), entry.type, code, _SKIP_REASONS[code]))
        return Planned(tuple(elements), tuple(skipped))

    def end(self, unreadable: Iterable[str]) -> Planned:
        if self._failure is not None:
            return Planned(failure=self._failure)
        self._childless.difference_update(unreadable)
        if self._is_file:
            return Planned()
        return Planned(
            tuple(
                NewElement(
                    JobType.MKDIR,
                    joined(self._source, path),
                    joined(self._destination, path),
                    is_directory=True,
                )
                for path in sorted(self._childless)
            )
        )

    def _has_child(self, path: str) -> None:
        self._childless.discard(path.rpartition("/")[0])

    def _leads_inside(self, entry: ListedEntry) -> bool:
        return entry.target is not None and entry.target_is_file and is_inside(entry.target, self._tree)

    def _place_of(self, path: str) -> str:
        if path:
            return joined(self._destination, path)
        self._is_file = True
        if self._destination.endswith("/"):
            return joined(self._destination, posixpath.basename(self._source.rstrip("/")))
        return self._destination


def _why_skipped(entry: ListedEntry) -> SkipCode:
    if entry.type != "link":
        return SkipCode.SPECIAL_FILE
    if entry.target_is_directory:
        return SkipCode.LINK_TO_DIRECTORY
    if entry.target_is_file:
        return SkipCode.LINK_OUTSIDE
    return SkipCode.DANGLING_LINK if entry.target is None else SkipCode.SPECIAL_FILE


def _failure_of_source(source: str, entry: ListedEntry) -> AttemptFailure:
    if entry.type == "link" and entry.target is None:
        message = f"{source} is a symbolic link that leads nowhere, or to where the site does not reach"
        return AttemptFailure(FailureScope.SOURCE, FailureCode.NOT_FOUND, message)
    message = f"{source} is neither a file nor a directory: nothing was copied"
    return AttemptFailure(FailureScope.SOURCE, FailureCode.SPECIAL_FILE, message)


@define
class _RemovePlan:
    _source: str
    _recursive: bool
    _is_directory: bool = True

    def locate(self, tree: str) -> None:
        """A removal follows no links."""

    def take(self, entries: Iterable[ListedEntry]) -> Planned:
        elements: list[NewElement] = []
        for entry in _checked(entries):
            if entry.path:
                if self._recursive:
                    elements.append(self._removal(entry.path, is_directory=entry.type == "directory"))
            elif entry.type != "directory":
                self._is_directory = False
                elements.append(self._removal("", is_directory=False))
        return Planned(tuple(elements))

    def end(self, unreadable: Iterable[str]) -> Planned:
        if not self._is_directory:
            return Planned()
        if not self._recursive:
            return Planned(
                failure=AttemptFailure(
                    FailureScope.SOURCE,
                    FailureCode.IS_A_DIRECTORY,
                    f"{self._source} is a directory; nothing was removed",
                )
            )
        return Planned((self._removal("", is_directory=True),))

    def _removal(self, path: str, *, is_directory: bool) -> NewElement:
        depth = path.count("/") + 1 if path else 0
        return NewElement(
            JobType.REMOVE,
            joined(self._source, path),
            is_directory=is_directory,
            phase=LAST_PHASE - depth if is_directory else 0,
        )

"""What a job's elements are: from a request to its first element, and from a listing to all that follow.

A listing arrives in pieces and may be long. `plan_for` gives the planner of a job type; it takes each piece, gives the
elements that can run at once, and at the end those that had to wait for it (directories that turned out empty). It
remembers directories only, never files.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from typing import Protocol

from attrs import Factory, define, frozen

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.domain.jobs import Entry, NewElement
from pdm.workqueue.domain.paths import is_inside, is_safe_name, joined

#: Phase of the top directory of a REMOVE; each level below runs one phase earlier, files run in phase 0.
LAST_PHASE = 1_000_000
#: The largest size a database integer holds.
LARGEST_SIZE = 2**63 - 1


class BadListingError(ValueError):
    """A listing that cannot be true; the text names the entry."""


@frozen
class Skipped:
    """An entry that is not carried out, and why."""

    path: str
    reason: str


@frozen
class Planned:
    """What follows from a piece of a listing."""

    elements: tuple[NewElement, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    #: Why the job cannot be done at all.
    failure: AttemptFailure | None = None


class Plan(Protocol):
    """How a job type turns a listing into elements."""

    def take(self, entries: Iterable[Entry]) -> Planned:
        """What follows from the next entries.

        Raises:
            BadListingError: an entry that no honest server gives.
        """
        ...

    def end(self, unreadable: Iterable[str]) -> Planned:
        """What follows once the listing is complete; ``unreadable`` are directories that could not be listed."""
        ...


def first_element(type_: JobType, src_filepath: str, dst_filepath: str | None) -> NewElement:
    """Element 0: the listing that the rest follows from, or the act itself."""
    if type_ is JobType.RENAME:
        return NewElement(JobType.RENAME, src_filepath, dst_filepath)
    if type_ is JobType.MKDIR:
        return NewElement(JobType.MKDIR, src_filepath, is_directory=True)
    return NewElement(JobType.LIST, src_filepath)


def plan_for(type_: JobType, source: str, destination: str | None, tree: str, *, recursive: bool = True) -> Plan | None:
    """The plan of a job with a listing.

    Args:
        type_: of the job.
        source: its ``src_filepath``.
        destination: its ``dst_filepath``.
        tree: absolute path of the source as its server names it; links are followed inside it only.
        recursive: whether a REMOVE may take a directory.

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


def _checked(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries, each with names that stay inside the listed folder and a size that can be stored."""
    for entry in entries:
        if entry.path and not all(map(is_safe_name, entry.path.split("/"))):
            raise BadListingError(f"the listing names {entry.path[:200]!r}, which would leave the listed folder")
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

    def __attrs_post_init__(self) -> None:
        self._childless.add("")

    def take(self, entries: Iterable[Entry]) -> Planned:
        elements: list[NewElement] = []
        skipped: list[Skipped] = []
        for entry in _checked(entries):
            if entry.type == "directory":
                if entry.path:
                    self._childless.add(entry.path)
                    self._has_child(entry.path)
                continue
            if entry.type == "file" or (entry.type == "link" and self._leads_inside(entry)):
                self._has_child(entry.path)
                elements.append(
                    NewElement(
                        JobType.COPY, joined(self._source, entry.path), self._place_of(entry.path), size=entry.size
                    )
                )
                continue
            skipped.append(Skipped(joined(self._source, entry.path), _reason_to_skip(entry)))
        return Planned(tuple(elements), tuple(skipped))

    def end(self, unreadable: Iterable[str]) -> Planned:
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
        self._childless.discard(posixpath.dirname(path))

    def _leads_inside(self, entry: Entry) -> bool:
        return entry.target is not None and entry.target_is_file and is_inside(entry.target, self._tree)

    def _place_of(self, path: str) -> str:
        if path:
            return joined(self._destination, path)
        self._is_file = True
        if self._destination.endswith("/"):
            return joined(self._destination, posixpath.basename(self._source.rstrip("/")))
        return self._destination


def _reason_to_skip(entry: Entry) -> str:
    if entry.type != "link":
        return "neither a file nor a directory"
    if entry.target is None:
        return "a symbolic link that leads nowhere"
    if not entry.target_is_file:
        return "a symbolic link to a directory"
    return "a symbolic link to a file outside the tree"


@define
class _RemovePlan:
    _source: str
    _recursive: bool
    _is_directory: bool = True

    def take(self, entries: Iterable[Entry]) -> Planned:
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
                    Scope.SOURCE, FailureCode.IS_A_DIRECTORY, f"{self._source} is a directory; nothing was removed"
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

"""What plans a job's elements from its listing, and what it says; and what a COPY with ``delete_extra`` removes.

A listing arrives in pieces and may be long. A plan takes each piece, gives the elements that can run at once, and at
the end those that had to wait for it (directories that turned out empty). It remembers directories only, never files.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import chain, islice
from types import MappingProxyType
from typing import Protocol, TypeVar

from attrs import Factory, define, frozen

from pdm.workqueue.domain.enums import JobType, PlannedAction
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.filters import EntryFilter, FilterVerdict
from pdm.workqueue.domain.jobs import ListedEntry, NewElement
from pdm.workqueue.domain.paths import is_safe_path, joined

_T = TypeVar("_T")

#: What is at a destination that was not listed.
NOTHING: Mapping[str, ListedEntry] = MappingProxyType({})
#: Phase of the top directory of a REMOVE; each level below runs one phase earlier, files run in phase 0.
LAST_PHASE = 1_000_000
#: Elements that are planned at once.
_PIECE = 1000
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
    FILTERED = "FILTERED"
    NO_TIME = "NO_TIME"
    OCCUPIED = "OCCUPIED"
    EXISTS = "EXISTS"
    KEPT = "KEPT"
    LINK_NOT_MOVED = "LINK_NOT_MOVED"


SKIP_REASONS: Mapping[SkipCode, str] = MappingProxyType(
    {
        SkipCode.SPECIAL_FILE: "neither a file nor a directory: a pipe, a socket or a device",
        SkipCode.DANGLING_LINK: "a symbolic link that leads nowhere, or to where the site does not reach",
        SkipCode.LINK_TO_DIRECTORY: "a symbolic link to a directory",
        SkipCode.LINK_OUTSIDE: "a symbolic link to a file outside the tree",
        SkipCode.UNNAMED: (
            "the server counts more entries in this directory than it names:"
            " most likely symbolic links that lead nowhere"
        ),
        SkipCode.FILTERED: "left out by the filters of the job",
        SkipCode.NO_TIME: "left out: the site does not say when it was changed, and the filters ask for it",
        SkipCode.EXISTS: "the destination has a file of this name, which the job may not overwrite",
        SkipCode.KEPT: "the source is kept: the destination had this file before, and it may be the source itself",
        SkipCode.LINK_NOT_MOVED: "a symbolic link: a move leaves it where it is",
    }
)


@frozen
class Skipped:
    """An entry that is left out, and why.

    Attributes:
        path: as of an element; of entries without a name, of the directory that holds them; of those that filters
            leave out, the source.
        type: ``file``, ``directory``, ``link`` or ``other``; ``unknown`` of entries that are counted only.
        count: number of entries; more than 1 only of those without a name, and of those that filters leave out.
    """

    path: str
    type: str
    code: str
    reason: str
    count: int = 1


def unnamed(path: str, count: int) -> Skipped:
    """Entries that the server of a directory counts and does not name."""
    return Skipped(path, "unknown", SkipCode.UNNAMED, SKIP_REASONS[SkipCode.UNNAMED], count)


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

    @property
    def needs_destination(self) -> bool:
        """Whether the destination is to be listed first, to be compared with."""
        ...

    @property
    def is_slow(self) -> bool:
        """Whether planning may take milliseconds for each entry, and belongs in a thread."""
        ...

    def locate(self, tree: str, *, at_destination: bool = False) -> None:
        """Note where a listed directory is, links resolved; comes before the entries in it, if at all."""
        ...

    def places(self, entries: Iterable[ListedEntry]) -> list[str]:
        """Paths below the destination to which the entries go: those that `take` looks for.

        As the entries' own; but a file that is the source itself may go into a directory.
        """
        ...

    def take(self, entries: Iterable[ListedEntry], there: Mapping[str, ListedEntry] = NOTHING) -> Planned:
        """Plan the next entries.

        Args:
            there: what the listing of the destination has at their `places`.

        Raises:
            BadListingError: an entry that no honest server gives.
        """
        ...

    def end(
        self, unreadable: Iterable[str], extra: Iterable[ListedEntry] = (), *, incomplete: FailureScope | None = None
    ) -> Iterator[Planned]:
        """Plan the rest once the listing is complete, in pieces; only the last one has a failure, if any.

        Args:
            unreadable: directories of the source that could not be listed.
            extra: what the destination's listing has that no entry of the source was compared with; gone through more
                than once, so no iterator.
            incomplete: the end whose listing is not complete, so that ``extra`` cannot be believed; None if both are.
        """
        ...


def checked_entries(entries: Iterable[ListedEntry]) -> Iterator[ListedEntry]:
    """The entries, each with names that stay inside the listed directory and a size that can be stored."""
    for entry in entries:
        if entry.path and not is_safe_path(entry.path):
            raise BadListingError(f"the listing names {entry.path[:200]!r}, which would leave the listed directory")
        if not 0 <= entry.size <= LARGEST_SIZE:
            raise BadListingError(f"the listing gives {entry.path[:200]!r} a size of {entry.size} bytes")
        yield entry


def directories_above(path: str) -> Iterator[str]:
    """The directories above a relative path: the nearest first, the listed one, an empty path, last."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def pieces(items: Iterable[_T]) -> Iterator[tuple[_T, ...]]:
    """The items, as many together as may be added in one transaction."""
    rest = iter(items)
    while piece := tuple(islice(rest, _PIECE)):
        yield piece


@define(kw_only=True)
class ExtraEntries:
    """Removals at the destination: all, or none at all. Remembers directories only, never files.

    Attributes:
        destination: the listed path.
        entry_filter: what it leaves out stays.
        uncompared: what is below these relative paths stays.
        is_done: whether the removals are planned only.
    """

    _destination: str
    _entry_filter: EntryFilter
    _uncompared: Set[str]
    _is_done: bool
    _directories: set[str] = Factory(set)
    #: Directories in which something stays.
    _kept: set[str] = Factory(set)

    def refusal(
        self, extra: Iterable[ListedEntry], max_delete: int, *, incomplete: FailureScope | None
    ) -> AttemptFailure | None:
        """Why nothing may be removed; None if all may be.

        Args:
            extra: entries of the destination that the source does not have.
            max_delete: number of entries that may be removed.
            incomplete: the end whose listing is not complete; None if both are.

        Raises:
            BadListingError: an entry that no honest server gives.
        """
        if incomplete is not None:
            message = f"directories of the {incomplete} could not be listed: nothing was removed at the destination"
            return AttemptFailure(incomplete, FailureCode.INCOMPLETE_LISTING, message)
        count = 0
        for entry in checked_entries(extra):
            if not entry.path:
                message = f"{self._destination} is no directory at the destination: nothing was removed"
                return AttemptFailure(FailureScope.DESTINATION, FailureCode.NOT_A_DIRECTORY, message)
            if not self._is_removed(entry):
                self._kept.update(directories_above(entry.path))
            elif entry.type == "directory":
                self._directories.add(entry.path)
            else:
                count += 1
        self._directories -= self._kept
        count += len(self._directories)
        if count <= max_delete:
            return None
        message = (
            f"{count} entries at the destination are not at the source, and at most {max_delete} may be removed:"
            " nothing was removed"
        )
        return AttemptFailure(FailureScope.DESTINATION, FailureCode.TOO_MANY_DELETIONS, message)

    def removals(self, extra: Iterable[ListedEntry]) -> Iterator[Planned]:
        """Removals of files, then of directories, each after what is in it; `refusal` was asked before."""
        files = (entry for entry in extra if entry.type != "directory" and self._is_removed(entry))
        removed = chain(map(self._file_removal, files), map(self._directory_removal, self._directories))
        for piece in pieces(removed):
            yield Planned(piece)

    def _is_removed(self, entry: ListedEntry) -> bool:
        if self._uncompared and not self._uncompared.isdisjoint(directories_above(entry.path)):
            return False
        return self._entry_filter.verdict(entry, entry.path) is FilterVerdict.TAKEN

    def _file_removal(self, entry: ListedEntry) -> NewElement:
        place = joined(self._destination, entry.path)
        # What shows later whether it is the same file; what a link leads to may be gone by then.
        mtime = None if entry.type == "link" else entry.mtime
        action, done = PlannedAction.DELETE, self._is_done
        return NewElement(JobType.REMOVE, place, place, entry.size, phase=1, planned=action, mtime=mtime, done=done)

    def _directory_removal(self, path: str) -> NewElement:
        place, phase = joined(self._destination, path), LAST_PHASE - 1 - path.count("/")
        action, done = PlannedAction.DELETE, self._is_done
        return NewElement(JobType.REMOVE, place, place, is_directory=True, phase=phase, planned=action, done=done)

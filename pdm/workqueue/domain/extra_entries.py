"""What a COPY with ``delete_extra`` removes: entries of the destination that the source does not have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from itertools import chain

from attrs import Factory, define

from pdm.workqueue.domain.enums import JobType, PlannedAction
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.filters import EntryFilter, FilterVerdict
from pdm.workqueue.domain.jobs import ListedEntry, NewElement
from pdm.workqueue.domain.paths import joined
from pdm.workqueue.domain.planning import LAST_PHASE, Planned, checked_entries, directories_above, pieces


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

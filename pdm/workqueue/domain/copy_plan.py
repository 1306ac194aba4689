"""How a directory, or a file, is copied: from the listings of source and destination to elements.

What is at the destination is compared with the source's entry of the same path; `extra_entries` says what is removed.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Literal

from attrs import Factory, define, frozen

from pdm.workqueue.domain.enums import JobType, PlannedAction, SyncLevel
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.filters import NO_FILTER, EntryFilter, FilterVerdict
from pdm.workqueue.domain.jobs import ListedEntry, NewElement
from pdm.workqueue.domain.paths import is_inside, joined
from pdm.workqueue.domain.planning import (
    LAST_PHASE,
    NOTHING,
    SKIP_REASONS,
    ExtraEntries,
    Planned,
    SkipCode,
    Skipped,
    checked_entries,
    directories_above,
    pieces,
)

#: Seconds by which the times of an unchanged file may differ: some protocols round to seconds, others cut.
MTIME_TOLERANCE_S = 1


@frozen(kw_only=True)
class CopyRules:
    """What a COPY is asked that its plan depends on.

    Attributes:
        sync: what counts as already there; None if the destination is not compared.
        overwrite: without ``sync``: what happens to files that are there.
        entry_filter: which entries are copied, and at the destination removed.
        delete_extra: whether what is at the destination only is removed.
        max_delete: nothing is removed if it would be more.
        dry_run: whether nothing is done but to plan.
        move: whether sources are removed once they have arrived.
    """

    sync: SyncLevel | None = None
    overwrite: Literal["never", "always", "different"] = "never"
    entry_filter: EntryFilter = NO_FILTER
    delete_extra: bool = False
    max_delete: int = 100
    dry_run: bool = False
    move: bool = False

    @property
    def needs_destination(self) -> bool:
        """Whether the destination must be listed.

        For a move it says what was there before: that may be the source itself, by another door to its storage.
        """
        return self.sync is not None or self.dry_run or self.move

    @property
    def is_plain(self) -> bool:
        """Whether every file is copied, whatever the destination has."""
        return not self.needs_destination and self.entry_filter.takes_all


#: What listings call an entry, in words.
_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "file": "a file",
        "directory": "a directory",
        "link": "a symbolic link",
        "other": "a special file",
    }
)

#: Of a copy without options.
PLAIN_COPY = CopyRules()


@define
class CopyPlan:
    """The plan of a COPY."""

    _source: str
    _destination: str
    _tree: str
    _rules: CopyRules
    _is_one_server: bool
    #: Where the listed destination is, links resolved.
    _tree_at_destination: str | None = None
    #: Directories in which nothing to copy has been seen yet.
    _childless: set[str] = Factory(lambda: {""})
    #: Those of them that the destination has.
    _existing: set[str] = Factory(set)
    #: Of a move: directories to be removed, and those in which something stays.
    _emptied: set[str] = Factory(lambda: {""})
    _kept: set[str] = Factory(set)
    #: Directories whose place at the destination something else has.
    _blocked: set[str] = Factory(set)
    #: What is below these at the destination has nothing to be compared with at the source.
    _uncompared: set[str] = Factory(set)
    _is_file: bool = False
    _filtered: int = 0
    #: Why nothing can be copied.
    _failure: AttemptFailure | None = None
    #: Why something of it cannot be copied.
    _clash: AttemptFailure | None = None

    @property
    def needs_destination(self) -> bool:
        return self._rules.needs_destination

    @property
    def is_slow(self) -> bool:
        return self._rules.entry_filter.patterns is not None

    def locate(self, tree: str, *, at_destination: bool = False) -> None:
        if at_destination:
            self._tree_at_destination = tree
            return
        self._tree = tree
        place = self._tree_at_destination
        if not self._is_one_server or place is None:
            return
        message = None
        if is_inside(place, tree):
            message = f"the destination leads to {place}, which is the source itself or inside it: nothing was done"
        elif self._rules.delete_extra and is_inside(tree, place):
            message = f"the source leads to {tree}, which is inside the destination, and would be removed as extra"
        if message is not None:
            self._failure = AttemptFailure(FailureScope.DESTINATION, FailureCode.SAME_PLACE, message)

    def places(self, entries: Iterable[ListedEntry]) -> list[str]:
        return [self._below_destination(entry.path) for entry in entries]

    def take(self, entries: Iterable[ListedEntry], there: Mapping[str, ListedEntry] = NOTHING) -> Planned:
        if self._failure is not None:
            return Planned()
        elements: list[NewElement] = []
        skipped: list[Skipped] = []
        is_plain = self._rules.is_plain
        for entry in checked_entries(entries):
            path = entry.path
            if is_plain and path and entry.type == "file":
                self._has_child(path)
                source, destination = joined(self._source, path), joined(self._destination, path)
                elements.append(NewElement(JobType.COPY, source, destination, entry.size))
                continue
            if not path and entry.type == "directory":
                continue
            if not path and entry.type != "file" and not entry.target_is_file:
                self._failure = _failure_of_source(self._source, entry)
                continue
            if not path:
                self._is_file = True
            if (left_out := self._left_out(entry)) is not None:
                skipped += left_out
                self._keep(path)
                continue
            at = there.get(self._below_destination(path))
            if at is not None:
                self._existing.add("")
            if entry.type == "directory":
                skipped += self._take_directory(entry, at)
                continue
            element, notes = self._take_file(entry, at)
            skipped += notes
            if element is not None:
                elements.append(element)
        return Planned(tuple(elements), tuple(skipped))

    def _left_out(self, entry: ListedEntry) -> list[Skipped] | None:
        """None if an entry is to be copied; else the note about it, if any: what filters leave out is counted."""
        path = entry.path or posixpath.basename(self._source.rstrip("/"))
        if not self._rules.entry_filter.takes_all:
            verdict = self._rules.entry_filter.verdict(entry, path)
            if verdict is FilterVerdict.LEFT_OUT:
                self._filtered += 1
                return []
            if verdict is FilterVerdict.NO_TIME:
                return [self._note(entry, SkipCode.NO_TIME)]
        # A link that is the source itself was named by the user: it is followed wherever it leads.
        if entry.type in ("file", "directory") or not entry.path:
            return None
        if self._leads_inside(entry):
            # The file that it leads to may be gone before the link is copied.
            return [self._note(entry, SkipCode.LINK_NOT_MOVED)] if self._rules.move else None
        if self._rules.delete_extra:
            self._uncompared.add(entry.path)
        return [self._note(entry, _why_skipped(entry))]

    def _take_directory(self, entry: ListedEntry, at: ListedEntry | None) -> list[Skipped]:
        if self._is_blocked(entry.path) or (at is not None and at.type != "directory"):
            self._blocked.add(entry.path)
            return [self._occupied_by(entry, at)]
        self._childless.add(entry.path)
        if at is not None:
            self._existing.add(entry.path)
        if self._rules.move:
            self._emptied.add(entry.path)
        self._has_child(entry.path)
        return []

    def _take_file(self, entry: ListedEntry, at: ListedEntry | None) -> tuple[NewElement | None, list[Skipped]]:
        if at is None:
            if self._is_blocked(entry.path):
                return None, [self._occupied_by(entry, at)]
            action = PlannedAction.COPY
        elif at.type != "file" and not (at.target_is_file and not self._rules.move):
            return None, [self._occupied_by(entry, at)]
        elif self._rules.sync is None and self._rules.overwrite == "never" and self._rules.dry_run:
            return None, [self._note(entry, SkipCode.EXISTS)]
        else:
            action = PlannedAction.SAME if self._is_same(entry, at) else PlannedAction.OVERWRITE
        self._has_child(entry.path)
        notes = []
        if self._rules.move and action is PlannedAction.SAME:
            self._keep(entry.path)
            notes.append(self._note(entry, SkipCode.KEPT))
        is_compared = self._rules.needs_destination
        element = NewElement(
            JobType.COPY,
            joined(self._source, entry.path),
            joined(self._destination, self._below_destination(entry.path)),
            size=entry.size,
            planned=action if is_compared else None,
            mtime=entry.mtime if is_compared else None,
            done=self._rules.dry_run or action is PlannedAction.SAME,
        )
        return element, notes

    def _is_same(self, entry: ListedEntry, at: ListedEntry) -> bool:
        match self._rules.sync:
            case SyncLevel.EXISTS:
                return True
            case SyncLevel.SIZE:
                return entry.size == at.size
            case SyncLevel.MTIME:
                return (
                    entry.size == at.size
                    and entry.mtime is not None
                    and at.mtime is not None
                    and abs(entry.mtime - at.mtime) <= MTIME_TOLERANCE_S
                )
        # Checksums are compared when the element runs.
        return False

    def end(
        self, unreadable: Iterable[str], extra: Iterable[ListedEntry] = (), *, incomplete: FailureScope | None = None
    ) -> Iterator[Planned]:
        if self._failure is not None:
            yield Planned(failure=self._failure)
            return
        closed = set(unreadable)
        if not self._is_file:
            yield from self._empty_directories(closed)
        if self._filtered:
            yield Planned(skipped=(self._filtered_note(),))
        failure = None if self._rules.dry_run else self._clash
        if self._rules.delete_extra and not self._is_file and self._clash is None:
            extras = ExtraEntries(
                destination=self._destination,
                entry_filter=self._rules.entry_filter,
                uncompared=self._uncompared,
                is_done=self._rules.dry_run,
            )
            failure = extras.refusal(
                extra, self._rules.max_delete, incomplete=FailureScope.SOURCE if closed else incomplete
            )
            if failure is None:
                yield from extras.removals(extra)
        if self._rules.move and not self._rules.dry_run and not self._is_file:
            yield from self._emptied_directories(closed)
        if failure is not None:
            yield Planned(failure=failure)

    def _empty_directories(self, unreadable: set[str]) -> Iterator[Planned]:
        self._childless -= unreadable
        if self._filtered and len(self._childless) == 1:
            # Nothing at all is left to copy.
            self._childless.discard("")
        for piece in pieces(sorted(self._childless)):
            yield Planned(tuple(map(self._empty_directory, piece)))

    def _empty_directory(self, path: str) -> NewElement:
        action = None
        if self._rules.needs_destination:
            action = PlannedAction.SAME if path in self._existing else PlannedAction.COPY
        return NewElement(
            JobType.MKDIR,
            joined(self._source, path),
            joined(self._destination, path),
            is_directory=True,
            planned=action,
            done=self._rules.dry_run or action is PlannedAction.SAME,
        )

    def _emptied_directories(self, unreadable: set[str]) -> Iterator[Planned]:
        """Removals of the source's directories in which nothing stays."""
        for path in unreadable:
            self._keep(f"{path}/")
        for piece in pieces(sorted(self._emptied - self._kept)):
            yield Planned(
                tuple(
                    NewElement(
                        JobType.REMOVE,
                        joined(self._source, path),
                        is_directory=True,
                        phase=LAST_PHASE - (path.count("/") + 1 if path else 0),
                        planned=PlannedAction.MOVED,
                    )
                    for path in piece
                )
            )

    def _keep(self, path: str) -> None:
        """Note that something stays at the source, so that the directories above stay, too."""
        if not self._rules.move:
            return
        for directory in directories_above(path):
            if directory in self._kept:
                return
            self._kept.add(directory)

    def _has_child(self, path: str) -> None:
        self._childless.discard(path.rpartition("/")[0])

    def _is_blocked(self, path: str) -> bool:
        return bool(self._blocked) and any(directory in self._blocked for directory in directories_above(path))

    def _leads_inside(self, entry: ListedEntry) -> bool:
        return entry.target is not None and entry.target_is_file and is_inside(entry.target, self._tree)

    def _below_destination(self, path: str) -> str:
        if not path and self._destination.endswith("/"):
            return posixpath.basename(self._source.rstrip("/"))
        return path

    def _note(self, entry: ListedEntry, code: SkipCode) -> Skipped:
        return Skipped(joined(self._source, entry.path), entry.type, code, SKIP_REASONS[code])

    def _filtered_note(self) -> Skipped:
        reason = SKIP_REASONS[SkipCode.FILTERED]
        return Skipped(self._source, "unknown", SkipCode.FILTERED, reason, self._filtered)

    def _occupied_by(self, entry: ListedEntry, at: ListedEntry | None) -> Skipped:
        """A note on an entry whose place at the destination something of another type has."""
        self._keep(entry.path)
        place = joined(self._destination, self._below_destination(entry.path))
        if at is None:
            reason = f"something else than a directory is above {place} at the destination"
        else:
            reason = f"{place} is {_NAMES.get(at.type, at.type)} at the destination: it is not replaced"
        if self._clash is None:
            code = FailureCode.NOT_A_DIRECTORY if entry.type == "directory" else FailureCode.IS_A_DIRECTORY
            code = FailureCode.EXISTS if at is not None and at.type not in ("file", "directory") else code
            self._clash = AttemptFailure(FailureScope.DESTINATION, code, f"not all can be copied: {reason}")
        return Skipped(joined(self._source, entry.path), entry.type, SkipCode.OCCUPIED, reason)


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

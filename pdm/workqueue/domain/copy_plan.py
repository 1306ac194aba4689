"""How a directory, or a file, is copied: from the listings of source and destination to elements."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from attrs import Factory, define, frozen

from pdm.workqueue.domain.enums import JobType, SyncLevel
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ListedEntry, NewElement
from pdm.workqueue.domain.paths import is_inside, joined
from pdm.workqueue.domain.planning import NOTHING, SKIP_REASONS, Planned, SkipCode, Skipped, checked_entries


@frozen(kw_only=True)
class CopyRules:
    """What a COPY is asked that its plan depends on.

    Attributes:
        sync: what counts as already there; None if the destination is not compared.
        overwrite: without ``sync``: what happens to files that are there.
        delete_extra: whether what is at the destination only is removed.
        max_delete: nothing is removed if it would be more.
        dry_run: whether nothing is done but to plan.
        move: whether sources are removed once they have arrived.
    """

    sync: SyncLevel | None = None
    overwrite: Literal["never", "always", "different"] = "never"
    delete_extra: bool = False
    max_delete: int = 100
    dry_run: bool = False
    move: bool = False

    @property
    def needs_destination(self) -> bool:
        """Whether the destination must be listed."""
        return self.sync is not None or self.dry_run


#: Of a copy without options.
PLAIN_COPY = CopyRules()


@define
class CopyPlan:
    """The plan of a COPY."""

    _source: str
    _destination: str
    _tree: str
    _rules: CopyRules
    #: Directories in which nothing to copy has been seen yet.
    _childless: set[str] = Factory(set)
    _is_file: bool = False
    #: Why the source itself cannot be copied.
    _failure: AttemptFailure | None = None

    def __attrs_post_init__(self) -> None:
        self._childless.add("")

    def locate(self, tree: str) -> None:
        self._tree = tree

    @property
    def needs_destination(self) -> bool:
        return self._rules.needs_destination

    def places(self, entries: Iterable[ListedEntry]) -> list[str]:
        return [self._below_destination(entry.path) for entry in entries]

    def take(self, entries: Iterable[ListedEntry], there: Mapping[str, ListedEntry] = NOTHING) -> Planned:
        elements: list[NewElement] = []
        skipped: list[Skipped] = []
        for entry in checked_entries(entries):
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
            skipped.append(Skipped(joined(self._source, entry.path), entry.type, code, SKIP_REASONS[code]))
        return Planned(tuple(elements), tuple(skipped))

    def end(
        self, unreadable: Iterable[str], extra: Iterable[ListedEntry] = (), *, extra_known: bool = True
    ) -> Iterator[Planned]:
        if self._failure is not None:
            yield Planned(failure=self._failure)
            return
        self._childless.difference_update(unreadable)
        if self._is_file:
            return
        yield Planned(
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
        if not path:
            self._is_file = True
        return joined(self._destination, self._below_destination(path))

    def _below_destination(self, path: str) -> str:
        if not path and self._destination.endswith("/"):
            return posixpath.basename(self._source.rstrip("/"))
        return path


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

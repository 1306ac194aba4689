"""A job's first element, the plan of its job type, and how a directory is removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from attrs import define

from pdm.workqueue.domain.copy_plan import PLAIN_COPY, CopyPlan, CopyRules
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ListedEntry, NewElement
from pdm.workqueue.domain.paths import joined
from pdm.workqueue.domain.planning import LAST_PHASE, NOTHING, Plan, Planned, checked_entries


def first_element(type_: JobType, src_filepath: str, dst_filepath: str | None) -> NewElement:
    """Element 0: the listing, or the only operation of the job."""
    if type_ is JobType.RENAME:
        return NewElement(JobType.RENAME, src_filepath, dst_filepath)
    if type_ is JobType.MKDIR:
        return NewElement(JobType.MKDIR, src_filepath, is_directory=True)
    return NewElement(JobType.LIST, src_filepath)


def plan_for(
    type_: JobType,
    source: str,
    destination: str | None,
    tree: str,
    *,
    recursive: bool = True,
    only_empty: bool = False,
    rules: CopyRules = PLAIN_COPY,
    is_one_server: bool = False,
) -> Plan | None:
    """The plan of a job with a listing.

    Args:
        tree: absolute path of the source as its server names it; links are followed inside it only.
        recursive: of a REMOVE.
        only_empty: of a REMOVE: whether only an empty directory is removed.
        rules: of a COPY.
        is_one_server: of a COPY: whether source and destination are at the same server.

    Returns:
        None for a job whose listing is all that was asked.
    """
    if type_ is JobType.COPY:
        if destination is None:
            raise ValueError("a COPY has a destination")
        return CopyPlan(source, destination, tree, rules, is_one_server)
    if type_ is JobType.REMOVE:
        return RemovePlan(source, recursive and not only_empty, only_empty)
    return None


@define
class RemovePlan:
    """The plan of a REMOVE: all files first, then the directories, each after what is in it."""

    _source: str
    _recursive: bool
    _only_empty: bool = False
    _is_directory: bool = True
    needs_destination: bool = False
    is_slow: bool = False

    def locate(self, tree: str, *, at_destination: bool = False) -> None:
        """A removal follows no links."""

    def places(self, entries: Iterable[ListedEntry]) -> list[str]:
        """A removal has no destination."""
        return []

    def take(self, entries: Iterable[ListedEntry], there: Mapping[str, ListedEntry] = NOTHING) -> Planned:
        elements: list[NewElement] = []
        for entry in checked_entries(entries):
            if entry.path:
                if self._recursive:
                    elements.append(self._removal(entry.path, is_directory=entry.type == "directory"))
            elif entry.type != "directory":
                self._is_directory = False
                if not self._only_empty:
                    elements.append(self._removal("", is_directory=False))
        return Planned(tuple(elements))

    def end(
        self, unreadable: Iterable[str], extra: Iterable[ListedEntry] = (), *, incomplete: FailureScope | None = None
    ) -> Iterator[Planned]:
        if not self._is_directory:
            if self._only_empty:
                message = f"{self._source} is not a directory; nothing was removed"
                yield Planned(failure=AttemptFailure(FailureScope.SOURCE, FailureCode.NOT_A_DIRECTORY, message))
            return
        # A directory that is not empty is refused when it is removed.
        if self._recursive or self._only_empty:
            yield Planned((self._removal("", is_directory=True),))
            return
        message = f"{self._source} is a directory; nothing was removed"
        yield Planned(failure=AttemptFailure(FailureScope.SOURCE, FailureCode.IS_A_DIRECTORY, message))

    def _removal(self, path: str, *, is_directory: bool) -> NewElement:
        depth = path.count("/") + 1 if path else 0
        return NewElement(
            JobType.REMOVE,
            joined(self._source, path),
            is_directory=is_directory,
            phase=LAST_PHASE - depth if is_directory else 0,
        )

"""The index of a destination's listing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.workqueue.domain.jobs import ListedEntry
from pdm.workqueue.domain.planning import BadListingError
from pdm.workqueue.execution.destination_index import DestinationIndex


@pytest.fixture
def index(tmp_path: Path) -> Iterator[DestinationIndex]:
    made = DestinationIndex(tmp_path)
    yield made
    made.close()


def file(path: str, size: int = 1) -> ListedEntry:
    return ListedEntry(path, "file", size, 0o644, 1_000_000_000)


def test_what_was_asked_for_is_not_extra(index: DestinationIndex) -> None:
    entries = [file(f"d/{number:04}", number) for number in range(500)]
    index.put(entries)
    index.put([ListedEntry("d", "directory", 0, 0o755), ListedEntry("l", "link", 3, target_is_file=True)])
    found = index.at(["l", "missing", *(entry.path for entry in entries[:350])])
    assert found == {entry.path: entry for entry in entries[:350]} | {
        "l": ListedEntry("l", "link", 3, target_is_file=True)
    }
    extra = index.extra()
    left = [ListedEntry("d", "directory", 0, 0o755), *entries[350:]]
    assert list(extra) == left
    assert list(extra) == left, "it may be gone through again"
    assert index.at([]) == {}


def test_every_name_is_found(index: DestinationIndex) -> None:
    names = ["a b", "new\nline", "\uef80\uefff", "é", "e\u0301", "'\"%_", "half \udc80", "a" * 4000]
    index.put([file(name) for name in names])
    assert sorted(index.at(names)) == sorted(names)
    assert list(index.extra()) == []


def test_the_last_of_two_entries_counts(index: DestinationIndex) -> None:
    index.put([file("f", 1), file("f", 2)])
    assert index.at(["f"])["f"].size == 2


def test_files_that_arrive_are_no_entries(index: DestinationIndex) -> None:
    index.put([file(".pdm-0123456789abcdef.4.1.part"), file("d/.pdm-0123456789abcdef.4.1.2.part"), file(".pdm-x")])
    assert [entry.path for entry in index.extra()] == [".pdm-x"]


@pytest.mark.parametrize("entry", [file("../f"), file("a//b"), file("f", -1), file("f", 2**63)])
def test_impossible_entries_are_refused(index: DestinationIndex, entry: ListedEntry) -> None:
    with pytest.raises(BadListingError):
        index.put([entry])
    index.put([file("f")])
    assert list(index.at(["f"])) == ["f"]


def test_nothing_of_it_is_left(index: DestinationIndex, tmp_path: Path) -> None:
    index.put([file(f"{number:06}" * 20) for number in range(3000)])
    assert list(tmp_path.iterdir()) == []

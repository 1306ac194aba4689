"""What a copy can be asked, against rclone on the same trees: the plan alone, applied to a model of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pdm.workqueue.domain.enums import JobType, PlannedAction
from pdm.workqueue.domain.job_plans import plan_for
from pdm.workqueue.domain.jobs import ListedEntry, NewElement
from pdm.workqueue.domain.planning import Planned
from pdm.workqueue.wire.options import CopyOptions, read_options
from tests.support.sync_cases import CASES, MATRIX, SyncCase, Tree, expected, run_rclone

#: Always: each level once with each filter, with deletions; all others in the full run.
_EVERYDAY = {case.name for case in CASES if case not in MATRIX or case.options.get("delete_extra")}


def entries_of(tree: Tree) -> Iterator[ListedEntry]:
    """The listing of a tree: directories before what is in them."""
    listed: set[str] = set()
    for name, file in tree.items():
        path = name.rstrip("/")
        parts = path.split("/")
        above = ["/".join(parts[:depth]) for depth in range(1, len(parts) + (file is None))]
        for directory in above:
            if directory not in listed:
                listed.add(directory)
                yield ListedEntry(directory, "directory")
        if file is not None:
            yield ListedEntry(path, "file", len(file[0].encode()), 0o644, file[1])


def planned(case: SyncCase) -> list[Planned]:
    options = read_options(JobType.COPY, dict(case.options))
    assert isinstance(options, CopyOptions)
    plan = plan_for(JobType.COPY, "/s", "/d", "/s", rules=options.rules(datetime(2026, 1, 1, tzinfo=UTC)))
    assert plan is not None
    there = {entry.path: entry for entry in entries_of(case.destination)}
    entries = list(entries_of(case.source))
    seen = set(plan.places(entries))
    extra = [entry for path, entry in there.items() if path not in seen]
    return [
        plan.take(entries, {path: there[path] for path in seen & there.keys()}),
        *plan.end((), extra),
    ]


def applied(case: SyncCase, elements: list[NewElement]) -> dict[str, str | None]:
    """The destination once all elements have run."""
    after = {entry.path: None for entry in entries_of(case.destination) if entry.type == "directory"} | {
        path: file[0] for path, file in case.destination.items() if file is not None
    }
    for element in sorted(elements, key=lambda element: element.phase):
        if element.done:
            continue
        path = (element.dst_filepath or "").removeprefix("/d").removeprefix("/")
        if element.type is JobType.REMOVE:
            assert element.planned is PlannedAction.DELETE
            assert not any(other.startswith(f"{path}/") for other in after), f"{path} is not empty"
            del after[path]
            continue
        parts = path.split("/")
        after |= {"/".join(parts[:depth]): None for depth in range(1, len(parts))}
        file = case.source[element.src_filepath.removeprefix("/s/")] if element.type is JobType.COPY else None
        if path:
            after[path] = None if file is None else file[0]
    full = {path.rpartition("/")[0] for path in after}
    return {path: content for path, content in after.items() if content is not None or path not in full}


@pytest.mark.skipif(shutil.which("rclone") is None, reason="rclone is not installed")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.name in _EVERYDAY else (pytest.mark.full,)) for case in CASES],
)
def test_a_plan_leads_to_what_rclone_leads_to(case: SyncCase, tmp_path: Path) -> None:
    pieces = planned(case)
    elements = [element for piece in pieces for element in piece.elements]
    after = applied(case, elements)
    theirs = run_rclone(case, tmp_path)
    assert (pieces[-1].failure is not None) is case.fails
    assert after == expected(case, theirs)

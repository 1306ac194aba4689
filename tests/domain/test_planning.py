"""From a listing to elements."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.job_plans import first_element, plan_for
from pdm.workqueue.domain.jobs import ListedEntry, NewElement
from pdm.workqueue.domain.planning import LAST_PHASE, BadListingError, Plan, Planned


def copy_plan(destination: str = "/b/tree", source: str = "/a/tree") -> Plan:
    plan = plan_for(JobType.COPY, source, destination, source)
    assert plan is not None
    return plan


def remove_plan(*, recursive: bool = True, only_empty: bool = False) -> Plan:
    plan = plan_for(JobType.REMOVE, "/a/tree", None, "/a/tree", recursive=recursive, only_empty=only_empty)
    assert plan is not None
    return plan


def run(plan: Plan, entries: Iterable[ListedEntry], unreadable: Iterable[str] = ()) -> Planned:
    pieces = [plan.take(entries), *plan.end(unreadable)]
    return Planned(
        tuple(element for piece in pieces for element in piece.elements),
        tuple(skipped for piece in pieces for skipped in piece.skipped),
        pieces[-1].failure,
    )


def test_the_first_element_lists_or_acts() -> None:
    assert first_element(JobType.COPY, "/a", "/b") == NewElement(JobType.LIST, "/a")
    assert first_element(JobType.REMOVE, "/a", None) == NewElement(JobType.LIST, "/a")
    assert first_element(JobType.RENAME, "/a", "/b") == NewElement(JobType.RENAME, "/a", "/b")
    assert first_element(JobType.MKDIR, "/a", None) == NewElement(JobType.MKDIR, "/a", is_directory=True)


def test_a_list_job_needs_no_plan() -> None:
    assert plan_for(JobType.LIST, "/a", None, "/a") is None


def test_a_tree_becomes_its_files_and_its_empty_directories() -> None:
    planned = run(
        copy_plan(),
        [
            ListedEntry("full", "directory"),
            ListedEntry("full/one", "file", 3),
            ListedEntry("empty", "directory"),
            ListedEntry("outer", "directory"),
            ListedEntry("outer/inner", "directory"),
        ],
    )
    assert planned.elements == (
        NewElement(JobType.COPY, "/a/tree/full/one", "/b/tree/full/one", size=3),
        NewElement(JobType.MKDIR, "/a/tree/empty", "/b/tree/empty", is_directory=True),
        NewElement(JobType.MKDIR, "/a/tree/outer/inner", "/b/tree/outer/inner", is_directory=True),
    )


def test_an_empty_tree_becomes_one_directory() -> None:
    assert [element.dst_filepath for element in run(copy_plan(), []).elements] == ["/b/tree"]


@pytest.mark.parametrize(
    ("destination", "expected"), [("/b/other", "/b/other"), ("/b/dir/", "/b/dir/file"), ("x", "x")]
)
def test_a_single_file_goes_to_the_destination_or_into_it(destination: str, expected: str) -> None:
    planned = run(copy_plan(destination, "/a/file"), [ListedEntry("", "file", 7)])
    assert planned.elements == (NewElement(JobType.COPY, "/a/file", expected, size=7),)


@pytest.mark.parametrize("target", ["/elsewhere/real", None])
def test_a_link_to_a_file_that_is_the_source_is_followed_wherever_it_leads(target: str | None) -> None:
    planned = run(copy_plan("/b/", "/a/link"), [ListedEntry("", "link", 7, target=target, target_is_file=True)])
    assert planned == Planned((NewElement(JobType.COPY, "/a/link", "/b/link", size=7),))


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        (ListedEntry("", "link"), FailureCode.NOT_FOUND),
        (ListedEntry("", "other"), FailureCode.SPECIAL_FILE),
        (ListedEntry("", "link", target="/a/pipe"), FailureCode.SPECIAL_FILE),
    ],
)
def test_a_source_that_has_no_content_fails_and_makes_nothing(entry: ListedEntry, code: FailureCode) -> None:
    planned = run(copy_plan(), [entry])
    assert (planned.elements, planned.skipped) == ((), ())
    assert planned.failure is not None
    assert (planned.failure.scope, planned.failure.code) == (FailureScope.SOURCE, code)


def test_links_in_a_tree_are_inside_where_the_tree_really_is() -> None:
    entries = [
        ListedEntry("real", "link", 5, target="/real/tree/f", target_is_file=True),
        ListedEntry("named", "link", 5, target="/a/tree/f", target_is_file=True),
    ]
    plan = copy_plan()
    plan.locate("/real/tree")
    assert [element.src_filepath for element in run(plan, entries).elements] == ["/a/tree/real"]


def test_links_are_followed_to_files_inside_the_tree_only() -> None:
    planned = run(
        copy_plan(),
        [
            ListedEntry("good", "link", 5, target="/a/tree/real", target_is_file=True),
            ListedEntry("outside", "link", 5, target="/etc/passwd", target_is_file=True),
            ListedEntry("beside", "link", 5, target="/a/tree2/x", target_is_file=True),
            ListedEntry("dir", "link", target="/a/tree", target_is_directory=True),
            ListedEntry("broken", "link"),
            ListedEntry("pipe", "other"),
            ListedEntry("to pipe", "link", target="/a/tree/pipe"),
        ],
    )
    assert [element.src_filepath for element in planned.elements] == ["/a/tree/good"]
    assert {skipped.path.removeprefix("/a/tree/"): (skipped.type, skipped.code) for skipped in planned.skipped} == {
        "outside": ("link", "LINK_OUTSIDE"),
        "beside": ("link", "LINK_OUTSIDE"),
        "dir": ("link", "LINK_TO_DIRECTORY"),
        "broken": ("link", "DANGLING_LINK"),
        "pipe": ("other", "SPECIAL_FILE"),
        "to pipe": ("link", "SPECIAL_FILE"),
    }
    assert all(skipped.reason for skipped in planned.skipped)


def test_a_directory_of_skipped_things_is_still_made() -> None:
    planned = run(copy_plan(), [ListedEntry("d", "directory"), ListedEntry("d/pipe", "other")])
    assert [(element.type, element.dst_filepath) for element in planned.elements] == [(JobType.MKDIR, "/b/tree/d")]


def test_an_unreadable_directory_is_not_taken_for_an_empty_one() -> None:
    planned = run(copy_plan(), [ListedEntry("secret", "directory"), ListedEntry("f", "file")], ["secret"])
    assert [element.type for element in planned.elements] == [JobType.COPY]


@pytest.mark.parametrize("path", ["..", "a/../b", "a//b", "/etc/passwd", "a/", ".", "a\0b"])
def test_a_name_that_leaves_the_directory_is_no_listing(path: str) -> None:
    for plan in (copy_plan(), remove_plan()):
        with pytest.raises(BadListingError, match="leave the listed directory"):
            plan.take([ListedEntry(path, "file")])


@pytest.mark.parametrize("size", [-1, 2**63])
def test_an_impossible_size_is_no_listing(size: int) -> None:
    with pytest.raises(BadListingError, match=r"a size of -?\d+ bytes"):
        copy_plan().take([ListedEntry("f", "file", size)])


def test_removal_without_recursion_refuses_a_directory() -> None:
    planned = run(remove_plan(recursive=False), [ListedEntry("", "directory")])
    assert planned.elements == ()
    assert planned.failure is not None
    assert planned.failure.code is FailureCode.IS_A_DIRECTORY


def test_removal_of_an_empty_directory_only_is_one_element_whatever_is_in_it() -> None:
    # The server refuses to remove one that is not empty.
    plan = remove_plan(only_empty=True)
    assert run(plan, [ListedEntry("", "directory")]).elements == (
        NewElement(JobType.REMOVE, "/a/tree", is_directory=True, phase=LAST_PHASE),
    )
    planned = run(remove_plan(only_empty=True), [ListedEntry("", "file", 3)])
    assert planned.elements == ()
    assert planned.failure is not None
    assert planned.failure.code is FailureCode.NOT_A_DIRECTORY


def test_removal_of_a_file_is_one_element() -> None:
    planned = run(remove_plan(recursive=False), [ListedEntry("", "file", 3)])
    assert planned.elements == (NewElement(JobType.REMOVE, "/a/tree"),)


NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=5).filter(
    lambda name: name not in (".", "..")
)


@given(st.recursive(st.none(), lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=30))
def test_every_directory_is_removed_after_all_that_is_in_it(tree: dict[str, object] | None) -> None:
    entries: list[ListedEntry] = []

    def walk(node: object, path: str) -> None:
        entries.append(ListedEntry(path, "directory" if isinstance(node, dict) else "file"))
        if isinstance(node, dict):
            for name, inner in node.items():
                walk(inner, f"{path}/{name}" if path else name)

    walk(tree, "")
    planned = run(remove_plan(), entries)
    phases = {element.src_filepath: element.phase for element in planned.elements}
    assert len(phases) == len(planned.elements) == len(entries)
    for path, phase in phases.items():
        parent = path.rpartition("/")[0]
        if parent in phases:
            assert phases[parent] > phase


@given(
    st.recursive(st.none(), lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=30), st.integers(1, 5)
)
def test_a_copy_makes_every_file_and_every_empty_directory_once(tree: dict[str, object] | None, piece: int) -> None:
    entries: list[ListedEntry] = []
    wanted: set[str] = set()

    def walk(node: object, path: str) -> None:
        if not isinstance(node, dict):
            entries.append(ListedEntry(path, "file"))
            wanted.add(path)
            return
        if path:
            entries.append(ListedEntry(path, "directory"))
        if not node:
            wanted.add(path)
        for name, inner in node.items():
            walk(inner, f"{path}/{name}" if path else name)

    walk(tree, "")
    plan = copy_plan()
    elements: list[NewElement] = []
    for start in range(0, len(entries), piece):
        elements += plan.take(entries[start : start + piece]).elements
    elements += (element for planned in plan.end([]) for element in planned.elements)
    places = [element.dst_filepath for element in elements]
    assert len(places) == len(set(places))
    assert set(places) == {f"/b/tree/{path}" if path else "/b/tree" for path in wanted}

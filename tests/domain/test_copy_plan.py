"""What a compared, filtered, moved or mirrored COPY becomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.domain.copy_plan import CopyRules
from pdm.workqueue.domain.enums import JobType, PlannedAction, SyncLevel
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.filters import EntryFilter, FilterRule, PatternList
from pdm.workqueue.domain.job_plans import plan_for
from pdm.workqueue.domain.jobs import ListedEntry, NewElement
from pdm.workqueue.domain.planning import Plan, Planned

COPY, OVERWRITE, SAME = PlannedAction.COPY, PlannedAction.OVERWRITE, PlannedAction.SAME
DELETE, MOVED = PlannedAction.DELETE, PlannedAction.MOVED
SYNC = CopyRules(sync=SyncLevel.SIZE)
MIRROR = CopyRules(sync=SyncLevel.SIZE, delete_extra=True)
MOVE = CopyRules(move=True)


def directory(path: str) -> ListedEntry:
    return ListedEntry(path, "directory")


def file(path: str, size: int = 1, mtime: int | None = 100) -> ListedEntry:
    return ListedEntry(path, "file", size, 0o644, mtime)


def excluding(*patterns: str) -> EntryFilter:
    return EntryFilter(patterns=PatternList([FilterRule(pattern, False) for pattern in patterns]))


def plan(rules: CopyRules, source: str = "/s", destination: str = "/d") -> Plan:
    made = plan_for(JobType.COPY, source, destination, source, rules=rules)
    assert made is not None
    return made


def run(
    made: Plan,
    entries: Iterable[ListedEntry],
    there: Iterable[ListedEntry] = (),
    *,
    unreadable: Iterable[str] = (),
    incomplete: FailureScope | None = None,
) -> Planned:
    """All that is planned, from listings in one piece."""
    entries = list(entries)
    at = {entry.path: entry for entry in there}
    places = made.places(entries)
    first = made.take(entries, {path: at[path] for path in places if path in at})
    extra = [entry for path, entry in at.items() if path not in places]
    found = [first, *made.end(unreadable, extra, incomplete=incomplete)]
    assert all(piece.failure is None for piece in found[:-1])
    return Planned(
        tuple(element for piece in found for element in piece.elements),
        tuple(note for piece in found for note in piece.skipped),
        found[-1].failure,
    )


def actions(planned: Planned) -> dict[str, tuple[JobType, PlannedAction | None, bool]]:
    return {one.dst_filepath or one.src_filepath: (one.type, one.planned, one.done) for one in planned.elements}


def notes(planned: Planned) -> dict[str, str]:
    return {note.path: note.code for note in planned.skipped}


@pytest.mark.parametrize(
    ("level", "at", "expected"),
    [
        ("exists", file("f", 9, None), SAME),
        ("size", file("f", 5, None), SAME),
        ("size", file("f", 4), OVERWRITE),
        ("mtime", file("f", 5, 100), SAME),
        ("mtime", file("f", 5, 101), SAME),
        ("mtime", file("f", 5, 99), SAME),
        ("mtime", file("f", 5, 102), OVERWRITE),
        ("mtime", file("f", 5, 100 + 3600), OVERWRITE),
        ("mtime", file("f", 4, 100), OVERWRITE),
        ("mtime", file("f", 5, None), OVERWRITE),
        ("checksum", file("f", 5, 100), OVERWRITE),
        ("checksum", file("f", 4, 100), OVERWRITE),
        ("size", ListedEntry("f", "link", 5, target="/x", target_is_file=True), SAME),
    ],
)
def test_a_level_says_what_counts_as_already_there(level: str, at: ListedEntry, expected: PlannedAction) -> None:
    planned = run(plan(CopyRules(sync=SyncLevel(level))), [file("f", 5)], [at])
    element = NewElement(JobType.COPY, "/s/f", "/d/f", 5, planned=expected, mtime=100, done=expected is SAME)
    assert planned == Planned((element,))


def test_a_source_without_time_is_never_the_same_by_time() -> None:
    planned = run(plan(CopyRules(sync=SyncLevel.MTIME)), [file("f", 5, None)], [file("f", 5, 100)])
    assert actions(planned) == {"/d/f": (JobType.COPY, OVERWRITE, False)}


def test_a_plain_copy_says_nothing_of_a_plan() -> None:
    made = plan(CopyRules())
    planned = run(made, [directory("d"), file("f")], [file("f")])
    assert not made.needs_destination
    assert planned.elements == (
        NewElement(JobType.COPY, "/s/f", "/d/f", 1),
        NewElement(JobType.MKDIR, "/s/d", "/d/d", is_directory=True),
    )


def test_an_empty_directory_that_is_there_is_the_same() -> None:
    planned = run(plan(SYNC), [directory("a"), directory("b")], [directory("a")])
    assert actions(planned) == {"/d/a": (JobType.MKDIR, SAME, True), "/d/b": (JobType.MKDIR, COPY, False)}


def test_a_file_that_is_the_source_is_compared_with_its_place() -> None:
    into = plan(SYNC, "/s/f", "/d/")
    assert into.places([file("")]) == ["f"]
    assert actions(run(into, [file("")], [file("f"), file("other")])) == {"/d/f": (JobType.COPY, SAME, True)}
    named = plan(MIRROR, "/s/f", "/d/g")
    assert actions(run(named, [file("")], [file("")])) == {"/d/g": (JobType.COPY, SAME, True)}
    # Beside a single file, nothing of the destination was asked for.
    assert actions(run(plan(MIRROR, "/s/f", "/d/"), [file("")], [file("other")])) == {
        "/d/f": (JobType.COPY, COPY, False)
    }


def test_filters_judge_a_file_that_is_the_source_by_its_name() -> None:
    planned = run(plan(CopyRules(entry_filter=excluding("*.tmp")), "/s/f.tmp", "/d/"), [file("")])
    assert planned.elements == ()
    assert [(note.code, note.count) for note in planned.skipped] == [("FILTERED", 1)]


@pytest.mark.parametrize(
    ("overwrite", "code", "expected"),
    [("never", ["EXISTS"], {"/d": SAME}), ("always", [], {"/d/f": OVERWRITE}), ("different", [], {"/d/f": OVERWRITE})],
)
def test_a_dry_run_says_what_overwrite_leads_to(overwrite: Any, code: list[str], expected: dict[str, Any]) -> None:
    planned = run(plan(CopyRules(dry_run=True, overwrite=overwrite)), [file("f")], [file("f")])
    assert [note.code for note in planned.skipped] == code
    assert {path: action for path, (_, action, done) in actions(planned).items() if done} == expected
    assert planned.failure is None


def test_all_of_a_dry_run_is_done_before_it_runs() -> None:
    rules = CopyRules(sync=SyncLevel.SIZE, delete_extra=True, dry_run=True)
    planned = run(
        plan(rules), [file("new"), file("same"), directory("e")], [file("same"), file("gone"), directory("g")]
    )
    assert all(element.done for element in planned.elements)
    assert {path: action for path, (_, action, _) in actions(planned).items()} == {
        "/d/new": COPY,
        "/d/same": SAME,
        "/d/e": COPY,
        "/d/gone": DELETE,
        "/d/g": DELETE,
    }


def test_what_filters_leave_out_is_counted_once_and_makes_no_directory() -> None:
    planned = run(
        plan(CopyRules(entry_filter=excluding("tmp/", "*.log"))),
        [directory("tmp"), file("tmp/x"), directory("a"), file("a/y.log"), file("z")],
    )
    assert actions(planned) == {"/d/z": (JobType.COPY, None, False), "/d/a": (JobType.MKDIR, None, False)}
    assert [(note.path, note.type, note.code, note.count) for note in planned.skipped] == [
        ("/s", "unknown", "FILTERED", 3)
    ]


def test_filters_that_leave_nothing_make_nothing_and_say_so() -> None:
    planned = run(plan(CopyRules(entry_filter=excluding("*"))), [directory("a"), file("a/x"), file("y")])
    assert planned.elements == ()
    assert planned.failure is None
    assert [(note.code, note.count) for note in planned.skipped] == [("FILTERED", 3)]


def test_a_file_whose_time_is_not_known_is_named() -> None:
    planned = run(plan(CopyRules(entry_filter=EntryFilter(changed_from=50))), [file("a", 1, None), file("b", 1, 60)])
    assert list(actions(planned)) == ["/d/b"]
    assert notes(planned) == {"/s/a": "NO_TIME"}


LINK_TO_FILE = ListedEntry("x", "link", 1, target="/elsewhere/x", target_is_file=True)
LINK_TO_DIRECTORY = ListedEntry("x", "link", target="/elsewhere", target_is_directory=True)


@pytest.mark.parametrize(
    ("entry", "at", "code"),
    [
        (file("x"), directory("x"), FailureCode.IS_A_DIRECTORY),
        (file("x"), ListedEntry("x", "other"), FailureCode.EXISTS),
        (file("x"), LINK_TO_DIRECTORY, FailureCode.EXISTS),
        (file("x"), ListedEntry("x", "link"), FailureCode.EXISTS),
        (directory("x"), file("x"), FailureCode.NOT_A_DIRECTORY),
        (directory("x"), LINK_TO_DIRECTORY, FailureCode.EXISTS),
        (directory("x"), LINK_TO_FILE, FailureCode.EXISTS),
    ],
)
def test_something_of_another_type_is_not_replaced(entry: ListedEntry, at: ListedEntry, code: FailureCode) -> None:
    below = [file("x/inner")] if entry.type == "directory" else []
    planned = run(plan(MIRROR), [entry, *below, file("other")], [at, file("extra")])
    # The rest is copied; but nothing is removed.
    assert list(actions(planned)) == ["/d/other"]
    assert notes(planned) == dict.fromkeys(("/s/x", "/s/x/inner") if below else ("/s/x",), "OCCUPIED")
    assert planned.failure is not None
    assert (planned.failure.scope, planned.failure.code) == (FailureScope.DESTINATION, code)
    assert "/d/x" in planned.failure.message
    rehearsal = CopyRules(sync=SyncLevel.SIZE, delete_extra=True, dry_run=True)
    assert run(plan(rehearsal), [entry, *below, file("other")], [at, file("extra")]).failure is None


def test_what_is_extra_is_removed_files_first_and_directories_from_below() -> None:
    planned = run(
        plan(MIRROR),
        [directory("d"), file("d/x")],
        [directory("d"), file("d/x"), file("d/y"), directory("gone"), directory("gone/deep"), file("gone/deep/z")],
    )
    removals = [one for one in planned.elements if one.planned is DELETE]
    removed = sorted((one.phase, one.dst_filepath, one.is_directory) for one in removals)
    assert [(path, is_directory) for _, path, is_directory in removed] == [
        ("/d/d/y", False),
        ("/d/gone/deep/z", False),
        ("/d/gone/deep", True),
        ("/d/gone", True),
    ]
    assert 0 < removed[0][0] == removed[1][0] < removed[2][0] < removed[3][0]
    assert all(one.src_filepath == one.dst_filepath for one in removals)


def test_links_and_special_files_that_are_extra_are_removed_but_nothing_behind_a_link_of_the_source() -> None:
    source = [ListedEntry("link", "link", target="/elsewhere", target_is_directory=True)]
    there = [ListedEntry("old", "link"), ListedEntry("pipe", "other"), directory("link"), file("link/x")]
    planned = run(plan(MIRROR), source, there)
    assert [path for path, (_, action, _) in actions(planned).items() if action is DELETE] == ["/d/old", "/d/pipe"]


def refused(planned: Planned) -> AttemptFailure:
    assert planned.failure is not None
    assert not [one for one in planned.elements if one.planned is DELETE]
    return planned.failure


def test_nothing_is_removed_if_it_would_be_too_much_or_a_listing_is_incomplete() -> None:
    there = [file("a"), directory("d"), file("d/b")]
    some = CopyRules(sync=SyncLevel.SIZE, delete_extra=True, max_delete=2)
    failure = refused(run(plan(some), [file("new")], there))
    assert failure.code is FailureCode.TOO_MANY_DELETIONS
    assert "3 entries" in failure.message
    assert list(actions(run(plan(some), [file("new")], there))) == ["/d/new"]
    for incomplete, scope in (
        (run(plan(MIRROR), [file("new")], there, incomplete=FailureScope.DESTINATION), FailureScope.DESTINATION),
        (run(plan(MIRROR), [file("new")], there, incomplete=FailureScope.SOURCE), FailureScope.SOURCE),
        (run(plan(MIRROR), [file("new"), directory("closed")], there, unreadable=["closed"]), FailureScope.SOURCE),
    ):
        failure = refused(incomplete)
        assert (failure.code, failure.scope) == (FailureCode.INCOMPLETE_LISTING, scope)
        assert failure.message.startswith(f"directories of the {scope} could not be listed")
        assert list(actions(incomplete)) == ["/d/new"]


def test_a_destination_that_is_a_file_is_not_removed() -> None:
    assert refused(run(plan(MIRROR), [file("new")], [file("")])).code is FailureCode.NOT_A_DIRECTORY


def test_filters_protect_what_is_at_the_destination_and_the_directories_above() -> None:
    rules = CopyRules(sync=SyncLevel.SIZE, delete_extra=True, max_delete=1, entry_filter=excluding("*.tmp", "keep/"))
    there = [directory("gone"), file("gone/x.tmp"), file("gone/y"), directory("keep"), file("keep/z")]
    planned = run(plan(rules), [file("f")], there)
    assert [path for path, (_, action, _) in actions(planned).items() if action is DELETE] == ["/d/gone/y"]


def test_a_move_removes_directories_in_which_nothing_stays_from_below() -> None:
    planned = run(
        plan(CopyRules(move=True, entry_filter=excluding("*.tmp"))),
        [directory("a"), directory("a/b"), file("a/b/x"), directory("c"), file("c/y.tmp"), directory("e")],
    )
    removed = [
        (one.src_filepath, one.dst_filepath, one.is_directory) for one in planned.elements if one.planned is MOVED
    ]
    assert removed == [("/s/a", None, True), ("/s/a/b", None, True), ("/s/e", None, True)]
    phases = {one.src_filepath: one.phase for one in planned.elements if one.planned is MOVED}
    assert 0 < phases["/s/a/b"] < phases["/s/a"]
    (copied,) = (one for one in planned.elements if one.type is JobType.COPY)
    assert (copied.planned, copied.mtime) == (COPY, 100)


def test_a_move_of_all_removes_the_source_itself_last() -> None:
    planned = run(plan(MOVE), [directory("a"), file("a/x")])
    assert max(planned.elements, key=lambda one: one.phase).src_filepath == "/s"


def test_a_move_keeps_what_is_not_proven_at_the_destination() -> None:
    rules = CopyRules(move=True, sync=SyncLevel.SIZE)
    planned = run(
        plan(rules), [directory("a"), file("a/x"), directory("b"), file("b/y")], [directory("a"), file("a/x")]
    )
    assert notes(planned) == {"/s/a/x": "KEPT"}
    assert [one.src_filepath for one in planned.elements if one.planned is MOVED] == ["/s/b"]


@pytest.mark.parametrize("rules", [MOVE, CopyRules(move=True, sync=SyncLevel.CHECKSUM)])
def test_a_move_knows_what_the_destination_had_before(rules: CopyRules) -> None:
    made = plan_for(JobType.COPY, "/s/f", "/alias/f", "/s/f", rules=rules, is_one_server=True)
    assert made is not None and made.needs_destination
    assert [one.planned for one in run(made, [file("")], [file("")]).elements] == [OVERWRITE]


def test_a_move_leaves_links_and_unreadable_directories() -> None:
    link = ListedEntry("a/link", "link", 1, target="/s/a/x", target_is_file=True)
    planned = run(plan(MOVE), [directory("a"), link, file("a/x"), directory("closed")], unreadable=["closed"])
    assert notes(planned) == {"/s/a/link": "LINK_NOT_MOVED"}
    assert not [one for one in planned.elements if one.planned is MOVED]


@pytest.mark.parametrize(
    ("rules", "source", "destination", "is_one_server", "code"),
    [
        (SYNC, "/real/s", "/real/s", True, FailureCode.SAME_PLACE),
        (SYNC, "/real/s", "/real/s/inner", True, FailureCode.SAME_PLACE),
        (MIRROR, "/real/s/inner", "/real/s", True, FailureCode.SAME_PLACE),
        (SYNC, "/real/s/inner", "/real/s", True, None),
        (MIRROR, "/real/s", "/real/s2", True, None),
        (SYNC, "/real/s", "/real/s", False, None),
    ],
)
def test_links_that_lead_from_one_tree_into_the_other_are_seen_before_anything_is_done(
    rules: CopyRules, source: str, destination: str, is_one_server: bool, code: FailureCode | None
) -> None:
    made = plan_for(JobType.COPY, "/s", "/d", "/s", rules=rules, is_one_server=is_one_server)
    assert made is not None
    made.locate(destination, at_destination=True)
    made.locate(source)
    planned = run(made, [file("f"), directory("e")])
    assert bool(planned.elements) is (code is None)
    assert (None if planned.failure is None else planned.failure.code) == code


def test_the_dry_run_of_a_move_removes_nothing() -> None:
    planned = run(plan(CopyRules(move=True, dry_run=True)), [directory("a"), file("a/x")])
    assert {action for _, action, _ in actions(planned).values()} == {COPY}


# -- any two trees, any options

NAMES = st.sampled_from(["a", "b", "a.tmp", "c"])
NODES = st.recursive(
    st.tuples(st.integers(0, 2), st.integers(0, 3)),
    lambda inner: st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)
TREES = st.dictionaries(NAMES, NODES, max_size=4)
PATTERNS = st.lists(
    st.tuples(st.sampled_from(["*.tmp", "a/", "/b", "c", "a/*", "*"]), st.booleans()).map(
        lambda pair: FilterRule(*pair)
    ),
    max_size=3,
)


def listed(tree: Mapping[str, Any], above: str = "") -> list[ListedEntry]:
    entries: list[ListedEntry] = []
    for name, node in tree.items():
        path = f"{above}/{name}" if above else name
        if isinstance(node, dict):
            entries += [directory(path), *listed(node, path)]
        else:
            entries.append(file(path, *node))
    return entries


RULES = st.builds(
    CopyRules,
    sync=st.sampled_from(SyncLevel),
    entry_filter=st.builds(
        EntryFilter,
        patterns=PATTERNS.map(PatternList),
        min_size=st.none() | st.integers(0, 2),
        changed_before=st.none() | st.integers(0, 3),
    ),
    delete_extra=st.booleans(),
    max_delete=st.integers(0, 10),
    dry_run=st.booleans(),
)


@given(TREES, TREES, RULES, st.integers(1, 5))
def test_a_plan_leaves_what_it_must(source: Any, destination: Any, rules: CopyRules, size: int) -> None:
    made, entries, there = plan(rules), listed(source), {entry.path: entry for entry in listed(destination)}
    pieces: list[Planned] = []
    for start in range(0, len(entries), size):
        some = entries[start : start + size]
        pieces.append(made.take(some, {path: there[path] for path in made.places(some) if path in there}))
    at_source = {entry.path: entry for entry in entries}
    extra = [entry for path, entry in there.items() if path not in at_source]
    pieces += made.end((), extra)
    elements = [element for piece in pieces for element in piece.elements]
    places = [(element.dst_filepath or "").removeprefix("/d").removeprefix("/") for element in elements]

    assert len(places) == len(set(places)), "two elements with one destination"
    removed = {path for path, element in zip(places, elements, strict=True) if element.planned is DELETE}
    assert len(removed) <= rules.max_delete if rules.delete_extra else not removed
    assert not removed & at_source.keys()
    for path in removed:
        assert rules.entry_filter.verdict(there[path], path).name == "TAKEN"
        below = {other for other in there if other.startswith(f"{path}/")}
        assert below <= removed, "a directory that would not be empty"
    for path, element in zip(places, elements, strict=True):
        if element.planned is DELETE or not path:
            continue
        here, at = at_source[path], there.get(path)
        assert rules.entry_filter.verdict(here, path).name == "TAKEN"
        assert (element.planned is COPY) is (at is None)
        if element.planned is SAME and here.type == "file":
            assert at is not None
            assert rules.sync is not SyncLevel.CHECKSUM
            assert rules.sync is SyncLevel.EXISTS or here.size == at.size
            assert rules.sync is not SyncLevel.MTIME or abs((here.mtime or 0) - (at.mtime or 0)) <= 1
        assert element.done is (rules.dry_run or element.planned is SAME)

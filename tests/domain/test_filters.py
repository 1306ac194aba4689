"""Which files of a listing a COPY takes."""

from __future__ import annotations

import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.domain.filters import (
    EntryFilter,
    FilterRule,
    FilterVerdict,
    InvalidPatternError,
    PatternList,
    time_from_text,
)
from pdm.workqueue.domain.jobs import ListedEntry


def excluding(*patterns: str) -> PatternList:
    return PatternList([FilterRule(pattern, False) for pattern in patterns])


#: A pattern → paths that it matches, and paths that it does not; a directory ends with a slash.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "*.tmp": (["a.tmp", "d/e/a.tmp", ".tmp", "a\nb.tmp", "dir.tmp/", "dir.tmp/x"], ["a.tmp2", "tmp"]),
    "tmp/": (["tmp/", "tmp/x", "a/tmp/", "a/tmp/b/c"], ["tmp", "a/tmp", "tmpx/", "xtmp/y"]),
    "/tmp": (["tmp", "tmp/", "tmp/x"], ["a/tmp", "a/tmp/x"]),
    "a/b": (["a/b", "a/b/c"], ["x/a/b", "a/bc"]),
    "a/*": (["a/b", "a/b/c"], ["a/", "x/a/b"]),
    "a/**": (["a/b", "a/b/c"], ["a/", "a", "x/a/b"]),
    "**/b": (["b", "a/b", "a/c/b/d"], ["bb", "a/cb"]),
    "a/**/b": (["a/b", "a/c/b", "a/c/d/b"], ["ab", "a/cb"]),
    "run?": (["run1", "runx/", "d/run\uef80"], ["run", "run12", "run/"]),
    "[a-c]x": (["ax", "d/cx"], ["dx", "x"]),
    "[!a]x": (["bx", "d/zx"], ["ax", "d/ax"]),
    "a[!b]c": (["axc"], ["abc", "a/c"]),
    "[]x]": (["]", "x"], ["a"]),
    "[!]x]y": (["ay"], ["]y", "xy"]),
    "\\*": (["*", "d/*"], ["x"]),
    "\\!x": (["!x"], ["x"]),
    "\\#x": (["#x"], ["x"]),
    "x\\ ": (["x "], ["x"]),
    "a.b+(c)|$": (["a.b+(c)|$"], ["axb+(c)|$"]),
    "größe-\uef80": (["größe-\uef80", "d/größe-\uef80/x"], ["größe-\uef81"]),
    "*": (["x", "d/", "d/x"], []),
    "**": (["x", "d/", "d/x"], []),
}


@pytest.mark.parametrize("pattern", CASES)
def test_a_pattern_matches_as_gitignore_has_it(pattern: str) -> None:
    matched, others = CASES[pattern]
    patterns = excluding(pattern)
    assert [path for path in matched if patterns.includes(path)] == []
    assert [path for path in others if not patterns.includes(path)] == []


def test_git_has_the_same_opinion(tmp_path: Path) -> None:
    """What git itself says of the cases in which it takes paths as they are here."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for pattern, (matched, others) in CASES.items():
        (tmp_path / ".gitignore").write_text(f"{pattern}\n")
        # Git counts bytes, and takes the slash of a directory in its input for a part of the name.
        paths = [path for path in matched + others if path.isascii() and path != "a/"]
        found = subprocess.run(
            ["git", "-c", "core.quotePath=false", "check-ignore", "--no-index", "-z", "--stdin"],
            cwd=tmp_path,
            input="\0".join(paths).encode(),
            capture_output=True,
            check=False,
        )
        ignored = {path for path in found.stdout.decode().split("\0") if path}
        assert ignored == set(matched) & set(paths), pattern


def test_the_first_rule_that_matches_decides_and_none_includes() -> None:
    rules = [
        FilterRule("/keep/", True),
        FilterRule("tmp/", False),
        FilterRule("*.root", True),
        FilterRule("*", False),
    ]
    patterns = PatternList(rules)
    included = [path for path in ("keep/tmp/x", "tmp/a.root", "run/a.root", "run/a.txt") if patterns.includes(path)]
    assert included == ["keep/tmp/x", "run/a.root"]
    assert PatternList(rules[:3]).includes("run/a.txt")
    assert PatternList([]).includes("x")


RULES = st.lists(st.tuples(st.sampled_from(["a", "b", "a/", "/a", "*b", "b/*", "a/**", "**/a", "?"]), st.booleans()))
PATHS = st.lists(st.sampled_from(["a", "b", "ab", "c"]), min_size=1, max_size=4).map("/".join)


@given(RULES, PATHS, st.booleans())
def test_rules_together_decide_as_one_after_the_other(
    rules: list[tuple[str, bool]], path: str, is_directory: bool
) -> None:
    path += "/" if is_directory else ""
    expected = next((includes for pattern, includes in rules if not excluding(pattern).includes(path)), True)
    assert PatternList([FilterRule(*rule) for rule in rules]).includes(path) is expected


@given(
    st.text(st.sampled_from("ab*?[]!^-\\/.(){}|$+#é\uef80\ud800\n\0 "), min_size=1, max_size=12) | st.text(min_size=1),
    PATHS,
)
def test_any_text_is_a_pattern_or_refused_alone_and_among_others(pattern: str, path: str) -> None:
    try:
        patterns = excluding(pattern)
    except InvalidPatternError:
        with pytest.raises(InvalidPatternError, match="pattern 2"):
            excluding("b", pattern)
        return
    for other in ("zz", "a"):
        both = excluding(pattern, other)
        assert both.includes(path) is (patterns.includes(path) and excluding(other).includes(path))


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["!x"], "use include"),
        (["#x"], "comment"),
        (["  "], "blank"),
        (["/"], "blank"),
        (["[a"], "not closed"),
        (["[z-a]"], "reversed"),
        (["[[:alpha:]]"], r"write \[0-9\]"),
        (["a\\"], "backslash"),
        (["a\0b"], "NUL"),
        (["\ud800"], "Unicode"),
        (["x"] * 1001, "at most 1000"),
        (["x" * 4000] * 17, "65536 characters"),
        (["*?" * 1001], "2000 wildcards"),
        (["fine", "[a"], r"pattern 2, '\[a'"),
    ],
)
def test_what_is_no_pattern_is_refused_with_the_reason(patterns: list[str], words: str) -> None:
    with pytest.raises(InvalidPatternError, match=words):
        excluding(*patterns)


def test_a_pattern_made_to_backtrack_takes_no_longer_than_others() -> None:
    patterns = excluding(*("*a" * 40 + f"*b{number}" for number in range(20)))
    began = time.process_time()
    assert patterns.includes("/".join(["a" * 250] * 15))
    assert time.process_time() - began < 5


def test_many_rules_that_alternate_are_found_in_few_steps() -> None:
    rules = [FilterRule(f"/run{number}", number % 2 == 0) for number in range(1000)]
    patterns = PatternList(rules)
    assert [number for number in range(1000) if patterns.includes(f"run{number}")] == list(range(0, 1000, 2))


TAKEN, LEFT_OUT, NO_TIME = FilterVerdict.TAKEN, FilterVerdict.LEFT_OUT, FilterVerdict.NO_TIME


@pytest.mark.parametrize(
    ("entry", "bounds", "expected"),
    [
        (ListedEntry("f", "file", 10), EntryFilter(min_size=10, max_size=10), TAKEN),
        (ListedEntry("f", "file", 9), EntryFilter(min_size=10), LEFT_OUT),
        (ListedEntry("f", "file", 11), EntryFilter(max_size=10), LEFT_OUT),
        (ListedEntry("l", "link", 9, target="/a", target_is_file=True), EntryFilter(min_size=10), LEFT_OUT),
        (ListedEntry("d", "directory"), EntryFilter(min_size=10, changed_from=9), TAKEN),
        (ListedEntry("p", "other"), EntryFilter(min_size=10), TAKEN),
        (ListedEntry("f", "file", 1, None, 100), EntryFilter(changed_from=100), TAKEN),
        (ListedEntry("f", "file", 1, None, 99), EntryFilter(changed_from=100), LEFT_OUT),
        (ListedEntry("f", "file", 1, None, 100), EntryFilter(changed_before=100), LEFT_OUT),
        (ListedEntry("f", "file", 1, None, 99), EntryFilter(changed_before=100), TAKEN),
        (ListedEntry("f", "file", 1), EntryFilter(changed_before=100), NO_TIME),
        (ListedEntry("f", "file", 1), EntryFilter(changed_before=100, min_size=5), LEFT_OUT),
        (ListedEntry("d", "directory"), EntryFilter(patterns=excluding("d/")), LEFT_OUT),
        (ListedEntry("d", "file"), EntryFilter(patterns=excluding("d/")), TAKEN),
    ],
)
def test_an_entry_is_judged_by_pattern_size_and_time(
    entry: ListedEntry, bounds: EntryFilter, expected: FilterVerdict
) -> None:
    assert bounds.verdict(entry, entry.path) is expected
    assert not bounds.takes_all


def test_times_are_given_as_such_or_as_a_duration_before_the_submission() -> None:
    assert time_from_text("7d", 1_000_000.0) == 1_000_000.0 - 7 * 86400
    assert time_from_text("90s", 100.0) == 10.0
    assert time_from_text("2026-03-01T00:00:00Z", 0.0) == datetime(2026, 3, 1, tzinfo=UTC).timestamp()
    for text in ("", "7", "7y", "-1d", "1.5h", "yesterday", "2026-03-01T00:00:00", "١d", "99999999999d"):
        with pytest.raises(ValueError, match="a duration before the submission"):
            time_from_text(text, 0.0)

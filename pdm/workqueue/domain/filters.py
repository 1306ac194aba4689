"""Which files of a listing a COPY takes: by pattern, size and time.

Patterns come from users. RE2 matches them in linear time; Python's ``re`` would backtrack. Both libraries are imported
when the first pattern is used: the commands of users, which import this module for its types, start sooner.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from typing import NamedTuple, Protocol

from attrs import frozen

from pdm.workqueue.domain.jobs import ListedEntry
from pdm.workqueue.domain.paths import InvalidPathError, bytes_from_text

#: How many patterns a copy may have, and of how many characters each.
MOST_RULES, LONGEST_PATTERN = 1000, 4096
#: Of all patterns together: characters, and wildcards among them. The time for one path grows with both.
_MOST_CHARACTERS, _MOST_WILDCARDS = 64 * 1024, 2000
#: Bytes that an automaton may take.
_MOST_MEMORY = 16 * 1024 * 1024

_WILDCARD = re.compile(r"[*?\[]")
_CLASS_BY_NAME = re.compile(r"\[\[[:.=]")
#: A name that pathspec gives to a group, which a regular expression may have once only.
_NAMED_SLASH = "(?P<ps_d>/)"
#: Where a negated class begins in what pathspec writes, unless the bracket is escaped; no class may match a slash.
_NEGATED = re.compile(r"(\\.)|\[\^(\]?)", re.DOTALL)

_DURATION = re.compile(r"([0-9]{1,9})([smhdw])", re.ASCII)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class InvalidPatternError(ValueError):
    """A pattern that cannot be used; the text says why, and what to write."""


class _Matcher(Protocol):
    """A regular expression of RE2, which has no types."""

    def search(self, text: str) -> object | None: ...


class FilterRule(NamedTuple):
    """A gitignore pattern, relative to the source, and whether what it matches is included."""

    pattern: str
    includes: bool


class FilterVerdict(enum.Enum):
    """Whether a filter takes an entry."""

    TAKEN = enum.auto()
    LEFT_OUT = enum.auto()
    #: It would depend on when the entry was changed, which the listing does not say.
    NO_TIME = enum.auto()


def time_from_text(text: str, submitted: float) -> float:
    """The time of a timestamp, or of a duration before the submission; seconds since 1970 UTC.

    Args:
        text: RFC 3339 with an offset from UTC, or a number and a unit (``s``, ``m``, ``h``, ``d``, ``w``).
        submitted: when the job was, in the same seconds.

    Raises:
        ValueError: it is neither.
    """
    if duration := _DURATION.fullmatch(text):
        return submitted - int(duration[1]) * _UNITS_S[duration[2]]
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        parsed = None
    if parsed is None or parsed.tzinfo is None:
        raise ValueError(
            "a time such as 2026-03-01T00:00:00Z is expected, or a duration before the submission such as 12h or 7d"
        )
    return parsed.timestamp()


def load_pattern_libraries() -> None:
    """Import what patterns need, so that the first one takes no longer than others."""
    _compiled([_expression("*")])


def _expression(pattern: str) -> str:
    """A regular expression that is searched for in a path; that of a directory ends with a slash."""
    from pathspec.patterns.gitignore import GitIgnorePatternError
    from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

    try:
        bytes_from_text(pattern)
    except InvalidPathError as error:
        raise InvalidPatternError("a pattern must be valid Unicode text") from error
    if "\0" in pattern:
        raise InvalidPatternError("a pattern must not contain NUL")
    if pattern.startswith("!"):
        raise InvalidPatternError("a leading ! has no meaning here: use include; \\! begins a name with !")
    if pattern.startswith("#"):
        raise InvalidPatternError("a leading # begins a comment: leave it out; \\# begins a name with #")
    if _CLASS_BY_NAME.search(pattern):
        raise InvalidPatternError("classes such as [[:digit:]] are not taken: write [0-9]")
    try:
        expression, _ = GitIgnoreSpecPattern.pattern_to_regex(pattern)
    except GitIgnorePatternError as error:
        raise InvalidPatternError("not a gitignore pattern: does it end with a backslash?") from error
    if expression is None:
        raise InvalidPatternError("no path can match this pattern: is it blank, or is a [ not closed?")
    plain = _NEGATED.sub(
        lambda found: found[1] or ("[^/\\]" if found[2] else "[^/"), expression.replace(_NAMED_SLASH, "/")
    )
    # What is in a directory, but not the directory itself.
    return plain + "." if pattern.rstrip().endswith("/**") else plain


def _compiled(expressions: Sequence[str]) -> _Matcher:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MOST_MEMORY
    try:
        matcher: _Matcher = re2.compile("(?s)" + "|".join(f"(?:{each})" for each in expressions), options)
    except re2.error as error:
        raise InvalidPatternError("it cannot be used: is a range in [] reversed?") from error
    finally:
        # Its cache would keep the automata of many jobs.
        re2.purge()
    return matcher


class PatternList:
    """Patterns in order: the first one that matches decides; what none matches is included.

    A pattern that matches a directory matches all that is in it.

    Raises:
        InvalidPatternError: a pattern cannot be used, or all together are too large.
    """

    def __init__(self, rules: Sequence[FilterRule]) -> None:
        if len(rules) > MOST_RULES:
            raise InvalidPatternError(f"at most {MOST_RULES} patterns are taken")
        if sum(len(rule.pattern) for rule in rules) > _MOST_CHARACTERS:
            raise InvalidPatternError(f"all patterns together may have at most {_MOST_CHARACTERS} characters")
        if sum(len(_WILDCARD.findall(rule.pattern)) for rule in rules) > _MOST_WILDCARDS:
            raise InvalidPatternError(f"all patterns together may have at most {_MOST_WILDCARDS} wildcards (* ? [)")
        expressions = []
        for number, rule in enumerate(rules, 1):
            try:
                expressions.append(_expression(rule.pattern))
                _compiled(expressions[-1:])
            except InvalidPatternError as error:
                raise InvalidPatternError(f"pattern {number}, {rule.pattern[:100]!r}: {error}") from error
        verdicts = [rule.includes for rule in rules]
        #: Neighbours with the same verdict are matched as one.
        self._runs: list[tuple[bool, list[str]]] = [
            (verdict, [expression for _, expression in run])
            for verdict, run in groupby(zip(verdicts, expressions, strict=True), key=lambda pair: pair[0])
        ]
        self._matcher = functools.cache(self._compile)

    def _compile(self, first: int, end: int) -> _Matcher:
        return _compiled([expression for _, run in self._runs[first:end] for expression in run])

    def includes(self, path: str) -> bool:
        """Whether a path is included; that of a directory ends with a slash."""
        first, end = 0, len(self._runs)
        if not end or self._matcher(first, end).search(path) is None:
            return True
        while end - first > 1:
            middle = (first + end) // 2
            if self._matcher(first, middle).search(path) is not None:
                end = middle
            else:
                first = middle
        return self._runs[first][0]


@frozen(kw_only=True)
class EntryFilter:
    """Which entries are taken.

    Attributes:
        patterns: of paths; None if all are taken.
        min_size, max_size: bytes that a file has at least and at most.
        changed_from, changed_before: when a file was changed, seconds since 1970 UTC: at that time or later, before it.
    """

    patterns: PatternList | None = None
    min_size: int | None = None
    max_size: int | None = None
    changed_from: float | None = None
    changed_before: float | None = None

    @property
    def takes_all(self) -> bool:
        """Whether nothing can be left out."""
        bounds = (self.patterns, self.min_size, self.max_size, self.changed_from, self.changed_before)
        return all(bound is None for bound in bounds)

    def verdict(self, entry: ListedEntry, path: str) -> FilterVerdict:
        """Whether an entry is taken.

        Args:
            entry: one with the content of a file is also judged by size and time.
            path: of the entry, below the source; the name of a file that is the source itself.
        """
        is_directory = entry.type == "directory"
        if self.patterns is not None and not self.patterns.includes(f"{path}/" if is_directory else path):
            return FilterVerdict.LEFT_OUT
        if entry.type != "file" and not entry.target_is_file:
            return FilterVerdict.TAKEN
        if self.min_size is not None and entry.size < self.min_size:
            return FilterVerdict.LEFT_OUT
        if self.max_size is not None and entry.size > self.max_size:
            return FilterVerdict.LEFT_OUT
        if self.changed_from is None and self.changed_before is None:
            return FilterVerdict.TAKEN
        if entry.mtime is None:
            return FilterVerdict.NO_TIME
        if self.changed_from is not None and entry.mtime < self.changed_from:
            return FilterVerdict.LEFT_OUT
        if self.changed_before is not None and entry.mtime >= self.changed_before:
            return FilterVerdict.LEFT_OUT
        return FilterVerdict.TAKEN


#: Takes all.
NO_FILTER = EntryFilter()

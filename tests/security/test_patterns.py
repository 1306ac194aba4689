"""No regular expression takes long over hostile text: none has a repetition within a repetition."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import time
from collections.abc import Iterator
from re import _constants as constants
from re import _parser as parser
from typing import Any

import msgspec
import pytest

import pdm.workqueue
from pdm.workqueue.certificates import names
from pdm.workqueue.domain import notifications, oidc, subjects
from pdm.workqueue.helpers.backends import http_plain
from pdm.workqueue.helpers.gridftp.replies import _PASSIVE_ADDRESS, _SIZE_FACT
from pdm.workqueue.http.endpoints import ENDPOINTS, ROOT
from pdm.workqueue.http.openapi import openapi_document

_REPEATS = (constants.MAX_REPEAT, constants.MIN_REPEAT, constants.POSSESSIVE_REPEAT)
#: A repetition of fewer times than this is no danger.
_FEW = 16
#: Each round of the outer repetition begins or ends with a delimiter that its inside cannot hold: one way only.
_DELIMITED = {
    r"((?:[A-Za-z][A-Za-z0-9._-]*=[^;\r\n]*;)+) ",
    r"\r\n(?=(?:[A-Za-z][A-Za-z0-9._-]*=[^;\r\n]*;)+ )",
    _SIZE_FACT.pattern,
    # A field ends with a line break, which its value does not hold.
    *(each.pattern.decode() for each in (http_plain._REQUEST, http_plain._RESPONSE)),
    r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*",
    # The parts of a mail address are divided by dots, which none of them holds.
    notifications._ADDRESS.pattern,
    # The words of a scope are divided by spaces, which none of them holds.
    oidc._WORDS.pattern,
    # The inner repetition looks ahead from a slash, and stops at the next one.
    *(each.pattern for each in (names._PART, subjects._PART)),
}


def modules() -> Iterator[Any]:
    for found in pkgutil.walk_packages(pdm.workqueue.__path__, "pdm.workqueue."):
        if ".migrations." not in found.name and not found.name.endswith("__main__"):
            try:
                yield importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                # Of another interpreter.
                if error.name != "pyxrootd":
                    raise


def patterns_in(value: Any, depth: int = 3) -> Iterator[str]:
    """The patterns in a module's constant."""
    if isinstance(value, re.Pattern):
        yield value.pattern if isinstance(value.pattern, str) else value.pattern.decode("latin-1")
    elif isinstance(value, msgspec.Meta) and value.pattern:
        yield value.pattern
    elif depth and isinstance(value, (tuple, list, frozenset)):
        for one in value:
            yield from patterns_in(one, depth - 1)
    elif depth and isinstance(value, dict):
        for one in (*value, *value.values()):
            yield from patterns_in(one, depth - 1)
    elif depth and hasattr(value, "__metadata__"):
        yield from patterns_in(value.__metadata__, depth - 1)


def all_patterns() -> set[str]:
    found = {pattern for module in modules() for value in vars(module).values() for pattern in patterns_in(value)}
    return found | set(_of_schema(openapi_document(ENDPOINTS, ROOT)))


def _of_schema(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        for value in schema.values():
            yield from _of_schema(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _of_schema(value)


def nested(pattern: str) -> bool:
    """Whether there is an unbounded repetition of something that itself repeats without bound."""
    return _nested(parser.parse(pattern), within=False)


def _nested(items: Any, *, within: bool) -> bool:
    for operation, value in items:
        if operation in _REPEATS:
            _, most, content = value
            unbounded = most > _FEW
            if (unbounded and within) or _nested(content, within=within or unbounded):
                return True
        elif operation is constants.SUBPATTERN:
            if _nested(value[-1], within=within):
                return True
        elif operation is constants.BRANCH:
            if any(_nested(one, within=within) for one in value[1]):
                return True
        elif operation is constants.ATOMIC_GROUP:
            if _nested(value, within=within):
                return True
        elif operation is constants.GROUPREF_EXISTS:
            if any(_nested(one, within=within) for one in value[1:] if one is not None):
                return True
        elif operation in (constants.ASSERT, constants.ASSERT_NOT) and _nested(value[1], within=within):
            return True
    return False


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("(a+)+$", True),
        ("(?:a|b*)*", True),
        ("(?:(a{1,50})x)*", True),
        ("(?:(?>a*))*", True),
        ("a+b*", False),
        ("(?:ab?)+", False),
    ],
)
def test_the_check_itself(pattern: str, expected: bool) -> None:
    assert nested(pattern) is expected


def test_a_hostile_subject_is_read_in_no_time() -> None:
    before = time.process_time()
    for text in ("/CN=" + "/" * 64_000, "/CN=" + "/a" * 32_000, "/CN=" + "a" * 64_000 + "\n/", "/CN=" + "\\" * 64_000):
        with contextlib.suppress(ValueError):
            subjects.normal_subject(text)
        with contextlib.suppress(ValueError):
            names.parse_dn(text)
    assert time.process_time() - before < 8


def test_no_pattern_repeats_within_a_repetition() -> None:
    found = all_patterns()
    assert len(found) > 20
    assert {pattern for pattern in found if nested(pattern)} == _DELIMITED


@pytest.mark.parametrize("words", ["227 ", "1,", "227 1,1,1,"])
def test_the_address_in_a_hostile_reply_is_looked_for_in_no_time(words: str) -> None:
    """32 KiB took a helper 7 s."""
    before = time.process_time()
    assert _PASSIVE_ADDRESS.search(words * (64 * 1024 // len(words)) + "x") is None
    assert time.process_time() - before < 8

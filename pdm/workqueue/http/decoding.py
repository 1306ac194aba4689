"""From bytes to values: bodies, query parameters and keys; every refusal names the place."""

from __future__ import annotations

import hashlib
import re
import typing
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.http.problems import InvalidInputError, UnsupportedMediaTypeError
from pdm.workqueue.store.jobs import IdempotencyKey
from pdm.workqueue.wire.requests import PATTERN_WORDS

_S = TypeVar("_S", bound=msgspec.Struct)
_E = TypeVar("_E", JobType, JobStatus)

#: What msgspec puts between what is wrong and where.
_AT = " - at `$"
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_PATTERN = re.compile(r"Expected `str` matching regex (.*)", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_MOST_PARAMETERS = 100
_LONGEST_KEY = 255

_JSON = "application/json"
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


def decode_json(raw: bytes, content_types: Sequence[str], type_: type[_S]) -> _S:
    """Read a JSON body.

    Args:
        raw: the body.
        content_types: the Content-Type headers of the request.
        type_: what it must be.

    Raises:
        UnsupportedMediaTypeError: it says that it is something else.
        InvalidInputError: it is not JSON, or not of the type.
    """
    _check_media_type(content_types)
    try:
        return msgspec.json.decode(raw, type=type_)
    except msgspec.ValidationError as error:
        raise invalid_value(error, type_) from error
    except msgspec.DecodeError as error:
        raise InvalidInputError(f"the body is not JSON: {error}", "$") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError("the body is not UTF-8", "$") from error
    except RecursionError as error:
        raise InvalidInputError("the body is nested too deeply", "$") from error


def _check_media_type(content_types: Sequence[str]) -> None:
    for value in content_types:
        media_type = value.partition(";")[0].strip().lower()
        if media_type != _JSON:
            hint = f"; form data is not read, with curl add -H 'Content-Type: {_JSON}'" if media_type in _FORMS else ""
            raise UnsupportedMediaTypeError(f"{_JSON} is expected, not {media_type[:100]}{hint}", "Content-Type")


def invalid_value(error: msgspec.ValidationError, type_: type[msgspec.Struct], root: str = "$") -> InvalidInputError:
    """What msgspec says of a wrong value, with the place as a pointer and the known keys named.

    Args:
        error: what it says.
        type_: what was expected at the root.
        root: what stands for ``$`` in the pointer (``$.extra_opts``).
    """
    text = str(error)
    what, at, place = text.removesuffix("`").rpartition(_AT)
    if not at or not text.endswith("`"):
        what, place = text, ""
    if unknown := _UNKNOWN.fullmatch(what):
        keys = _keys_at(type_, place)
        if keys is None and (whole := _UNKNOWN.fullmatch(text)):
            # The unknown key itself reads like a place.
            unknown, place, keys = whole, "", _keys_at(type_, "")
        known = ", ".join(keys or ()) or "none"
        return InvalidInputError(f"unknown key {unknown[1][:100]!r}; known are {known}", f"{root}{place}.{unknown[1]}")
    pointer = root + place
    if missing := _MISSING.fullmatch(what):
        return InvalidInputError(f"the key {missing[1]!r} is missing", f"{pointer}.{missing[1]}")
    if pattern := _PATTERN.fullmatch(what):
        what = next((words for each, words in PATTERN_WORDS.items() if repr(each) == pattern[1]), what)
    return InvalidInputError(what[:1].lower() + what[1:].replace("`", ""), pointer)


def _keys_at(type_: type[msgspec.Struct], place: str) -> list[str] | None:
    """The keys of the struct at a place such as ``.dummy``; None if there is no struct."""
    for name in place.split(".")[1:]:
        hint = typing.get_type_hints(type_).get(name)
        structs = (
            candidate
            for candidate in (hint, *typing.get_args(hint))
            if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct)
        )
        if (found := next(structs, None)) is None:
            return None
        type_ = found
    return [field.encode_name for field in msgspec.structs.fields(type_)]


def decode_query(raw: bytes, type_: type[_S] | None) -> _S | None:
    """Read the parameters behind the ``?`` of a URL.

    Raises:
        InvalidInputError: one is unknown, given twice, or wrong.
    """
    if not raw:
        return None if type_ is None else type_()
    pairs = _pairs(raw)
    fields = {field.encode_name: field for field in msgspec.structs.fields(type_)} if type_ is not None else {}
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise InvalidInputError(f"unknown query parameter {name[:100]!r}; known are {known}", f"?{name}")
        if fields[name].default == ():
            values.setdefault(name, []).extend(value.split(","))
        elif name in values:
            raise InvalidInputError(f"the query parameter {name} is given twice", f"?{name}")
        else:
            values[name] = f"{value}T00:00:00Z" if name == "since" and _DATE.fullmatch(value) else value
    if type_ is None:
        return None
    try:
        return msgspec.convert(values, type_, strict=False)
    except msgspec.ValidationError as error:
        problem = invalid_value(error, type_)
        place = (problem.pointer or "$")[2:].partition("[")[0]
        raise InvalidInputError(f"{problem.detail} (query parameter {place})", f"?{place}") from error


def _pairs(raw: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(
            raw.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=_MOST_PARAMETERS,
        )
    except ValueError as error:
        raise InvalidInputError(f"the query cannot be read: {error}", "?") from error


def words(type_: type[_E], values: Sequence[str], name: str) -> frozenset[_E]:
    """The members that a repeated query parameter names.

    Raises:
        InvalidInputError: a word is none.
    """
    try:
        return frozenset(type_.parse(value.strip()) for value in values)
    except ValueError as error:
        raise InvalidInputError(str(error), f"?{name}") from error


def idempotency_key(
    values: Sequence[str], user_id: int, route: str, body: msgspec.Struct | None
) -> IdempotencyKey | None:
    """The key under which a request is carried out once only; None where none is given.

    Raises:
        InvalidInputError: it is not 1 to 255 printable ASCII characters, or there are several.
    """
    if not values:
        return None
    key = values[0]
    if len(values) > 1 or not 1 <= len(key) <= _LONGEST_KEY or not (key.isascii() and key.isprintable()):
        raise InvalidInputError(
            f"one key of 1 to {_LONGEST_KEY} printable ASCII characters is expected", "Idempotency-Key"
        )
    encoded = msgspec.json.encode(body, order="sorted")
    return IdempotencyKey(user_id, key, hashlib.sha256(route.encode() + b"\n" + encoded).hexdigest())

"""Decode and validate request bodies, query parameters, idempotency keys and job submissions.

Every error names the key, parameter or header that is wrong.
"""

from __future__ import annotations

import hashlib
import re
import typing
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from pdm.workqueue.domain.credentials import CredentialNeed
from pdm.workqueue.domain.enums import TOOL_PROTOCOLS, JobProtocol, JobStatus, JobType, MoverKind
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.job_plans import first_element
from pdm.workqueue.domain.jobs import DEFAULT_PRIORITY, DEFAULT_TRIES, JobRecord, NewJob, Predecessors
from pdm.workqueue.domain.lifecycle import deadline_from_text
from pdm.workqueue.domain.notifications import EventKind
from pdm.workqueue.domain.paths import is_inside, normalised
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.copy_requests import (
    check_filters,
    check_not_removed,
    check_tape,
    planned_items,
    refuse_paths,
    url_at,
    urls_at,
)
from pdm.workqueue.http.problems import InvalidInputError, UnsupportedMediaTypeError
from pdm.workqueue.movers import TOOL_MOVERS
from pdm.workqueue.movers.mover import destination_protocol
from pdm.workqueue.sites.checks import TOOL_SCHEMES
from pdm.workqueue.sites.registry import Site, moved_by_tools
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.wire.options import OPTIONS, CopyOptions, read_options
from pdm.workqueue.wire.requests import LARGEST_ID, PATTERN_WORDS, SubmitJob

_S = TypeVar("_S", bound=msgspec.Struct)
_QueryEnum = TypeVar("_QueryEnum", JobType, JobStatus, EventKind)

#: msgspec writes this between the message and the path.
_PLACE_SEPARATOR = " - at `$"
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_PATTERN = re.compile(r"Expected `str` matching regex (.*)", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_MAX_PARAMETERS = 100
_MAX_KEY_LENGTH = 255

_JSON = "application/json"
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


def decode_json(raw: bytes, content_types: Sequence[str], type_: type[_S]) -> _S:
    """Decode and validate a JSON body.

    Raises:
        UnsupportedMediaTypeError: a Content-Type header names another type.
        InvalidInputError: the body is not JSON, or not a valid `type_`.
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
            hint = f"; form data is not accepted, with curl add -H 'Content-Type: {_JSON}'"
            hint = hint if media_type in _FORMS else ""
            raise UnsupportedMediaTypeError(f"{_JSON} is expected, not {media_type[:100]}{hint}", "Content-Type")


def invalid_value(error: msgspec.ValidationError, type_: type[msgspec.Struct], root: str = "$") -> InvalidInputError:
    """Convert an error of msgspec: the path becomes the pointer, an unknown key gets the list of known ones.

    `root` replaces ``$`` in the pointer where the document is a part of the body (``$.extra_opts``).
    """
    text = str(error)
    what, at, place = text.removesuffix("`").rpartition(_PLACE_SEPARATOR)
    if not at or not text.endswith("`"):
        what, place = text, ""
    if unknown := _UNKNOWN.fullmatch(what):
        keys = _keys_at(type_, place)
        if keys is None and (whole := _UNKNOWN.fullmatch(text)):
            # The unknown key itself contains the separator.
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
    """Keys of the struct at a path such as ``.dummy``; None if there is no struct."""
    for name in place.split(".")[1:]:
        hint = typing.get_type_hints(type_).get(name.partition("[")[0])
        structs = (
            candidate
            for candidate in (
                hint,
                *(inner for outer in typing.get_args(hint) for inner in (outer, *typing.get_args(outer))),
            )
            if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct)
        )
        if (found := next(structs, None)) is None:
            return None
        type_ = found
    return [field.encode_name for field in msgspec.structs.fields(type_)]


def decode_query(raw: bytes, type_: type[_S] | None) -> _S | None:
    """Decode and validate the query string of a URL.

    Raises:
        InvalidInputError: a parameter is unknown, duplicated or invalid.
    """
    if not raw:
        return None if type_ is None else type_()
    pairs = url_pairs(raw)
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


def url_pairs(raw: bytes, most: int = _MAX_PARAMETERS) -> list[tuple[str, str]]:
    """Names and values of a query string, or of a form in its encoding.

    Raises:
        InvalidInputError: it is not well-formed, or there are more than `most`.
    """
    try:
        return parse_qsl(
            raw.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=most,
        )
    except ValueError as error:
        raise InvalidInputError(f"the query cannot be read: {error}", "?") from error


def enum_members(type_: type[_QueryEnum], values: Sequence[str], name: str) -> frozenset[_QueryEnum]:
    """Parse the values of a repeated query parameter as members of an enumeration.

    Raises:
        InvalidInputError: a value is not a member.
    """
    try:
        return frozenset(type_.parse(value.strip()) for value in values)
    except ValueError as error:
        raise InvalidInputError(str(error), f"?{name}") from error


def idempotency_key(
    values: Sequence[str], user_id: int, route: str, body: msgspec.Struct | None
) -> IdempotencyKey | None:
    """Read the Idempotency-Key headers; None if there is none.

    Raises:
        InvalidInputError: there are several, or the key is not 1 to 255 printable ASCII characters.
    """
    if not values:
        return None
    key = values[0]
    if len(values) > 1 or not 1 <= len(key) <= _MAX_KEY_LENGTH or not (key.isascii() and key.isprintable()):
        raise InvalidInputError(
            f"one key of 1 to {_MAX_KEY_LENGTH} printable ASCII characters is expected", "Idempotency-Key"
        )
    encoded = msgspec.json.encode(body, order="sorted")
    return IdempotencyKey(user_id, key, hashlib.sha256(route.encode() + b"\n" + encoded).hexdigest())


_JobEnum = TypeVar("_JobEnum", JobType, JobProtocol)

_WITH_DESTINATION = frozenset({JobType.COPY, JobType.RENAME})


def job_from_request(api: ApiContext, user_id: int, submission: SubmitJob) -> NewJob:
    """Validate a submission and convert it to a job of the user.

    Raises:
        InvalidInputError: the submission is invalid; `pointer` names the key.
    """
    type_ = _enum_member(JobType, submission.type, "$.type")
    protocol = JobProtocol.GRIDFTP
    if submission.protocol is not None:
        protocol = _enum_member(JobProtocol, submission.protocol, "$.protocol")
    if submission.label is not None and not submission.label.isprintable():
        raise InvalidInputError("a label is one line of printable characters", "$.label")
    options, items = _options(type_, protocol, submission.extra_opts)
    if submission.src_filepath is None and items is None:
        raise InvalidInputError("the key 'src_filepath' is missing", "$.src_filepath")
    source = _site(api, user_id, submission.src_siteid, "$.src_siteid")
    destination = _destination(api, user_id, type_, source, submission)
    _check_supported(api, protocol, type_)
    if destination is not None and type_ is JobType.COPY:
        check_tape(options, source, destination)
    by_tools = _by_tools(protocol, options, source, source if destination is None else destination)
    planned = None
    if items is not None and destination is not None:
        refuse_paths(submission)
        other = _protocol_at(api, source, destination, protocol, by_tools=by_tools)
        planned = planned_items(items, urls_at(source, protocol), urls_at(destination, other))
        options = {**options, "items": len(planned.elements)}
    else:
        _check_paths(api, type_, protocol, source, destination, submission, options, by_tools=by_tools)
    src_filepath = planned.source if planned is not None else submission.src_filepath or ""
    return NewJob(
        user_id=user_id,
        type=type_,
        protocol=protocol,
        src_siteid=source.id,
        src_filepath=src_filepath,
        dst_siteid=None if destination is None else destination.id,
        dst_filepath=submission.dst_filepath if planned is None else planned.destination,
        options=options,
        priority=DEFAULT_PRIORITY if submission.priority is None else submission.priority,
        max_tries=DEFAULT_TRIES if submission.max_tries is None else submission.max_tries,
        label=submission.label,
        max_active=submission.max_active,
        log_uid=uuid.uuid4().hex,
        first=first_element(type_, src_filepath, submission.dst_filepath) if planned is None else planned.elements[0],
        more=() if planned is None else planned.elements[1:],
        checksums={} if planned is None else planned.checksums,
        after=_predecessors(submission),
        deadline=_deadline(options.get("deadline"), api.clock()),
    )


def _check_paths(
    api: ApiContext,
    type_: JobType,
    protocol: JobProtocol,
    source: Site,
    destination: Site | None,
    submission: SubmitJob,
    options: Mapping[str, Any],
    *,
    by_tools: bool,
) -> None:
    source_url = url_at(source, protocol, submission.src_filepath or "", "$.src_filepath")
    removes = type_ is JobType.REMOVE or (type_ is JobType.COPY and options.get("move"))
    if removes and _is_whole_site(source_url, source.endpoints[protocol]):
        raise InvalidInputError("this path is the root of the whole site: name what to remove", "$.src_filepath")
    if destination is not None and submission.dst_filepath is not None:
        other = _protocol_at(api, source, destination, protocol, by_tools=by_tools)
        destination_url = url_at(destination, other, submission.dst_filepath, "$.dst_filepath")
        # Compares URLs: two sites may be endpoints of one storage.
        if is_inside(destination_url, source_url):
            raise InvalidInputError("the destination is the source itself, or is inside it", "$.dst_filepath")
        check_not_removed(options, source_url, destination_url)


def _predecessors(submission: SubmitJob) -> Predecessors | None:
    if submission.after:
        return Predecessors(tuple(dict.fromkeys(submission.after)), submission.after_any or False)
    if submission.after_any is not None:
        raise InvalidInputError("after_any needs the key 'after', with the jobs to wait for", "$.after_any")
    return None


def _deadline(text: str | None, now: datetime) -> datetime | None:
    if text is None:
        return None
    try:
        return deadline_from_text(text, now)
    except ValueError as error:
        raise InvalidInputError(str(error), "$.extra_opts.deadline") from error


_TOOL_URLS = tuple(f"{scheme}://" for scheme in TOOL_SCHEMES)


def _enum_member(type_: type[_JobEnum], word: object, pointer: str) -> _JobEnum:
    try:
        return type_.parse(word)
    except ValueError as error:
        raise InvalidInputError(str(error), pointer) from error


def _is_whole_site(url: str, endpoint: str) -> bool:
    """Whether a URL is the root of a storage or a home directory, whose removal is most likely a mistake."""
    return normalised("/" + url.removeprefix(endpoint)) in ("/", "/~")


def _site(api: ApiContext, user_id: int, number: int | str, pointer: str) -> Site:
    site_id = int(number)
    site = api.sites.by_id(site_id) if site_id <= LARGEST_ID else None
    if site is None or not site.is_open_to(user_id):
        raise InvalidInputError(f"there is no site {site_id}; GET /sites lists all", pointer)
    return site


def _destination(api: ApiContext, user_id: int, type_: JobType, source: Site, submission: SubmitJob) -> Site | None:
    if type_ not in _WITH_DESTINATION:
        for name, value in (("dst_siteid", submission.dst_siteid), ("dst_filepath", submission.dst_filepath)):
            if value is not None:
                raise InvalidInputError(f"a {type_.name} has no destination: leave {name} out", f"$.{name}")
        return None
    if submission.dst_filepath is None and not (submission.extra_opts or {}).get("items"):
        raise InvalidInputError(f"a {type_.name} needs the key 'dst_filepath'", "$.dst_filepath")
    if type_ is JobType.RENAME:
        if submission.dst_siteid is not None and int(submission.dst_siteid) != source.id:
            raise InvalidInputError("a RENAME stays at its site: leave dst_siteid out, or use COPY", "$.dst_siteid")
        return source
    if submission.dst_siteid is None:
        raise InvalidInputError(f"a {type_.name} needs the key 'dst_siteid'", "$.dst_siteid")
    return _site(api, user_id, submission.dst_siteid, "$.dst_siteid")


def _options(
    type_: JobType, protocol: JobProtocol, values: dict[str, Any] | None
) -> tuple[dict[str, Any], CopyOptions | None]:
    """The options as given; and once more as values if they have items."""
    given = values or {}
    try:
        options = read_options(type_, given)
    except msgspec.ValidationError as error:
        raise invalid_value(error, OPTIONS[type_], "$.extra_opts") from error
    if isinstance(options, CopyOptions):
        check_filters(options)
    if options.dummy is not None:
        if protocol is not JobProtocol.DUMMY:
            raise InvalidInputError("the option dummy is for the protocol DUMMY only", "$.extra_opts.dummy")
        if options.dummy.fail is not None and options.dummy.fail not in list(FailureCode):
            raise InvalidInputError(
                f"not a failure code; known are {', '.join(FailureCode)}", "$.extra_opts.dummy.fail"
            )
    return given, options if isinstance(options, CopyOptions) and options.items is not None else None


def _check_supported(api: ApiContext, protocol: JobProtocol, type_: JobType) -> None:
    if api.supports(protocol, type_):
        return
    known = [member.name for member in JobProtocol if api.supports(member, type_)]
    if known:
        raise InvalidInputError(
            f"this service cannot {type_.name} by {protocol.name}; it can by {', '.join(known)}", "$.protocol"
        )
    raise InvalidInputError(f"this service cannot {type_.name}", "$.type")


def _by_tools(protocol: JobProtocol, options: Mapping[str, Any], *sites: Site) -> bool:
    """Whether the tools mover runs a job."""
    asked = options.get("mover")
    if asked == MoverKind.TOOLS and protocol not in TOOL_PROTOCOLS:
        known = ", ".join(each.name for each in sorted(TOOL_PROTOCOLS))
        raise InvalidInputError(f"the tools move by {known}, not by {protocol.name}", "$.extra_opts.mover")
    by_tools = moved_by_tools(protocol, asked, sites)
    if not by_tools and any(site.endpoints.get(protocol, "").startswith(_TOOL_URLS) for site in sites):
        raise InvalidInputError("only the tools reach this site: leave the option mover away", "$.extra_opts.mover")
    return by_tools


def _relays_to(api: ApiContext, protocol: JobProtocol, *, by_tools: bool) -> frozenset[JobProtocol]:
    return TOOL_MOVERS[protocol].relays_to if by_tools else api.relays_to(protocol)


def _protocol_at(
    api: ApiContext, source: Site, destination: Site, protocol: JobProtocol, *, by_tools: bool
) -> JobProtocol:
    """The protocol for the destination; one that cannot be reached is refused with the pairs that work."""
    relays_to = _relays_to(api, protocol, by_tools=by_tools)
    if source is destination or not relays_to:
        return protocol
    found = destination_protocol(destination.endpoints, protocol, relays_to)
    if found is not None:
        return found
    reached = ", ".join(f"{protocol.name} to {other.name}" for other in sorted({protocol, *relays_to}))
    offered = ", ".join(sorted(other.name for other in destination.endpoints))
    raise InvalidInputError(
        f"site {destination.name} offers {offered}; by {protocol.name} this service can copy {reached}", "$.protocol"
    )


def stored_sites(api: ApiContext, new: NewJob) -> list[int]:
    """The sites of a job that are in the database, where they can be removed."""
    return [number for number in new.sites if not api.sites.is_of_file(number)]


def credential_needs(api: ApiContext, new: NewJob | JobRecord) -> dict[int, CredentialNeed]:
    """Credentials that a job needs, by site; sites that need none are left out."""
    source = api.sites.by_id(new.src_siteid)
    destination = None if new.dst_siteid is None else api.sites.by_id(new.dst_siteid)
    sites = [site for site in (source, destination) if site is not None]
    by_tools = moved_by_tools(new.protocol, new.options.get("mover"), sites)
    ends = [] if source is None else [(source, new.protocol)]
    if destination is not None and destination.id != new.src_siteid:
        found = destination_protocol(
            destination.endpoints, new.protocol, _relays_to(api, new.protocol, by_tools=by_tools)
        )
        ends.append((destination, new.protocol if found is None else found))
    needs = [
        (site, TOOL_MOVERS[protocol].need if by_tools else api.credential_need(protocol)) for site, protocol in ends
    ]
    return {site.id: need.at(site.owner_id) for site, need in needs if need is not None}

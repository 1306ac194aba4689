"""From what a client asks for to a job that can be registered; every refusal names the key that is wrong."""

from __future__ import annotations

import uuid
from typing import Any, TypeVar

import msgspec

from pdm.workqueue.domain.credentials import Need
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.jobs import DEFAULT_PRIORITY, DEFAULT_TRIES, JobRecord, NewJob
from pdm.workqueue.domain.paths import InvalidPathError, checked, is_inside, normalised
from pdm.workqueue.domain.planning import first_element
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.decoding import invalid_value
from pdm.workqueue.http.problems import InvalidInputError
from pdm.workqueue.movers.pairs import protocol_at
from pdm.workqueue.sites.registry import NotOfferedError, Site, storage_url
from pdm.workqueue.wire.options import OPTIONS, read_options
from pdm.workqueue.wire.requests import LARGEST_ID, SubmitJob

_E = TypeVar("_E", JobType, JobProtocol)

_WITH_DESTINATION = frozenset({JobType.COPY, JobType.RENAME})


def job_from(api: ApiContext, user_id: int, asked: SubmitJob) -> NewJob:
    """The job that a request asks for.

    Args:
        api: knows sites and what is supported.
        user_id: whose job it will be.
        asked: the request.

    Raises:
        InvalidInputError: it cannot be; names the key.
    """
    type_ = _member(JobType, asked.type, "$.type")
    protocol = JobProtocol.GRIDFTP
    if asked.protocol is not None:
        protocol = _member(JobProtocol, asked.protocol, "$.protocol")
    if asked.label is not None and not asked.label.isprintable():
        raise InvalidInputError("a label is one line of printable characters", "$.label")
    options = _options(type_, protocol, asked.extra_opts)
    source = _site(api, user_id, asked.src_siteid, "$.src_siteid")
    destination = _destination(api, user_id, type_, source, asked)
    _check_supported(api, protocol, type_)
    source_url = _url(source, protocol, asked.src_filepath, "$.src_filepath")
    if type_ is JobType.REMOVE and _is_whole_site(source_url, source.endpoints[protocol]):
        raise InvalidInputError("that is all of the site: name what is to be removed there", "$.src_filepath")
    if destination is not None and asked.dst_filepath is not None:
        other = _protocol_at(api, source, destination, protocol)
        destination_url = _url(destination, other, asked.dst_filepath, "$.dst_filepath")
        # URLs, for two sites may be doors to one storage.
        if is_inside(destination_url, source_url):
            raise InvalidInputError("the destination is the source itself, or lies inside it", "$.dst_filepath")
    return NewJob(
        user_id=user_id,
        type=type_,
        protocol=protocol,
        src_siteid=source.id,
        src_filepath=asked.src_filepath,
        dst_siteid=None if destination is None else destination.id,
        dst_filepath=asked.dst_filepath,
        options=options,
        priority=DEFAULT_PRIORITY if asked.priority is None else asked.priority,
        max_tries=DEFAULT_TRIES if asked.max_tries is None else asked.max_tries,
        label=asked.label,
        log_uid=uuid.uuid4().hex,
        first=first_element(type_, asked.src_filepath, asked.dst_filepath),
    )


def _member(type_: type[_E], word: object, pointer: str) -> _E:
    try:
        return type_.parse(word)
    except ValueError as error:
        raise InvalidInputError(str(error), pointer) from error


def _is_whole_site(url: str, endpoint: str) -> bool:
    """Whether a URL is the root of a storage, or of an account: a slip there is beyond repair."""
    return normalised("/" + url.removeprefix(endpoint)) in ("/", "/~")


def _site(api: ApiContext, user_id: int, number: int | str, pointer: str) -> Site:
    site_id = int(number)
    site = api.sites.by_id(site_id) if site_id <= LARGEST_ID else None
    if site is None or not site.is_open_to(user_id):
        raise InvalidInputError(f"there is no site {site_id}; GET /sites lists those there are", pointer)
    return site


def _destination(api: ApiContext, user_id: int, type_: JobType, source: Site, asked: SubmitJob) -> Site | None:
    if type_ not in _WITH_DESTINATION:
        for name, value in (("dst_siteid", asked.dst_siteid), ("dst_filepath", asked.dst_filepath)):
            if value is not None:
                raise InvalidInputError(f"a {type_.name} has no destination: leave {name} out", f"$.{name}")
        return None
    if asked.dst_filepath is None:
        raise InvalidInputError(f"a {type_.name} needs the key 'dst_filepath'", "$.dst_filepath")
    if type_ is JobType.RENAME:
        if asked.dst_siteid is not None and int(asked.dst_siteid) != source.id:
            raise InvalidInputError("a RENAME stays at its site: leave dst_siteid out, or use COPY", "$.dst_siteid")
        return source
    if asked.dst_siteid is None:
        raise InvalidInputError(f"a {type_.name} needs the key 'dst_siteid'", "$.dst_siteid")
    return _site(api, user_id, asked.dst_siteid, "$.dst_siteid")


def _options(type_: JobType, protocol: JobProtocol, values: dict[str, Any] | None) -> dict[str, Any]:
    given = values or {}
    try:
        options = read_options(type_, given)
    except msgspec.ValidationError as error:
        raise invalid_value(error, OPTIONS[type_], "$.extra_opts") from error
    if options.dummy is not None:
        if protocol is not JobProtocol.DUMMY:
            raise InvalidInputError("the option dummy is for the protocol DUMMY only", "$.extra_opts.dummy")
        if options.dummy.fail is not None and options.dummy.fail not in list(FailureCode):
            raise InvalidInputError(
                f"not a failure code; known are {', '.join(FailureCode)}", "$.extra_opts.dummy.fail"
            )
    return given


def _check_supported(api: ApiContext, protocol: JobProtocol, type_: JobType) -> None:
    if api.supports(protocol, type_):
        return
    known = [member.name for member in JobProtocol if api.supports(member, type_)]
    if known:
        raise InvalidInputError(
            f"this service cannot {type_.name} by {protocol.name}; it can by {', '.join(known)}", "$.protocol"
        )
    raise InvalidInputError(f"this service cannot {type_.name}", "$.type")


def _protocol_at(api: ApiContext, source: Site, destination: Site, protocol: JobProtocol) -> JobProtocol:
    """The protocol for the destination; one that cannot be reached is refused with the pairs that work."""
    relays_to = api.relays_to(protocol)
    if source is destination or not relays_to:
        return protocol
    found = protocol_at(destination.endpoints, protocol, relays_to)
    if found is not None:
        return found
    reached = ", ".join(f"{protocol.name} to {other.name}" for other in sorted({protocol, *relays_to}))
    offered = ", ".join(sorted(other.name for other in destination.endpoints))
    raise InvalidInputError(
        f"site {destination.name} offers {offered}; by {protocol.name} this service can copy {reached}", "$.protocol"
    )


def needs_of(api: ApiContext, new: NewJob | JobRecord) -> dict[int, Need]:
    """What a job needs at each of its sites that needs something."""
    source = api.sites.by_id(new.src_siteid)
    destination = None if new.dst_siteid is None else api.sites.by_id(new.dst_siteid)
    ends = [] if source is None else [(source, new.protocol)]
    if destination is not None and destination.id != new.src_siteid:
        found = protocol_at(destination.endpoints, new.protocol, api.relays_to(new.protocol))
        ends.append((destination, found or new.protocol))
    needs = [(site, api.credential_need(protocol)) for site, protocol in ends]
    return {site.id: need.at(site.owner_id) for site, need in needs if need is not None}


def _url(site: Site, protocol: JobProtocol, path: str, pointer: str) -> str:
    try:
        return storage_url(site, protocol, checked(path))
    except NotOfferedError as error:
        raise InvalidInputError(str(error), "$.protocol") from error
    except InvalidPathError as error:
        raise InvalidInputError(str(error), pointer) from error

"""The interface of a mover (one for each protocol), and how a batch becomes the request for its helper process."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

from attrs import frozen

from pdm.workqueue.domain.credentials import CredentialKind, CredentialNeed
from pdm.workqueue.domain.enums import ChecksumAlgorithm, JobProtocol, JobType, PlannedAction, relay_order
from pdm.workqueue.domain.failures import (
    AttemptFailure,
    FailureCode,
    FailureScope,
    code_for_errno,
    is_unreachable_errno,
)
from pdm.workqueue.domain.jobs import Batch, ElementRecord, JobRecord
from pdm.workqueue.domain.paths import LONGEST_PATH, InvalidPathError, StorageUrl
from pdm.workqueue.telemetry.logging import redacted
from pdm.workqueue.wire.agent_events import Fault
from pdm.workqueue.wire.agent_requests import (
    CheckItem,
    CheckRequest,
    CopyItem,
    CopyRequest,
    FoundBefore,
    ListRequest,
    MkdirRequest,
    PathItem,
    RemoveRequest,
    RenameItem,
    RenameRequest,
    TimeLimits,
    WorkRequest,
)
from pdm.workqueue.wire.options import CopyOptions, ListOptions, MkdirOptions, Options, RemoveOptions, RenameOptions

_LONGEST_MESSAGE = 2000


@frozen
class ErrorPattern:
    """A text that has a meaning.

    Attributes:
        pattern: searched for in the message.
        code: what it means.
        scope: whose fault it then is, whatever the helper thought; None to leave that.
        unreachable: whether no server answered.
    """

    pattern: re.Pattern[str]
    code: FailureCode
    scope: FailureScope | None = None
    unreachable: bool = False

    @classmethod
    def of(
        cls, pattern: str, code: FailureCode, scope: FailureScope | None = None, *, unreachable: bool = False
    ) -> ErrorPattern:
        """One whose pattern sees each line of a message, and reaches over them."""
        return cls(re.compile(pattern, re.DOTALL | re.MULTILINE), code, scope, unreachable)


def classify(fault: Fault, patterns: Sequence[ErrorPattern] = ()) -> AttemptFailure:
    """The failure behind a fault.

    Args:
        fault: as the helper gives it.
        patterns: for messages without code and error number; the first that fits counts.
    """
    scope = FailureScope(fault.scope)
    # Some servers send back what they were sent, tokens included.
    message = redacted(fault.message[:_LONGEST_MESSAGE])
    if fault.code is not None and fault.code in FailureCode.__members__:
        return AttemptFailure(scope, FailureCode(fault.code), message, fault.retry_after_s, fault.unreachable)
    code = code_for_errno(fault.errno)
    if code is not FailureCode.UNKNOWN:
        unreachable = fault.unreachable or is_unreachable_errno(fault.errno)
        return AttemptFailure(scope, code, message, fault.retry_after_s, unreachable)
    for candidate in patterns:
        if candidate.pattern.search(message):
            return AttemptFailure(
                candidate.scope or scope,
                candidate.code,
                message,
                unreachable=fault.unreachable or candidate.unreachable,
            )
    return AttemptFailure(scope, FailureCode.UNKNOWN, message)


#: URL of a path at a site: ``(site number, path) -> URL``.
SiteUrl = Callable[[int, str], str]

NO_FAILURES: Mapping[int, AttemptFailure] = MappingProxyType({})
ALL_JOB_TYPES = frozenset(JobType)


@frozen
class Access:
    """What a helper may be told about who it acts for and whom it trusts; files, never secrets themselves.

    Attributes:
        credential: file with the user's delegated proxy; None where none is needed.
        trust_dir: directory with the authorities that storage servers are checked against, except endpoints that have
            others of their own, by URL (``PDM_TRUST``).
        roots: directories on disk that FILE sites serve.
        ssh_key: file with the service's own private key for SSH, for users who have given none.
        ssh_known_hosts: file with the host keys of SSH servers.
        ssh_user: account at SSH servers; empty for the service's own name.
    """

    credential: Path | None = None
    trust_dir: Path | None = None
    roots: Sequence[str] = ()
    ssh_key: Path | None = None
    ssh_known_hosts: Path | None = None
    ssh_user: str = ""

    @property
    def own(self) -> frozenset[CredentialKind]:
        """Kinds of which the service has one of its own, for users who have given none."""
        return frozenset() if self.ssh_key is None else frozenset({CredentialKind.SSH_KEY})


@frozen
class BuiltRequest:
    """What a helper is asked for a batch.

    Attributes:
        request: None if no element of the batch can be in one.
        refused: why elements are not in it that can never be, by key.
        postponed: keys of elements that are left to a later batch, because the request would be too long with them.
    """

    request: WorkRequest | None
    refused: Mapping[int, AttemptFailure] = NO_FAILURES
    postponed: frozenset[int] = frozenset()


class Mover(Protocol):
    """How one protocol lists, copies, removes, renames and makes directories."""

    @property
    def job_types(self) -> frozenset[JobType]:
        """What it can do."""
        ...

    @property
    def helper(self) -> str:
        """Module of the helper program."""
        ...

    @property
    def needs_credential(self) -> CredentialKind | None:
        """The kind of credential of the user that the helper works with; None if it needs none.

        A proxy is one for the whole route, and its file goes to `environment`. Of SSH keys and tokens each site has its
        own: the helper finds in ``PDM_CREDENTIALS`` of its environment a JSON object that maps each endpoint's URL to
        ``{"file": PATH, "account": NAME or null}``.
        """
        ...

    @property
    def prefers_credential(self) -> CredentialKind | None:
        """A kind that is used instead at each site for which the user has given one; None if there is no such."""
        ...

    def request_for(
        self, batch: Batch, urls: SiteUrl, options: Options, limits: TimeLimits, request_id: int
    ) -> BuiltRequest:
        """What the helper is asked for a batch; the key of each item is its element's place in there."""
        ...

    @property
    def relays_to(self) -> frozenset[JobProtocol]:
        """Other protocols that its helper can copy to; such a copy passes through the service."""
        ...

    def environment(self, access: Access) -> Mapping[str, str]:
        """What the helper's environment has to tell it."""
        ...

    def classify(self, fault: Fault) -> AttemptFailure:
        """What a fault means for the user and the queue."""
        ...


def credential_need(mover: Mover, access: Access) -> CredentialNeed | None:
    """What a mover needs at a site that it reaches; None for nothing."""
    kinds = tuple(kind for kind in (mover.prefers_credential, mover.needs_credential) if kind is not None)
    return CredentialNeed(kinds, optional=not access.own.isdisjoint(kinds)) if kinds else None


def destination_protocol(
    offered: Collection[JobProtocol], asked: JobProtocol, relays_to: Collection[JobProtocol]
) -> JobProtocol | None:
    """The protocol for the destination of a copy.

    Args:
        offered: by the destination.
        asked: the job's, by which the source is read.
        relays_to: where the job's mover can write to besides.

    Returns:
        The job's own where it is offered; else the first by `relay_order` that is offered and can be written to; None
        if there is none.
    """
    if asked in offered:
        return asked
    return min((protocol for protocol in offered if protocol in relays_to), key=relay_order, default=None)


#: Bytes of URLs in one request. A helper reads no longer line than 64 MiB; what does not fit waits for the next batch.
_LARGEST_REQUEST = 32 * 1024 * 1024
#: What the names of further ways add to a temporary name, at most (`helpers/copying.py`).
LONGEST_SUFFIX = 8
_Item = TypeVar("_Item", CheckItem, CopyItem, PathItem, RenameItem)


class _UnusableError(Exception):
    """An element that no helper can be asked for."""

    def __init__(self, failure: AttemptFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def build_request(batch: Batch, urls: SiteUrl, options: Options, limits: TimeLimits, request_id: int) -> BuiltRequest:
    """The request for a batch, without the elements that cannot be in one.

    Args:
        batch: elements of one type; the key of each item is its place in there.
        urls: gives the URL of a path at a site.
        options: of the job.
        limits: for each element.
        request_id: names the request in events.
    """
    match batch.type:
        case JobType.LIST:
            return _list(batch, urls, options, limits, request_id)
        case JobType.COPY:
            if not isinstance(options, CopyOptions):
                raise TypeError(f"a copy with {type(options).__name__}")
            algorithm = ChecksumAlgorithm(options.checksum or ChecksumAlgorithm.ADLER32)
            if options.check is not None:
                at = FailureScope(options.check)
                checks = _Items[CheckItem](
                    batch, lambda key, element: _check_item(key, batch.job_of(element), element, urls, at)
                )
                return checks.built(CheckRequest(request_id, checks.items, at, limits, algorithm))
            copies = _Items[CopyItem](batch, lambda key, element: _copy_item(key, batch.job_of(element), element, urls))
            return copies.built(
                CopyRequest(
                    request_id,
                    copies.items,
                    options.effective_overwrite,
                    options.verify,
                    limits,
                    algorithm,
                    options.preserve,
                )
            )
        case JobType.REMOVE:
            removals = _Items[PathItem](
                batch, lambda key, element: _remove_item(key, batch.job_of(element), element, urls)
            )
            return removals.built(RemoveRequest(request_id, removals.items, limits))
        case JobType.RENAME:
            if not isinstance(options, RenameOptions):
                raise TypeError(f"a rename with {type(options).__name__}")
            renames = _Items[RenameItem](batch, lambda key, element: _rename_item(key, batch.job, element, urls))
            return renames.built(RenameRequest(request_id, renames.items, options.overwrite, limits))
        case JobType.MKDIR:
            # The empty directories of a copied tree are made where it goes to.
            parents = options.parents if isinstance(options, MkdirOptions) else True
            made = _Items[PathItem](batch, lambda key, element: _make_item(key, batch.job, element, urls))
            return made.built(MkdirRequest(request_id, made.items, parents, limits))


class _Items(Generic[_Item]):
    """The items of a batch: an element that cannot be one fails alone, and what is too much for one line waits.

    Args:
        batch: the elements.
        build: makes the item of a key and an element; raises `_UnusableError`.

    Attributes:
        items: for the request.
    """

    def __init__(self, batch: Batch, build: Callable[[int, ElementRecord], _Item]) -> None:
        self.items: list[_Item] = []
        self._refused: dict[int, AttemptFailure] = {}
        self._postponed: set[int] = set()
        left = _LARGEST_REQUEST
        for key, element in enumerate(batch.elements):
            try:
                item = build(key, element)
            except _UnusableError as error:
                self._refused[key] = error.failure
                continue
            left -= _length(item)
            if left < 0 and self.items:
                self._postponed.add(key)
            else:
                self.items.append(item)

    def built(self, request: WorkRequest) -> BuiltRequest:
        return BuiltRequest(request if self.items else None, self._refused, frozenset(self._postponed))


def _length(item: CheckItem | CopyItem | PathItem | RenameItem) -> int:
    """Bytes of an item's URLs; they are ASCII."""
    if isinstance(item, PathItem | CheckItem):
        return len(item.url)
    length = len(item.source) + len(item.destination)
    if isinstance(item, CopyItem):
        length += len(item.temporary) * (1 + len(item.stale))
    return length


def _url(urls: SiteUrl, site: int, path: str, scope: FailureScope) -> str:
    try:
        return urls(site, path)
    except InvalidPathError as error:
        raise _UnusableError(AttemptFailure(scope, FailureCode.INVALID_NAME, str(error))) from error


def temporary_name(log_uid: str, element_id: int, attempt: int) -> str:
    """The name under which a file arrives; hidden, and unlike that of any other attempt anywhere."""
    return f".pdm-{log_uid[:16]}.{element_id}.{attempt}.part"


def _list(batch: Batch, urls: SiteUrl, options: Options, limits: TimeLimits, request_id: int) -> BuiltRequest:
    if len(batch.elements) != 1:
        raise ValueError("a listing is a batch of its own")
    element, job = batch.elements[0], batch.job
    depth: int | None = None
    if isinstance(options, ListOptions):
        depth = options.depth
    elif isinstance(options, RemoveOptions) and (options.only_empty or not options.recursive):
        # What the path itself is decides all.
        depth = 0
    destination: str | None = None
    space_at: str | None = None
    try:
        url = _url(urls, job.src_siteid, element.src_filepath, FailureScope.SOURCE)
        if isinstance(options, CopyOptions):
            if job.dst_siteid is None or job.dst_filepath is None:
                raise ValueError(f"job {job.id} has no destination")
            # Of a plain copy, the elements fail if the path is not possible there.
            with contextlib.suppress(*(() if job.lists_destination else (_UnusableError,))):
                space_at = _url(urls, job.dst_siteid, job.dst_filepath, FailureScope.DESTINATION)
            destination = space_at if job.lists_destination else None
    except _UnusableError as error:
        return BuiltRequest(None, {0: error.failure})
    # The removal of a link must not empty the directory that it leads to.
    follow = job.type is not JobType.REMOVE
    owners = job.type is JobType.LIST
    return BuiltRequest(ListRequest(request_id, 0, url, depth, limits, follow, destination, space_at, owners))


def _copy_item(key: int, job: JobRecord, element: ElementRecord, urls: SiteUrl) -> CopyItem:
    source = _url_of(urls, job, element, FailureScope.SOURCE)
    destination = _url_of(urls, job, element, FailureScope.DESTINATION)
    directory = destination.rpartition("/")[0]
    if destination.endswith("/"):
        directory = StorageUrl(destination).parent.rstrip("/")
    attempts = element.attempts
    temporary = f"{directory}/{temporary_name(job.log_uid, element.id, attempts)}"
    _check_length(temporary)
    stale = [f"{directory}/{temporary_name(job.log_uid, element.id, attempt)}" for attempt in range(1, attempts)]
    size = -1 if not element.size and job.has_items else element.size
    return CopyItem(key, source, destination, temporary, stale, size, element.checksum, element.handed_over)


def _check_item(key: int, job: JobRecord, element: ElementRecord, urls: SiteUrl, at: FailureScope) -> CheckItem:
    return CheckItem(key, _url_of(urls, job, element, at), element.size, element.checksum)


def _url_of(urls: SiteUrl, job: JobRecord, element: ElementRecord, at: FailureScope) -> str:
    """The URL of an element's path at the source or the destination."""
    if at is FailureScope.SOURCE:
        return _url(urls, job.src_siteid, element.src_filepath, at)
    if job.dst_siteid is None or element.dst_filepath is None:
        raise ValueError(f"element {element.id} of job {job.id} has no destination")
    return _url(urls, job.dst_siteid, element.dst_filepath, at)


def _check_length(temporary: str) -> None:
    """Refuse a destination next to which the temporary name has no room."""
    if len(temporary) <= LONGEST_PATH:
        return
    if len(StorageUrl(temporary).path) + LONGEST_SUFFIX > LONGEST_PATH:
        message = f"the path is too long: with its temporary name it has more than {LONGEST_PATH} bytes"
        raise _UnusableError(AttemptFailure(FailureScope.DESTINATION, FailureCode.INVALID_NAME, message))


def _remove_item(key: int, job: JobRecord, element: ElementRecord, urls: SiteUrl) -> PathItem:
    if element.planned is not None:
        return _planned_removal(key, job, element, urls)
    url = _url(urls, job.src_siteid, element.src_filepath, FailureScope.SOURCE)
    listed_at = element.timestamp.timestamp()
    return PathItem(key, url, element.is_directory, again=element.may_be_done, listed_at=listed_at)


def _planned_removal(key: int, job: JobRecord, element: ElementRecord, urls: SiteUrl) -> PathItem:
    """The removal of a moved source, or of what only the destination has; what is gone already is done."""
    scope = FailureScope.SOURCE if element.dst_filepath is None else FailureScope.DESTINATION
    return PathItem(
        key,
        _url_of(urls, job, element, scope),
        element.is_directory,
        again=True,
        listed_size=None if element.is_directory else element.size,
        listed_mtime=element.mtime,
        may_stay=element.planned is PlannedAction.MOVED,
        at_destination=scope is FailureScope.DESTINATION,
    )


def _rename_item(key: int, job: JobRecord, element: ElementRecord, urls: SiteUrl) -> RenameItem:
    if element.dst_filepath is None:
        raise ValueError(f"element {element.id} of job {element.job_id} has no new name")
    source = _url(urls, job.src_siteid, element.src_filepath, FailureScope.SOURCE)
    destination = _url(urls, job.src_siteid, element.dst_filepath, FailureScope.DESTINATION)
    return RenameItem(key, source, destination, found=_found_before(element))


def _make_item(key: int, job: JobRecord, element: ElementRecord, urls: SiteUrl) -> PathItem:
    site, path = job.src_siteid, element.src_filepath
    if element.dst_filepath is not None and job.dst_siteid is not None:
        site, path = job.dst_siteid, element.dst_filepath
    url = _url(urls, site, path, FailureScope.DESTINATION)
    return PathItem(key, url, directory=True, found=_found_before(element))


def _found_before(element: ElementRecord) -> FoundBefore | None:
    found = element.found_before
    return None if found is None else FoundBefore(source=found["source"], destination=found["destination"])

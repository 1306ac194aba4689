"""Jobs, elements, attempts and claims as values.

What exists for each element is a named tuple: a frozen attrs class takes three times as long to construct.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from attrs import frozen

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType, PlannedAction
from pdm.workqueue.domain.failures import OUTCOME_UNKNOWN, AttemptFailure, FailureScope
from pdm.workqueue.domain.holds import JobHold

#: Priorities: 0 is served first.
FIRST_PRIORITY, LAST_PRIORITY, DEFAULT_PRIORITY = 0, 9, 5
#: How many jobs one job may wait for.
MOST_PREDECESSORS = 100
#: How many attempts an element may have.
LEAST_TRIES, MOST_TRIES, DEFAULT_TRIES = 1, 10, 2


#: Assumed of a file of unknown size where a time depends on it.
_WELL_POSSIBLE_SIZE = 2**40


class NewElement(NamedTuple):
    """An element that planning asks for.

    Attributes:
        type: what to do (a COPY job has LIST, COPY and MKDIR elements).
        src_filepath: path at the source site, or of the thing itself.
        dst_filepath: path at the destination site; None where the type has none.
        size: bytes; 0 where nothing is moved or it is not known.
        is_directory: whether a REMOVE or MKDIR is of a directory.
        phase: elements of a job run phase by phase, lowest first; only removals have another than 0.
        planned: what the plan of a COPY that was compared with its destination says; None in all other jobs.
        mtime: when the source was changed, seconds since 1970 UTC; None where nothing needs it or it is not listed.
        done: whether nothing is to be done: the element is DONE without an attempt.
    """

    type: JobType
    src_filepath: str
    dst_filepath: str | None = None
    size: int = 0
    is_directory: bool = False
    phase: int = 0
    planned: PlannedAction | None = None
    mtime: int | None = None
    done: bool = False


class CancelCode(enum.StrEnum):
    """Why the service has cancelled a job: stable words for clients."""

    DEADLINE = "DEADLINE"
    PREDECESSOR = "PREDECESSOR"


@frozen
class CancelReason:
    """Why the service has cancelled a job; ``message`` is for people."""

    code: CancelCode
    message: str


@frozen
class Predecessors:
    """Jobs that a job waits for.

    Attributes:
        jobs: their ids; older jobs of the same user, so that there are no cycles.
        any_end: whether it begins however they end; otherwise only when all are DONE.
        on_failure: whether it begins only when all are FAILED: it is the same work in another way.
    """

    jobs: Sequence[int]
    any_end: bool = False
    on_failure: bool = False


def _touched(source: int, destination: int | None) -> frozenset[int]:
    return frozenset({source} if destination is None else {source, destination})


@frozen
class NewJob:
    """A job to be registered; it gets one first element, number 0."""

    user_id: int
    type: JobType
    protocol: JobProtocol
    src_siteid: int
    src_filepath: str
    dst_siteid: int | None
    dst_filepath: str | None
    options: Mapping[str, Any]
    priority: int
    max_tries: int
    label: str | None
    log_uid: str
    first: NewElement
    #: Elements 1 and on, of a job without a listing.
    more: Sequence[NewElement] = ()
    #: Number of an element → the checksum that its file must have.
    checksums: Mapping[int, str] = MappingProxyType({})
    after: Predecessors | None = None
    #: When it is cancelled unless it has ended.
    deadline: datetime | None = None
    #: The schedule of which it is a run.
    schedule_id: int | None = None
    #: How many of its elements but the listing may run at once; None for no limit of its own.
    max_active: int | None = None

    @property
    def sites(self) -> frozenset[int]:
        """Those that it reads from or writes to."""
        return _touched(self.src_siteid, self.dst_siteid)


@frozen
class Counters:
    """Number of elements of a job by status; their sum is ``elements``."""

    elements: int = 0
    submitted: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    held: int = 0


@frozen
class JobRecord:
    """A job as the database knows it; times are UTC, sizes bytes."""

    id: int
    user_id: int
    type: JobType
    status: JobStatus
    protocol: JobProtocol
    src_siteid: int
    src_filepath: str
    dst_siteid: int | None
    dst_filepath: str | None
    options: Mapping[str, Any]
    priority: int
    max_tries: int
    label: str | None
    log_uid: str
    timestamp: datetime
    finished_at: datetime | None
    cancel_requested: bool
    counters: Counters
    bytes_total: int
    bytes_done: int
    #: Entries of the source that are left out; each is noted with its reason.
    skipped: int
    #: When the first of its elements was claimed for the first time.
    started_at: datetime | None = None
    #: Files that the destination had before, and their bytes; they are among those that are done.
    already_there: int = 0
    bytes_already_there: int = 0
    after: Predecessors | None = None
    #: Whether another job was submitted to wait for this one.
    is_awaited: bool = False
    deadline: datetime | None = None
    #: Why the service has cancelled it; None if it was not cancelled, or by its user.
    cancel_reason: CancelReason | None = None
    #: The schedule of which it is a run; that may have been removed.
    schedule_id: int | None = None
    #: By a person; None in a job that is being cancelled, and in one that has ended.
    hold: JobHold | None = None
    #: How many of its elements but the listing may run at once, on all nodes; None for no limit of its own.
    max_active: int | None = None

    @property
    def sites(self) -> frozenset[int]:
        """Those that it reads from or writes to."""
        return _touched(self.src_siteid, self.dst_siteid)

    @property
    def moves(self) -> bool:
        """Whether a source file is removed once its copy is proven."""
        return self.type is JobType.COPY and bool(self.options.get("move"))

    @property
    def deletes_extra(self) -> bool:
        """Whether what only the destination has is removed after the copies."""
        return self.type is JobType.COPY and bool(self.options.get("delete_extra"))

    @property
    def has_items(self) -> bool:
        """Whether its elements came with the request: no listing has found them."""
        return self.type is JobType.COPY and bool(self.options.get("items"))

    @property
    def checked_site(self) -> int | None:
        """The site at which its items are compared with the files that are there; None if it is no check."""
        at = self.options.get("check") if self.has_items else None
        if at is None:
            return None
        return self.src_siteid if at == FailureScope.SOURCE else self.dst_siteid

    @property
    def lists_destination(self) -> bool:
        """Whether its destination is listed as well: as `CopyRules.needs_destination` says, without their filters."""
        options = self.options
        return self.type is JobType.COPY and bool(options.get("sync") or options.get("dry_run") or options.get("move"))

    @property
    def stages(self) -> bool:
        """Whether its sources are brought from tape to disk first."""
        return self.type is JobType.COPY and bool(self.options.get("stage")) and not self.options.get("dry_run")

    @property
    def archives(self) -> bool:
        """Whether a copy is DONE only once the destination has it on tape."""
        return self.type is JobType.COPY and bool(self.options.get("archive")) and not self.options.get("dry_run")

    @property
    def has_phases(self) -> bool:
        """Whether some of its elements wait for others."""
        return self.type is JobType.REMOVE or self.moves or self.deletes_extra


class ElementRecord(NamedTuple):
    """An element as the database knows it.

    Attributes:
        attempts: attempts begun so far; the newest has this number.
        lost: attempts that do not count (the daemon died, or the credential had expired).
        already_there: whether the destination had the file before, so that nothing was moved.
        begun: what the last attempt that began the work found before: of a RENAME or MKDIR. Of a COPY: ``handed``, the
            job of another service that it was handed over to.
        planned: as in `NewElement`; so is ``mtime``.
        not_preserved: as in `Verdict`.
    """

    job_id: int
    id: int
    type: JobType
    status: JobStatus
    src_filepath: str
    dst_filepath: str | None
    size: int
    is_directory: bool
    attempts: int
    lost: int
    max_tries: int
    timestamp: datetime
    not_before: datetime | None
    transferred: int | None
    elapsed_s: float | None
    checksum: str | None
    failure: AttemptFailure | None
    already_there: bool = False
    begun: Mapping[str, Any] | None = None
    planned: PlannedAction | None = None
    mtime: int | None = None
    not_preserved: str | None = None

    @property
    def work_bytes(self) -> int:
        """Bytes that it has to move."""
        return 0 if self.type is JobType.REMOVE else self.size

    @property
    def found_before(self) -> Mapping[str, Any] | None:
        """What an earlier attempt found, if it began the work and its result is unknown."""
        unheard = self.failure is None or self.failure.code in OUTCOME_UNKNOWN
        return self.begun if self.attempts > 1 and unheard else None

    @property
    def handed_over(self) -> str | None:
        """URL of the job of another service that an earlier attempt has handed a copy over to."""
        if self.type is not JobType.COPY or self.begun is None:
            return None
        found: str | None = self.begun.get("handed")
        return found

    @property
    def next_try(self) -> int:
        """Which try comes next, without those that do not count."""
        return min(self.attempts - self.lost + 1, self.max_tries)

    @property
    def may_be_done(self) -> bool:
        """Whether an earlier attempt may have done the work without a result that was stored."""
        unheard = self.failure is not None and self.failure.code in OUTCOME_UNKNOWN
        return self.attempts > 1 and (self.lost > 0 or unheard)


class LogSpan(NamedTuple):
    """The part of a job's log file that has all lines of one attempt, perhaps with lines of others between them.

    Both are in bytes: where the first line begins, and how many until the last line ends.
    """

    offset: int
    length: int


@frozen
class AttemptRecord:
    """An attempt that has ended.

    ``log`` is None where it is not known: of earlier versions, and of an attempt that was lost with its daemon.
    """

    job_id: int
    element_id: int
    attempt: int
    status: JobStatus
    started_at: datetime
    ended_at: datetime
    worker: str
    transferred: int
    failure: AttemptFailure | None
    log: LogSpan | None = None


class ClaimToken(NamedTuple):
    """Fencing token: the right to run one attempt of one element, checked at every write about it."""

    job_id: int
    element_id: int
    attempt: int


@frozen
class Batch:
    """Elements of one type, claimed together and handed to one agent.

    They may be of several jobs: of one user, with the same type, protocol, sites and options, so that one agent with
    one credential carries them out as if they were of one.

    Attributes:
        jobs: job by number, of all the elements.
        elements: the place of one in here is its key in all that is said to and by the agent.
    """

    jobs: Mapping[int, JobRecord]
    type: JobType
    elements: Sequence[ElementRecord]

    @classmethod
    def of_one(cls, job: JobRecord, type_: JobType, elements: Sequence[ElementRecord]) -> Batch:
        """A batch of one job."""
        return cls({job.id: job}, type_, elements)

    @property
    def job(self) -> JobRecord:
        """One of the jobs; for what all have in common."""
        return self.jobs[self.elements[0].job_id]

    @property
    def is_of_its_kind(self) -> bool:
        """Whether its speed says something about the work of its job: removals of a COPY have no bytes to move."""
        return self.type not in (JobType.LIST, JobType.REMOVE) or self.type is self.job.type

    def job_of(self, element: ElementRecord) -> JobRecord:
        return self.jobs[element.job_id]

    @property
    def largest_size(self) -> int:
        """Bytes of the largest element; of one whose size is not known, as many as it may well have."""
        sizes = map(self.listed_size, self.elements)
        return max(_WELL_POSSIBLE_SIZE if size is None else size for size in sizes)

    def listed_size(self, element: ElementRecord) -> int | None:
        """Bytes of an element; None where the size is not known before it is copied."""
        return None if not element.size and self.job_of(element).has_items else element.size

    def token(self, element: ElementRecord) -> ClaimToken:
        return ClaimToken(element.job_id, element.id, element.attempts)


class Verdict(NamedTuple):
    """How one claimed attempt ended.

    Attributes:
        status: DONE, FAILED, CANCELLED; SUBMITTED to be tried again; HELD.
        transferred: bytes that arrived and are proven (0 if none).
        already_there: whether the destination had the file before, so that nothing was moved.
        leftover: whether a temporary file of the attempt may be left at the destination.
        skipped: for a LIST: entries that are left out.
        not_preserved: attributes of the source that a COPY could not set, separated by commas; None for none.
        log: where its log is; None if nothing of it could be written.
    """

    token: ClaimToken
    status: JobStatus
    started_at: datetime
    ended_at: datetime
    counts: bool = True
    not_before: datetime | None = None
    transferred: int = 0
    checksum: str | None = None
    already_there: bool = False
    failure: AttemptFailure | None = None
    leftover: bool = False
    skipped: int = 0
    not_preserved: str | None = None
    log: LogSpan | None = None

    def with_log(self, log: LogSpan | None) -> Verdict:
        """The verdict, and where its log is."""
        # A third of what `_replace` takes.
        return Verdict._make((*self[:-1], log))


class ListedEntry(NamedTuple):
    """One entry of a listing.

    Attributes:
        path: below the listed directory, parts joined by ``/``; empty for the listed thing itself.
        type: ``file``, ``directory``, ``link`` or ``other``.
        size: bytes; 0 for what is not a file.
        mode: permission bits, or None where the server does not report them.
        mtime: seconds since 1970 UTC, or None.
        target: of a link: the absolute path it leads to, None if it leads nowhere.
        target_is_file: of a link: whether it leads to a regular file.
        target_is_directory: of a link: whether it leads to a directory.
        owner: name or number of the account that owns it, or None where the server does not report it.
        group: the same of its group.
    """

    path: str
    type: str
    size: int = 0
    mode: int | None = None
    mtime: int | None = None
    target: str | None = None
    target_is_file: bool = False
    target_is_directory: bool = False
    owner: str | None = None
    group: str | None = None

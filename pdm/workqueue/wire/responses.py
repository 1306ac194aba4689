"""What the service answers: one struct for each object of the API, and its errors. Times are UTC, sizes bytes."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.holds import HOLD_CODE, HoldBy
from pdm.workqueue.domain.planning import SkipCode
from pdm.workqueue.wire.plans import EstimateView, PlanView, SkipCounts

TypeName = Annotated[str, Meta(extra_json_schema={"enum": list(JobType.__members__)})]
StatusName = Annotated[str, Meta(extra_json_schema={"enum": list(JobStatus.__members__)})]
ProtocolName = Annotated[str, Meta(extra_json_schema={"enum": list(JobProtocol.__members__)})]

WaitingFor = Annotated[
    list[str],
    Meta(
        description="Why what is submitted has to wait, a sentence each: sites that are away or drained, the next try"
        " of what failed, what comes first in the queue. Not in arrays."
    ),
]

#: Directory → names in it.
Names = dict[str, list[str]]


class JobProgressView(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is and how fast it goes; null where that is not known.

    Proven bytes and moving ones are separate; together they are never more than the total, and decrease only when a
    transfer has to be repeated. A file here is any element but the listing: also a directory that is made or removed.
    """

    listing: Annotated[bool, Meta(description="Whether it is still being listed how much there is to do.")]
    bytes_done: Annotated[int, Meta(description="Bytes proven at the destination.")]
    bytes_total: Annotated[int | None, Meta(description="Bytes in all; null while they are being listed.")]
    bytes_moving: Annotated[int | None, Meta(description="Bytes moved so far that are not proven yet.")]
    files_done: int
    files_total: Annotated[int | None, Meta(description="Files in all; null while they are being listed.")]
    instant: Annotated[float | None, Meta(description="Bytes/s now, smoothed; null once nothing runs.")]
    average: Annotated[float | None, Meta(description="Bytes/s since the start; at the end, over the whole job.")]
    files_per_second: Annotated[float | None, Meta(description="Files/s now, smoothed; null once nothing runs.")]
    elapsed: Annotated[
        float | None, Meta(description="Seconds since the first element was begun, until now or its end.")
    ]
    eta: Annotated[float | None, Meta(description="Seconds until the end, by bytes or files, whichever are slower.")]
    silent: Annotated[
        list[str] | UnsetType,
        Meta(description="Where parts of it run that are not counted as moving: on node X, which does not answer."),
    ] = UNSET


class HoldView(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job or elements of it are HELD; they resume once that is corrected, or the person ends the hold."""

    count: Annotated[int, Meta(description="Elements that are held.")]
    code: Annotated[
        str, Meta(description=f"Stable word; of the first of them, or {HOLD_CODE} if a person holds the job.")
    ]
    reason: Annotated[str, Meta(description="What was found; of a person, who holds it, until when, and the message.")]
    hint: Annotated[str, Meta(description="What to do.")]
    by: Annotated[str, Meta(description="service, owner or operator.", extra_json_schema={"enum": list(HoldBy)})] = (
        HoldBy.SERVICE.value
    )
    who: Annotated[str | UnsetType, Meta(description="Subject of the person.")] = UNSET
    message: Annotated[str | UnsetType, Meta(description="What the person says about it; may be empty.")] = UNSET
    since: Annotated[datetime | UnsetType, Meta(description="When the person held it.")] = UNSET
    until: Annotated[datetime | UnsetType | None, Meta(description="When it is resumed by itself; null for never.")] = (
        UNSET
    )


class FailureView(msgspec.Struct, frozen=True, kw_only=True):
    """Why an attempt failed."""

    scope: Annotated[str, Meta(description="Whose side: source, destination, transfer or service.")]
    code: Annotated[str, Meta(description="Stable word.")]
    retryable: Annotated[bool, Meta(description="Whether the same may pass later.")]
    hint: Annotated[str, Meta(description="What to do.")]
    message: Annotated[str, Meta(description="What tool or server said.")]


class QueueView(msgspec.Struct, frozen=True, kw_only=True):
    """Position of a job in the queue; users take turns, so jobs of others are not counted."""

    place: Annotated[int, Meta(description="Among the jobs of its user that wait, from 1; by priority, then number.")]
    behind: Annotated[list[int], Meta(description="Numbers of the first of the jobs that come before it.")]
    other_users: Annotated[int, Meta(description="Other users with jobs that wait.")]
    listing: Annotated[bool, Meta(description="Whether it waits for its listing: listings have a queue of their own.")]


class NextTryView(msgspec.Struct, frozen=True, kw_only=True):
    """The next try of an element that failed, while nothing else of its job can be done."""

    element: int
    at: Annotated[datetime, Meta(description="Not before this time.")]
    attempt: Annotated[int, Meta(description="Which try it will be, without those that do not count.")]
    max_tries: int
    failure: FailureView = field(name="error")


class CancelReasonView(msgspec.Struct, frozen=True, kw_only=True):
    """Why the service has cancelled a job."""

    code: Annotated[
        str, Meta(description="Stable word: DEADLINE, or PREDECESSOR for a job that did not end as it had to.")
    ]
    message: str


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job.

    ``num_new`` to ``num_cancelled`` sum to ``num_elements``; elements that are held count as submitted, and once more
    in ``held``. ``skipped`` are entries of the source that are left out: links that lead out of the tree, to
    directories or nowhere, sockets, directories that cannot be listed ...; ``GET /jobs/N/skipped`` names each.
    ``already_there`` are files that the destination had before; they are among those that are done, and moved no byte.
    """

    id: int
    user_id: int
    src_siteid: int
    dst_siteid: Annotated[int | UnsetType, Meta(description="Where the type has a destination.")] = UNSET
    src_filepath: str
    dst_filepath: Annotated[str | UnsetType, Meta(description="Where the type has a destination.")] = UNSET
    type: TypeName
    status: StatusName
    extra_opts: dict[str, Any]
    priority: int
    protocol: ProtocolName
    log_uid: str
    timestamp: datetime
    finished_at: datetime | None
    label: str | None
    max_tries: int
    cancel_requested: bool
    cancel_reason: Annotated[
        CancelReasonView | UnsetType, Meta(description="Of a job that the service has cancelled, not its user.")
    ] = UNSET
    after: Annotated[list[int] | UnsetType, Meta(description="Jobs after which it was to begin.")] = UNSET
    after_any: Annotated[
        bool | UnsetType, Meta(description="With ``after``: whether it begins in whatever state these end.")
    ] = UNSET
    schedule: Annotated[int | UnsetType, Meta(description="The schedule of which it is a run.")] = UNSET
    deadline: Annotated[datetime | UnsetType, Meta(description="When it is cancelled unless it has ended.")] = UNSET
    num_elements: int
    num_new: int
    num_submitted: int
    num_running: int
    num_done: int
    num_failed: int
    num_cancelled: int
    held: int
    skipped: int
    skipped_by_code: SkipCounts | UnsetType = UNSET
    plan: Annotated[
        PlanView | UnsetType,
        Meta(description="Of one copy that was compared, filtered or moved, once it has ended; not in arrays."),
    ] = UNSET
    estimate: Annotated[
        EstimateView | UnsetType,
        Meta(description="Of one copy that has been listed and has not ended, or of a dry run; not in arrays."),
    ] = UNSET
    already_there: int = 0
    bytes_already_there: int = 0
    bytes_total: int
    bytes_done: int
    progress: Annotated[JobProgressView | UnsetType, Meta(description="Of one job; not in arrays.")] = UNSET
    hold: Annotated[
        HoldView | UnsetType,
        Meta(description="Why the job or elements of it are held; in arrays only if a person holds the job."),
    ] = UNSET
    max_active: Annotated[
        int | UnsetType, Meta(description="How many of its elements may run at once, if it has a limit of its own.")
    ] = UNSET
    warnings: Annotated[list[str] | UnsetType, Meta(description="What the user should know; of one job.")] = UNSET
    waiting: WaitingFor | UnsetType = UNSET
    queue: Annotated[
        QueueView | UnsetType, Meta(description="Of one job of which nothing runs and something could; not in arrays.")
    ] = UNSET
    next_try: Annotated[
        NextTryView | UnsetType, Meta(description="Of one job that waits after a failure; not in arrays.")
    ] = UNSET
    owner: Annotated[
        str | UnsetType,
        Meta(description="Subject of its user, for operators: of others' jobs, and in arrays that ``user`` asks for."),
    ] = UNSET

    def __repr__(self) -> str:
        label = "" if self.label is None else f" {self.label!r}"
        target = "" if self.dst_filepath is UNSET else f" -> {self.dst_siteid}:{self.dst_filepath}"
        counts = f"{self.num_done}/{self.num_elements} elements, {self.num_failed} failed, {self.skipped} skipped"
        what = f"{self.type} {self.src_siteid}:{self.src_filepath}{target}"
        return f"<{type(self).__name__} {self.id}{label} {self.status}: {what}, {counts}>"


class RetriedJobView(JobView, frozen=True, kw_only=True):
    """A job that was asked to try again; ``retried`` elements went back to the queue."""

    retried: int
    left: Annotated[
        dict[str, int] | UnsetType,
        Meta(description="With ``code`` or ``force``: elements that a retry cannot help and that were left, by code."),
    ] = UNSET


class EntryView(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a directory; ``mode`` and ``mtime`` (seconds since 1970) are null where the server is silent."""

    name: str
    type: Annotated[str, Meta(extra_json_schema={"enum": ["file", "directory", "link", "other"]})]
    size: int
    mode: int | None
    mtime: int | None
    owner: Annotated[
        str | UnsetType, Meta(description="Name of the account, or its number where the server reports no name.")
    ] = UNSET
    group: Annotated[str | UnsetType, Meta(description="Name or number of its group.")] = UNSET
    target: Annotated[str | UnsetType, Meta(description="Where a link leads.")] = UNSET

    def __repr__(self) -> str:
        return f"<EntryView {self.name!r} {self.type} {self.size} bytes>"


class SkippedView(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of a job's source that is left out.

    ``id`` grows from one to the next, not by one: ``after`` takes it. ``count`` is more than 1 only of entries that the
    server counts and does not name: ``path`` is then the directory that holds them.
    """

    id: int
    job_id: int
    path: str
    type: Annotated[str, Meta(extra_json_schema={"enum": ["file", "directory", "link", "other", "unknown"]})]
    code: Annotated[
        str,
        Meta(
            description=f"Stable word: {', '.join(SkipCode)}, or of a directory that cannot be listed the code of the"
            " failure."
        ),
    ]
    reason: str
    count: int = 1


class NoteView(msgspec.Struct, frozen=True, kw_only=True):
    """An entry that was left out, and why."""

    path: str
    reason: str


Entries = dict[str, list[EntryView]]
Notes = list[NoteView]


class ElementView(msgspec.Struct, frozen=True, kw_only=True):
    """An element of a job.

    A LIST element that is done has its ``listing``, the same with details as ``entries``, and what was left out
    (``unreadable`` of a LIST job, ``skipped`` of others). In the array of a job's elements the listing of a COPY or
    REMOVE job is empty, for what was found are the elements that follow it.
    """

    id: int
    job_id: int
    src_filepath: str
    dst_filepath: Annotated[str | UnsetType, Meta(description="Where it has a destination.")] = UNSET
    size: int
    max_tries: int
    attempts: int
    type: TypeName
    status: StatusName
    timestamp: datetime
    not_before: Annotated[datetime | None, Meta(description="When a waiting element is tried again.")]
    checksum: str | None
    already_there: Annotated[bool, Meta(description="Whether the destination had the file before.")] = False
    planned: Annotated[
        str | UnsetType, Meta(description="Where a copy was compared: COPY, OVERWRITE, SAME, DELETE or MOVED.")
    ] = UNSET
    failure: FailureView | None = field(name="error")
    listing: list[Names] = []
    entries: Entries | UnsetType = UNSET
    unreadable: Notes | UnsetType = UNSET
    skipped: Notes | UnsetType = UNSET

    def __repr__(self) -> str:
        failure = "" if self.failure is None else f", {self.failure.code} ({self.failure.scope})"
        what = f"{self.type} {self.src_filepath}, {self.size} bytes, {self.attempts} attempts{failure}"
        return f"<ElementView {self.job_id}.{self.id} {self.status}: {what}>"


class ProcessView(msgspec.Struct, frozen=True, kw_only=True):
    """The helper process that carried out an attempt; it carries out those of other elements, too."""

    host: str
    pid: int
    ended: Annotated[
        str | None, Meta(description="How it ended if it died within the attempt: signal 9, exit status 1.")
    ] = None


class OutputView(msgspec.Struct, frozen=True, kw_only=True):
    """The output of one attempt that has ended, or with ``live`` a piece of its log, from its first line on.

    ``log`` is null only in the output of a whole job and with ``live``, for a log that is gone from disk. A LIST
    element has ``listing``, ``entries`` and notes as in the element; they are those of its latest attempt.
    """

    jobid: int
    elementid: int
    attempt: int
    type: TypeName
    status: StatusName
    log: str | None
    offset: Annotated[int | UnsetType, Meta(description="With live: where the next piece begins, in bytes.")] = UNSET
    end: Annotated[bool | UnsetType, Meta(description="With live: whether the log ends with this piece.")] = UNSET
    silent: Annotated[
        str | UnsetType, Meta(description="Where the log is, if it cannot be read: on node X, which does not answer.")
    ] = UNSET
    process: Annotated[
        ProcessView | UnsetType, Meta(description="Where the begin of the log is there, and names it.")
    ] = UNSET
    listing: Names | UnsetType = UNSET
    entries: Entries | UnsetType = UNSET
    unreadable: Notes | UnsetType = UNSET
    skipped: Notes | UnsetType = UNSET


class JobStatusView(msgspec.Struct, frozen=True, kw_only=True):
    """Status of a job."""

    jobid: int
    status: StatusName
    skipped: Annotated[int, Meta(description="Entries of the source that are left out.")] = 0
    skipped_by_code: SkipCounts | UnsetType = UNSET
    already_there: Annotated[int, Meta(description="Files that the destination had before.")] = 0
    progress: JobProgressView | UnsetType = UNSET
    waiting: WaitingFor | UnsetType = UNSET


class ElementStatusView(msgspec.Struct, frozen=True, kw_only=True):
    """Status and progress of an element; null is unknown."""

    jobid: int
    elementid: int
    status: StatusName
    attempts: int
    transferred: Annotated[int | None, Meta(description="Bytes moved.")]
    instant: Annotated[float | None, Meta(description="Bytes/s now.")]
    average: Annotated[float | None, Meta(description="Bytes/s since the start.")]
    elapsed: Annotated[float | None, Meta(description="Seconds since the start.")]
    silent: Annotated[
        str | UnsetType, Meta(description="Where it runs, if that is unknown: on node X, which does not answer.")
    ] = UNSET


class WhoamiView(msgspec.Struct, frozen=True, kw_only=True):
    """Who the service takes the caller for."""

    user_id: int
    subject: str
    role: Annotated[str, Meta(extra_json_schema={"enum": ["user", "operator"]})]
    delegation_id: str
    certificate_valid_until: Annotated[datetime, Meta(description="End of the first that ends of the presented chain.")]
    limited_proxy: bool
    credential_valid_until: Annotated[datetime | None, Meta(description="End of what was delegated; null for none.")]


class FaultView(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the service that does not work; its log says why."""

    part: Annotated[
        str, Meta(description="``database``, ``credential files``, ``helpers`` or ``attempt logs``; more may come.")
    ]
    since: datetime


class HealthView(msgspec.Struct, frozen=True, kw_only=True):
    """That the service answers."""

    status: Annotated[
        str,
        Meta(
            description="``ok``; ``degraded``: something does not work, jobs run all the same; ``paused``: no job is"
            " begun until it works again."
        ),
    ]
    version: str
    faults: list[FaultView] = []


def timestamp_text(timestamp: datetime) -> str:
    """A time (UTC) as the API writes it: ``2026-11-23T19:30:12Z``."""
    return f"{timestamp:%Y-%m-%dT%H:%M:%S}Z"


#: What the ``type`` of a problem begins with; the rest is its stable word.
PROBLEM_TYPE_PREFIX = "urn:pdm:workqueue:problem:"

MEDIA_TYPE = "application/problem+json"


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Error response, ``application/problem+json`` of RFC 9457."""

    type: Annotated[str, Meta(description="Stable name of the kind of problem.")]
    title: Annotated[str, Meta(description="The kind of problem in words, the same for all of a kind.")]
    status: Annotated[int, Meta(description="The HTTP status code once more.")]
    detail: Annotated[str, Meta(description="What is wrong with this request, and what to do.")]
    request_id: Annotated[str, Meta(description="Is on every line of the daemon's log about this request.")]
    pointer: Annotated[
        str | None,
        Meta(description="What is wrong: $.key of the body, ?name of the query, or the name of a header."),
    ] = None
    incident: Annotated[str | None, Meta(description="For a fault of the service: what to tell an operator.")] = None

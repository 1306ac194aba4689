"""Events that a helper process (agent) writes to its file descriptor 3: JSON in UTF-8, one event a line.

Order of events of a batch: for each key ``started``, any number of ``log`` and ``progress``, then exactly one of
``done``, ``failed`` and ``cancelled``; after the last key, ``finished``. Paths and names are
percent-encoded, as in the requests.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pdm.workqueue.domain.failures import FailureScope
from pdm.workqueue.wire.agent_requests import FoundBefore, PreservedAttribute


class ReadyEvent(msgspec.Struct, tag="ready", tag_field="event", frozen=True, omit_defaults=True):
    """The first event: the agent is ready. ``tools`` names its programs and libraries, for the log."""

    tools: str


class StartedEvent(msgspec.Struct, tag="started", tag_field="event", frozen=True, omit_defaults=True):
    """Work on one item begins."""

    id: int
    key: int


class BegunEvent(msgspec.Struct, tag="begun", tag_field="event", frozen=True, omit_defaults=True):
    """The state of the storage before a change that could later be mistaken for another client's.

    The agent waits for a `ProceedRequest`, so that the state is stored before anything is changed.

    Attributes:
        found: the state.
    """

    id: int
    key: int
    found: FoundBefore


class HandOverEvent(msgspec.Struct, tag="handing", tag_field="event", frozen=True, omit_defaults=True):
    """Items are going to be handed over to another service; the agent waits for the `ProceedRequest` of ``key``.

    Attributes:
        keys: of the items; ``key`` is one of them.
        job: URL of the job there, whose name is known before it exists. Later attempts get it in `CopyItem.handed`.
    """

    id: int
    key: int
    keys: list[int]
    job: str


class LogEvent(msgspec.Struct, tag="log", tag_field="event", frozen=True, omit_defaults=True):
    """A line for the attempt's log."""

    id: int
    key: int
    text: str


class ProgressEvent(msgspec.Struct, tag="progress", tag_field="event", frozen=True, omit_defaults=True):
    """Progress of a transfer: bytes, bytes/s now and on average, seconds."""

    id: int
    key: int
    transferred: int
    instant: float
    average: float
    elapsed: float


class RawEntry(msgspec.Struct, array_like=True, frozen=True):
    """One directory entry: its path below the listed directory, percent-encoded, components joined by ``/``.

    ``type`` is ``file``, ``directory``, ``link`` or ``other``. The entry with an empty path is the listed URL itself,
    if it is no directory or a link to one. ``target`` of a link is an absolute percent-encoded path. ``owner`` and
    ``group`` are names, or else numbers.
    """

    path: str
    type: Literal["file", "directory", "link", "other"]
    size: int
    mode: int | None = None
    mtime: int | None = None
    target: str | None = None
    target_is_file: bool = False
    target_is_directory: bool = False
    owner: str | None = None
    group: str | None = None


class EntriesEvent(msgspec.Struct, tag="entries", tag_field="event", frozen=True, omit_defaults=True):
    """Entries of a listing (at most 1000 an event)."""

    id: int
    key: int
    entries: list[RawEntry]
    destination: bool = False


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error before classification.

    Attributes:
        scope: the side that failed.
        message: error message of the server or tool (at most 2000 characters).
        errno: if known.
        code: a `FailureCode`, if the agent knows it (TIMEOUT, STALLED, CHECKSUM_MISMATCH, EXISTS, ...); text here,
            because an agent of another package may use a code that the service does not know.
        retry_after_s: seconds until the server accepts the next request, if it has said so.
        unreachable: whether no server answered: the connection failed, or no greeting arrived.
    """

    scope: FailureScope
    message: str
    errno: int | None = None
    code: str | None = None
    retry_after_s: float | None = None
    unreachable: bool = False


class UnreadableEvent(msgspec.Struct, tag="unreadable", tag_field="event", frozen=True, omit_defaults=True):
    """A sub-directory that could not be listed; the rest of the listing continues."""

    id: int
    key: int
    path: str
    fault: Fault
    destination: bool = False


class RootEvent(msgspec.Struct, tag="root", tag_field="event", frozen=True, omit_defaults=True):
    """Absolute percent-encoded path of the listed directory, links resolved. Sent before its entries."""

    id: int
    key: int
    path: str
    destination: bool = False


class UnnamedEvent(msgspec.Struct, tag="unnamed", tag_field="event", frozen=True, omit_defaults=True):
    """The server counts ``count`` entries of a directory without naming them; ``path`` as in `RawEntry`."""

    id: int
    key: int
    path: str
    count: int
    destination: bool = False


class DoneEvent(msgspec.Struct, tag="done", tag_field="event", frozen=True, omit_defaults=True):
    """An item is done and verified.

    Attributes:
        size: bytes verified at the destination (copy), else 0.
        transferred: bytes that were transferred; 0 if the file was already there.
        already_there: whether the destination had an identical file, so that nothing was transferred.
        checksum: algorithm and lower-case hexadecimal digits, if compared: ``ADLER32:`` with 8 of them, ``MD5:`` with
            32, ``SHA256:`` with 64.
        not_preserved: attributes of the source that were to be preserved, and could not be.
        free: of a listing: bytes that are free at its ``space_at``; None if that was not asked, or is not known.
    """

    id: int
    key: int
    size: int = 0
    transferred: int = 0
    checksum: str | None = None
    already_there: bool = False
    not_preserved: tuple[PreservedAttribute, ...] = ()
    free: int | None = None


class FailedEvent(msgspec.Struct, tag="failed", tag_field="event", frozen=True, omit_defaults=True):
    """An item failed. ``leftover``: a temporary file may be left at the destination."""

    id: int
    key: int
    fault: Fault
    leftover: bool = False


class CancelledEvent(msgspec.Struct, tag="cancelled", tag_field="event", frozen=True, omit_defaults=True):
    """An item was not done because its batch was cancelled."""

    id: int
    key: int
    leftover: bool = False


class TapeFile(msgspec.Struct, array_like=True, frozen=True, omit_defaults=True):
    """What a tape API says of one path.

    Attributes:
        path: its place in the request.
        locality: as the API names it; of ``status``: ``DISK`` where the file is on disk, else empty.
        error: why it has failed; empty if it has not.
    """

    path: int
    locality: str = ""
    error: str = ""


class TapeEvent(msgspec.Struct, tag="tape", tag_field="event", frozen=True, omit_defaults=True):
    """The answer to a `TapeRequest`.

    Attributes:
        api: of ``discover``: URL of the API; empty if the endpoint names none.
        request: of ``stage``: the site's name for the request.
        files: of ``archiveinfo`` and ``status``: those of the paths that the answer has, once each.
    """

    id: int
    key: int
    api: str = ""
    request: str = ""
    files: list[TapeFile] = []


class FinishedEvent(msgspec.Struct, tag="finished", tag_field="event", frozen=True, omit_defaults=True):
    """Every key of the batch has been reported; the agent is free."""

    id: int


AgentEvent = (
    ReadyEvent
    | StartedEvent
    | BegunEvent
    | HandOverEvent
    | LogEvent
    | ProgressEvent
    | RootEvent
    | EntriesEvent
    | UnreadableEvent
    | UnnamedEvent
    | DoneEvent
    | FailedEvent
    | CancelledEvent
    | TapeEvent
    | FinishedEvent
)

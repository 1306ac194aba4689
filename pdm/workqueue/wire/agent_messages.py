"""The lines between the daemon and an agent: JSON in UTF-8, one message a line.

The daemon writes requests to the agent's standard input; the agent writes events to its file descriptor 3. An agent
carries out one batch at a time, in the order in which they come; the next one may come while one is carried out.
``cancel`` may come at any time. Paths are inside percent-encoded URLs; names in
listings are percent-encoded too. An agent whose standard input ends kills what it started and leaves at once.

Order of events of a batch: for each key ``started``, any number of ``log`` and ``progress``, then exactly one of
``done``, ``failed`` and ``cancelled``; after the last key, ``finished``.
"""

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec

from pdm.workqueue.domain.failures import FailureScope

#: The longest line either side accepts, in bytes; a longer one ends the agent.
LONGEST_LINE = 4 * 1024 * 1024
#: How an agent exits whose lease has ended (EX_TEMPFAIL of sysexits.h).
LEASE_OVER_STATUS = 75


#: What a thing is recognised by later: its kind; of what is no directory also size and mtime.
Fingerprint = list[str | int | None]


class FoundBefore(TypedDict):
    """What an attempt has found at both ends before it began; None for nothing. The database keeps it as it is."""

    source: Fingerprint | None
    destination: Fingerprint | None


class CopyItem(msgspec.Struct, frozen=True):
    """One file to copy.

    Attributes:
        key: names the item in events.
        source: URL of the file.
        destination: URL of its final name.
        temporary: URL under which it arrives, in the directory of the destination; renamed once proven.
        stale: URLs of temporary files that earlier attempts may have left; removed first.
        size: bytes according to the listing; another size at the end is SIZE_CHANGED.
    """

    key: int
    source: str
    destination: str
    temporary: str
    stale: list[str]
    size: int


class PathItem(msgspec.Struct, frozen=True):
    """One thing to remove or to make.

    Attributes:
        key: names the item in events.
        url: of the thing.
        directory: whether it is one.
        again: of a removal: an attempt without a known end may have removed it already; then it counts as done.
        listed_at: of a removal: when it was listed, seconds since 1970; a file that was written later is not the one
            that was to go.
        found: of a directory to make: what `BegunEvent` reported of an earlier attempt without a known end. By that
            alone it is decided whether that attempt has made it.
    """

    key: int
    url: str
    directory: bool = False
    again: bool = False
    listed_at: float | None = None
    found: FoundBefore | None = None


class RenameItem(msgspec.Struct, frozen=True):
    """One thing to give a new name; ``found`` as in `PathItem`."""

    key: int
    source: str
    destination: str
    found: FoundBefore | None = None


class TimeLimits(msgspec.Struct, frozen=True):
    """When an agent gives up on one element; all in seconds.

    Attributes:
        stall_s: no byte, entry or answer for so long is STALLED.
        total_s: TIMEOUT of one element without its bytes.
        least_rate: bytes/s that a transfer must average; adds size / least_rate to ``total_s``.
    """

    stall_s: float = 120.0
    total_s: float = 600.0
    least_rate: float = 500_000.0


class ListRequest(msgspec.Struct, tag="list", tag_field="op", frozen=True):
    """List what is at a URL, down to ``depth`` levels (0: the thing itself; None: all).

    ``follow``: whether a symbolic link at the URL itself is followed to a directory; those below never are.
    """

    id: int
    key: int
    url: str
    depth: int | None
    limits: TimeLimits
    follow: bool = True


class CopyRequest(msgspec.Struct, tag="copy", tag_field="op", frozen=True):
    """Copy files and prove each."""

    id: int
    items: list[CopyItem]
    overwrite: Literal["never", "always", "different"]
    verify: Literal["checksum", "size"]
    limits: TimeLimits


class RemoveRequest(msgspec.Struct, tag="remove", tag_field="op", frozen=True):
    """Remove files, or empty directories. What is not there is NOT_FOUND."""

    id: int
    items: list[PathItem]
    limits: TimeLimits


class RenameRequest(msgspec.Struct, tag="rename", tag_field="op", frozen=True):
    """Rename at one site."""

    id: int
    items: list[RenameItem]
    overwrite: Literal["never", "always"]
    limits: TimeLimits


class MkdirRequest(msgspec.Struct, tag="mkdir", tag_field="op", frozen=True):
    """Make directories; with ``parents`` also those above, and one that is there already is done."""

    id: int
    items: list[PathItem]
    parents: bool
    limits: TimeLimits


class DiscardRequest(msgspec.Struct, tag="discard", tag_field="op", frozen=True):
    """Remove temporary files that may be there: what is not there is done."""

    id: int
    items: list[PathItem]
    limits: TimeLimits


class LeaseRequest(msgspec.Struct, tag="lease", tag_field="op", frozen=True):
    """The end of the daemon's lease, in seconds of this machine's CLOCK_BOOTTIME.

    Sent before the first work and at each renewal. Once it is over the agent ends itself, and all it started, without
    another word to any server: another daemon may do the same work by then. Exit status: `LEASE_OVER_STATUS`.
    """

    until: float


class ProceedRequest(msgspec.Struct, tag="go", tag_field="op", frozen=True):
    """What `BegunEvent` told of an item is kept: it may be done."""

    id: int
    key: int


class CancelRequest(msgspec.Struct, tag="cancel", tag_field="op", frozen=True):
    """End the batch ``id``: stop transfers within half a second, clean up, report the rest as cancelled.

    With ``keys``, only these items end. An agent that cannot end some without the others ends the whole batch: items
    that are reported as cancelled without a request return to the queue. A batch that waits behind another is ended at
    once, and never begins.
    """

    id: int
    keys: list[int] | None = None


AgentRequest = (
    ListRequest
    | CopyRequest
    | RemoveRequest
    | RenameRequest
    | MkdirRequest
    | DiscardRequest
    | CancelRequest
    | ProceedRequest
    | LeaseRequest
)
#: The requests that are work on items.
ItemRequest = CopyRequest | RemoveRequest | RenameRequest | MkdirRequest | DiscardRequest
#: The requests that are work; each ends with `FinishedEvent`.
WorkRequest = ListRequest | ItemRequest


class ReadyEvent(msgspec.Struct, tag="ready", tag_field="event", frozen=True, omit_defaults=True):
    """The first event: the agent can work. ``tools`` names what it works with, for the log."""

    tools: str


class StartedEvent(msgspec.Struct, tag="started", tag_field="event", frozen=True, omit_defaults=True):
    """Work on one item begins."""

    id: int
    key: int


class BegunEvent(msgspec.Struct, tag="begun", tag_field="event", frozen=True, omit_defaults=True):
    """The next thing that the agent does to an item cannot be told from somebody else's doing afterwards.

    The agent waits for a `ProceedRequest`, so that what it has found is kept before anything is done.

    Attributes:
        found: what was there before.
    """

    id: int
    key: int
    found: FoundBefore


class LogEvent(msgspec.Struct, tag="log", tag_field="event", frozen=True, omit_defaults=True):
    """A line for the attempt's log."""

    id: int
    key: int
    text: str


class ProgressEvent(msgspec.Struct, tag="progress", tag_field="event", frozen=True, omit_defaults=True):
    """How far a transfer is: bytes, bytes/s now and on average, seconds."""

    id: int
    key: int
    transferred: int
    instant: float
    average: float
    elapsed: float


class RawEntry(msgspec.Struct, array_like=True, frozen=True):
    """One entry as the server gives it: path below the listed directory, percent-encoded, parts joined by ``/``.

    ``type`` is ``file``, ``directory``, ``link`` or ``other``. The entry with an empty path is the listed thing itself,
    where it is no directory or a link to one. ``target`` of a link is an absolute percent-encoded path.
    """

    path: str
    type: Literal["file", "directory", "link", "other"]
    size: int
    mode: int | None = None
    mtime: int | None = None
    target: str | None = None
    target_is_file: bool = False
    target_is_directory: bool = False


class EntriesEvent(msgspec.Struct, tag="entries", tag_field="event", frozen=True, omit_defaults=True):
    """Some entries of the listing (at most 1000 an event)."""

    id: int
    key: int
    entries: list[RawEntry]


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """What went wrong, before it is judged.

    Attributes:
        scope: whose side failed.
        message: what server or tool said (at most 2000 characters).
        errno: where one is known.
        code: a `FailureCode`, where the agent itself knows (TIMEOUT, STALLED, CHECKSUM_MISMATCH, EXISTS, ...); text
            here, for the agent of another package may know one that the service does not.
        retry_after_s: seconds until the server wants to be asked again, where it has said so.
        unreachable: whether the agent knows that no server answered: it was not connected, or never greeted.
    """

    scope: FailureScope
    message: str
    errno: int | None = None
    code: str | None = None
    retry_after_s: float | None = None
    unreachable: bool = False


class UnreadableEvent(msgspec.Struct, tag="unreadable", tag_field="event", frozen=True, omit_defaults=True):
    """A sub-directory that could not be listed; the rest is."""

    id: int
    key: int
    path: str
    fault: Fault


class RootEvent(msgspec.Struct, tag="root", tag_field="event", frozen=True, omit_defaults=True):
    """Where the listed directory is, links resolved: an absolute percent-encoded path. Comes before its entries."""

    id: int
    key: int
    path: str


class UnnamedEvent(msgspec.Struct, tag="unnamed", tag_field="event", frozen=True, omit_defaults=True):
    """The server counts ``count`` entries of a directory that it does not name; ``path`` as in `RawEntry`."""

    id: int
    key: int
    path: str
    count: int


class DoneEvent(msgspec.Struct, tag="done", tag_field="event", frozen=True, omit_defaults=True):
    """An item is done and proven.

    Attributes:
        size: bytes proven at the destination (copy), else 0.
        transferred: bytes that were moved; 0 when it was already there.
        already_there: whether the destination had it before, so that nothing was moved.
        checksum: ``ADLER32:8-hex-digits``, where compared.
    """

    id: int
    key: int
    size: int = 0
    transferred: int = 0
    checksum: str | None = None
    already_there: bool = False


class FailedEvent(msgspec.Struct, tag="failed", tag_field="event", frozen=True, omit_defaults=True):
    """An item failed. ``residue``: a temporary file may be left at the destination."""

    id: int
    key: int
    fault: Fault
    residue: bool = False


class CancelledEvent(msgspec.Struct, tag="cancelled", tag_field="event", frozen=True, omit_defaults=True):
    """An item was not done because its batch was cancelled."""

    id: int
    key: int
    residue: bool = False


class FinishedEvent(msgspec.Struct, tag="finished", tag_field="event", frozen=True, omit_defaults=True):
    """Every key of the batch has been reported; the agent is free."""

    id: int


AgentEvent = (
    ReadyEvent
    | StartedEvent
    | BegunEvent
    | LogEvent
    | ProgressEvent
    | RootEvent
    | EntriesEvent
    | UnreadableEvent
    | UnnamedEvent
    | DoneEvent
    | FailedEvent
    | CancelledEvent
    | FinishedEvent
)

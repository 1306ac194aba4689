"""Requests that the daemon writes to the standard input of a helper process (agent): JSON in UTF-8, one request a line.

An agent works on one batch at a time, in the order of arrival; the next one, and ``cancel``, may come at any time. It
answers with events (`agent_events`). Paths and names are percent-encoded. When its standard input ends, it kills what
it has started, and exits.
"""

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureScope

#: The longest line either side accepts, in bytes; a longer one ends the agent.
LONGEST_LINE = 4 * 1024 * 1024
#: Exit status of an agent whose lease has expired (EX_TEMPFAIL of sysexits.h).
LEASE_OVER_STATUS = 75

#: What a copy can keep of a file besides its bytes.
PreservedAttribute = Literal["mtime", "mode"]
#: Identifies an entry later: its kind, and unless it is a directory also size and mtime.
Fingerprint = list[str | int | None]


class FoundBefore(TypedDict):
    """What was at source and destination before an attempt began; None for nothing. Stored in the database as it is."""

    source: Fingerprint | None
    destination: Fingerprint | None


class CopyItem(msgspec.Struct, frozen=True):
    """One file to copy.

    Attributes:
        key: identifies the item in events.
        source: URL of the file.
        destination: URL of its final name.
        temporary: URL that it is written to, in the directory of the destination; renamed after verification.
        stale: URLs of temporary files that earlier attempts may have left; removed first.
        size: bytes according to the listing; another size at the end is SIZE_CHANGED. Negative for unknown.
        checksum: algorithm of the request, ``:`` and the value that the file must have; None for any.
        handed: `HandOverEvent.job` of an earlier attempt, with one of the names in ``stale``; None for none.
    """

    key: int
    source: str
    destination: str
    temporary: str
    stale: list[str]
    size: int
    checksum: str | None = None
    handed: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether its size is known, and no checksum was given: others are copied one by one."""
        return self.size >= 0 and self.checksum is None


class CheckItem(msgspec.Struct, frozen=True):
    """One file to compare with what is known of it.

    Attributes:
        key: identifies the item in events.
        url: of the file.
        size: bytes that it must have.
        checksum: algorithm of the request, ``:`` and the value that it must have; None to compare the size only.
    """

    key: int
    url: str
    size: int
    checksum: str | None = None


class PathItem(msgspec.Struct, frozen=True):
    """One file or directory to remove, or a directory to make.

    Attributes:
        key: identifies the item in events.
        url: of the file or directory.
        directory: whether it is a directory.
        again: removal: it may be gone already, as after an attempt without a known result; then it counts as done.
        listed_at: removal: time of the listing, seconds since 1970; a file with a later mtime is not removed.
        found: directory to make: what `BegunEvent` of an earlier attempt without a known result reported. Only this
            decides whether that attempt has made it.
        listed_size: removal: bytes of the file when it was listed; a file of another size is not removed.
        listed_mtime: removal: its mtime then, seconds since 1970; None if it is not known, or of a link.
        may_stay: removal of a directory: one that is not empty stays, and counts as done.
        at_destination: whether it is at the destination of a copy: its errors are those of that side.
        handed: file to discard: `HandOverEvent.job` whose transfers to it end first; None for none.
    """

    key: int
    url: str
    directory: bool = False
    again: bool = False
    listed_at: float | None = None
    found: FoundBefore | None = None
    listed_size: int | None = None
    listed_mtime: int | None = None
    may_stay: bool = False
    at_destination: bool = False
    handed: str | None = None

    @property
    def scope(self) -> FailureScope:
        """The side of a removal."""
        return FailureScope.DESTINATION if self.at_destination else FailureScope.SOURCE


class RenameItem(msgspec.Struct, frozen=True):
    """One file or directory to rename; ``found`` as in `PathItem`."""

    key: int
    source: str
    destination: str
    found: FoundBefore | None = None


class TimeLimits(msgspec.Struct, frozen=True):
    """Time limits for one element; all in seconds.

    Attributes:
        stall_s: STALLED after so long without a byte, entry or reply.
        total_s: TIMEOUT of one element, without the time for its bytes.
        least_rate: bytes/s that a transfer must average; adds size / least_rate to ``total_s``.
    """

    stall_s: float = 120.0
    total_s: float = 600.0
    least_rate: float = 500_000.0


class ListRequest(msgspec.Struct, tag="list", tag_field="op", frozen=True):
    """List a URL, down to ``depth`` levels (0: the entry itself; None: all).

    ``follow``: whether a symbolic link at the URL itself is followed to a directory; links below it never are.
    ``destination``: URL to which a copy goes: it is listed first, down to all levels, and its events have
    ``destination`` set. If the source is a file, only the place that it goes to is shown. What is missing has no entry.
    ``space_at``: URL to which a copy goes: if much is listed, or ``destination`` is set, the server is asked how many
    bytes are free there (`DoneEvent.free`). ``owners``: whether names of owners are worth a look-up of the server.
    """

    id: int
    key: int
    url: str
    depth: int | None
    limits: TimeLimits
    follow: bool = True
    destination: str | None = None
    space_at: str | None = None
    owners: bool = False


class TransferService(msgspec.Struct, frozen=True):
    """An FTS3 that transfers the files of a copy.

    Attributes:
        url: ``https://HOST:PORT``.
        poll_s: seconds between two requests for the states of its files, at most.
        patience_s: files whose state has not changed for so many seconds are cancelled there, and fail.
    """

    url: str
    poll_s: float = 15.0
    patience_s: float = 86400.0


class CopyRequest(msgspec.Struct, tag="copy", tag_field="op", frozen=True):
    """Copy files and verify each.

    ``checksum`` names the algorithm by which both ends are compared, where ``verify`` or ``overwrite`` ask for that.
    ``preserve``: what the file at the destination gets of its source, also one that is there already; what cannot be
    set is no failure. ``service``: transfers the files to their temporary names; None if the agent does.
    """

    id: int
    items: list[CopyItem]
    overwrite: Literal["never", "always", "different"]
    verify: Literal["checksum", "size"]
    limits: TimeLimits
    checksum: ChecksumAlgorithm = ChecksumAlgorithm.ADLER32
    preserve: tuple[PreservedAttribute, ...] = ()
    service: TransferService | None = None


class CheckRequest(msgspec.Struct, tag="check", tag_field="op", frozen=True):
    """Compare files with what is known of them; nothing is written. One that is another fails with DIFFERS.

    ``at``: the side at which the files are.
    """

    id: int
    items: list[CheckItem]
    at: FailureScope
    limits: TimeLimits
    checksum: ChecksumAlgorithm = ChecksumAlgorithm.ADLER32


class RemoveRequest(msgspec.Struct, tag="remove", tag_field="op", frozen=True):
    """Remove files, or empty directories. A missing one fails with NOT_FOUND."""

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
    """Make directories; with ``parents`` also missing parents, and an existing directory counts as done."""

    id: int
    items: list[PathItem]
    parents: bool
    limits: TimeLimits


class DiscardRequest(msgspec.Struct, tag="discard", tag_field="op", frozen=True):
    """Remove possible temporary files: a missing one counts as done. ``service``: as in `CopyRequest`."""

    id: int
    items: list[PathItem]
    limits: TimeLimits
    service: TransferService | None = None


class TapeRequest(msgspec.Struct, tag="tape", tag_field="op", frozen=True):
    """One request of the WLCG tape REST API; its answer is a `TapeEvent`, then ``done``. Only the relay carries it out.

    Attributes:
        api: URL of the API, without a slash at its end; of ``discover``: of an HTTPS endpoint of the site.
        paths: percent-encoded, at the site; empty for ``discover`` and ``delete``.
        request: the site's name for a stage request; empty for ``discover``, ``archiveinfo`` and ``stage``.
        lifetime_s: of ``stage``: seconds for which the files are to stay on disk.
    """

    id: int
    key: int
    action: Literal["discover", "archiveinfo", "stage", "status", "cancel", "release", "delete"]
    api: str
    limits: TimeLimits
    paths: list[str] = []
    request: str = ""
    lifetime_s: int = 0


class LeaseRequest(msgspec.Struct, tag="lease", tag_field="op", frozen=True):
    """The end of the daemon's lease, in seconds of this machine's CLOCK_BOOTTIME, before the first work and renewed.

    When the lease expires, the agent kills itself and the processes that it has started, without sending anything to a
    server: another daemon may do the same work by then. Exit status: `LEASE_OVER_STATUS`.
    """

    until: float


class ProceedRequest(msgspec.Struct, tag="go", tag_field="op", frozen=True):
    """The daemon has stored the `BegunEvent` or `HandOverEvent` of an item: the agent may act."""

    id: int
    key: int


class CancelRequest(msgspec.Struct, tag="cancel", tag_field="op", frozen=True):
    """End the batch ``id``: stop transfers within half a second, clean up, report the rest as cancelled.

    With ``keys``, only these items end. An agent that cannot end some alone ends the whole batch: items that are
    cancelled without a request return to the queue. A batch that waits behind another is ended at once.
    ``keep``: what was handed over to another service is left there, for the next attempts. ``waiting_only``: of the
    items with ``keys`` only those end that have not started; an agent that cannot end some alone continues with all.
    """

    id: int
    keys: list[int] | None = None
    keep: bool = False
    waiting_only: bool = False


AgentRequest = (
    ListRequest
    | CopyRequest
    | CheckRequest
    | RemoveRequest
    | RenameRequest
    | MkdirRequest
    | DiscardRequest
    | TapeRequest
    | CancelRequest
    | ProceedRequest
    | LeaseRequest
)
#: Requests with items to work on.
ItemRequest = CopyRequest | CheckRequest | RemoveRequest | RenameRequest | MkdirRequest | DiscardRequest
#: Requests that end with `FinishedEvent`.
WorkRequest = ListRequest | ItemRequest

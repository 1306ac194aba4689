"""Receipts: what a job did to every file, as lines of JSON; and the failures of a job in groups.

The lines are `ReceiptJob`, then `ReceiptElement` for each element, `ReceiptEntry` for each entry that was left out, and
`ReceiptEnd`, which has one member more at its end, ``signature``: a detached JWS of the line without that member.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from pdm.workqueue.wire.responses import FailureView, JobView, TypeName

#: Media types of a receipt, the default first.
NDJSON, CSV = "application/x-ndjson", "text/csv"
#: Version of the format.
RECEIPT_VERSION = 1
#: Bytes of a line, at most; a longer one is none of ours.
LONGEST_LINE = 256 * 1024
#: What stands between the signed part of the last line and its signature.
SIGNATURE_MEMBER = b',"signature":"'

#: Outcomes after which nothing is left to do.
DONE, ALREADY_THERE = "done", "already there"


class _Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="line", omit_defaults=True):
    pass


class ReceiptSite(msgspec.Struct, frozen=True, kw_only=True):
    """A site of the job; its name and URL at the time of the receipt."""

    id: int
    name: str | None
    url: str | None


class ReceiptService(msgspec.Struct, frozen=True, kw_only=True):
    """The service that has written the receipt; its certificate is for this host name."""

    name: str
    version: str


class ReceiptJob(_Line, frozen=True, kw_only=True, tag="job"):
    """The first line: what was asked, by whom and when.

    Attributes:
        receipt: version of the format.
        final: whether the job had ended.
        user: subject of its owner.
    """

    receipt: int
    final: bool
    written_at: datetime
    service: ReceiptService
    user: str
    source: ReceiptSite
    destination: ReceiptSite | None = None
    job: JobView


class ReceiptElement(_Line, frozen=True, kw_only=True, tag="element"):
    """An element.

    Attributes:
        source: path; of what a job removes, makes or lists, too.
        checksum: ``algorithm:value``.
        planned: what the plan of a copy that was compared with its destination says; see
            `pdm.workqueue.domain.enums.PlannedAction`.
        not_preserved: attributes of the source that could not be set, of ``mtime`` and ``mode``, separated by commas.
        outcome: ``done``, ``already there``, ``failed``, ``cancelled``, ``held``, ``running`` or ``waiting``; of a dry
            run ``would copy``, ``would overwrite``, ``same``, ``would delete`` or ``would remove``.
        attempts: number of attempts begun.
        source_kept: of a move: why the source of a file that counts as copied was not removed.
        start: of the first attempt.
        end: of the last one that has ended.
        failure: why the last attempt failed, unless the element is done.
    """

    element: int
    type: TypeName
    source: str
    destination: str | None = None
    size: int | None = None
    checksum: str | None = None
    planned: str | None = None
    not_preserved: str | None = None
    outcome: str
    attempts: int
    source_kept: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    failure: FailureView | None = field(name="reason", default=None)


class ReceiptEntry(_Line, frozen=True, kw_only=True, tag="skipped"):
    """An entry of the source that was left out; see `pdm.workqueue.wire.responses.SkippedView`.

    Attributes:
        outcome: ``skip``.
    """

    path: str
    type: str
    outcome: str
    code: str
    message: str
    count: int = 1


class ReceiptEnd(_Line, frozen=True, kw_only=True, tag="end"):
    """The last line, about the lines before it.

    Attributes:
        lines: their number.
        outcomes: number of elements by outcome.
        skipped: entries that were left out.
        bytes: sizes of the elements that are done or were already there.
        final: whether the job had ended before the first line, and was not changed until this one.
        sha256: of all lines before, with their line ends; hexadecimal.
        signed_at: by the clock of the service.
    """

    lines: int
    elements: int
    outcomes: dict[str, int]
    skipped: int
    bytes: int
    final: bool
    sha256: str
    signed_at: datetime


ReceiptLine = ReceiptJob | ReceiptElement | ReceiptEntry | ReceiptEnd


class ErrorGroupView(msgspec.Struct, frozen=True, kw_only=True):
    """Failures of a job that have code and scope in common."""

    code: Annotated[str, Meta(description="Stable word.")]
    scope: Annotated[str, Meta(description="Whose side: source, destination, transfer or service.")]
    count: Annotated[int, Meta(description="Elements that failed or are held.")]
    held: Annotated[int, Meta(description="Those of them that are held, and resume by themselves.")]
    retryable: Annotated[bool, Meta(description="Whether a retry can help while nothing else has changed.")]
    hint: Annotated[str, Meta(description="What to do.")]
    element: Annotated[int, Meta(description="Number of the first of them.")]
    src_filepath: Annotated[str, Meta(description="Of the first.")]
    dst_filepath: Annotated[str | UnsetType, Meta(description="Of the first, where it has a destination.")] = UNSET
    message: Annotated[str, Meta(description="What tool or server said about the first.")]

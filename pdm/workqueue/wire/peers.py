"""What the nodes of a service tell each other: progress of what they run, and pieces of logs that they have.

A node may be of another version, or not be itself any more: each field is bounded, unknown ones are ignored.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from pdm.workqueue.wire.requests import LARGEST_ID

#: Jobs in one answer, elements of one question, columns of a history, at most.
MOST_JOBS, MOST_ELEMENTS, MOST_COLUMNS = 2000, 200, 1000
#: Bytes of a piece of a log, at most; one longer line is given out whole.
MOST_LOG_BYTES = 4 * 1024**2

#: The year 2500; some months.
_LATEST_S, _LONGEST_COLUMN_S = 16_725_225_600, 10_000_000

_Count = Annotated[int, Meta(ge=0, le=LARGEST_ID)]
_Amount = Annotated[float, Meta(ge=0, le=LARGEST_ID)]


class MotionView(msgspec.Struct, frozen=True, kw_only=True):
    """What a node moves of one job."""

    job: _Count
    running: Annotated[_Count, Meta(description="Elements that it runs.")]
    moving: Annotated[_Count, Meta(description="Bytes that these have moved.")]
    losses: Annotated[_Count, Meta(description="How often moved bytes were lost, because an attempt has failed.")]
    instant: Annotated[_Amount | None, Meta(description="Bytes/s, smoothed.")]
    files_per_second: Annotated[_Amount | None, Meta(description="Elements that end, smoothed.")]


class NodeProgressView(msgspec.Struct, frozen=True, kw_only=True):
    """What a node moves: of the jobs that run there, and of those that ran there lately."""

    incarnation: Annotated[str, Meta(max_length=64, description="Changes with each start of the node.")]
    jobs: Annotated[list[MotionView], Meta(max_length=MOST_JOBS)]


class ElementMotionView(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of an element that a node runs; null for what is not known."""

    element: _Count
    transferred: _Count | None
    instant: _Amount | None
    average: _Amount | None
    elapsed: _Amount | None


class HistoryView(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has moved of a job over time, in columns of equal length."""

    begun_at: Annotated[float, Meta(ge=0, le=_LATEST_S, description="Begin of the columns, seconds since 1970 UTC.")]
    bytes_column_s: Annotated[float, Meta(ge=1, le=_LONGEST_COLUMN_S, description="Seconds of a column of `bytes`.")]
    bytes: Annotated[list[_Amount], Meta(max_length=MOST_COLUMNS, description="Bytes/s.")]
    files_column_s: Annotated[float, Meta(ge=1, le=_LONGEST_COLUMN_S, description="Seconds of a column of `files`.")]
    files: Annotated[list[_Amount], Meta(max_length=MOST_COLUMNS, description="Elements/s.")]


class ElementsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which elements."""

    element: Annotated[
        tuple[_Count, ...], Meta(max_length=MOST_ELEMENTS, description="Number of an element; may be repeated.")
    ] = ()


class LogQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which part of a log."""

    part: Annotated[
        str,
        Meta(
            pattern="^(whole|piece|tail)$",
            description="`whole`: bounded like the log; `piece`: from `offset` on; `tail`: the last lines.",
        ),
    ] = "whole"
    offset: Annotated[_Count | None, Meta(description="Where a piece begins in the file.")] = None
    most: Annotated[int, Meta(ge=1, le=MOST_LOG_BYTES, description="Bytes of a piece or tail.")] = MOST_LOG_BYTES
    begin: Annotated[_Count | None, Meta(description="Where the log begins in the file, if known.")] = None
    length: Annotated[_Count | None, Meta(description="Its bytes in the file, if known.")] = None


class LogPartView(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a log."""

    found: Annotated[bool, Meta(description="Whether the node has the log on its disk.")]
    text: Annotated[str | None, Meta(description="Whole lines; null for none.")] = None
    end: Annotated[_Count, Meta(description="Where the part ends in the file.")] = 0
    is_last: Annotated[bool, Meta(description="Of a piece: whether the file has no more yet.")] = True
    is_cut: Annotated[bool, Meta(description="Of a tail: whether earlier lines are left out.")] = False

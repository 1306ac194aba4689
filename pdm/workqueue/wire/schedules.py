"""What clients send and receive about schedules."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pdm.workqueue.wire.requests import SubmitJob
from pdm.workqueue.wire.responses import HoldView, StatusName


class NewScheduleBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A job that is to be submitted again and again."""

    recurrence: Annotated[
        Annotated[str, Meta(min_length=1, max_length=200)],
        Meta(
            description="Five fields of cron (minute, hour, day of the month, month, day of the week): ``0 3 * * *``;"
            " or an interval of 1 minute to 366 days: ``every 6h``."
        ),
    ]
    timezone: Annotated[
        Annotated[str, Meta(min_length=1, max_length=64)] | None,
        Meta(description="Of a cron expression: a name of the IANA database such as Europe/Paris; default UTC."),
    ] = None
    job: Annotated[SubmitJob, Meta(description="The body of ``POST /jobs``.")]


class ScheduleChanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is to be changed; null, or left out, for what stays."""

    paused: Annotated[
        bool | None, Meta(description="Whether it stops to run; times that pass meanwhile are not made up for.")
    ] = None
    recurrence: Annotated[
        Annotated[str, Meta(min_length=1, max_length=200)] | None, Meta(description="Of cron, or an interval.")
    ] = None
    timezone: Annotated[Annotated[str, Meta(min_length=1, max_length=64)] | None, Meta(description="Its zone.")] = None
    job: Annotated[SubmitJob | None, Meta(description="The whole body of ``POST /jobs``, of the next runs.")] = None


class ScheduleRunView(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a schedule at one of its times."""

    due_at: Annotated[datetime, Meta(description="When it was due; of several that were missed, the first.")]
    made_at: Annotated[datetime, Meta(description="When the service attended to it; later if it did not run.")]
    outcome: Annotated[
        str,
        Meta(
            description="Stable word: SUBMITTED, SKIPPED (the job of an earlier run had not ended), or FAILED (the job"
            " could not be submitted).",
            extra_json_schema={"enum": ["SUBMITTED", "SKIPPED", "FAILED"]},
        ),
    ]
    job: Annotated[int | None, Meta(description="The job.")]
    status: Annotated[StatusName | None, Meta(description="Of the job, now.")]
    message: Annotated[str | None, Meta(description="Why there is no job.")]


class ScheduleView(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule."""

    id: int
    user_id: int
    recurrence: str
    timezone: str
    paused: bool
    created_at: datetime
    next_due: Annotated[datetime | None, Meta(description="Null while it is paused.")]
    job: Annotated[dict[str, Any], Meta(description="The body of ``POST /jobs`` that it submits.")]
    last_run: Annotated[ScheduleRunView | None, Meta(description="Null before the first.")]
    hold: Annotated[
        HoldView | UnsetType,
        Meta(description="Why the last job is held; of one schedule, not in arrays."),
    ] = UNSET
    runs: Annotated[
        list[ScheduleRunView] | UnsetType,
        Meta(description="The last 100, the newest first; of one schedule, not in arrays."),
    ] = UNSET

"""Schedules and their runs as values."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from attrs import frozen

from pdm.workqueue.domain.enums import JobStatus

#: Schedules of one user, and runs of one schedule that are kept.
MOST_SCHEDULES, MOST_RUNS = 1000, 100


class RunOutcome(enum.StrEnum):
    """What became of a schedule at one of its times."""

    #: A job was submitted.
    SUBMITTED = "SUBMITTED"
    #: The job of an earlier run had not ended.
    SKIPPED = "SKIPPED"
    #: The job could not be submitted.
    FAILED = "FAILED"


@frozen(kw_only=True)
class NewSchedule:
    """A schedule to be stored.

    Attributes:
        recurrence: a cron expression, or ``every`` and a duration.
        timezone: of a cron expression.
        submission: the body of ``POST /jobs``.
        next_due: when it runs first.
    """

    user_id: int
    recurrence: str
    timezone: str
    submission: Mapping[str, Any]
    next_due: datetime


@frozen(kw_only=True)
class ScheduleRecord:
    """A schedule as the database knows it; ``next_due`` is None while it is paused."""

    id: int
    user_id: int
    recurrence: str
    timezone: str
    submission: Mapping[str, Any]
    created_at: datetime
    next_due: datetime | None


@frozen(kw_only=True)
class ScheduleEdit:
    """What is to be changed in a schedule; None leaves a value as it is."""

    recurrence: str | None = None
    timezone: str | None = None
    submission: Mapping[str, Any] | None = None
    paused: bool | None = None


@frozen(kw_only=True)
class ScheduleRun:
    """What became of a schedule at one of its times.

    Attributes:
        due_at: that time.
        made_at: when the daemon attended to it; later if none ran.
        job_id: the job that was submitted.
        job_status: its status now.
        message: why no job was submitted.
    """

    schedule_id: int
    due_at: datetime
    made_at: datetime
    outcome: RunOutcome
    job_id: int | None = None
    job_status: JobStatus | None = None
    message: str | None = None

"""Schedules and their runs. A run is made in one transaction: its job, its row, and the next time of the schedule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from attrs import evolve
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.jobs import JobRecord, NewJob
from pdm.workqueue.domain.schedules import (
    MOST_RUNS,
    MOST_SCHEDULES,
    NewSchedule,
    RunOutcome,
    ScheduleEdit,
    ScheduleRecord,
    ScheduleRun,
)
from pdm.workqueue.store import jobs as job_store
from pdm.workqueue.store import sites, waits
from pdm.workqueue.store.idempotency import IdempotencyKey, earlier_row
from pdm.workqueue.store.records import FINAL, columns_of, jobs, schedule_runs, schedules
from pdm.workqueue.WorkqueueDB import IS_DUE

_COLUMNS = columns_of(schedules, "id", "user_id", "recurrence", "timezone", "submission", "created_at", "next_due")
_SCHEDULES = sa.select(*_COLUMNS)
_FETCH = _SCHEDULES.where(schedules.c.id == bindparam("number"))
#: Due schedules that are read at once.
_DUE_AT_ONCE = 100


class TooManySchedulesError(Exception):
    """The user has `MOST_SCHEDULES` schedules."""


class PlannedRun(NamedTuple):
    """What a run is to submit.

    Attributes:
        job: None if it is not possible.
        stored_sites: those of its sites that are in the database, checked again.
        message: why it is not possible.
    """

    job: NewJob | None
    stored_sites: Collection[int] = ()
    message: str | None = None


class MadeRun(NamedTuple):
    """A run that was made, and its job."""

    run: ScheduleRun
    job: JobRecord | None


def create(session: Session, new: NewSchedule, key: IdempotencyKey | None, now: datetime) -> ScheduleRecord:
    """Create a schedule, or return that of an earlier request with the same key.

    Raises:
        IdempotencyConflictError: the key was used for another schedule.
        TooManySchedulesError: the user has too many.
    """
    of_user = schedules.c.user_id == new.user_id
    known = None if key is None else earlier_row(session, key, schedules, _COLUMNS)
    if known is not None:
        return _record(known)
    if (session.scalar(sa.select(sa.func.count()).select_from(schedules).where(of_user)) or 0) >= MOST_SCHEDULES:
        raise TooManySchedulesError(f"you have {MOST_SCHEDULES} schedules: remove some that you do not use any more")
    row = session.execute(
        sa.insert(schedules)
        .values(
            user_id=new.user_id,
            recurrence=new.recurrence,
            timezone=new.timezone,
            submission=dict(new.submission),
            created_at=now,
            next_due=new.next_due,
            request_key=None if key is None else key.key,
            fingerprint=None if key is None else key.fingerprint,
        )
        .returning(*_COLUMNS)
    ).one()
    return _record(row)


def fetch(session: Session, number: int, owner_id: int | None) -> ScheduleRecord | None:
    """A schedule; None if it does not exist or its owner is not ``owner_id``. ``owner_id`` None: any owner."""
    row = session.execute(_FETCH, {"number": number}).one_or_none()
    return None if row is None or owner_id not in (None, row.user_id) else _record(row)


def of_user(session: Session, user_id: int) -> list[ScheduleRecord]:
    """The schedules of a user, by id; at most `MOST_SCHEDULES`."""
    rows = session.execute(_SCHEDULES.where(schedules.c.user_id == user_id).order_by(schedules.c.id))
    return [_record(row) for row in rows]


def edit(
    session: Session, number: int, changes: ScheduleEdit, following: Callable[[ScheduleRecord], datetime | None]
) -> ScheduleRecord | None:
    """Change a schedule; its next time changes if it is paused or resumed, or if its times change.

    Args:
        number: of the schedule.
        changes: to be made.
        following: the next time of a schedule; None for never.

    Returns:
        The schedule as changed; None if it does not exist.
    """
    row = session.execute(_LOCK, {"number": number}).one_or_none()
    if row is None:
        return None
    found = _record(row)
    edited = evolve(
        found,
        recurrence=changes.recurrence or found.recurrence,
        timezone=changes.timezone or found.timezone,
        submission=found.submission if changes.submission is None else changes.submission,
    )
    is_paused = found.next_due is None if changes.paused is None else changes.paused
    has_same_times = (edited.recurrence, edited.timezone) == (found.recurrence, found.timezone)
    if is_paused:
        edited = evolve(edited, next_due=None)
    elif found.next_due is None or not has_same_times:
        edited = evolve(edited, next_due=following(edited))
    values = {
        "recurrence": edited.recurrence,
        "timezone": edited.timezone,
        "submission": dict(edited.submission),
        "next_due": edited.next_due,
    }
    session.execute(sa.update(schedules).where(schedules.c.id == number).values(values))
    return edited


def remove(session: Session, number: int) -> None:
    """Remove a schedule with its history; its jobs stay."""
    # First the lock of the schedule, as in `make_run`.
    session.execute(_LOCK, {"number": number})
    session.execute(sa.delete(schedule_runs).where(schedule_runs.c.schedule_id == number))
    session.execute(sa.delete(schedules).where(schedules.c.id == number))


_DUE = (
    _SCHEDULES.where(sa.text(IS_DUE), schedules.c.next_due <= bindparam("now"))
    .order_by(schedules.c.next_due)
    .limit(_DUE_AT_ONCE)
)
_NEXT_DUE = sa.select(schedules.c.next_due).where(sa.text(IS_DUE)).order_by(schedules.c.next_due).limit(1)


def due(session: Session, now: datetime) -> list[ScheduleRecord]:
    """The schedules that are due, the first of them."""
    return [_record(row) for row in session.execute(_DUE, {"now": now})]


def next_due(session: Session) -> datetime | None:
    """When the next schedule is due; None if there is none."""
    return session.scalar(_NEXT_DUE)


_LOCK = _FETCH.with_for_update()
_RUNS = (
    sa.select(
        *columns_of(schedule_runs, "schedule_id", "due_at", "made_at", "outcome", "job_id", "message"),
        jobs.c.status.label("job_status"),
    )
    .select_from(schedule_runs)
    .outerjoin(jobs, jobs.c.id == schedule_runs.c.job_id)
)
_OPEN_JOB = (
    sa.select(jobs.c.id)
    .join(schedule_runs, schedule_runs.c.job_id == jobs.c.id)
    .where(schedule_runs.c.schedule_id == bindparam("number"), jobs.c.status.not_in(FINAL))
    .limit(1)
)
_RUN_AT = sa.select(schedule_runs.c.due_at).where(
    schedule_runs.c.schedule_id == bindparam("number"), schedule_runs.c.due_at == bindparam("at")
)
_OLDEST_KEPT = (
    sa.select(schedule_runs.c.due_at)
    .where(schedule_runs.c.schedule_id == bindparam("number"))
    .order_by(schedule_runs.c.due_at.desc())
    .offset(MOST_RUNS - 1)
    .limit(1)
)


def make_run(
    session: Session, seen: ScheduleRecord, planned: PlannedRun, now: datetime, following: datetime | None
) -> MadeRun | None:
    """Make the run of a schedule that is due.

    Args:
        seen: the schedule as it was read; if it has changed since, another daemon has made the run, or it was edited.
        planned: what to submit.
        following: when the schedule is due again; None for never.

    Returns:
        None if nothing was made.
    """
    row = session.execute(_LOCK, {"number": seen.id}).one_or_none()
    if row is None or seen.next_due is None or _record(row) != seen:
        return None
    session.execute(sa.update(schedules).where(schedules.c.id == seen.id).values(next_due=following))
    if session.execute(_RUN_AT, {"number": seen.id, "at": seen.next_due}).first() is not None:
        # The clock was set back.
        return None
    run = ScheduleRun(schedule_id=seen.id, due_at=seen.next_due, made_at=now, outcome=RunOutcome.FAILED)
    job = None
    open_job = session.scalar(_OPEN_JOB, {"number": seen.id})
    missing = next(iter(sites.missing(session, planned.stored_sites)), None) if planned.stored_sites else None
    values: dict[str, Any] = {"message": planned.message}
    if open_job is not None:
        values = {"outcome": RunOutcome.SKIPPED, "message": f"overlap: job {open_job} of an earlier run has not ended"}
    elif missing is not None:
        values = {"message": f"there is no site {missing}"}
    elif planned.job is not None:
        job = waits.hold_items(session, job_store.submit(session, planned.job, None, now), planned.job, now)
        values = {"outcome": RunOutcome.SUBMITTED, "job_id": job.id, "job_status": job.status}
    made = evolve(run, **values)
    session.execute(
        sa.insert(schedule_runs).values(
            schedule_id=made.schedule_id,
            due_at=made.due_at,
            made_at=made.made_at,
            outcome=made.outcome.value,
            job_id=made.job_id,
            message=made.message,
        )
    )
    oldest = session.scalar(_OLDEST_KEPT, {"number": seen.id})
    if oldest is not None:
        session.execute(
            sa.delete(schedule_runs).where(schedule_runs.c.schedule_id == seen.id, schedule_runs.c.due_at < oldest)
        )
    return MadeRun(made, job)


def runs(session: Session, number: int) -> list[ScheduleRun]:
    """The runs of a schedule, the newest first; at most `MOST_RUNS`."""
    statement = _RUNS.where(schedule_runs.c.schedule_id == number).order_by(schedule_runs.c.due_at.desc())
    return [_run(row) for row in session.execute(statement)]


def last_runs(session: Session, numbers: Sequence[int]) -> dict[int, ScheduleRun]:
    """The newest run of each of some schedules, by the id of the schedule."""
    newest = (
        sa.select(schedule_runs.c.schedule_id, sa.func.max(schedule_runs.c.due_at))
        .where(schedule_runs.c.schedule_id.in_(numbers))
        .group_by(schedule_runs.c.schedule_id)
    )
    place = sa.tuple_(schedule_runs.c.schedule_id, schedule_runs.c.due_at)
    return {row.schedule_id: _run(row) for row in session.execute(_RUNS.where(place.in_(newest)))}


def _record(row: Iterable[Any]) -> ScheduleRecord:
    return ScheduleRecord(**dict(zip((column.name for column in _COLUMNS), row, strict=False)))


def _run(row: Any) -> ScheduleRun:
    return ScheduleRun(
        schedule_id=row.schedule_id,
        due_at=row.due_at,
        made_at=row.made_at,
        outcome=RunOutcome(row.outcome),
        job_id=row.job_id,
        job_status=row.job_status,
        message=row.message,
    )

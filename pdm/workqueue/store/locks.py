"""Row locks. Jobs are locked in id order before their elements are changed, to avoid deadlocks.

SQLite has no row locks and needs none: it has one writer. SQLAlchemy omits FOR UPDATE there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from attrs import define, evolve, field
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain import lifecycle
from pdm.workqueue.domain.enums import JobStatus, JobType, PlannedAction
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.holds import HoldBy
from pdm.workqueue.domain.jobs import Counters, JobRecord, NewElement
from pdm.workqueue.store import job_counts
from pdm.workqueue.store.events import note_changes
from pdm.workqueue.store.jobs import note_written
from pdm.workqueue.store.records import IS_THERE, JOB_COLUMNS, columns_of, hold_columns, job_record, jobs
from pdm.workqueue.store.row_statements import RowStatement
from pdm.workqueue.WorkqueueDB import AT_ONCE, MAX_BYTES, NEVER

_COLUMNS = (*JOB_COLUMNS, jobs.c.list_due_at, jobs.c.work_due_at)


@define
class LockedJob:
    """A job that no other transaction changes before this one ends; `save_jobs` writes the changes.

    ``record`` has the new status and counters after `roll_up`.

    Attributes:
        hold: why an element of it is HELD from now on.
        resumed: who ends the hold of a person, and a sentence about it.
    """

    record: JobRecord
    started_at: datetime | None = field(init=False)
    list_due_at: datetime | None
    work_due_at: datetime | None
    hold: AttemptFailure | None = field(init=False, default=None)
    resumed: tuple[HoldBy, str] | None = field(init=False, default=None)
    _counters: Counters = field(init=False)
    # Moves are summed up first: many elements change at once, and a new record for each is expensive.
    _moves: dict[tuple[JobStatus, JobStatus], int] = field(init=False, factory=dict)
    _bytes_total: int = field(init=False)
    _bytes_done: int = field(init=False)
    _already_there: int = field(init=False)
    _bytes_already_there: int = field(init=False)
    _before: tuple[JobRecord, datetime | None, datetime | None] = field(init=False)
    # The state up to which events are noted, and the time of the latest roll-up, which changes it.
    _noted: JobRecord = field(init=False)
    _changed_at: datetime | None = field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self.started_at = self.record.started_at
        self._before = (self.record, self.list_due_at, self.work_due_at)
        self._noted = self.record
        self._counters = self.record.counters
        self._bytes_total = self.record.bytes_total
        self._bytes_done = self.record.bytes_done
        self._already_there = self.record.already_there
        self._bytes_already_there = self.record.bytes_already_there

    @property
    def id(self) -> int:
        return self.record.id

    @property
    def is_changed(self) -> bool:
        """Whether there is anything to write."""
        record, list_due_at, work_due_at = self._before
        same = self.record is record and self.list_due_at == list_due_at and self.work_due_at == work_due_at
        return not same

    @property
    def hold_is_changed(self) -> bool:
        """Whether a person begins or ends to hold it."""
        return self.record.hold is not self._before[0].hold

    @property
    def counters(self) -> Counters:
        """Counters including all moves so far."""
        for (before, after), count in self._moves.items():
            self._counters = lifecycle.counters_after_moving(self._counters, before, after, count)
        self._moves.clear()
        return self._counters

    def move(self, before: JobStatus, after: JobStatus, count: int = 1) -> None:
        """Count elements whose status changes."""
        if count:
            self._moves[before, after] = self._moves.get((before, after), 0) + count

    def grow(self, new: Sequence[NewElement]) -> None:
        """Count elements that are added."""
        done = [one for one in new if one.done]
        self._counters = lifecycle.counters_after_adding(self.counters, JobStatus.SUBMITTED, len(new) - len(done))
        size = sum(one.size for one in new if one.type is not JobType.REMOVE)
        self._bytes_total = min(self._bytes_total + size, MAX_BYTES)
        if done:
            self._counters = lifecycle.counters_after_adding(self._counters, JobStatus.DONE, len(done))
            for one in done:
                if one.planned is PlannedAction.SAME and one.type is JobType.COPY:
                    self.count_arrived(one.size, already_there=True)

    def grow_bytes(self, size: int) -> None:
        """Count bytes of an element whose size was not known."""
        self._bytes_total = min(self._bytes_total + size, MAX_BYTES)

    def shrink(self, status: JobStatus, count: int) -> None:
        """Count elements that are deleted: removals, which have no bytes to move."""
        self._counters = lifecycle.counters_after_adding(self.counters, status, -count)

    def count_arrived(self, size: int, *, already_there: bool) -> None:
        """Count bytes that are proven at the destination, transferred or already there."""
        self._bytes_done = min(self._bytes_done + size, MAX_BYTES)
        if already_there:
            self._already_there += 1
            self._bytes_already_there = min(self._bytes_already_there + size, MAX_BYTES)

    def counted_done(self) -> tuple[int, ...]:
        """What `job_counts.append` takes, of a job that is not locked: its changes since it was read."""
        before = self._before[0]
        return (
            self.id,
            self.counters.done - before.counters.done,
            self._bytes_total - before.bytes_total,
            self._bytes_done - before.bytes_done,
            self._already_there - before.already_there,
            self._bytes_already_there - before.bytes_already_there,
        )

    def schedule_listing(self, due_at: datetime = AT_ONCE) -> None:
        """Make the LIST element claimable from a time on; no effect while the job is held by a person."""
        if self.record.hold is None:
            self.list_due_at = due_at

    def schedule_work(self, due_at: datetime = AT_ONCE) -> None:
        """Make another element claimable from a time on, at the earliest.

        No effect while a large job is being cancelled or retried, or while it is held by a person: the end of that
        schedules it.
        """
        if self.work_due_at == NEVER or self.record.hold is not None:
            return
        self.work_due_at = due_at if self.work_due_at is None else min(self.work_due_at, due_at)

    def roll_up(self, now: datetime) -> bool:
        """Derive the status from the counters; returns whether the job has just become final."""
        self._changed_at = now
        before, counters = self.record.status, self.counters
        hold = None if self.record.cancel_requested else self.record.hold
        status = lifecycle.job_status(
            counters,
            started=self.started_at is not None,
            cancel_requested=self.record.cancel_requested,
            on_hold=hold is not None,
        )
        finished_at = (self.record.finished_at if before.is_final else now) if status.is_final else None
        if not counters.submitted or self.record.cancel_requested:
            self.list_due_at = self.work_due_at = None
        elif hold is not None:
            self.list_due_at = None
            # A large retry is put back to its end.
            self.work_due_at = NEVER if self.work_due_at == NEVER else None
        if self.record.cancel_requested and (counters.submitted or counters.held):
            self.work_due_at = NEVER
        self.record = evolve(
            self.record,
            status=status,
            counters=counters,
            started_at=self.started_at,
            finished_at=finished_at,
            bytes_total=self._bytes_total,
            bytes_done=self._bytes_done,
            already_there=self._already_there,
            bytes_already_there=self._bytes_already_there,
            hold=None if status.is_final else hold,
        )
        return status.is_final and not before.is_final

    def note_events(self, session: Session) -> None:
        """Note the events of what has changed since the last call."""
        if self._changed_at is not None:
            note_changes(session, self._noted, self.record, self.hold, self._changed_at, self.resumed)
            self._noted, self.resumed = self.record, None


_READ = sa.select(*_COLUMNS).order_by(jobs.c.id)
#: By whether there may be counts apart from the jobs: on a shared database.
_LOCK = {False: _READ, True: _READ.add_columns(job_counts.HAS_COUNTS)}
_BY_NUMBER = (jobs.c.id.in_(bindparam("numbers", expanding=True)), IS_THERE)
_LOCK_BY_NUMBER = {
    (shared, skip_locked): _LOCK[shared]
    .where(*_BY_NUMBER)
    .with_for_update(key_share=True, skip_locked=skip_locked, of=jobs)
    for shared in (False, True)
    for skip_locked in (False, True)
}
_LOCK_DUE = {
    (column, shared, skip_locked): _LOCK[shared]
    .where(jobs.c.id.in_(bindparam("numbers", expanding=True)), column <= bindparam("now"))
    .with_for_update(key_share=True, skip_locked=skip_locked, of=jobs)
    for column in (jobs.c.list_due_at, jobs.c.work_due_at)
    for shared in (False, True)
    for skip_locked in (False, True)
}
_WITHOUT_LOCK = _READ.where(*_BY_NUMBER)
_ADD_UP = job_counts.added_up(_COLUMNS)


def lock_job(session: Session, job_id: int) -> LockedJob | None:
    """Lock one job; None if it does not exist."""
    return next(iter(lock_jobs(session, [job_id])), None)


def lock_jobs(
    session: Session, numbers: Collection[int], *, skip_locked: bool = False, to_the_end: bool = False
) -> list[LockedJob]:
    """Lock jobs by id; with ``skip_locked`` only those that no other transaction has locked.

    ``to_the_end``: add up what is counted apart even if nothing is open then; the caller derives the status.
    """
    if not numbers:
        return []
    statement = _LOCK_BY_NUMBER[is_shared(session), skip_locked]
    return _locked(session, statement, {"numbers": list(numbers)}, to_the_end=to_the_end)


def read_jobs(session: Session, numbers: Collection[int]) -> list[JobRecord]:
    """Jobs as they are now, without a lock."""
    return [job_record(row) for row in session.execute(_WITHOUT_LOCK, {"numbers": list(numbers)})]


def is_shared(session: Session) -> bool:
    """Whether several daemons may share the database."""
    return session.get_bind().dialect.name == "postgresql"


#: PostgreSQL: ``lock_timeout`` expired.
LOCK_NOT_AVAILABLE = "55P03"
_WAIT_BRIEFLY = sa.text("SET LOCAL lock_timeout = '250ms'")


def lock_due_jobs(
    session: Session, due_at: sa.Column[Any], numbers: Collection[int], now: datetime, *, skip_locked: bool
) -> list[LockedJob]:
    """Lock those of these jobs that still have something due once they are locked.

    ``due_at``: column with the due time. ``skip_locked``: skip jobs that another transaction has locked, instead of
    waiting briefly.

    Returns:
        The jobs; none if the lock was not available in time.
    """
    parameters = {"numbers": list(numbers), "now": now}
    shared = is_shared(session)
    if skip_locked or not shared:
        return _locked(session, _LOCK_DUE[due_at, shared, skip_locked], parameters)
    try:
        with session.begin_nested():
            session.execute(_WAIT_BRIEFLY)
            return _locked(session, _LOCK_DUE[due_at, shared, False], parameters)
    except sa.exc.OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
            raise
        return []


def _locked(
    session: Session, statement: sa.Select[Any], parameters: dict[str, Any], *, to_the_end: bool = False
) -> list[LockedJob]:
    rows = session.execute(statement, parameters).all()
    counted = [row.id for row in rows if row.has_counts] if rows and is_shared(session) else ()
    if counted:
        added_up = session.execute(_ADD_UP, {"numbers": counted, "to_the_end": to_the_end})
        by_number = {row.id: row for row in added_up}
        rows = [by_number.get(row.id, row) for row in rows]
    return [LockedJob(job_record(row), row.list_due_at, row.work_due_at) for row in rows]


#: In the order of `_saved`.
_SAVED = columns_of(
    jobs,
    *("id", "status", "started_at", "finished_at", "cancel_requested", "bytes_total", "bytes_done", "skipped"),
    *("already_there", "bytes_already_there", "list_due_at", "work_due_at", "num_elements", "num_submitted"),
    *("num_running", "num_done", "num_failed", "num_cancelled", "num_held"),
)
_CHANGED = [column.name for column in _SAVED[1:]]
#: Many jobs of one element change together.
_SAVE = RowStatement(
    f"""
    WITH saved (job_id, {", ".join(_CHANGED)}) AS (VALUES {{rows}})
    UPDATE jobs SET {", ".join(f"{name} = saved.{name}" for name in _CHANGED)}
    FROM saved WHERE jobs.id = saved.job_id
    """,  # noqa: S608 - names of columns
    _SAVED,
)


#: Rare: the statement above is for what changes with each element.
_SET_HOLD = sa.update(jobs).where(jobs.c.id == bindparam("number"))


def save_jobs(session: Session, locked: Collection[LockedJob]) -> None:
    """Write locked jobs, and note their events."""
    if locked:
        _SAVE.execute(session, [_saved(job) for job in locked])
        changed = [job.record for job in locked if job.hold_is_changed]
        if changed:
            session.execute(_SET_HOLD, [{"number": record.id} | hold_columns(record.hold) for record in changed])
        for job in locked:
            note_written(session, job.record)
            job.note_events(session)


def _saved(job: LockedJob) -> tuple[Any, ...]:
    record, counters = job.record, job.record.counters
    return (
        record.id,
        record.status,
        job.started_at,
        record.finished_at,
        record.cancel_requested,
        record.bytes_total,
        record.bytes_done,
        record.skipped,
        record.already_there,
        record.bytes_already_there,
        job.list_due_at,
        job.work_due_at,
        counters.elements,
        counters.submitted,
        counters.running,
        counters.done,
        counters.failed,
        counters.cancelled,
        counters.held,
    )

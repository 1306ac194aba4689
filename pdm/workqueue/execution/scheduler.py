"""Submits the jobs of schedules when they are due."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from attrs import Factory, define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.schedules import ScheduleRecord
from pdm.workqueue.execution.recurrence import recurrence
from pdm.workqueue.store import schedules, users
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseClosedError, DatabaseUnavailableError
from pdm.workqueue.store.schedules import PlannedRun
from pdm.workqueue.telemetry.background import DueTimer
from pdm.workqueue.telemetry.logging import log_submitted

#: Seconds until a schedule is noticed that another daemon has stored or resumed.
_LOOK_EVERY_S = 10.0


@define(eq=False, kw_only=True)
class Scheduler:
    """Makes the runs of schedules; of several daemons on one database, the first one that comes makes a run.

    Attributes:
        plan: validates the submission of a schedule as of now, as its owner's, whose subject it is called with.
        on_job: called with each job that was submitted.
        timer: to be woken when a schedule was stored or resumed.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    plan: Callable[[ScheduleRecord, str], PlannedRun]
    on_job: Callable[[JobRecord], None]
    timer: DueTimer = field(
        init=False,
        default=Factory(
            lambda self: DueTimer(self.reactor, "run schedules", _LOOK_EVERY_S, self._run_due), takes_self=True
        ),
    )
    _log: Logger = field(factory=Logger)

    async def _run_due(self) -> float:
        failed = False
        while not failed:
            due = await self.database.read("find due schedules", schedules.due, self.clock())
            for schedule in due:
                try:
                    await self._run(schedule)
                except (DatabaseClosedError, DatabaseUnavailableError):
                    raise
                except Exception:
                    # The others run all the same; this one is tried again later.
                    failed = True
                    self._log.failure("schedule {schedule} could not be run", schedule=schedule.id)
            if not due:
                break
        next_due = await self.database.read("find the next due schedule", schedules.next_due)
        if failed or next_due is None:
            return _LOOK_EVERY_S
        return (next_due - self.clock()).total_seconds()

    async def _run(self, schedule: ScheduleRecord) -> None:
        now = self.clock()
        # Never earlier than this time, even if the clock was set back: a time has one run.
        since = now if schedule.next_due is None else max(now, schedule.next_due)
        following = recurrence(schedule.recurrence, schedule.timezone).after(since, schedule.created_at)
        owners = await self.database.read("fetch the user of a schedule", users.subjects, [schedule.user_id])
        planned = self.plan(schedule, owners[schedule.user_id])
        made = await self.database.run("run a schedule", schedules.make_run, schedule, planned, now, following)
        if made is None:
            return
        if made.job is None:
            write = self._log.info if made.run.message is None else self._log.warn
            write(
                "schedule {schedule} of user {user}: run {outcome}: {why}",
                schedule=schedule.id,
                user=schedule.user_id,
                outcome=made.run.outcome.value,
                why=made.run.message,
            )
            return
        log_submitted(made.job)
        self.on_job(made.job)

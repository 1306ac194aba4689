"""Tells jobs that wait for others how those have ended; cancels jobs at their deadline; ends holds at their time."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from attrs import Factory, define, field
from twisted.internet.interfaces import IReactorTime

from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.store import chains, holds, job_changes
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import Background, DueTimer, Periodic
from pdm.workqueue.telemetry.logging import log_ended

#: Seconds between two searches for what a daemon that was killed has not told.
_SWEEP_EVERY_S = 20.0


@define(eq=False, kw_only=True)
class Chains:
    """Releases jobs when those that they wait for have ended.

    Attributes:
        on_cancelled: called with the id of each job that is cancelled in parts.
        on_work: called when a job may be claimed.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    on_cancelled: Callable[[int], None]
    on_work: Callable[[], None]
    _periodic: Periodic | None = None
    _background: Background = field(factory=Background)
    _stopping: bool = False

    def start(self) -> None:
        self.database.on_awaited_end = self.ended
        self._periodic = Periodic(self.reactor, "release waiting jobs", _SWEEP_EVERY_S, self.sweep)
        self._periodic.start()
        self._background.start("release waiting jobs", self.sweep())

    async def stop(self) -> None:
        self._stopping = True
        if self._periodic is not None:
            await self._periodic.stop()
        await self._background.over()

    def ended(self, job_id: int) -> None:
        """Tell the jobs that wait for one that has ended."""
        if not self._stopping:
            self._background.start(f"release jobs that wait for job {job_id}", self._release(job_id))

    async def sweep(self) -> None:
        """Find what was not told: its daemon was killed, or the transaction failed."""
        for job_id in await self.database.read("find ended predecessors", chains.ended_predecessors):
            await self._release(job_id)

    async def _release(self, job_id: int) -> None:
        more = True
        while more and not self._stopping:
            released = await self.database.run("release waiting jobs", chains.release, job_id, self.clock())
            for job in released.ended:
                _note_cancelled(job, self.on_cancelled)
            if released.has_work:
                self.on_work()
            more = released.more


#: Seconds until a deadline, or the end of a hold, is noticed that came with another daemon, which has ended since.
_LOOK_EVERY_S = 5.0
_PAUSE_S = 0.2


@define(eq=False, kw_only=True)
class Deadlines:
    """Cancels jobs whose deadline is over.

    Attributes:
        on_cancelled: called with the id of each of which something runs or waits.
        timer: to be woken when a job with a deadline was submitted.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    on_cancelled: Callable[[int], None]
    timer: DueTimer = field(
        init=False,
        default=Factory(
            lambda self: DueTimer(self.reactor, "cancel overdue jobs", _LOOK_EVERY_S, self._cancel_overdue),
            takes_self=True,
        ),
    )

    async def _cancel_overdue(self) -> float:
        while True:
            due = await self.database.read("find the next deadline", job_changes.next_deadline)
            left_s = _LOOK_EVERY_S if due is None else (due - self.clock()).total_seconds()
            if left_s > 0:
                return left_s
            overdue = await self.database.run("cancel overdue jobs", job_changes.cancel_overdue, self.clock())
            if not overdue:
                # Another daemon has just cancelled it.
                return _PAUSE_S
            for job in overdue:
                _note_cancelled(job, self.on_cancelled)


@define(eq=False, kw_only=True)
class HoldEnds:
    """Resumes jobs that were held until some time.

    Attributes:
        on_work: called when a job may be claimed.
        timer: to be woken when a job is held until some time.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    on_work: Callable[[], None]
    timer: DueTimer = field(
        init=False,
        default=Factory(
            lambda self: DueTimer(self.reactor, "resume held jobs", _LOOK_EVERY_S, self._resume_ended),
            takes_self=True,
        ),
    )

    async def _resume_ended(self) -> float:
        while True:
            due = await self.database.read("find the next end of a hold", holds.next_end)
            left_s = _LOOK_EVERY_S if due is None else (due - self.clock()).total_seconds()
            if left_s > 0:
                return left_s
            if not await self.database.run("resume held jobs", holds.resume_ended, self.clock()):
                # Another daemon has just resumed it.
                return _PAUSE_S
            self.on_work()


def _note_cancelled(job: JobRecord, on_cancelled: Callable[[int], None]) -> None:
    """Log the end of a job that was cancelled; one that has not ended yet is to be brought to its end."""
    if job.status.is_final:
        log_ended(job)
    else:
        on_cancelled(job.id)

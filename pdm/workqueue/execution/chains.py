"""Tells jobs that wait for others how those have ended, and cancels jobs whose deadline is over."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from pdm.workqueue.store import chains, job_changes
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import Background, Periodic
from pdm.workqueue.telemetry.logging import log_ended

#: Seconds between two searches for what a daemon that was killed has not told.
_SWEEP_EVERY_S = 20.0


@define(eq=False, kw_only=True)
class Chains:
    """Releases jobs when those that they wait for have ended.

    Attributes:
        on_work: called when a job may be claimed.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
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
                log_ended(job)
            if released.has_work:
                self.on_work()
            more = released.more


#: Seconds until a deadline is noticed that came with a job of another daemon, which has ended since.
_LOOK_EVERY_S = 5.0


@define(eq=False, kw_only=True)
class Deadlines:
    """Cancels jobs whose deadline is over.

    Attributes:
        on_cancelled: called with the id of each: what runs of it is to be ended.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    on_cancelled: Callable[[int], None]
    _timer: IDelayedCall | None = None
    _background: Background = field(factory=Background)
    _looking: bool = False
    _again: bool = False
    _stopping: bool = False

    def start(self) -> None:
        self.look()

    async def stop(self) -> None:
        self._stopping = True
        self._cancel_timer()
        await self._background.over()

    def look(self) -> None:
        """A job with a deadline was submitted, or the clock was set."""
        self._again = True
        if not self._looking and not self._stopping:
            self._cancel_timer()
            self._background.start("cancel overdue jobs", self._look())

    def clock_was_set(self, _step: object) -> None:
        self.look()

    async def _look(self) -> None:
        self._looking = True
        pause_s = _LOOK_EVERY_S
        try:
            while self._again and not self._stopping:
                self._again = False
                pause_s = await self._cancel_overdue()
        finally:
            self._looking = False
            if not self._stopping:
                self._timer = self.reactor.callLater(pause_s, self.look)

    async def _cancel_overdue(self) -> float:
        """Cancel what is overdue; returns for how many seconds nothing more is."""
        due = await self.database.read("find the next deadline", job_changes.next_deadline)
        while due is not None and due <= self.clock() and not self._stopping:
            for job in await self.database.run("cancel overdue jobs", job_changes.cancel_overdue, self.clock()):
                if job.status.is_final:
                    log_ended(job)
                self.on_cancelled(job.id)
            due = await self.database.read("find the next deadline", job_changes.next_deadline)
        left_s = _LOOK_EVERY_S if due is None else (due - self.clock()).total_seconds()
        return min(max(left_s, 0.0), _LOOK_EVERY_S)

    def _cancel_timer(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None

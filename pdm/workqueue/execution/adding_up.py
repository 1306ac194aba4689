"""Adds to the counters of jobs what was counted apart from them: see `pdm.workqueue.store.job_counts`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from pdm.workqueue.store import counted_apart
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseClosedError
from pdm.workqueue.telemetry.background import ReportedError, start_background
from pdm.workqueue.telemetry.logging import log_ended

#: Claims of a job add up, too: this is for the counters that users see while nothing is claimed.
_PAUSE_S = 0.25
#: The same of jobs of which nothing waits, so that they may end soon.
_SHORT_PAUSE_S = 0.02
_PAUSE_AFTER_ERROR_S = 1.0


@define(eq=False)
class AddingUp:
    """The jobs that must be looked at, and the task that does it.

    Attributes:
        on_idle: called when nothing is left.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    on_idle: Callable[[], None]
    _jobs: set[int] = field(factory=set)
    _timer: IDelayedCall | None = None
    _running: bool = False
    _log: Logger = field(factory=Logger)

    @property
    def is_idle(self) -> bool:
        return not (self._jobs or self._running)

    def later(self, jobs: Collection[int], *, soon: bool) -> None:
        """Look at jobs after a pause, which is short if they may end ``soon``."""
        self._jobs.update(jobs)
        if not self._jobs or self._running:
            return
        pause_s = _SHORT_PAUSE_S if soon else _PAUSE_S
        if self._timer is None:
            self._timer = self.reactor.callLater(pause_s, self._begin)
        elif soon and self._timer.getTime() > self.reactor.seconds() + pause_s:
            self._timer.reset(pause_s)

    def now(self) -> None:
        """Do not wait for the end of the pause."""
        if self._timer is not None:
            self._timer.reset(0)

    def _begin(self) -> None:
        self._timer = None
        self._running = True
        start_background("add up counters", self._add_up())

    async def _add_up(self) -> None:
        try:
            while self._jobs:
                jobs, self._jobs = self._jobs, set()
                try:
                    added = await self.database.run("add up counters", counted_apart.add_up, self.clock(), jobs)
                except DatabaseClosedError:
                    # Another daemon does it, or this one after its next start.
                    self._jobs.clear()
                    return
                except Exception as error:
                    if not isinstance(error, ReportedError):
                        self._log.failure("the counters of jobs could not be added up; trying again")
                    self._jobs |= jobs
                    await deferLater(self.reactor, _PAUSE_AFTER_ERROR_S)
                    continue
                for job in added.finished:
                    log_ended(job)
                if added.left:
                    self._jobs |= added.left
                    await deferLater(self.reactor, _SHORT_PAUSE_S)
        finally:
            self._running = False
            self.on_idle()

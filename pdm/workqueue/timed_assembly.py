"""Part of the composition root: what begins, ends, resumes or removes jobs because time has passed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

from attrs import frozen

from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.holds import WaitPolicy
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.schedules import ScheduleRecord
from pdm.workqueue.execution.chains import Chains, Deadlines, HoldEnds
from pdm.workqueue.execution.preparing import Preparation
from pdm.workqueue.execution.retention import Retention
from pdm.workqueue.execution.scheduler import Scheduler
from pdm.workqueue.execution.staging import TapeVisits
from pdm.workqueue.execution.tape import TapeApis
from pdm.workqueue.execution.waits import WaitPoller
from pdm.workqueue.policies import retention_policy
from pdm.workqueue.services import OrderedServices
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.schedules import PlannedRun

#: Requests of one visit of a tape API at most, and seconds until a helper for one has started.
_REQUESTS_OF_VISIT, _HELPER_START_S = 6, 35.0


def wait_policy(settings: Settings) -> WaitPolicy:
    """How tape systems are polled."""
    tape = settings.tape
    return WaitPolicy(
        poll_s=tape.poll_s,
        longest_poll_s=max(tape.longest_poll_s, tape.poll_s),
        stage_timeout_s=tape.stage_timeout_s,
        archive_timeout_s=tape.archive_timeout_s,
        lifetime_s=tape.lifetime_s,
    )


@frozen(kw_only=True)
class TimedParts:
    """The parts of a daemon that act when a time has come.

    Attributes:
        waits: visits elements that wait for tape systems.
    """

    chains: Chains
    deadlines: Deadlines
    hold_ends: HoldEnds
    waits: WaitPoller
    scheduler: Scheduler
    retention: Retention

    def add_to(self, services: OrderedServices) -> None:
        """Add the parts in the order of their start, except `retention`, which starts last."""
        services.add("chains", start=self.chains.start, stop=self.chains.stop)
        services.add("deadlines", start=self.deadlines.timer.start, stop=self.deadlines.timer.stop)
        services.add("holds", start=self.hold_ends.timer.start, stop=self.hold_ends.timer.stop)
        services.add("waits for tape", start=self.waits.timer.start, stop=self.waits.stop)
        services.add("schedules", start=self.scheduler.timer.start, stop=self.scheduler.timer.stop)

    def clock_was_set(self, _step: timedelta) -> None:
        """Compute anew when to act next."""
        for part in (self.deadlines, self.hold_ends, self.scheduler, self.waits):
            part.timer.wake()


def timed_parts(
    *,
    reactor: Any,
    settings: Settings,
    database: Database,
    clock: Callable[[], datetime],
    preparation: Preparation,
    incarnation: str,
    planned_run: Callable[[ScheduleRecord, str], PlannedRun],
    on_cancelled: Callable[[int], None],
    on_work: Callable[[], None],
    receipt_of: Callable[[int], Awaitable[AsyncGenerator[bytes]]],
) -> TimedParts:
    """The parts, from the settings.

    Args:
        planned_run: as `Scheduler.plan`.
        on_cancelled: called with a job that was cancelled.
        on_work: called when elements became due.
        receipt_of: as `Retention.receipt_of`.
    """
    deadlines = Deadlines(reactor=reactor, database=database, clock=clock, on_cancelled=on_cancelled)

    def job_added(job: JobRecord) -> None:
        if job.deadline is not None:
            deadlines.timer.wake()
        on_work()

    return TimedParts(
        chains=Chains(reactor=reactor, database=database, clock=clock, on_cancelled=on_cancelled, on_work=on_work),
        deadlines=deadlines,
        hold_ends=HoldEnds(reactor=reactor, database=database, clock=clock, on_work=on_work),
        waits=_wait_poller(
            reactor=reactor,
            settings=settings,
            database=database,
            clock=clock,
            preparation=preparation,
            incarnation=incarnation,
            on_work=on_work,
        ),
        scheduler=Scheduler(reactor=reactor, database=database, clock=clock, plan=planned_run, on_job=job_added),
        retention=Retention(
            reactor=reactor,
            database=database,
            clock=clock,
            policy=retention_policy(settings),
            incarnation=incarnation,
            logs=settings.logs.folder,
            receipt_of=receipt_of,
        ),
    )


def _wait_poller(
    *,
    reactor: Any,
    settings: Settings,
    database: Database,
    clock: Callable[[], datetime],
    preparation: Preparation,
    incarnation: str,
    on_work: Callable[[], None],
) -> WaitPoller:
    """Visits of elements that wait for tape systems."""
    policy, timeout_s = wait_policy(settings), settings.tape.timeout_s
    visits = TapeVisits(
        database=database,
        sites=preparation.sites,
        apis=TapeApis(preparation=preparation, pool=preparation.pool, timeout_s=timeout_s),
        clock=clock,
        policy=policy,
    )
    return WaitPoller(
        reactor=reactor,
        database=database,
        clock=clock,
        policy=policy,
        look=visits.look,
        incarnation=incarnation,
        # A visit is a few requests; each may wait for a helper to start.
        lease_s=_REQUESTS_OF_VISIT * (timeout_s + _HELPER_START_S),
        on_work=on_work,
    )

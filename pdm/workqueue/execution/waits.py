"""Visits waits when they are due: elements that are HELD until a site has done something.

`pdm.workqueue.domain.holds` has the terms.

Each daemon takes waits for itself, a few of each site at a time. A site that does not answer is left alone for a while,
so that its other waits do not wait for a timeout each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

from attrs import Factory, define, evolve, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.holds import Wait, WaitingElement, WaitKind, WaitPhase, WaitPolicy
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.lifecycle import duration_s
from pdm.workqueue.store import wait_visits
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.wait_visits import WaitVisit
from pdm.workqueue.telemetry.background import Background, DueTimer
from pdm.workqueue.telemetry.logging import log_ended

#: Seconds until a wait is noticed that another daemon has added.
_LOOK_EVERY_S = 2.0
#: Visits at once, of all sites and of one: their helpers are outside the limits for jobs.
_AT_ONCE, _AT_SITE = 4, 2
#: Longest pause of a site that does not answer.
_LONGEST_REST_S = 120.0


class SiteUnansweredError(Exception):
    """A site has not answered, or has refused the request as a whole.

    Attributes:
        is_unsure: whether it may have carried out the request.
        wait: the wait as it is now, if it has another phase.
    """

    def __init__(self, failure: AttemptFailure, *, is_unsure: bool = False, wait: Wait | None = None) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.is_unsure = is_unsure
        self.wait = wait


@define(eq=False, kw_only=True)
class WaitPoller:
    """Visits waits, several at once.

    Attributes:
        look: visits one with its elements, and returns what it has found; `SiteUnansweredError` if nothing.
        incarnation: of this daemon.
        lease_s: seconds after which another daemon may visit a wait that this one has taken; no visit takes longer.
        on_work: called when elements may be claimed.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    policy: WaitPolicy
    look: Callable[[Wait, JobRecord, Sequence[WaitingElement]], Awaitable[WaitVisit]]
    incarnation: str
    lease_s: float
    on_work: Callable[[], None]
    timer: DueTimer = field(
        init=False,
        default=Factory(
            lambda self: DueTimer(self.reactor, "poll what elements wait for", _LOOK_EVERY_S, self._visit_due),
            takes_self=True,
        ),
    )
    _visits: Background = field(factory=Background)
    _running: Counter[int] = field(factory=Counter)
    #: Site → until when it is left alone, and visits without an answer in a row.
    _resting: dict[int, tuple[datetime, int]] = field(factory=dict)
    _log: Logger = field(factory=Logger)

    async def stop(self) -> None:
        """Begin no further visit, and wait for those that run."""
        await self.timer.stop()
        await self._visits.over()

    async def _visit_due(self) -> float:
        while True:
            now = self.clock()
            resting = {site: until for site, (until, _) in self._resting.items() if until > now}
            allowance = {site: _AT_SITE - count for site, count in self._running.items()} | dict.fromkeys(resting, 0)
            most = _AT_ONCE - self._running.total()
            if most < 1:
                # The end of a visit wakes the timer.
                return _LOOK_EVERY_S
            excluded = [site for site, count in allowance.items() if count < 1]
            due_at = await self.database.read("find the next wait", wait_visits.next_due, excluded, now)
            if due_at is None or due_at > now:
                next_at = min([*resting.values(), *([] if due_at is None else [due_at])], default=None)
                return _LOOK_EVERY_S if next_at is None else (next_at - now).total_seconds()
            taken = await self.database.run(
                "take due waits",
                wait_visits.take_due,
                self.incarnation,
                allowance,
                _AT_SITE,
                most,
                self.lease_s,
                now,
            )
            for wait in taken:
                self._running[wait.site_id] += 1
                self._visits.start(f"visit wait {wait.id} of job {wait.job_id}", self._visit(wait))
            if not taken:
                # Another daemon has them.
                return _LOOK_EVERY_S

    async def _visit(self, wait: Wait) -> None:
        try:
            job = await self.database.job(wait.job_id)
            if job is None:
                return
            if wait.phase is WaitPhase.GATHER:
                await self._split(wait, job)
                return
            members = await self.database.read("fetch the elements of a wait", wait_visits.members, wait)
            visit = await self._found(wait, job, members)
            finished = await self.database.run("settle a visit", wait_visits.settle_visit, visit, self.clock())
            if finished is not None:
                log_ended(finished)
            if visit.resumed or (visit.done and job.has_phases):
                self.on_work()
        finally:
            self._running[wait.site_id] -= 1
            if not self._running[wait.site_id]:
                del self._running[wait.site_id]
            self.timer.wake()

    async def _split(self, wait: Wait, job: JobRecord) -> None:
        now = self.clock()
        asked = job.options.get("stage_timeout" if wait.kind is WaitKind.STAGE else "archive_timeout")
        usual = self.policy.stage_timeout_s if wait.kind is WaitKind.STAGE else self.policy.archive_timeout_s
        deadline = now + timedelta(seconds=usual if asked is None else duration_s(asked))
        await self.database.run("split a wait", wait_visits.split, wait, deadline, now)

    async def _found(self, wait: Wait, job: JobRecord, members: Sequence[WaitingElement]) -> WaitVisit:
        """What a visit has found; without an answer, when the next one is."""
        try:
            visit = await self.look(wait, job, members)
        except SiteUnansweredError as error:
            failure, wait = error.failure, error.wait or wait
        except Exception:
            self._log.failure("wait {wait} of job {job} could not be visited", wait=wait.id, job=wait.job_id)
            failure = AttemptFailure(FailureScope.SERVICE, FailureCode.INTERNAL, "a fault of the service")
            if self.clock() >= wait.deadline:
                # Nothing is held longer than its job has asked for.
                waiting = dict.fromkeys((one.id for one in members if one.waits_for(wait.kind)), failure)
                left = [one.id for one in members]
                return WaitVisit(wait=wait, due_at=self.clock(), failed=waiting, left=left, message=failure.message)
        else:
            self._resting.pop(wait.site_id, None)
            return visit
        now = self.clock()
        wait = evolve(wait, errors=wait.errors + 1, polls=wait.polls + 1)
        pause_s = max(self.policy.pause_s(wait.errors), failure.retry_after_s or 0.0)
        if failure.unreachable or failure.retry_after_s is not None:
            count = self._resting.get(wait.site_id, (now, 0))[1] + 1
            rest_s = max(min(self.policy.pause_s(count), _LONGEST_REST_S), failure.retry_after_s or 0.0)
            self._resting[wait.site_id] = now + timedelta(seconds=rest_s), count
        # Not each time: it may stay so for days.
        is_milestone = not wait.errors & (wait.errors - 1)
        write = self._log.warn if is_milestone else self._log.debug
        write(
            "job {job}: site {site} does not say where its files are: {code}: {message}",
            job=wait.job_id,
            site=wait.site_id,
            code=failure.code,
            message=failure.message,
        )
        return WaitVisit(
            wait=wait, due_at=now + timedelta(seconds=pause_s), message=f"{failure.code}: {failure.message}"
        )

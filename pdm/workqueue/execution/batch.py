"""Runs one batch on one agent: turns its events into logs, progress and exactly one verdict per element."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from pdm.workqueue.agents.process import AgentProcess, BatchListener
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch, ClaimToken
from pdm.workqueue.domain.pacing import ROUTE_FAILURES, BatchRun
from pdm.workqueue.domain.planning import BadListingError
from pdm.workqueue.execution.attempts import AttemptContext, Instant, RunningAttempt
from pdm.workqueue.execution.endpoint_health import SiteEndpoint, sites_of_element
from pdm.workqueue.execution.listing import ClaimLostError, ListingIntake, bad_listing
from pdm.workqueue.execution.progress_board import ReportedProgress
from pdm.workqueue.execution.service_health import ServicePart, is_exhausted
from pdm.workqueue.execution.transfer_services import TransferServices
from pdm.workqueue.movers.mover import Mover
from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.wire.agent_events import (
    AgentEvent,
    BegunEvent,
    CancelledEvent,
    DoneEvent,
    EntriesEvent,
    FailedEvent,
    Fault,
    FinishedEvent,
    HandOverEvent,
    LogEvent,
    ProgressEvent,
    ReadyEvent,
    RootEvent,
    StartedEvent,
    UnnamedEvent,
    UnreadableEvent,
)
from pdm.workqueue.wire.agent_requests import WorkRequest

#: Seconds that a responding agent may take to remove temporary files after a cancellation; it may have to log in.
_CLEAN_UP_S = 4.0
#: Added to the silence allowed: agents enforce their own timeouts, and may try a new connection after ten seconds of
#: it; this catches one that does not.
_SILENCE_SLACK_S = 15.0


class Ending(enum.StrEnum):
    """Why a batch is ended early."""

    CANCELLED = "the job was cancelled"
    STOPPED = "the service stopped"
    LOST = "the lease was lost"
    LAPSED = "the lease was not renewed in time"
    DRAINED = "the node is drained, and its deadline is over"
    CREDENTIAL = "the credential that it used was removed or replaced"
    GIVEN_BACK = "it had not begun here, and may begin sooner elsewhere"
    HELD = "a job is held"


#: With these, transfers of another service end as well.
_FOR_GOOD = frozenset({Ending.CANCELLED, Ending.CREDENTIAL})
#: Log text of elements whose agent was ended because of another job.
_ENDED_WITH_ANOTHER = "another job's cancellation ended the helper"
#: Log text of elements that did not fit into the request.
_POSTPONED = "the batch was full"


@define(eq=False, kw_only=True)
class RunningBatch:
    """A claimed batch until each of its elements has a verdict.

    It may be queued on an agent that still runs another batch: until then none of it has begun, and silence of the
    agent is ignored.

    Attributes:
        service: URL of the FTS3 that transfers its files; None for none.
        services: learns whether that answers.
        finished: fires when every element has a verdict and the agent is free or dead.
        wake_waiting: makes waiting batches look again for an agent, after this one has released or lost its own.
        seconds: duration on the agent, once it has ended.
        moved: bytes transferred over the network.
        attempts: number of attempts that ended and count.
        failed: how many of them with `ROUTE_FAILURES`.
        is_listed: whether a listing is complete and only needs to be stored: the agent is free, or will be at once.
        is_followed: whether the only file of a listing has begun already.
    """

    batch: Batch
    mover: Mover
    context: AttemptContext
    service: str | None = None
    services: TransferServices | None = None
    finished: Deferred[None] = field(factory=Deferred)
    wake_waiting: Callable[[], None] = lambda: None
    seconds: float = 0.0
    elements: int = 0
    moved: int = 0
    attempts: int = 0
    failed: int = 0
    ending: Ending | None = None
    #: By key: the index in the batch.
    _open: dict[int, RunningAttempt] = field(factory=dict)
    _agent: AgentProcess | None = None
    _listener: BatchListener | None = None
    _request_id: int = 0
    #: Site → endpoint that it uses.
    _endpoints: Mapping[int, SiteEndpoint] = MappingProxyType({})
    #: Whether an element is done that `SiteHealth` was not notified of.
    _has_worked: bool = False
    _intake: ListingIntake | None = None
    #: Keys of elements of cancelled jobs, while other jobs of the batch continue.
    _cancelled: set[int] = field(factory=set)
    #: Keys of elements that were withdrawn before they had begun, and why: the helper gives them back unless they have
    #: begun since.
    _withdrawn: dict[int, Ending] = field(factory=dict)
    _killer: IDelayedCall | None = None
    _is_responding: bool = False
    _was_killed: bool = False
    _watchdog: IDelayedCall | None = None
    _silence_s: float = 0.0
    _turn_at: float | None = None
    _heard_at: float = 0.0
    is_listed: bool = False
    is_followed: bool = False
    _agent_free: bool = False
    _log: Logger = field(factory=Logger)

    def __attrs_post_init__(self) -> None:
        self._open = {
            key: RunningAttempt(self.batch.job_of(element), element, self.context)
            for key, element in enumerate(self.batch.elements)
        }

    # -- called by the executor

    def run(
        self,
        agent: AgentProcess,
        request: WorkRequest,
        intake: ListingIntake | None,
        endpoints: Mapping[int, SiteEndpoint] = MappingProxyType({}),
    ) -> None:
        """Send the request to an agent, with the endpoint that it uses at each site; `finished` fires at the end."""
        self._endpoints = endpoints
        self._agent = agent
        for attempt in self._open.values():
            attempt.pid = agent.pid
        self._request_id = request.id
        self._intake = intake
        largest = self.batch.largest_size
        # Computing the checksum of a file may be silent.
        self._silence_s = request.limits.stall_s + largest / request.limits.least_rate + _SILENCE_SLACK_S
        self._listener = BatchListener(self._events, self._free, self._turn)
        agent.submit(request, self._listener)
        if not self._agent_free:
            if self.ending is not None:
                self._request_end()
            elif self._cancelled:
                self._request_cancel()

    def end(self, why: Ending) -> None:
        """End it early: cancel the request, and kill the agent if it does not react."""
        if self.ending is None:
            self.ending = why
            if self._agent is not None:
                self._request_end()
            else:
                self.wake_waiting()

    def cancel(self, job_id: int, numbers: Collection[int] | None = None) -> bool:
        """Cancel the elements of one job, or some of them; the others continue. Returns whether there are any."""
        keys = {
            key
            for key, attempt in self._open.items()
            if attempt.record.job_id == job_id and (numbers is None or attempt.record.id in numbers)
        }
        if keys == self._open.keys() and not self._cancelled:
            if keys:
                self.end(Ending.CANCELLED)
        elif keys - self._cancelled:
            self._cancelled |= keys
            if self._agent is not None:
                self._request_cancel()
        return bool(keys)

    def withdraw(self, job_id: int) -> None:
        """Return what has not begun of a job that is held; what runs goes on, and what an FTS3 was given."""
        if self._agent is None:
            self.end(Ending.HELD)
        else:
            waiting = self.not_begun()
            self.give_back([key for key in waiting if self._open[key].record.job_id == job_id], Ending.HELD)

    def not_begun(self) -> list[int]:
        """Keys of elements that its helper has not begun and can give back, in the order in which it begins them."""
        if self.ending is not None or self.service is not None or self._agent is None or self._agent_free:
            return []
        gone = self._cancelled | self._withdrawn.keys()
        return [key for key, each in self._open.items() if each.began is None and key not in gone]

    def give_back(self, keys: Sequence[int], why: Ending = Ending.GIVEN_BACK) -> None:
        """Return some elements that its helper has not begun to the queue, unless it begins them meanwhile."""
        if keys and self._agent is not None:
            self._withdrawn.update(dict.fromkeys(keys, why))
            self._agent.withdraw(self._request_id, keys)

    def pace(self, now: float) -> tuple[int, float]:
        """How many elements its helper has begun, and in how many seconds; ``now`` is of the reactor."""
        waiting = sum(1 for each in self._open.values() if each.began is None)
        seconds = 0.0 if self._turn_at is None else now - self._turn_at
        return len(self.batch.elements) - waiting, seconds

    def attempts_open(self) -> Iterator[ClaimToken]:
        """Attempts without a verdict."""
        return (self.batch.token(attempt.record) for attempt in self._open.values())

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it was ended or given back early."""
        return self.ending is None and not self._withdrawn

    @property
    def run_so_far(self) -> BatchRun:
        """Figures for the adaptive limits of its route."""
        return BatchRun(self.seconds, self.elements, self.moved, self.attempts, self.failed)

    def is_wanted(self) -> bool:
        return self.ending is None

    def refuse(self, failure: AttemptFailure) -> None:
        """Fail all elements: the batch cannot be run."""
        now = self.context.now()
        for key in list(self._open):
            if key in self._cancelled:
                self._end_element(key, now, leftover=False)
            else:
                self._fail(key, failure, now)
        self._agent_free = True
        self._check_finished()

    def exclude(self, refused: Mapping[int, AttemptFailure], postponed: Collection[int]) -> None:
        """Before the start: fail elements that can never succeed, and return postponed ones to the queue."""
        now = self.context.now()
        for key, failure in refused.items():
            if self.ending is not None or key in self._cancelled:
                self._end_element(key, now, leftover=False)
            else:
                self._fail(key, failure, now)
        for key in postponed:
            self._end_element(key, now, leftover=False, why=_POSTPONED)

    def drop(self) -> None:
        """Return all elements to the queue: nothing was begun."""
        now = self.context.now()
        for key in list(self._open):
            self._end_element(key, now, leftover=False)
        self._agent_free = True
        self._check_finished()

    # -- ending early

    def _request_end(self) -> None:
        if not self._agent_free and self._agent is not None:
            # What was handed over to an FTS3 is for the next attempts, which the next daemon may begin.
            self._agent.cancel(self._request_id, keep=self.ending not in _FOR_GOOD)
            self._start_kill_timer()

    def _request_cancel(self) -> None:
        if not self._agent_free and self._agent is not None:
            self._agent.cancel(self._request_id, sorted(self._cancelled & self._open.keys()))
            self._start_kill_timer()

    def _start_kill_timer(self) -> None:
        if self._killer is not None and self._killer.active():
            self._killer.cancel()
        self._is_responding = False
        self._killer = self.context.reactor.callLater(self.context.cancel_grace_s, self._cancel_timed_out)

    def _cancel_timed_out(self) -> None:
        if self._agent is not None and (self.ending is not None or self._cancelled & self._open.keys()):
            self._was_killed = True
            self._agent.kill("it did not react to a cancellation")

    # -- silence

    def _turn(self) -> None:
        """The agent has finished the request before this one."""
        self._turn_at = self._heard_at = self.context.reactor.seconds()
        self._watchdog = self.context.reactor.callLater(self._silence_s, self._check_silence)

    def _check_silence(self) -> None:
        now = self.context.reactor.seconds()
        if self._intake is not None and self._intake.is_paused:
            # We have paused reading, so the agent is not silent.
            self._heard_at = now
        left = self._heard_at + self._silence_s - now
        if left > 0:
            self._watchdog = self.context.reactor.callLater(left, self._check_silence)
        elif self._agent is not None:
            self._agent.kill(f"it was silent for {self._silence_s:g} s")

    # -- events

    def _events(self, events: Sequence[AgentEvent]) -> None:
        self._heard_at = self.context.reactor.seconds()
        now = self.context.now()
        for event in events:
            if isinstance(event, (FinishedEvent, ReadyEvent)):
                self._note_worked(now)
                self._free(None)
                continue
            key = event.key
            if self._killer is not None and (self.ending is not None or key in self._cancelled):
                self._note_response(self._killer)
            attempt = self._open.get(key)
            if attempt is None:
                self._log.warn("an agent sent an event for {key}, which is not open: {event!r}", key=key, event=event)
            else:
                _HANDLERS[type(event)](self, attempt, event, now)
        self._note_worked(now)
        self._check_finished()

    def _note_response(self, killer: IDelayedCall) -> None:
        if not self._is_responding:
            self._is_responding = True
            if killer.active():
                killer.reset(_CLEAN_UP_S)

    def _on_begun(self, attempt: RunningAttempt, event: BegunEvent, now: Instant) -> None:
        attempt.begin(now)
        start_background("store the initial state", self._note_begun(event.key, event))

    def _on_done(self, attempt: RunningAttempt, event: DoneEvent, now: Instant) -> None:
        if self._intake is not None:
            self.is_listed = True
            start_background("end a listing", self._listing_done(event.key, self._intake, event.free))
        else:
            self._done(event.key, event, now)

    def _on_unreadable(self, attempt: RunningAttempt, event: UnreadableEvent, now: Instant) -> None:
        failure = self._classified(attempt, event.fault, now)
        attempt.write(f"cannot list {event.path}: {failure.code}: {failure.message}", now)
        self._require_intake().unreadable(event, failure)

    def _on_failed(self, attempt: RunningAttempt, event: FailedEvent, now: Instant) -> None:
        if event.fault.scope == "service" and is_exhausted(event.fault.errno):
            self.context.service_health.report(ServicePart.HELPERS, event.fault.message)
        self._fail(event.key, self._classified(attempt, event.fault, now), now, leftover=event.leftover)

    async def _note_begun(self, key: int, event: BegunEvent) -> None:
        """Store the state that an agent has found, then let it proceed; cancel it if the state cannot be stored."""
        kept = False
        try:
            kept = await self.context.settler.note_begun(self.batch.token(self.batch.elements[key]), event.found)
        finally:
            if self._agent is not None and key in self._open:
                if kept:
                    self._agent.proceed(self._request_id, key)
                else:
                    self._agent.cancel(self._request_id, [key])

    async def _note_handed(self, event: HandOverEvent) -> None:
        """Store to which job elements are handed over, then let the agent proceed; cancel them if that fails."""
        kept = False
        try:
            tokens = [self.batch.token(self.batch.elements[key]) for key in event.keys]
            kept = await self.context.settler.note_handed(tokens, event.job)
        finally:
            if self._agent is not None:
                if kept:
                    self._agent.proceed(self._request_id, event.key)
                else:
                    self._agent.cancel(self._request_id, event.keys)

    def _on_handed(self, event: HandOverEvent) -> None:
        self._note_answered()
        start_background("store a hand-over", self._note_handed(event))

    def _note_answered(self) -> None:
        if self.service is not None and self.services is not None:
            self.services.worked(self.service)

    def _classified(self, attempt: RunningAttempt, fault: Fault, now: Instant) -> AttemptFailure:
        """The failure that a fault means; the original message goes to the log if it is replaced."""
        failure = self.mover.classify(fault)
        if not fault.message.startswith(failure.message):
            attempt.write(f"the server or its library said: {fault.message}", now)
        return failure

    def _require_intake(self) -> ListingIntake:
        if self._intake is None:
            raise ValueError("entries of a batch that lists nothing")
        return self._intake

    async def _listing_done(self, key: int, intake: ListingIntake, free: int | None) -> None:
        try:
            outcome = await intake.finish(free)
        except BadListingError as error:
            self._fail(key, bad_listing(error), self.context.now())
        except ClaimLostError:
            self._end_element(key, self.context.now(), leftover=False)
        except Exception as error:
            if not isinstance(error, DatabaseUnavailableError):
                self._log.failure("the listing of job {job} could not be stored", job=self.batch.job.id)
            self._fail(key, self.context.service_health.blame(error, ServicePart.DATABASE), self.context.now())
        else:
            now = self.context.now()
            self._open[key].write(f"listed entries={outcome.entries} skipped={intake.skipped}", now)
            if outcome.failure is not None:
                self._fail(key, outcome.failure, now)
            else:
                self._done(key, DoneEvent(id=0, key=key), now)
                self._note_worked(now)
        finally:
            self.is_listed = False
            self._check_finished()

    # -- the agent is free, or dead

    def _free(self, why: str | None) -> None:
        if self._agent_free:
            return
        self._agent_free = True
        if self._turn_at is not None:
            self.seconds = self.context.reactor.seconds() - self._turn_at
        if self._agent is not None:
            self._agent.detach(self._request_id)
        for timer in (self._killer, self._watchdog):
            if timer is not None and timer.active():
                timer.cancel()
        if not self.is_listed:
            now = self.context.now()
            for key in list(self._open):
                self._unreported(key, why or "the helper ended the batch without a result for this element", now)
        self._check_finished()

    def _unreported(self, key: int, why: str, now: Instant) -> None:
        attempt = self._open[key]
        if self._agent is not None and self._agent.lease_over and self.ending is None:
            # The agent stopped because of the lease, not because of the element.
            self.ending = Ending.LAPSED
        # A transfer may have left a temporary file, even if the agent had no time to report its begin.
        leftover = self._turn_at is not None and self.batch.type is JobType.COPY
        if self.ending is not None or key in self._cancelled or self._was_killed:
            self._end_element(key, now, leftover=leftover)
            return
        # A single element is to blame even if its begin was not reported: otherwise one that kills agents at once would
        # be retried for ever.
        counts = attempt.began is not None or (self._turn_at is not None and len(self.batch.elements) == 1)
        self._fail(
            key, AttemptFailure(FailureScope.SERVICE, FailureCode.CRASHED, why), now, leftover=leftover, counts=counts
        )

    def _check_finished(self) -> None:
        if self._open:
            if self._listener is not None and not self._listener.nearly_done and self._intake is None:
                self._listener.nearly_done = 2 * len(self._open) <= len(self.batch.elements)
                if self._listener.nearly_done:
                    self.wake_waiting()
        elif self._agent_free and not self.is_listed and not self.finished.called:
            self.finished.callback(None)

    # -- verdicts

    def _done(self, key: int, event: DoneEvent, now: Instant) -> None:
        listed = self.batch.listed_size(self._open[key].record)
        if self.batch.type is JobType.COPY and listed not in (None, event.size):
            # The size that the agent proved and the listed one must agree; otherwise the result is not trusted.
            message = f"listed with {listed} bytes, proven with {event.size}"
            self._fail(key, AttemptFailure(FailureScope.SOURCE, FailureCode.SIZE_CHANGED, message), now)
            return
        proof = f" checksum={event.checksum}" if event.checksum else ""
        self.elements += 1
        self.moved += event.transferred
        self.attempts += 1
        self._has_worked = True
        self._open.pop(key).end(
            JobStatus.DONE,
            f" (already there){proof}" if event.already_there else proof,
            now,
            transferred=event.size,
            moved=event.transferred,
            checksum=event.checksum,
            already_there=event.already_there,
            skipped=self._skipped,
            not_preserved=",".join(event.not_preserved) or None,
            is_followed=self.is_followed,
        )

    def _note_worked(self, now: Instant) -> None:
        """Notify the endpoint health of finished elements."""
        if self._has_worked:
            self._has_worked = False
            self._note_answered()
            # The elements of a batch use the same sites.
            sites = sites_of_element(self.batch.job, self.batch.elements[0])
            worked = [self._endpoints[site] for site in sites if site in self._endpoints]
            self.context.health.worked(worked, now.utc)

    @property
    def _skipped(self) -> int:
        return 0 if self._intake is None else self._intake.skipped

    def _fail(
        self, key: int, failure: AttemptFailure, now: Instant, *, leftover: bool = False, counts: bool = True
    ) -> None:
        # Keep the order of the events.
        self._note_worked(now)
        if counts:
            self.attempts += 1
            self.failed += failure.code in ROUTE_FAILURES
        excused = False
        if self.service is not None and self.services is not None:
            excused = self.services.failed(self.service, failure)
        self._open.pop(key).fail(
            failure,
            now,
            self._endpoints,
            leftover=leftover,
            counts=counts,
            skipped=self._skipped,
            excused=excused,
        )

    def _end_element(self, key: int, now: Instant, *, leftover: bool, why: str = _ENDED_WITH_ANOTHER) -> None:
        attempt = self._open.pop(key)
        if self.ending is Ending.LOST:
            attempt.forget(Ending.LOST)
        elif self.ending is Ending.CANCELLED or key in self._cancelled:
            attempt.end(JobStatus.CANCELLED, f" {Ending.CANCELLED}", now, leftover=leftover, skipped=self._skipped)
        else:
            withdrawn = self._withdrawn.get(key) if attempt.began is None else None
            words = self.ending or withdrawn or why
            attempt.end(JobStatus.SUBMITTED, f" {words}", now, leftover=leftover, counts=False)


_HANDLERS: Mapping[type, Callable[[RunningBatch, RunningAttempt, Any, Instant], object]] = {
    StartedEvent: lambda batch, attempt, event, now: attempt.begin(now),
    BegunEvent: RunningBatch._on_begun,
    HandOverEvent: lambda batch, attempt, event, now: batch._on_handed(event),
    LogEvent: lambda batch, attempt, event, now: attempt.write(event.text, now),
    ProgressEvent: lambda batch, attempt, event, now: attempt.advance(
        ReportedProgress(event.transferred, event.instant, event.average, event.elapsed), now
    ),
    RootEvent: lambda batch, attempt, event, now: batch._require_intake().locate(event),
    EntriesEvent: lambda batch, attempt, event, now: batch._require_intake().feed(event),
    UnreadableEvent: RunningBatch._on_unreadable,
    UnnamedEvent: lambda batch, attempt, event, now: batch._require_intake().unnamed(event),
    DoneEvent: RunningBatch._on_done,
    FailedEvent: RunningBatch._on_failed,
    CancelledEvent: lambda batch, attempt, event, now: batch._end_element(event.key, now, leftover=event.leftover),
}

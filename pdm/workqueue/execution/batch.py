"""Runs one batch on one agent: turns its events into logs, progress and exactly one verdict per element."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from pdm.workqueue.agents.process import AgentProcess, BatchListener
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.domain.planning import BadListingError
from pdm.workqueue.execution.agent_watch import AgentWatch
from pdm.workqueue.execution.attempts import AttemptContext, Instant, RunningAttempt
from pdm.workqueue.execution.batch_verdicts import BatchVerdicts, Ending
from pdm.workqueue.execution.endpoint_health import SiteEndpoint
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

#: Added to the silence allowed: agents enforce their own timeouts, and may try a new connection after ten seconds of
#: it; this catches one that does not.
_SILENCE_SLACK_S = 15.0


#: With these, transfers of another service end as well.
_FOR_GOOD = frozenset({Ending.CANCELLED, Ending.CREDENTIAL})


@define(eq=False, kw_only=True)
class RunningBatch:
    """A claimed batch until each of its elements has a verdict.

    It may be queued on an agent that still runs another batch: until then none of it has begun, and silence of the
    agent is ignored.

    Attributes:
        service: URL of the FTS3 that transfers its files; None for none.
        services: as in `BatchVerdicts`.
        finished: fires when every element has a verdict and the agent is free or dead.
        wake_waiting: makes waiting batches look again for an agent, after this one has released or lost its own.
        seconds: duration on the agent, once it has ended.
        verdicts: of its elements.
        is_listed: whether a listing is complete and only needs to be stored: the agent is free, or will be at once.
    """

    batch: Batch
    mover: Mover
    context: AttemptContext
    service: str | None = None
    services: TransferServices | None = None
    finished: Deferred[None] = field(factory=Deferred)
    wake_waiting: Callable[[], None] = lambda: None
    seconds: float = 0.0
    verdicts: BatchVerdicts = field(init=False)
    _agent: AgentProcess | None = None
    _listener: BatchListener | None = None
    _request_id: int = 0
    _intake: ListingIntake | None = None
    _watch: AgentWatch | None = None
    is_listed: bool = False
    _agent_free: bool = False
    _log: Logger = field(factory=Logger)

    def __attrs_post_init__(self) -> None:
        self.verdicts = BatchVerdicts(
            batch=self.batch,
            context=self.context,
            service=self.service,
            services=self.services,
            skipped=lambda: 0 if self._intake is None else self._intake.skipped,
        )

    @property
    def ending(self) -> Ending | None:
        """Why it is ended early."""
        return self.verdicts.ending

    # -- called by the executor

    def run(
        self,
        agent: AgentProcess,
        request: WorkRequest,
        intake: ListingIntake | None,
        endpoints: Mapping[int, SiteEndpoint] = MappingProxyType({}),
    ) -> None:
        """Send the request to an agent, with the endpoint that it uses at each site; `finished` fires at the end."""
        self.verdicts.endpoints = endpoints
        self._agent = agent
        for attempt in self.verdicts.open.values():
            attempt.pid = agent.pid
        self._request_id = request.id
        self._intake = intake
        largest = self.batch.largest_size
        self._watch = AgentWatch(
            reactor=self.context.reactor,
            agent=agent,
            # Computing the checksum of a file may be silent.
            silence_s=request.limits.stall_s + largest / request.limits.least_rate + _SILENCE_SLACK_S,
            cancel_grace_s=self.context.cancel_grace_s,
            is_paused=lambda: intake is not None and intake.is_paused,
            is_cancelled=lambda: self.ending is not None or not self.verdicts.cancelled.isdisjoint(self.verdicts.open),
        )
        self._listener = BatchListener(self._events, self._free, self._watch.begin)
        agent.submit(request, self._listener)
        if not self._agent_free:
            if self.ending is not None:
                self._request_end()
            elif self.verdicts.cancelled:
                self._request_cancel()

    def end(self, why: Ending) -> None:
        """End it early: cancel the request, and kill the agent if it does not react."""
        if self.ending is None:
            self.verdicts.ending = why
            if self._agent is not None:
                self._request_end()
            else:
                self.wake_waiting()

    def cancel(self, job_id: int, numbers: Collection[int] | None = None) -> bool:
        """Cancel the elements of one job, or some of them; the others continue. Returns whether there are any."""
        keys = {
            key
            for key, attempt in self.verdicts.open.items()
            if attempt.record.job_id == job_id and (numbers is None or attempt.record.id in numbers)
        }
        if keys == self.verdicts.open.keys() and not self.verdicts.cancelled:
            if keys:
                self.end(Ending.CANCELLED)
        elif keys - self.verdicts.cancelled:
            self.verdicts.cancelled |= keys
            if self._agent is not None:
                self._request_cancel()
        return bool(keys)

    def withdraw(self, job_id: int) -> None:
        """Return what has not begun of a job that is held; what runs continues, and what an FTS3 was given."""
        if self._agent is None:
            self.end(Ending.HELD)
        else:
            attempts, waiting = self.verdicts.open, self.not_begun()
            self.return_elements([key for key in waiting if attempts[key].record.job_id == job_id], Ending.HELD)

    def not_begun(self) -> list[int]:
        """Keys of elements that its helper has not begun and can give back, in the order in which it begins them."""
        if self.ending is not None or self.service is not None or self._agent is None or self._agent_free:
            return []
        gone = self.verdicts.cancelled | self.verdicts.withdrawn.keys()
        return [key for key, each in self.verdicts.open.items() if each.began is None and key not in gone]

    def return_elements(self, keys: Sequence[int], why: Ending = Ending.GIVEN_BACK) -> None:
        """Return some elements that its helper has not begun to the queue, unless it begins them meanwhile."""
        if keys and self._agent is not None:
            self.verdicts.withdrawn.update(dict.fromkeys(keys, why))
            self._agent.withdraw(self._request_id, keys)

    def pace(self) -> tuple[int, float]:
        """How many elements its helper has begun, and in how many seconds."""
        waiting = sum(1 for each in self.verdicts.open.values() if each.began is None)
        return len(self.batch.elements) - waiting, 0.0 if self._watch is None else self._watch.seconds

    def is_wanted(self) -> bool:
        return self.ending is None

    def refuse(self, failure: AttemptFailure) -> None:
        """Fail all elements: the batch cannot be run."""
        self.verdicts.refuse(failure)
        self._agent_free = True
        self._check_finished()

    def drop(self) -> None:
        """Return all elements to the queue: nothing was begun."""
        self.verdicts.drop()
        self._agent_free = True
        self._check_finished()

    # -- ending early

    def _request_end(self) -> None:
        if not self._agent_free and self._agent is not None and self._watch is not None:
            # What was handed over to an FTS3 is for the next attempts, which the next daemon may begin.
            self._agent.cancel(self._request_id, keep=self.ending not in _FOR_GOOD)
            self._watch.await_end()

    def _request_cancel(self) -> None:
        if not self._agent_free and self._agent is not None and self._watch is not None:
            self._agent.cancel(self._request_id, sorted(self.verdicts.cancelled & self.verdicts.open.keys()))
            self._watch.await_end()

    # -- events

    def _events(self, events: Sequence[AgentEvent]) -> None:
        now = self.context.now()
        if self._watch is not None:
            self._watch.heard()
        for event in events:
            if isinstance(event, (FinishedEvent, ReadyEvent)):
                self.verdicts.note_worked(now)
                self._free(None)
                continue
            key = event.key
            if self._watch is not None and (self.ending is not None or key in self.verdicts.cancelled):
                self._watch.responded()
            attempt = self.verdicts.open.get(key)
            if attempt is None:
                self._log.warn("an agent sent an event for {key}, which is not open: {event!r}", key=key, event=event)
            else:
                _HANDLERS[type(event)](self, attempt, event, now)
        self.verdicts.note_worked(now)
        self._check_finished()

    def _on_begun(self, attempt: RunningAttempt, event: BegunEvent, now: Instant) -> None:
        attempt.begin(now)
        stored = self.context.settler.note_begun(self.batch.token(self.batch.elements[event.key]), event.found)
        start_background("store the initial state", self._proceed_once(event.key, [event.key], stored))

    def _on_handed(self, attempt: RunningAttempt, event: HandOverEvent, now: Instant) -> None:
        self.verdicts.note_answered()
        tokens = [self.batch.token(self.batch.elements[key]) for key in event.keys]
        stored = self.context.settler.note_handed(tokens, event.job)
        start_background("store a hand-over", self._proceed_once(event.key, event.keys, stored))

    def _on_done(self, attempt: RunningAttempt, event: DoneEvent, now: Instant) -> None:
        if self._intake is not None:
            self.is_listed = True
            start_background("end a listing", self._listing_done(event.key, self._intake, event.free))
        else:
            self.verdicts.done(event.key, event, now)

    def _on_unreadable(self, attempt: RunningAttempt, event: UnreadableEvent, now: Instant) -> None:
        failure = self._classified(attempt, event.fault, now)
        attempt.write(f"cannot list {event.path}: {failure.code}: {failure.message}", now)
        self._require_intake().unreadable(event, failure)

    def _on_failed(self, attempt: RunningAttempt, event: FailedEvent, now: Instant) -> None:
        if event.fault.scope == "service" and is_exhausted(event.fault.errno):
            self.context.service_health.report(ServicePart.HELPERS, event.fault.message)
        self.verdicts.fail(event.key, self._classified(attempt, event.fault, now), now, leftover=event.leftover)

    async def _proceed_once(self, key: int, keys: Sequence[int], stored: Awaitable[bool]) -> None:
        """Let the agent proceed with ``key`` once its event is stored; cancel ``keys`` if that fails."""
        is_stored = False
        try:
            is_stored = await stored
        finally:
            if self._agent is not None and not self.verdicts.open.keys().isdisjoint(keys):
                if is_stored:
                    self._agent.proceed(self._request_id, key)
                else:
                    self._agent.cancel(self._request_id, keys)

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
            self.verdicts.fail(key, bad_listing(error), self.context.now())
        except ClaimLostError:
            self.verdicts.end(key, self.context.now(), leftover=False)
        except Exception as error:
            if not isinstance(error, DatabaseUnavailableError):
                self._log.failure("the listing of job {job} could not be stored", job=self.batch.job.id)
            self.verdicts.fail(key, self.context.service_health.blame(error, ServicePart.DATABASE), self.context.now())
        else:
            now = self.context.now()
            self.verdicts.open[key].write(f"listed entries={outcome.entries} skipped={intake.skipped}", now)
            if outcome.failure is not None:
                self.verdicts.fail(key, outcome.failure, now)
            else:
                self.verdicts.done(key, DoneEvent(id=0, key=key), now)
                self.verdicts.note_worked(now)
        finally:
            self.is_listed = False
            self._check_finished()

    # -- the agent is free, or dead

    def _free(self, why: str | None) -> None:
        if self._agent_free:
            return
        self._agent_free = True
        if self._agent is not None and self._watch is not None:
            self.seconds = self._watch.seconds
            self._agent.detach(self._request_id)
            self._watch.stop()
        if not self.is_listed:
            now = self.context.now()
            for key in list(self.verdicts.open):
                self._unreported(key, why or "the helper ended the batch without a result for this element", now)
        self._check_finished()

    def _unreported(self, key: int, why: str, now: Instant) -> None:
        attempt = self.verdicts.open[key]
        if self._agent is not None and self._agent.lease_over and self.ending is None:
            # The agent stopped because of the lease, not because of the element.
            self.verdicts.ending = Ending.LAPSED
        # A transfer may have left a temporary file, even if the agent had no time to report its begin.
        had_turn = self._watch is not None and self._watch.began_at is not None
        leftover = had_turn and self.batch.type is JobType.COPY
        if (
            self.ending is not None
            or key in self.verdicts.cancelled
            or (self._watch is not None and self._watch.has_killed)
        ):
            self.verdicts.end(key, now, leftover=leftover)
            return
        # A single element is to blame even if its begin was not reported: otherwise one that kills agents at once would
        # be retried for ever.
        counts = attempt.began is not None or (had_turn and len(self.batch.elements) == 1)
        self.verdicts.fail(
            key, AttemptFailure(FailureScope.SERVICE, FailureCode.CRASHED, why), now, leftover=leftover, counts=counts
        )

    def _check_finished(self) -> None:
        if self.verdicts.open:
            if self._listener is not None and not self._listener.nearly_done and self._intake is None:
                self._listener.nearly_done = 2 * len(self.verdicts.open) <= len(self.batch.elements)
                if self._listener.nearly_done:
                    self.wake_waiting()
        elif self._agent_free and not self.is_listed and not self.finished.called:
            self.finished.callback(None)


_HANDLERS: Mapping[type, Callable[[RunningBatch, RunningAttempt, Any, Instant], object]] = {
    StartedEvent: lambda batch, attempt, event, now: attempt.begin(now),
    BegunEvent: RunningBatch._on_begun,
    HandOverEvent: RunningBatch._on_handed,
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
    CancelledEvent: lambda batch, attempt, event, now: batch.verdicts.end(event.key, now, leftover=event.leftover),
}

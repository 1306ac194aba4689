"""One batch on one agent: its events become logs, progress and verdicts, exactly one verdict an element."""

from __future__ import annotations

import enum

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from pdm.workqueue.agents.process import AgentProcess
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.domain.planning import BadListingError
from pdm.workqueue.execution.attempt import AttemptTools, RunningAttempt
from pdm.workqueue.execution.listing import ClaimLostError, ListingIntake, bad_listing
from pdm.workqueue.execution.progress import Progress
from pdm.workqueue.movers.mover import Mover
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.wire import agent_messages as wire

#: Seconds that an agent which has shown that it obeys may take to remove unfinished files; it may have to log in.
_CLEAN_UP_S = 4.0
#: Added to what an agent may be silent for: it looks after its own time-outs, and this is for one that does not.
_SILENCE_SLACK_S = 5.0


class Ending(enum.StrEnum):
    """Why a batch is ended before its time."""

    CANCELLED = "the job was cancelled"
    STOPPED = "the service stopped"
    LOST = "the lease was lost"


#: Seconds that an agent which has shown that it obeys may take to remove unfinished files; it may have to log in.
_CLEAN_UP_S = 4.0
#: Added to what an agent may be silent for: it looks after its own time-outs, and this is for one that does not.
_SILENCE_SLACK_S = 5.0


@define(eq=False)
class RunningBatch:
    """A claimed batch until each of its elements has a verdict.

    Attributes:
        batch: what was claimed.
        finished: fires when every element has a verdict and the agent is free or gone.
    """

    batch: Batch
    mover: Mover
    tools: AttemptTools
    finished: Deferred[None] = field(factory=Deferred)
    _open: dict[int, RunningAttempt] = field(factory=dict)
    _agent: AgentProcess | None = None
    _request_id: int = 0
    _intake: ListingIntake | None = None
    _ending: Ending | None = None
    _killer: IDelayedCall | None = None
    _obeys: bool = False
    _watchdog: IDelayedCall | None = None
    _silence_s: float = 0.0
    _listing_awaited: bool = False
    _agent_free: bool = False
    _log: Logger = field(factory=Logger)

    def __attrs_post_init__(self) -> None:
        job = self.batch.job
        self._open = {element.id: RunningAttempt(job, element, self.tools) for element in self.batch.elements}

    # -- what its owner calls

    def run(self, agent: AgentProcess, request: wire.Work, intake: ListingIntake | None) -> None:
        """Hand the work to an agent; `finished` tells the rest."""
        self._agent = agent
        self._request_id = request.id
        self._intake = intake
        agent.on_event = self._event
        largest = max(element.size for element in self.batch.elements)
        # Reading all bytes of a file, for its checksum, may be silent work.
        self._silence_s = request.limits.stall_s + largest / request.limits.least_rate + _SILENCE_SLACK_S
        self._watchdog = self.tools.reactor.callLater(self._silence_s, self._silent)
        agent.on_end = self._free
        agent.send(request)
        if not agent.alive:
            self._free("the helper process ended before it was given the work")
        elif self._ending is not None:
            self._ask_to_end()

    def end(self, why: Ending) -> None:
        """End it early: ask the agent, and kill it if it does not answer soon."""
        if self._ending is None:
            self._ending = why
            if self._agent is not None:
                self._ask_to_end()

    @property
    def ending(self) -> Ending | None:
        return self._ending

    def refuse(self, failure: AttemptFailure) -> None:
        """Nothing of it can be carried out."""
        for key in list(self._open):
            self._fail(key, failure)
        self._agent_free = True
        self._check_finished()

    def drop(self) -> None:
        """Nothing of it was begun and it is to end."""
        for key in list(self._open):
            self._end_element(key, residue=False)
        self._agent_free = True
        self._check_finished()

    # -- ending early

    def _ask_to_end(self) -> None:
        if self._agent_free or self._agent is None:
            return
        agent = self._agent
        agent.send(wire.CancelRequest(self._request_id))
        self._killer = self.tools.reactor.callLater(
            self.tools.cancel_grace_s,
            agent.kill,
            "it did not obey",
        )

    def _silent(self) -> None:
        if self._intake is not None and self._intake.is_paused:
            # It is we who do not listen.
            self._watchdog = self.tools.reactor.callLater(self._silence_s, self._silent)
        elif self._agent is not None:
            self._agent.kill(f"it was silent for {self._silence_s:g} s")

    # -- events

    def _event(self, event: wire.Event) -> None:
        if self._watchdog is not None and self._watchdog.active():
            self._watchdog.reset(self._silence_s)
        if self._killer is not None and self._killer.active() and not self._obeys:
            self._obeys = True
            self._killer.reset(_CLEAN_UP_S)
        if isinstance(event, wire.Finished):
            self._free(None)
            return
        key = getattr(event, "key", None)
        if key not in self._open:
            self._log.warn("an agent spoke of element {key}, which is not open: {event!r}", key=key, event=event)
            return
        if isinstance(event, wire.Started):
            self._open[key].begin()
        elif isinstance(event, wire.Log):
            self._open[key].write(event.text)
        elif isinstance(event, wire.Progress):
            self._open[key].advance(Progress(event.transferred, event.instant, event.average, event.elapsed))
        elif isinstance(event, wire.Entries):
            self._require_intake().feed(event.entries)
        elif isinstance(event, wire.Unreadable):
            failure = self.mover.judge(event.fault)
            self._open[key].write(f"cannot list {event.path}: {failure.code}: {failure.message}")
            self._require_intake().unreadable(event.path, failure)
        elif isinstance(event, wire.Done):
            if self._intake is not None:
                self._listing_awaited = True
                start_background("end a listing", self._listing_done(key, self._intake))
            else:
                self._done(key, event)
        elif isinstance(event, wire.Failed):
            self._fail(key, self.mover.judge(event.fault), residue=event.residue)
        elif isinstance(event, wire.Cancelled):
            self._end_element(key, residue=event.residue)

    def _require_intake(self) -> ListingIntake:
        if self._intake is None:
            raise ValueError("entries of a batch that lists nothing")
        return self._intake

    async def _listing_done(self, key: int, intake: ListingIntake) -> None:
        try:
            outcome = await intake.finish()
        except BadListingError as error:
            self._fail(key, bad_listing(error))
        except ClaimLostError:
            self._end_element(key, residue=False)
        except Exception as error:
            self._log.failure("the listing of job {job} could not be kept", job=self.batch.job.id)
            self._fail(key, AttemptFailure(Scope.SERVICE, FailureCode.INTERNAL, f"the listing was not kept: {error}"))
        else:
            self._open[key].write(f"listed entries={outcome.entries} skipped={outcome.skipped}")
            if outcome.failure is not None:
                self._fail(key, outcome.failure, skipped=outcome.skipped)
            else:
                self._done(key, wire.Done(id=0, key=key), skipped=outcome.skipped)
        finally:
            self._listing_awaited = False
            self._check_finished()

    # -- the agent is free, or gone

    def _free(self, why: str | None) -> None:
        if self._agent_free:
            return
        self._agent_free = True
        for timer in (self._killer, self._watchdog):
            if timer is not None and timer.active():
                timer.cancel()
        if not self._listing_awaited:
            for key in list(self._open):
                self._unreported(key, why or "the helper ended the batch without a word about this element")
        self._check_finished()

    def _unreported(self, key: int, why: str) -> None:
        entry = self._open[key]
        # Its transfer may have left something behind: that is looked after before anything else happens there.
        residue = entry.started and self.batch.type is JobType.COPY
        if self._ending is not None:
            self._end_element(key, residue=residue)
        else:
            failure = AttemptFailure(Scope.SERVICE, FailureCode.CRASHED, why)
            self._fail(key, failure, residue=residue, counts=entry.started)

    def _check_finished(self) -> None:
        if self._agent_free and not self._open and not self._listing_awaited and not self.finished.called:
            self.finished.callback(None)

    # -- verdicts

    def _done(self, key: int, event: wire.Done, skipped: int = 0) -> None:
        listed = self._open[key].record.size
        if self.batch.type is JobType.COPY and event.size != listed:
            # The agent's proof and the listing must agree; an agent that says otherwise is not believed.
            message = f"listed with {listed} bytes, proven with {event.size}"
            self._fail(key, AttemptFailure(Scope.SOURCE, FailureCode.SIZE_CHANGED, message))
            return
        note = "" if event.transferred or not event.size else " (already there)"
        proof = f" checksum={event.checksum}" if event.checksum else ""
        self._open.pop(key).end(
            JobStatus.DONE,
            note + proof,
            transferred=event.size,
            moved=event.transferred,
            checksum=event.checksum,
            skipped=skipped,
        )
        self._check_finished()

    def _fail(
        self, key: int, failure: AttemptFailure, *, residue: bool = False, counts: bool = True, skipped: int = 0
    ) -> None:
        self._open.pop(key).fail(failure, residue=residue, counts=counts, skipped=skipped)
        self._check_finished()

    def _end_element(self, key: int, *, residue: bool) -> None:
        attempt = self._open.pop(key)
        if self._ending is Ending.LOST:
            attempt.forget(Ending.LOST)
        elif self._ending is Ending.CANCELLED:
            attempt.end(JobStatus.CANCELLED, f" {self._ending}", residue=residue)
        else:
            attempt.end(JobStatus.SUBMITTED, f" {self._ending}", residue=residue, counts=False)
        self._check_finished()

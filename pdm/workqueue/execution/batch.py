"""One batch on one agent: its events become logs, progress and verdicts, exactly one verdict an element."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from datetime import datetime

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from pdm.workqueue.agents.process import AgentProcess
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.domain.jobs import Batch, ElementRecord, Verdict
from pdm.workqueue.domain.planning import BadListingError
from pdm.workqueue.domain.retry import GiveUp, Hold, RetryAt, RetryPolicy, decide
from pdm.workqueue.execution.listing import ClaimLostError, ListingIntake, bad_listing
from pdm.workqueue.execution.progress import Progress, ProgressBoard
from pdm.workqueue.execution.settler import Settler
from pdm.workqueue.logstore.files import LogRef, LogStore
from pdm.workqueue.movers.mover import Mover
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.wire import agent_messages as wire


class Ending(enum.StrEnum):
    """Why a batch is ended before its time."""

    CANCELLED = "the job was cancelled"
    STOPPED = "the service stopped"
    LOST = "the lease was lost"


#: Seconds that an agent which has shown that it obeys may take to remove unfinished files; it may have to log in.
_CLEAN_UP_S = 4.0
#: Added to what an agent may be silent for: it looks after its own time-outs, and this is for one that does not.
_SILENCE_SLACK_S = 5.0


@frozen
class BatchTools:
    """What every batch uses.

    Attributes:
        cancel_grace_s: seconds an agent has to show that it obeys a cancellation before it is killed.
    """

    reactor: IReactorTime
    clock: Callable[[], datetime]
    host: str
    policy: RetryPolicy
    logs: LogStore
    board: ProgressBoard
    settler: Settler
    cancel_grace_s: float


@define
class _Open:
    """An element without a verdict."""

    record: ElementRecord
    began_at: datetime
    started: bool = False
    last_progress: Progress | None = None


@define(eq=False)
class RunningBatch:
    """A claimed batch until each of its elements has a verdict.

    Attributes:
        batch: what was claimed.
        finished: fires when every element has a verdict and the agent is free or gone.
    """

    batch: Batch
    mover: Mover
    tools: BatchTools
    finished: Deferred[None] = field(factory=Deferred)
    _open: dict[int, _Open] = field(factory=dict)
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
        now = self.tools.clock()
        self._open = {element.id: _Open(element, now) for element in self.batch.elements}

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
        agent.ended.addCallback(self._agent_ended)
        agent.send(request)
        if self._ending is not None:
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
            self._begin(key)
        elif isinstance(event, wire.Log):
            self._write(key, event.text)
        elif isinstance(event, wire.Progress):
            self._progress(key, event)
        elif isinstance(event, wire.Entries):
            self._require_intake().feed(event.entries)
        elif isinstance(event, wire.Unreadable):
            failure = self.mover.judge(event.fault)
            self._write(key, f"cannot list {event.path}: {failure.code}: {failure.message}")
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

    def _progress(self, key: int, event: wire.Progress) -> None:
        progress = Progress(event.transferred, event.instant, event.average, event.elapsed)
        self._open[key].last_progress = progress
        self.tools.board.update(self.batch.job.id, key, progress)
        self._write(
            key,
            f"progress bytes={event.transferred} instant={event.instant:.0f}B/s "
            f"average={event.average:.0f}B/s elapsed={event.elapsed:.1f}s",
        )

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
            self._write(key, f"listed entries={outcome.entries} skipped={outcome.skipped}")
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
        if self._agent is not None:
            self._agent.on_event = _ignore
        if not self._listing_awaited:
            for key in list(self._open):
                self._unreported(key, why or "the helper ended the batch without a word about this element")
        self._check_finished()

    def _agent_ended(self, sentence: str) -> str:
        self._free(sentence)
        return sentence

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
        entry = self._open[key]
        if self.batch.type is JobType.COPY and event.size != entry.record.size:
            # The agent's proof and the listing must agree; an agent that says otherwise is not believed.
            self._fail(
                key,
                AttemptFailure(
                    Scope.SOURCE,
                    FailureCode.SIZE_CHANGED,
                    f"listed with {entry.record.size} bytes, proven with {event.size}",
                ),
            )
            return
        note = "" if event.transferred or not event.size else " (already there)"
        self._settle(
            key,
            JobStatus.DONE,
            f"{note}{f' checksum={event.checksum}' if event.checksum else ''}",
            transferred=event.size,
            moved=event.transferred,
            checksum=event.checksum,
            skipped=skipped,
        )

    def _fail(
        self, key: int, failure: AttemptFailure, *, residue: bool = False, counts: bool = True, skipped: int = 0
    ) -> None:
        entry = self._open[key]
        tries = entry.record.attempts - entry.record.lost - (0 if counts else 1)
        decision: RetryAt | Hold | GiveUp = decide(
            self.tools.policy,
            failure,
            max(tries, 1),
            entry.record.max_tries + (0 if counts else 1),
            self.tools.clock(),
            random.random(),  # noqa: S311 - spreads retries, guards nothing
        )
        self._write(key, f"failed scope={failure.scope} code={failure.code} {failure.message}")
        self._log.info(
            "attempt failed: {scope} {code}: {message}; {decision}",
            job=entry.record.job_id,
            element=entry.record.id,
            attempt=entry.record.attempts,
            scope=failure.scope,
            code=failure.code,
            message=failure.message,
            decision=_DECISIONS[type(decision)],
        )
        if isinstance(decision, RetryAt):
            words = f" next_try={decision.not_before:%Y-%m-%dT%H:%M:%SZ}"
            self._settle(
                key,
                JobStatus.SUBMITTED,
                words,
                failure=failure,
                residue=residue,
                counts=counts,
                not_before=decision.not_before,
                skipped=skipped,
            )
        elif isinstance(decision, Hold):
            self._settle(key, JobStatus.HELD, "", failure=failure, residue=residue, counts=False, skipped=skipped)
        else:
            self._settle(key, JobStatus.FAILED, "", failure=failure, residue=residue, counts=counts, skipped=skipped)

    def _end_element(self, key: int, *, residue: bool) -> None:
        if self._ending is Ending.LOST:
            self._forget(key)
        elif self._ending is Ending.CANCELLED:
            self._settle(key, JobStatus.CANCELLED, f" {self._ending}", residue=residue)
        else:
            self._settle(key, JobStatus.SUBMITTED, f" {self._ending}", residue=residue, counts=False)

    def _forget(self, key: int) -> None:
        """Another daemon may hold it by now: close the log, write nothing else."""
        entry = self._open.pop(key)
        self.tools.board.drop(self.batch.job.id, key)
        if entry.started:
            self.tools.logs.close(self._ref(entry.record), f"outcome=LOST {Ending.LOST}")

    def _settle(
        self,
        key: int,
        status: JobStatus,
        words: str,
        *,
        transferred: int = 0,
        moved: int = 0,
        checksum: str | None = None,
        failure: AttemptFailure | None = None,
        residue: bool = False,
        counts: bool = True,
        not_before: datetime | None = None,
        skipped: int = 0,
    ) -> None:
        if not self._open[key].started:
            self._begin(key)
        entry = self._open.pop(key)
        record = entry.record
        self.tools.board.drop(record.job_id, key)
        now = self.tools.clock()
        seconds = (now - entry.began_at).total_seconds()
        outcome = status.name if failure is None else "FAILED"
        code = 0 if failure is None and status is JobStatus.DONE else 1
        closed = self.tools.logs.close(
            self._ref(record), f"outcome={outcome} rc={code} bytes={moved} seconds={seconds:.3f}{words}"
        )
        self.tools.settler.submit(
            Verdict(
                self.batch.token(record),
                status,
                entry.began_at,
                now,
                counts=counts,
                not_before=not_before,
                transferred=transferred,
                checksum=checksum,
                failure=failure,
                residue=residue,
                skipped=skipped,
            ),
            closed,
        )
        self._check_finished()

    # -- the log of an attempt

    def _begin(self, key: int) -> None:
        entry = self._open[key]
        if entry.started:
            return
        entry.started = True
        entry.began_at = self.tools.clock()
        record, job = entry.record, self.batch.job
        where = f"source={job.src_siteid}:{record.src_filepath}"
        if record.dst_filepath is not None:
            where += f" destination={job.dst_siteid}:{record.dst_filepath}"
        self.tools.logs.open(
            self._ref(record),
            f"host={self.tools.host} job={job.id} element={record.id} attempt={record.attempts} "
            f"type={record.type.name} protocol={job.protocol.name} {where}",
        )

    def _write(self, key: int, text: str) -> None:
        if key in self._open:
            self._begin(key)
            self.tools.logs.write(self._ref(self._open[key].record), text)

    def _ref(self, record: ElementRecord) -> LogRef:
        return LogRef(self.batch.job.log_uid, record.id, record.attempts)


_DECISIONS = {RetryAt: "it will be tried again", Hold: "it is held", GiveUp: "given up"}


def _ignore(event: wire.Event) -> None:
    """Events of a batch that is over mean nothing any more."""

"""Attempts at elements, and the settler that stores their verdicts.

An attempt is one try at one element: its log, its progress, its verdict. The settler writes verdicts to the database,
many in one transaction: all that have arrived during the previous one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ClaimToken, ElementRecord, JobRecord, Verdict
from pdm.workqueue.domain.lifecycle import MOST_UNCOUNTED, GiveUp, Hold, RetryAt, RetryPolicy, decide_retry
from pdm.workqueue.execution.adding_up import AddingUp
from pdm.workqueue.execution.attempt_counts import AttemptCounts
from pdm.workqueue.execution.endpoint_health import SiteEndpoint, SiteHealth
from pdm.workqueue.execution.progress_board import ProgressBoard, ReportedProgress
from pdm.workqueue.execution.service_health import ServiceHealth
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.store import LogStore
from pdm.workqueue.logstore.writer import ClosedLog
from pdm.workqueue.store import attempt_states, results
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseClosedError, DatabaseUnavailableError
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.telemetry.logging import log_ended

#: Verdicts per transaction at most; bounds how long the writer is busy.
_MOST_AT_ONCE = 1000
#: After a transaction of `_MANY` verdicts, the next one begins once there are `_ENOUGH`, or after so many seconds: a
#: transaction of ten costs as much as one of sixty. A few verdicts wait for nothing, but that of a listing for as long
#: for that of its only file, which has begun already: a job of one file has a transaction less.
_MANY, _ENOUGH, _GATHER_S = 8, 100, 0.05
_PAIR = 2
_PAUSE_AFTER_ERROR_S = 1.0


class Settler:
    """Keeps verdicts in memory until they are in the database.

    Args:
        worker: the incarnation that claimed the attempts.
        on_settled: called after each transaction; whether an attempt may have left a temporary file, and whether
            elements of the jobs wait.
    """

    _log = Logger()

    def __init__(
        self,
        *,
        reactor: IReactorTime,
        database: Database,
        worker: str,
        clock: Callable[[], datetime],
        on_settled: Callable[[bool, bool], None],
    ) -> None:
        self._reactor = reactor
        self._database = database
        self._worker = worker
        self._clock = clock
        self._on_settled = on_settled
        #: Of the attempts whose verdicts are in the database.
        self.counts = AttemptCounts()
        self._pending: list[Verdict] = []
        self._awaited = 0
        self._tokens: set[ClaimToken] = set()
        self._busy = False
        #: Fires when there are enough verdicts for the next transaction; None while it is not waited for.
        self._gathering: Deferred[None] | None = None
        self._enough = _ENOUGH
        self._idle_waiters: list[Deferred[None]] = []
        self._adding_up = AddingUp(reactor, database, clock, self._wake_idle)

    def submit(self, verdict: Verdict, *, is_followed: bool = False) -> Callable[[ClosedLog], None]:
        """Accept a verdict, which is settled once its log is on disk.

        ``is_followed``: whether another verdict of its job is likely to follow at once.

        Returns:
            A callback for that; also called if the log could not be written, which the log store reports itself.
        """
        self._awaited += 1
        self._tokens.add(verdict.token)
        return partial(self._ready, verdict, is_followed)

    def _ready(self, verdict: Verdict, is_followed: bool, closed: ClosedLog) -> None:
        self._awaited -= 1
        self._pending.append(verdict.with_log(closed.span))
        if not self._busy:
            self._busy = True
            start_background("settle", self._settle_all(_PAIR if is_followed else 1))
        elif len(self._pending) >= self._enough:
            self._end_gathering()

    async def note_begun(self, token: ClaimToken, found: Mapping[str, Any]) -> bool:
        """Store the state that an attempt has found before it changes anything; False if the claim is lost."""
        return await self._database.run(
            "store the initial state", attempt_states.record_initial_state, self._worker, token, found
        )

    async def note_handed(self, tokens: Sequence[ClaimToken], handed: str) -> bool:
        """Store to which job of another service elements are handed over; False if a claim is lost."""
        return await self._database.run(
            "store a hand-over", attempt_states.record_hand_over, self._worker, tokens, handed
        )

    @property
    def backlog(self) -> int:
        """Number of verdicts that are not in the database yet."""
        return self._awaited + len(self._pending)

    def attempts(self) -> set[ClaimToken]:
        """Attempts whose verdicts are not in the database yet."""
        return set(self._tokens)

    def add_up(self, jobs: Collection[int]) -> None:
        """Add to the counters of jobs what another daemon has counted apart, which may be gone."""
        self._adding_up.later(jobs, soon=True)

    async def drained(self) -> None:
        """Wait until every submitted verdict is settled, and counted in the row of its job."""
        while self._awaited or self._busy or not self._adding_up.is_idle:
            self._adding_up.now()
            waiter: Deferred[None] = Deferred()
            self._idle_waiters.append(waiter)
            self._end_gathering()
            await waiter

    async def _settle_all(self, enough: int) -> None:
        """Settle all verdicts; the first transaction waits until there are ``enough``."""
        # After an error: a hanging session may have locked one job, so the other verdicts do not wait for it.
        skip_locked = False
        at_once = _MOST_AT_ONCE
        try:
            await self._gather(enough)
            while self._pending:
                verdicts = self._pending[:at_once]
                try:
                    settled = await self._database.run(
                        "settle",
                        results.settle,
                        self._worker,
                        verdicts,
                        self._clock(),
                        skip_locked=skip_locked,
                        may_count_apart=True,
                    )
                except DatabaseClosedError:
                    self._log.error(
                        "{count} verdicts are lost: the database is closed; their elements run again",
                        count=len(self._pending),
                    )
                    self._pending.clear()
                    self._tokens.clear()
                    self.counts.forget()
                    return
                except DatabaseUnavailableError:
                    skip_locked = True
                    await deferLater(self._reactor, _PAUSE_AFTER_ERROR_S)
                    continue
                except Exception:
                    # Keep the verdicts. One that cannot be stored must not block the others: retry one by one, this one
                    # last.
                    self._log.failure("{count} verdicts could not be stored; trying again", count=len(verdicts))
                    skip_locked = True
                    if len(verdicts) == 1:
                        self._pending.append(self._pending.pop(0))
                    at_once = 1
                    await deferLater(self._reactor, _PAUSE_AFTER_ERROR_S)
                    continue
                del self._pending[: len(verdicts)]
                at_once = min(2 * at_once, _MOST_AT_ONCE)
                self._tokens.difference_update(verdict.token for verdict in verdicts)
                dropped = [token for token in settled.lost if token not in settled.repeated]
                for token in dropped:
                    self._log.warn(
                        "job {job} element {element} attempt {attempt}: result dropped, the claim was lost",
                        job=token.job_id,
                        element=token.element_id,
                        attempt=token.attempt,
                    )
                later = {verdict.token for verdict in settled.passed_over}
                self.counts.settled((verdict for verdict in verdicts if verdict.token not in later), {*dropped})
                for job in settled.finished:
                    log_ended(job)
                self._adding_up.later(settled.counted_apart, soon=not settled.has_waiting)
                self._on_settled(any(verdict.leftover for verdict in verdicts), settled.has_waiting)
                skip_locked = bool(settled.passed_over)
                if settled.passed_over:
                    self._tokens.update(later)
                    is_stuck = not self._pending
                    self._pending += settled.passed_over
                    if is_stuck:
                        await deferLater(self._reactor, _PAUSE_AFTER_ERROR_S)
                elif len(verdicts) >= _MANY:
                    await self._gather(_ENOUGH)
        finally:
            self._busy = False
            self._wake_idle()

    def _wake_idle(self) -> None:
        waiters, self._idle_waiters = self._idle_waiters, []
        for waiter in waiters:
            waiter.callback(None)

    async def _gather(self, enough: int) -> None:
        """Wait until there are enough verdicts for the next transaction."""
        if len(self._pending) >= enough or self._idle_waiters:
            return
        self._enough = enough
        gathering = self._gathering = Deferred()
        timer = self._reactor.callLater(_GATHER_S, self._end_gathering)
        await gathering
        if timer.active():
            timer.cancel()

    def _end_gathering(self) -> None:
        if self._gathering is not None:
            gathering, self._gathering = self._gathering, None
            gathering.callback(None)


_log = Logger()
_DECISIONS = {RetryAt: "it will be tried again", Hold: "it is held", GiveUp: "given up"}


class Instant(NamedTuple):
    """A time by two clocks; the events of an agent that arrive together have the same.

    Attributes:
        utc: time of day, which may be set.
        seconds: of the progress board's clock, which is never set: for durations.
    """

    utc: datetime
    seconds: float


@frozen(kw_only=True)
class AttemptContext:
    """Settings and services that all attempts share.

    Attributes:
        host: name of this machine, for the logs.
        cancel_grace_s: seconds until an agent must react to a cancellation before it is killed.
        health: learns from outcomes which endpoints can be reached.
    """

    reactor: IReactorTime
    clock: Callable[[], datetime]
    host: str
    policy: RetryPolicy
    logs: LogStore
    board: ProgressBoard
    settler: Settler
    cancel_grace_s: float
    service_health: ServiceHealth
    health: SiteHealth = field(factory=SiteHealth)

    def now(self) -> Instant:
        return Instant(self.clock(), self.board.clock())


@define(eq=False)
class RunningAttempt:
    """A claimed attempt until its verdict is passed to the settler.

    Attributes:
        began: when its log began; None before.
        pid: of the helper process that carries it out; None before it has one.
    """

    job: JobRecord
    record: ElementRecord
    context: AttemptContext
    began: Instant | None = None
    pid: int | None = None
    _ref: LogRef = field(init=False)

    def begin(self, now: Instant) -> Instant:
        """Write the first line of the log, once; returns when it began."""
        if self.began is not None:
            return self.began
        self.began = now
        record, job = self.record, self.job
        self.context.board.begin(job.id, record.id, now.seconds)
        self._ref = LogRef(job.log_uid, record.id, record.attempts)
        where = f"source={job.src_siteid}:{record.src_filepath}"
        if record.dst_filepath is not None:
            where += f" destination={job.dst_siteid}:{record.dst_filepath}"
        process = "" if self.pid is None else f" pid={self.pid}"
        self.context.logs.open(
            self._ref,
            f"host={self.context.host}{process} job={job.id} element={record.id} attempt={record.attempts} "
            f"type={record.type.name} protocol={job.protocol.name} {where}",
        )
        return now

    def write(self, text: str, now: Instant) -> None:
        """Append to the log."""
        self.begin(now)
        self.context.logs.write(self._ref, text)

    def advance(self, progress: ReportedProgress, now: Instant) -> None:
        self.context.board.update(self.job.id, self.record.id, progress, now.seconds)
        self.write(
            f"progress bytes={progress.transferred} instant={progress.instant:.0f}B/s "
            f"average={progress.average:.0f}B/s elapsed={progress.elapsed:.1f}s",
            now,
        )

    def fail(
        self,
        failure: AttemptFailure,
        now: Instant,
        endpoints: Mapping[int, SiteEndpoint],
        *,
        leftover: bool,
        counts: bool,
        skipped: int,
        excused: bool = False,
    ) -> None:
        """End it as failed, and decide whether the element is retried.

        ``endpoints``: site → endpoint that it used. ``excused``: whether another service that it needs did not answer.
        """
        record = self.record
        of_site = self.context.health.failed(self.job, record, endpoints, failure, now.utc)
        # A helper may crash because of the element. Other faults of the service are not the element's; but after
        # `MOST_UNCOUNTED` they count, so that the job ends.
        if failure.scope is FailureScope.SERVICE and not excused:
            self.context.service_health.tally.add(now.seconds, failed=1)
        ours = failure.scope is FailureScope.SERVICE and failure.code is not FailureCode.CRASHED
        blameless = ours and record.lost < MOST_UNCOUNTED
        counts = counts and not of_site and not excused and not blameless
        uncounted = 0 if counts else 1
        decision = decide_retry(
            self.context.policy,
            failure,
            max(record.attempts - record.lost - uncounted + self.context.health.own_faults(self.job.id, record.id), 1),
            record.max_tries + uncounted,
            now.utc,
            random.random(),  # noqa: S311 - spreads retries, guards nothing
            record.lost,
        )
        if isinstance(decision, GiveUp):
            self.context.health.forget(self.job.id, record.id)
        self.write(f"failed scope={failure.scope} code={failure.code} {failure.message}", now)
        if of_site:
            self.write("not counted: the site cannot be reached, which is not a fault of this element", now)
        elif excused:
            self.write("not counted: the FTS3 does not answer, which is not a fault of this element", now)
        elif blameless:
            self.write("not counted: a fault of the service, not of this element", now)
        _log.info(
            "attempt failed: {scope} {code}: {message}; {decision}",
            job=record.job_id,
            element=record.id,
            attempt=record.attempts,
            scope=failure.scope,
            code=failure.code,
            message=failure.message,
            decision=_DECISIONS[type(decision)],
        )
        status, not_before, words = JobStatus.FAILED, None, ""
        if isinstance(decision, RetryAt):
            status, not_before = JobStatus.SUBMITTED, decision.not_before
            words = f" next_try={not_before:%Y-%m-%dT%H:%M:%SZ}"
        elif isinstance(decision, Hold):
            status, counts = JobStatus.HELD, False
        self.end(
            status,
            words,
            now,
            failure=failure,
            leftover=leftover,
            counts=counts,
            not_before=not_before,
            skipped=skipped,
        )

    def end(
        self,
        status: JobStatus,
        words: str,
        now: Instant,
        *,
        transferred: int = 0,
        moved: int = 0,
        checksum: str | None = None,
        already_there: bool = False,
        failure: AttemptFailure | None = None,
        leftover: bool = False,
        counts: bool = True,
        not_before: datetime | None = None,
        skipped: int = 0,
        not_preserved: str | None = None,
        is_followed: bool = False,
    ) -> None:
        """Write the last line of the log, and submit the verdict.

        ``words`` are appended to that line, ``moved`` are the bytes transferred over the network, including those that
        were discarded; for ``is_followed`` see `Settler.submit`, for the other arguments `Verdict`.
        """
        began, record, context = self.begin(now), self.record, self.context
        # A LIST element is not one of the files of the job.
        finished = record.type is not JobType.LIST and (status is JobStatus.DONE or status.is_final)
        # Files that were already there do not count for the transfer rate.
        arrived = 0 if already_there else transferred
        context.board.drop(record.job_id, record.id, now.seconds, finished=finished, proven=arrived)
        # Durations use the clock that is never set.
        seconds = now.seconds - began.seconds
        outcome = status.name if failure is None else "FAILED"
        code = 0 if failure is None and status is JobStatus.DONE else 1
        verdict = Verdict(
            ClaimToken(record.job_id, record.id, record.attempts),
            status,
            began.utc,
            began.utc + timedelta(seconds=seconds) if seconds else began.utc,
            counts,
            not_before,
            transferred,
            checksum,
            already_there,
            failure,
            leftover,
            skipped,
            not_preserved,
        )
        context.settler.counts.submitted(verdict.token, self.job, record.type)
        last_line = f"outcome={outcome} rc={code} bytes={moved} seconds={seconds:.3f}{words}"
        context.logs.end(self._ref, last_line, context.settler.submit(verdict, is_followed=is_followed))

    def forget(self, why: str) -> None:
        """Close its log without a verdict: another daemon may have the claim by now."""
        self.context.board.drop(self.job.id, self.record.id)
        if self.began is not None:
            self.context.logs.close(self._ref, f"outcome=LOST {why}")

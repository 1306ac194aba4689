"""One attempt at one element: its log from the first line to the last, its progress, its verdict."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from datetime import datetime

from attrs import define, field, frozen
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord, Token, Verdict
from pdm.workqueue.domain.retry import GiveUp, Hold, RetryAt, RetryPolicy, decide
from pdm.workqueue.execution.health import Door, SiteHealth, touched
from pdm.workqueue.execution.progress import Progress, ProgressBoard
from pdm.workqueue.execution.settler import Settler
from pdm.workqueue.logstore.files import LogRef, LogStore

_log = Logger()
_DECISIONS = {RetryAt: "it will be tried again", Hold: "it is held", GiveUp: "given up"}


@frozen
class AttemptTools:
    """What every attempt uses.

    Attributes:
        host: name of this machine, for the logs.
        cancel_grace_s: seconds an agent has to show that it obeys a cancellation before it is killed.
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
    health: SiteHealth = field(factory=SiteHealth)


@define(eq=False)
class RunningAttempt:
    """A claimed attempt until its verdict is handed to the settler.

    Attributes:
        started: whether work on it, and so its log, has begun.
        doors: the endpoints that it uses, by site.
    """

    job: JobRecord
    record: ElementRecord
    tools: AttemptTools
    started: bool = False
    doors: Mapping[int, Door] = field(factory=dict)
    _began_at: datetime = field(init=False)
    _ref: LogRef = field(init=False)

    def begin(self) -> None:
        """Write the first line of the log, once."""
        if self.started:
            return
        self.started = True
        self._began_at = self.tools.clock()
        self.tools.board.begin(self.job.id, self.record.id)
        record, job = self.record, self.job
        self._ref = LogRef(job.log_uid, record.id, record.attempts)
        where = f"source={job.src_siteid}:{record.src_filepath}"
        if record.dst_filepath is not None:
            where += f" destination={job.dst_siteid}:{record.dst_filepath}"
        self.tools.logs.open(
            self._ref,
            f"host={self.tools.host} job={job.id} element={record.id} attempt={record.attempts} "
            f"type={record.type.name} protocol={job.protocol.name} {where}",
        )

    def write(self, text: str) -> None:
        """Add to the log."""
        self.begin()
        self.tools.logs.write(self._ref, text)

    def advance(self, progress: Progress) -> None:
        """Note how far it is."""
        self.tools.board.update(self.job.id, self.record.id, progress)
        self.write(
            f"progress bytes={progress.transferred} instant={progress.instant:.0f}B/s "
            f"average={progress.average:.0f}B/s elapsed={progress.elapsed:.1f}s"
        )

    def fail(self, failure: AttemptFailure, *, residue: bool, counts: bool, skipped: int) -> None:
        """End it as failed; what follows is decided here."""
        record = self.record
        now = self.tools.clock()
        excused = self.tools.health.failed(self.job, record, self.doors, failure, now)
        counts = counts and not excused
        uncounted = 0 if counts else 1
        decision = decide(
            self.tools.policy,
            failure,
            max(record.attempts - record.lost - uncounted, 1),
            record.max_tries + uncounted,
            now,
            random.random(),  # noqa: S311 - spreads retries, guards nothing
        )
        self.write(f"failed scope={failure.scope} code={failure.code} {failure.message}")
        if excused:
            self.write("not counted: the site cannot be reached, which is no fault of this element")
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
            failure=failure,
            residue=residue,
            counts=counts,
            not_before=not_before,
            skipped=skipped,
        )

    def end(
        self,
        status: JobStatus,
        words: str,
        *,
        transferred: int = 0,
        moved: int = 0,
        checksum: str | None = None,
        already_there: bool = False,
        failure: AttemptFailure | None = None,
        residue: bool = False,
        counts: bool = True,
        not_before: datetime | None = None,
        skipped: int = 0,
    ) -> None:
        """Write the last line, and hand the verdict to the settler.

        Args:
            status: what the element becomes; for the rest see `Verdict`.
            words: what the last line says besides.
            transferred: bytes proven at the destination.
            moved: bytes that went over the wire.
            checksum: where compared.
            already_there: whether the destination had it before.
            failure: why it failed.
            residue: whether a temporary file may be left.
            counts: whether it counts towards ``max_tries``.
            not_before: when it may be tried again.
            skipped: entries of a listing that are not carried out.
        """
        self.begin()
        if status is JobStatus.DONE and self.doors:
            sites = touched(self.job, self.record)
            self.tools.health.worked([self.doors[site] for site in sites if site in self.doors], self.tools.clock())
        # A listing is none of the files that a job is about.
        finished = status.is_final and self.record.type is not JobType.LIST
        # What was there already has not gone over the wire: it belongs into no rate.
        arrived = 0 if already_there else transferred
        self.tools.board.drop(self.job.id, self.record.id, finished=finished, proven=arrived)
        now = self.tools.clock()
        outcome = status.name if failure is None else "FAILED"
        code = 0 if failure is None and status is JobStatus.DONE else 1
        seconds = (now - self._began_at).total_seconds()
        closed = self.tools.logs.close(
            self._ref, f"outcome={outcome} rc={code} bytes={moved} seconds={seconds:.3f}{words}"
        )
        verdict = Verdict(
            Token(self.record.job_id, self.record.id, self.record.attempts),
            status,
            self._began_at,
            now,
            counts=counts,
            not_before=not_before,
            transferred=transferred,
            checksum=checksum,
            already_there=already_there,
            failure=failure,
            residue=residue,
            skipped=skipped,
        )
        self.tools.settler.submit(verdict, closed)

    def forget(self, why: str) -> None:
        """Write nothing about it but the end of its log: another daemon may hold the element by now."""
        self.tools.board.drop(self.job.id, self.record.id)
        if self.started:
            self.tools.logs.close(self._ref, f"outcome=LOST {why}")

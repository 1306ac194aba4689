"""Gives each element of a claimed batch exactly one verdict, and counts them."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType

from attrs import define, field

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch, ClaimToken
from pdm.workqueue.domain.pacing import ROUTE_FAILURES, BatchRun
from pdm.workqueue.execution.attempts import AttemptContext, Instant, RunningAttempt
from pdm.workqueue.execution.endpoint_health import SiteEndpoint, sites_of_element
from pdm.workqueue.execution.transfer_services import TransferServices
from pdm.workqueue.wire.agent_events import DoneEvent


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


#: Log text of elements whose agent was ended because of another job.
_ENDED_WITH_ANOTHER = "another job's cancellation ended the helper"
#: Log text of elements that did not fit into the request.
_POSTPONED = "the batch was full"


@define(eq=False, kw_only=True)
class BatchVerdicts:
    """The elements of one batch.

    Attributes:
        service: URL of the FTS3 that transfers its files; None for none.
        services: learns whether that answers.
        skipped: number of entries that its listing has left out.
        endpoints: site → endpoint that it uses.
        ending: why it is ended early; None if it is not.
        cancelled: keys of elements of cancelled jobs, while other jobs of the batch continue.
        withdrawn: keys of elements that were withdrawn before they had begun, and why: the helper gives them back
            unless they have begun since.
        open: by key, the index in the batch: elements without a verdict.
        elements: number of elements that are done.
        moved: bytes transferred over the network.
        attempts: number of attempts that ended and count.
        failed: how many of them with `ROUTE_FAILURES`.
        is_followed: whether the only file of its listing has begun already.
    """

    batch: Batch
    context: AttemptContext
    service: str | None
    services: TransferServices | None
    skipped: Callable[[], int]
    endpoints: Mapping[int, SiteEndpoint] = MappingProxyType({})
    ending: Ending | None = None
    cancelled: set[int] = field(factory=set)
    withdrawn: dict[int, Ending] = field(factory=dict)
    open: dict[int, RunningAttempt] = field(init=False)
    elements: int = 0
    moved: int = 0
    attempts: int = 0
    failed: int = 0
    is_followed: bool = False
    #: Whether an element is done that `SiteHealth` was not notified of.
    _has_worked: bool = False

    def __attrs_post_init__(self) -> None:
        self.open = {
            key: RunningAttempt(self.batch.job_of(element), element, self.context)
            for key, element in enumerate(self.batch.elements)
        }

    def attempts_open(self) -> Iterator[ClaimToken]:
        """Attempts without a verdict."""
        return (self.batch.token(attempt.record) for attempt in self.open.values())

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it was ended or given back early."""
        return self.ending is None and not self.withdrawn

    def run_so_far(self, seconds: float) -> BatchRun:
        """Figures for the adaptive limits of its route, after so many seconds on the agent."""
        return BatchRun(seconds, self.elements, self.moved, self.attempts, self.failed)

    def refuse(self, failure: AttemptFailure) -> None:
        """Fail all elements: the batch cannot be run."""
        now = self.context.now()
        for key in list(self.open):
            if key in self.cancelled:
                self.end(key, now, leftover=False)
            else:
                self.fail(key, failure, now)

    def exclude(self, refused: Mapping[int, AttemptFailure], postponed: Collection[int]) -> None:
        """Before the start: fail elements that can never succeed, and return postponed ones to the queue."""
        now = self.context.now()
        for key, failure in refused.items():
            if self.ending is not None or key in self.cancelled:
                self.end(key, now, leftover=False)
            else:
                self.fail(key, failure, now)
        for key in postponed:
            self.end(key, now, leftover=False, why=_POSTPONED)

    def drop(self) -> None:
        """Return all elements to the queue: nothing was begun."""
        now = self.context.now()
        for key in list(self.open):
            self.end(key, now, leftover=False)

    def done(self, key: int, event: DoneEvent, now: Instant) -> None:
        """The agent has done an element and proven it."""
        listed = self.batch.listed_size(self.open[key].record)
        if self.batch.type is JobType.COPY and listed not in (None, event.size):
            # The size that the agent proved and the listed one must agree; otherwise the result is not trusted.
            message = f"listed with {listed} bytes, proven with {event.size}"
            self.fail(key, AttemptFailure(FailureScope.SOURCE, FailureCode.SIZE_CHANGED, message), now)
            return
        proof = f" checksum={event.checksum}" if event.checksum else ""
        self.elements += 1
        self.moved += event.transferred
        self.attempts += 1
        self._has_worked = True
        self.open.pop(key).end(
            JobStatus.DONE,
            f" (already there){proof}" if event.already_there else proof,
            now,
            transferred=event.size,
            moved=event.transferred,
            checksum=event.checksum,
            already_there=event.already_there,
            skipped=self.skipped(),
            not_preserved=",".join(event.not_preserved) or None,
            is_followed=self.is_followed,
        )

    def note_worked(self, now: Instant) -> None:
        """Notify the endpoint health of finished elements."""
        if self._has_worked:
            self._has_worked = False
            self.note_answered()
            # The elements of a batch use the same sites.
            sites = sites_of_element(self.batch.job, self.batch.elements[0])
            worked = [self.endpoints[site] for site in sites if site in self.endpoints]
            self.context.health.worked(worked, now.utc)

    def fail(
        self, key: int, failure: AttemptFailure, now: Instant, *, leftover: bool = False, counts: bool = True
    ) -> None:
        """An attempt has failed; ``counts``: whether it uses up a try."""
        # Keep the order of the events.
        self.note_worked(now)
        if counts:
            self.attempts += 1
            self.failed += failure.code in ROUTE_FAILURES
        excused = False
        if self.service is not None and self.services is not None:
            excused = self.services.failed(self.service, failure)
        self.open.pop(key).fail(
            failure,
            now,
            self.endpoints,
            leftover=leftover,
            counts=counts,
            skipped=self.skipped(),
            excused=excused,
        )

    def end(self, key: int, now: Instant, *, leftover: bool, why: str = _ENDED_WITH_ANOTHER) -> None:
        """An attempt is given up: the element is cancelled, or returns to the queue."""
        attempt = self.open.pop(key)
        if self.ending is Ending.LOST:
            attempt.forget(Ending.LOST)
        elif self.ending is Ending.CANCELLED or key in self.cancelled:
            attempt.end(JobStatus.CANCELLED, f" {Ending.CANCELLED}", now, leftover=leftover, skipped=self.skipped())
        else:
            withdrawn = self.withdrawn.get(key) if attempt.began is None else None
            words = self.ending or withdrawn or why
            attempt.end(JobStatus.SUBMITTED, f" {words}", now, leftover=leftover, counts=False)

    def note_answered(self) -> None:
        """The FTS3 that transfers the files, if one does, answers."""
        if self.service is not None and self.services is not None:
            self.services.worked(self.service)

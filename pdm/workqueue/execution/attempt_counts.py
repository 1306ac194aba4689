"""Counts of attempts for the metrics: how they ended, the bytes they moved, how long they and their jobs took.

An attempt is counted once its result is in the database, so the counters and the database agree. Written and read on
the reactor thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import NamedTuple

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import Batch, ClaimToken, JobRecord, Verdict
from pdm.workqueue.telemetry.metrics import OTHER, QUEUE_WAIT, TRANSFER_DURATION, HistogramTally

#: Combinations of type, outcome and sites that are counted apart at most.
_MOST_KEYS = 5000


class Work(NamedTuple):
    """What an attempt works on; the sites are None where they are counted as `OTHER`."""

    type: JobType
    source: int | None
    destination: int | None


class AttemptEnd(NamedTuple):
    """How an attempt ended; ``scope`` and ``code`` are empty without a failure."""

    work: Work
    status: JobStatus
    scope: str
    code: str


class AttemptCounts:
    """Attempts of this daemon.

    Attributes:
        ended: how they ended → number.
        bytes: source and destination → proven bytes.
        durations: of successful copies.
        waits: of jobs, by class: ``listing`` or ``work``.
    """

    def __init__(self) -> None:
        self.ended: defaultdict[AttemptEnd, int] = defaultdict(int)
        self.bytes: defaultdict[tuple[int | None, int | None], int] = defaultdict(int)
        self.durations: HistogramTally[tuple[()]] = HistogramTally(TRANSFER_DURATION, (), known=[()])
        self.waits: HistogramTally[str] = HistogramTally(QUEUE_WAIT, OTHER, known=["listing", "work"])
        #: Unsettled attempts.
        self._works: dict[ClaimToken, Work] = {}
        #: Most attempts are like the one before: they share these, and cost no hash.
        self._latest_work = Work(JobType.LIST, None, None)
        self._latest_end = AttemptEnd(self._latest_work, JobStatus.NEW, "", "")

    def begun(self, batch: Batch, now: datetime) -> None:
        """Note how long the jobs have waited that begin with this batch."""
        for element in batch.elements:
            # The first element of a job is its listing, or all that it has to do.
            if element.id == 0 and element.attempts == 1:
                job = batch.job_of(element)
                if job.after is None:
                    wait_s = (now - job.timestamp).total_seconds()
                    self.waits.observe("listing" if batch.type is JobType.LIST else "work", max(wait_s, 0.0))

    def submitted(self, token: ClaimToken, job: JobRecord, type_: JobType) -> None:
        """Note an attempt that has ended; it is counted when its verdict is settled."""
        work = self._latest_work
        if work.type is not type_ or work.source != job.src_siteid or work.destination != job.dst_siteid:
            work = self._latest_work = Work(type_, job.src_siteid, job.dst_siteid)
        self._works[token] = work

    def settled(self, verdicts: Iterable[Verdict], dropped: Collection[ClaimToken]) -> None:
        """Count verdicts that were committed; ``dropped``: those that were not written, because the claim was lost."""
        number = moved = 0
        for verdict in verdicts:
            work = self._works.pop(verdict.token, None)
            if work is None or verdict.token in dropped:
                continue
            end = self._latest_end
            if work is not end.work or verdict.status is not end.status or end.code or verdict.failure is not None:
                self._add(end, number, moved)
                number = moved = 0
                failure = verdict.failure
                scope, code = ("", "") if failure is None else (failure.scope.value, failure.code.value)
                self._latest_end = AttemptEnd(work, verdict.status, scope, code)
            number += 1
            if not verdict.already_there:
                moved += verdict.transferred
                if work.type is JobType.COPY and verdict.status is JobStatus.DONE:
                    self.durations.observe((), (verdict.ended_at - verdict.started_at).total_seconds())
        self._add(self._latest_end, number, moved)

    def number(self, *, done: bool) -> int:
        """How many attempts were done, or had a failure."""
        return sum(count for end, count in self.ended.items() if (end.status is JobStatus.DONE if done else end.code))

    def forget(self) -> None:
        """Drop what was noted: its verdicts are lost."""
        self._works.clear()

    def _add(self, end: AttemptEnd, number: int, moved: int) -> None:
        """Count attempts that ended alike; ``moved``: their proven bytes."""
        if not number:
            return
        if end not in self.ended and len(self.ended) >= _MOST_KEYS:
            end = AttemptEnd(Work(end.work.type, None, None), end.status, end.scope, end.code)
        self.ended[end] += number
        if moved:
            # Its key is a part of that above, so this is bounded, too.
            self.bytes[end.work.source, end.work.destination] += moved

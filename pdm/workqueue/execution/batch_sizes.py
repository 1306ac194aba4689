"""Adapts the number of elements of a batch to the time that they take."""

from __future__ import annotations

from attrs import define, field

from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.limits import (
    BATCH_TIME_S,
    FIRST_BATCH_SIZE,
    TOOLS_BATCH_TIME_S,
    WorkKind,
    next_batch_size,
    work_kind,
)
from pdm.workqueue.execution.batch import RunningBatch
from pdm.workqueue.execution.site_directory import job_moved_by_tools
from pdm.workqueue.sites.registry import SiteRegistry


@define(eq=False, kw_only=True)
class BatchSizes:
    """The sizes of this daemon's batches.

    Attributes:
        most: elements of a batch at most.
        by_kind: kind of work → elements that take as long as a batch should.
    """

    sites: SiteRegistry
    most: int
    by_kind: dict[WorkKind, int] = field(factory=dict)

    def time_s(self, job: JobRecord) -> float:
        """Seconds that a batch of a job should take."""
        return TOOLS_BATCH_TIME_S if job_moved_by_tools(job, self.sites) else BATCH_TIME_S

    def ended(self, running: RunningBatch) -> None:
        """Adapt the size of the next batch of this kind to the duration of one that has ended."""
        if running.service is not None:
            return
        if running.seconds and running.verdicts.is_whole and running.batch.is_of_its_kind:
            job, count = running.batch.job, len(running.batch.elements)
            size = self.by_kind.get(work_kind(job), FIRST_BATCH_SIZE)
            self.by_kind[work_kind(job)] = next_batch_size(size, count, running.seconds, self.most, self.time_s(job))

    def shorten(self, running: RunningBatch) -> None:
        """Make the next batches of this kind shorter than one that runs and is slow."""
        job, (begun, seconds) = running.batch.job, running.pace()
        in_time = max(int(begun / seconds * self.time_s(job)), 1)
        self.by_kind[work_kind(job)] = min(self.by_kind.get(work_kind(job), FIRST_BATCH_SIZE), in_time)

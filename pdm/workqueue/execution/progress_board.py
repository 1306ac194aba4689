"""Progress of running elements, in memory.

Progress is never stored: the counters of a job, in the database, count proven results, and a daemon that restarts
repeats its attempts. All methods of the progress board run on the reactor thread in constant time.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from attrs import define, field, frozen

from pdm.workqueue.domain.progress import Moving, RateHistory, SmoothedRate

#: Seconds for which the rates of a job are kept while nothing of it runs: between batches, or before a retry.
_KEPT_IDLE_S = 60.0
#: Jobs without running elements that are kept at most.
_MOST_IDLE = 1000
#: Seconds without a byte after which the rate of a transfer is shown as 0.
_STALLED_AFTER_S = 15.0
#: Jobs whose rates over time are kept at most; each has some kilobytes.
_MOST_HISTORIES = 1000
#: Jobs that are known as listed at most.
_MOST_LISTED = 10_000


@frozen
class ReportedProgress:
    """Progress from an agent: bytes transferred, bytes/s now and on average, seconds since the start."""

    transferred: int
    instant: float
    average: float
    elapsed: float


@frozen
class ElementProgress:
    """Progress of a running element; None for what its agent has not reported."""

    transferred: int | None
    instant: float | None
    average: float | None
    elapsed: float | None


@define(eq=False)
class _RunningElement:
    since_s: float
    changed_s: float
    transferred: int = 0
    reported: ReportedProgress | None = None


@frozen
class JobHistory:
    """What a job has moved over time, in this daemon: bytes, and elements that have ended.

    Attributes:
        begun_at: when the first columns begin, seconds since 1970 UTC.
    """

    begun_at: float
    bytes: RateHistory
    files: RateHistory


@frozen(kw_only=True)
class JobMotion:
    """What one daemon moves of a job.

    Attributes:
        running: elements that run there.
        moving: bytes that these have moved.
        losses: how often moved bytes were lost, because an attempt has failed.
        instant: bytes/s, smoothed.
        files_per_second: elements that end, smoothed.
    """

    job_id: int
    running: int
    moving: int
    losses: int
    instant: float | None
    files_per_second: float | None


@define(eq=False)
class _WatchedJob:
    bytes_rate: SmoothedRate
    files_rate: SmoothedRate
    #: Bytes and ended elements over time, kept for long.
    history: JobHistory
    elements: dict[int, _RunningElement] = field(factory=dict)
    #: Sum over the running elements.
    moving: int = 0
    #: Highest number of bytes, proven and moving, that was shown since bytes were last lost.
    reported: int = 0
    #: How often bytes were lost.
    losses: int = 0


def _motion(job_id: int, job: _WatchedJob, now_s: float) -> JobMotion:
    return JobMotion(
        job_id=job_id,
        running=len(job.elements),
        moving=job.moving,
        losses=job.losses,
        instant=job.bytes_rate.at(now_s),
        files_per_second=job.files_rate.at(now_s),
    )


class ProgressBoard:
    """Progress of all elements that this daemon runs, and of their jobs.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._jobs: dict[int, _WatchedJob] = {}
        self._idle: OrderedDict[int, float] = OrderedDict()
        self._listed: OrderedDict[int, int] = OrderedDict()
        self._histories: OrderedDict[int, JobHistory] = OrderedDict()

    # -- called by attempts; ``now_s``: result of `clock`, read once for many elements; by default it is read here

    def begin(self, job_id: int, element_id: int, now_s: float | None = None) -> None:
        now_s = self.clock() if now_s is None else now_s
        elements = self._watched(job_id, now_s).elements
        if element_id not in elements:
            elements[element_id] = _RunningElement(now_s, now_s)

    def update(self, job_id: int, element_id: int, progress: ReportedProgress, now_s: float | None = None) -> None:
        now_s = self.clock() if now_s is None else now_s
        job = self._watched(job_id, now_s)
        element = job.elements.get(element_id)
        if element is None:
            element = job.elements[element_id] = _RunningElement(now_s - progress.elapsed, now_s)
        more = progress.transferred - element.transferred
        job.moving += more
        if more > 0:
            element.changed_s = now_s
            job.bytes_rate.add(more, now_s)
            job.history.bytes.add(more, now_s)
        element.transferred = progress.transferred
        element.reported = progress

    def drop(
        self,
        job_id: int,
        element_id: int,
        now_s: float | None = None,
        *,
        finished: bool = False,
        proven: int = 0,
    ) -> None:
        """Remove an element that does not run any more.

        ``finished``: the element has ended, not only one attempt. ``proven``: its bytes at the destination, even if no
        progress was reported.
        """
        job = self._jobs.get(job_id)
        element = None if job is None else job.elements.pop(element_id, None)
        if job is None or element is None:
            return
        now_s = self.clock() if now_s is None else now_s
        job.moving -= element.transferred
        if proven > element.transferred:
            job.bytes_rate.add(proven - element.transferred, now_s)
            job.history.bytes.add(proven - element.transferred, now_s)
        elif proven < element.transferred:
            # These bytes must be moved again, so the shown progress of the job may go back.
            job.reported = 0
            job.losses += 1
        if finished:
            job.files_rate.add(1, now_s)
            job.history.files.add(1, now_s)
        if not job.elements:
            self._idle[job_id] = now_s
            self._forget_idle(now_s)

    # -- called by the API

    def of_element(self, job_id: int, element_id: int) -> ElementProgress | None:
        """Progress of an element; None if it does not run here."""
        job = self._jobs.get(job_id)
        element = None if job is None else job.elements.get(element_id)
        if element is None:
            return None
        now_s = self.clock()
        reported = element.reported
        if reported is None:
            return ElementProgress(None, None, None, now_s - element.since_s)
        if now_s - element.changed_s <= _STALLED_AFTER_S:
            return ElementProgress(reported.transferred, reported.instant, reported.average, reported.elapsed)
        elapsed = max(now_s - element.since_s, reported.elapsed)
        return ElementProgress(reported.transferred, 0.0, reported.transferred / elapsed, elapsed)

    def of_job(self, job_id: int, proven: int) -> Moving | None:
        """Bytes and rates of a job; None if nothing of it runs here, or ran recently.

        The shown progress does not go back unless bytes are lost: bytes of an ended element count as moving until
        ``proven`` has them, the proven bytes, read from the database before this call.
        """
        job = self._jobs.get(job_id)
        if job is None:
            return None
        now_s = self.clock()
        job.reported = max(job.reported, proven + job.moving)
        return Moving(max(job.reported - proven, 0), job.bytes_rate.at(now_s), job.files_rate.at(now_s))

    def motion_of(self, job_id: int) -> JobMotion | None:
        """What runs here of a job, or ran recently; None if nothing."""
        job = self._jobs.get(job_id)
        return None if job is None else _motion(job_id, job, self.clock())

    def motions(self, most: int) -> list[JobMotion]:
        """What runs here of each job, or ran recently; at most so many jobs, those with running elements first."""
        now_s = self.clock()
        chosen = sorted(self._jobs.items(), key=lambda item: not item[1].elements)[:most]
        return [_motion(job_id, job, now_s) for job_id, job in chosen]

    def running(self) -> list[int]:
        """Numbers of the jobs that have running elements here."""
        return [job_id for job_id, job in self._jobs.items() if job.elements]

    def history_of(self, job_id: int) -> JobHistory | None:
        """What a job has moved over time; None if nothing of it has run here lately."""
        return self._histories.get(job_id)

    def remember_listed(self, job_id: int, elements: int) -> None:
        """Record that the first listing of a job is done, and its number of elements."""
        self._listed[job_id] = elements
        if len(self._listed) > _MOST_LISTED:
            self._listed.popitem(last=False)

    def is_listed(self, job_id: int, elements: int) -> bool:
        """Whether the listing of a job with this number of elements is known to be done."""
        return self._listed.get(job_id) == elements

    # -- memory

    def _watched(self, job_id: int, now_s: float) -> _WatchedJob:
        job = self._jobs.get(job_id)
        if job is None:
            history = self._history(job_id, now_s)
            job = self._jobs[job_id] = _WatchedJob(SmoothedRate(now_s), SmoothedRate(now_s), history)
        elif not job.elements:
            self._idle.pop(job_id, None)
        return job

    def _history(self, job_id: int, now_s: float) -> JobHistory:
        found = self._histories.pop(job_id, None)
        if found is None:
            found = JobHistory(time.time(), RateHistory(now_s), RateHistory(now_s))
        # Reinserted at the end: the job that was begun longest ago leaves first.
        self._histories[job_id] = found
        if len(self._histories) > _MOST_HISTORIES:
            self._histories.popitem(last=False)
        return found

    def _forget_idle(self, now_s: float) -> None:
        """Drop jobs that are idle for long; amortized constant time."""
        while self._idle:
            job_id, since_s = next(iter(self._idle.items()))
            if now_s - since_s < _KEPT_IDLE_S and len(self._idle) <= _MOST_IDLE:
                return
            del self._idle[job_id], self._jobs[job_id]

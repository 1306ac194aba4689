"""How far running elements are, and how fast their jobs go: in memory, told by the attempts, asked by the API.

Nothing of it is ever written: a job's own numbers, in the database, count what is proven, and a daemon that starts
again begins its attempts again. All methods are called on the reactor's thread and cost the same however much runs.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from attrs import define, field, frozen

from pdm.workqueue.domain.progress import Moving, SmoothedRate

#: Seconds for which the rates of a job are kept while nothing of it runs: between two batches, or before a retry.
_KEPT_IDLE_S = 60.0
#: Jobs of which nothing runs that are kept at most.
_MOST_IDLE = 1000
#: Seconds without a byte after which a transfer does not move any more, whatever was said last.
_STILL_AFTER_S = 15.0
#: Jobs that are remembered as listed.
_MOST_LISTED = 10_000


@frozen
class Progress:
    """What an agent reports: bytes that have moved, bytes/s now and on average, seconds since the start."""

    transferred: int
    instant: float
    average: float
    elapsed: float


@frozen
class ElementProgress:
    """How far a running element is; None for what it has not reported yet."""

    transferred: int | None
    instant: float | None
    average: float | None
    elapsed: float | None


@define(eq=False)
class _RunningElement:
    since_s: float
    changed_s: float
    transferred: int = 0
    reported: Progress | None = None


@define(eq=False)
class _WatchedJob:
    bytes_rate: SmoothedRate
    files_rate: SmoothedRate
    elements: dict[int, _RunningElement] = field(factory=dict)
    #: Bytes that the running elements have moved, all together.
    moving: int = 0
    #: The most bytes, proven and moving, that were told since something was last lost.
    told: int = 0


class ProgressBoard:
    """The progress of all elements that this daemon runs, and of their jobs.

    Args:
        clock: seconds on a clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: dict[int, _WatchedJob] = {}
        self._idle: OrderedDict[int, float] = OrderedDict()
        self._listed: OrderedDict[int, int] = OrderedDict()

    # -- what attempts tell

    def begin(self, job_id: int, element_id: int) -> None:
        """Work on an element begins."""
        now_s = self._clock()
        self._watched(job_id, now_s).elements.setdefault(element_id, _RunningElement(now_s, now_s))

    def update(self, job_id: int, element_id: int, progress: Progress) -> None:
        """An element has come further."""
        now_s = self._clock()
        job = self._watched(job_id, now_s)
        element = job.elements.get(element_id)
        if element is None:
            element = job.elements[element_id] = _RunningElement(now_s - progress.elapsed, now_s)
        more = progress.transferred - element.transferred
        job.moving += more
        if more > 0:
            element.changed_s = now_s
            job.bytes_rate.add(more, now_s)
        element.transferred = progress.transferred
        element.reported = progress

    def drop(self, job_id: int, element_id: int, *, finished: bool = False, proven: int = 0) -> None:
        """An element does not run any more.

        Args:
            job_id: of the job.
            element_id: which of its elements.
            finished: whether that is the end of it, rather than of one attempt.
            proven: bytes that are proven at the destination; also those of which no progress was ever reported.
        """
        job = self._jobs.get(job_id)
        element = None if job is None else job.elements.pop(element_id, None)
        if job is None or element is None:
            return
        now_s = self._clock()
        job.moving -= element.transferred
        if proven > element.transferred:
            job.bytes_rate.add(proven - element.transferred, now_s)
        elif proven < element.transferred:
            # They have to be moved again, and a job that was further than it is now has to say so.
            job.told = 0
        if finished:
            job.files_rate.add(1, now_s)
        if not job.elements:
            self._idle[job_id] = now_s
            self._forget_idle(now_s)

    # -- what the API asks

    def of_element(self, job_id: int, element_id: int) -> ElementProgress | None:
        """How far a running element is; None for one that does not run here."""
        job = self._jobs.get(job_id)
        element = None if job is None else job.elements.get(element_id)
        if element is None:
            return None
        now_s = self._clock()
        reported = element.reported
        if reported is None:
            return ElementProgress(None, None, None, now_s - element.since_s)
        if now_s - element.changed_s <= _STILL_AFTER_S:
            return ElementProgress(reported.transferred, reported.instant, reported.average, reported.elapsed)
        elapsed = max(now_s - element.since_s, reported.elapsed)
        return ElementProgress(reported.transferred, 0.0, reported.transferred / elapsed, elapsed)

    def of_job(self, job_id: int, proven: int) -> Moving | None:
        """What moves of a job; None if nothing of it runs here, or did a moment ago.

        What is told never goes back while nothing is lost: bytes of an element that has ended count as moving until
        the database counts them as proven.

        Args:
            job_id: of the job.
            proven: its bytes that are proven, read from the database before this is called.
        """
        job = self._jobs.get(job_id)
        if job is None:
            return None
        now_s = self._clock()
        job.told = max(job.told, proven + job.moving)
        return Moving(max(job.told - proven, 0), job.bytes_rate.at(now_s), job.files_rate.at(now_s))

    def remember_listed(self, job_id: int, elements: int) -> None:
        """The listing with which a job begins is done, and has led to so many elements."""
        self._listed[job_id] = elements
        if len(self._listed) > _MOST_LISTED:
            self._listed.popitem(last=False)

    def is_listed(self, job_id: int, elements: int) -> bool:
        """Whether the listing is known to be done of a job that has so many elements, as a record of it says."""
        return self._listed.get(job_id) == elements

    # -- memory

    def _watched(self, job_id: int, now_s: float) -> _WatchedJob:
        job = self._jobs.get(job_id)
        if job is None:
            job = self._jobs[job_id] = _WatchedJob(SmoothedRate(now_s), SmoothedRate(now_s))
        elif not job.elements:
            self._idle.pop(job_id, None)
        return job

    def _forget_idle(self, now_s: float) -> None:
        """Forget the jobs of which nothing has run for long; each was put in once, so each goes once."""
        while self._idle:
            job_id, since_s = next(iter(self._idle.items()))
            if now_s - since_s < _KEPT_IDLE_S and len(self._idle) <= _MOST_IDLE:
                return
            del self._idle[job_id], self._jobs[job_id]

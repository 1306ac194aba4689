"""State of this daemon in memory: faults of its own parts, and the progress of running elements.

Faults of this machine are kept apart from those of sites and of elements. A part that fails is reported here, and no
attempt counts for it. While a required part is faulty, nothing is claimed. Each faulty part is checked until it works
again.

Progress is never stored: a job's own counters, in the database, count what is proven, and a daemon that restarts begins
its attempts again. All methods of the progress board are called on the reactor's thread and run in constant time.
"""

from __future__ import annotations

import enum
import errno
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime

from attrs import define, field, frozen
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.progress import Moving, SmoothedRate
from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.telemetry.background import Periodic

_log = Logger()

#: Seconds between two checks of a part that is faulty.
_CHECK_PERIOD_S = 1.0
#: Descriptors that must be free, and bytes that temporary files must have room for, before work begins again.
_FREE_DESCRIPTORS, _FREE_BYTES = 64, 256 * 1024
#: Error numbers that say that this machine lacks something, whatever was asked of it.
_EXHAUSTED = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.EAGAIN,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
    }
)


class ServicePart(enum.StrEnum):
    """What the service works with; the words are shown by ``GET /health``."""

    DATABASE = "database"
    CREDENTIAL_FILES = "credential files"
    HELPERS = "helpers"
    ATTEMPT_LOGS = "attempt logs"


#: Without these nothing can be carried out. Without its log an attempt can.
_REQUIRED = frozenset({ServicePart.DATABASE, ServicePart.CREDENTIAL_FILES, ServicePart.HELPERS})

#: Raises if a part still does not work.
PartCheck = Callable[[], Awaitable[object]]


@frozen
class PartFault:
    """A part that does not work.

    Attributes:
        since: when it was reported first, UTC.
        reason: for the daemon's log; may name files and servers.
        check: finds out whether it works again.
    """

    part: ServicePart
    since: datetime
    reason: str
    check: PartCheck


@define(eq=False)
class ServiceHealth:
    """What is faulty at present.

    Attributes:
        checks: how it is found out that a part works again.
        on_change: called when work may begin again.
        log_errors: how many writes of attempt logs have failed so far.
    """

    reactor: IReactorTime
    clock: Callable[[], datetime]
    checks: Mapping[ServicePart, PartCheck]
    on_change: Callable[[], None] = lambda: None
    log_errors: Callable[[], int] = lambda: 0
    _faults: dict[ServicePart, PartFault] = field(factory=dict)
    _log_errors_seen: int = 0
    _periodic: Periodic | None = None

    def start(self) -> None:
        self._periodic = Periodic(self.reactor, "check what is faulty", _CHECK_PERIOD_S, self._check)
        self._periodic.start()

    async def stop(self) -> None:
        if self._periodic is not None:
            await self._periodic.stop()

    @property
    def may_claim(self) -> bool:
        """Whether all works without which nothing can be carried out."""
        return _REQUIRED.isdisjoint(self._faults)

    @property
    def faults(self) -> list[PartFault]:
        """What does not work."""
        return list(self._faults.values())

    def report(self, part: ServicePart, reason: str, check: PartCheck | None = None) -> None:
        """A part has failed.

        Args:
            part: which.
            reason: one line for the daemon's log.
            check: finds out whether it works again; the part's own where it is left out.
        """
        known = self._faults.get(part)
        check = check or self.checks[part]
        if known is None:
            stops = "nothing is begun until it works again" if part in _REQUIRED else "work goes on without"
            _log.error("{part} do not work: {reason}; {stops}", part=part.value, reason=reason, stops=stops)
            self._faults[part] = PartFault(part, self.clock(), reason, check)
        else:
            self._faults[part] = PartFault(part, known.since, reason, check)

    def blame(self, error: BaseException, part: ServicePart, check: PartCheck | None = None) -> AttemptFailure:
        """The failure of an attempt that could not be begun; the part is reported if the error is the machine's.

        Args:
            error: what was raised.
            part: what was being used.
            check: as of `report`.

        Returns:
            What the user is told: no path, no host, no SQL.
        """
        if isinstance(error, DatabaseUnavailableError):
            self.report(ServicePart.DATABASE, str(error))
            why = "the database of the service cannot be used"
        elif isinstance(error, OSError):
            self.report(part, f"{type(error).__name__}: {error}", check)
            why = f"{part.value} of the service do not work: {error.strerror or type(error).__name__}"
        else:
            why = f"a fault of the service ({type(error).__name__}): its log says more"
        return AttemptFailure(FailureScope.SERVICE, FailureCode.INTERNAL, why)

    async def _check(self) -> None:
        failed = self.log_errors()
        if failed > self._log_errors_seen:
            self._log_errors_seen = failed
            self.report(ServicePart.ATTEMPT_LOGS, f"{failed} writes have failed so far")
        for fault in self.faults:
            try:
                await fault.check()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                self._faults[fault.part] = PartFault(fault.part, fault.since, reason, fault.check)
                continue
            if self._faults.get(fault.part) is fault:
                del self._faults[fault.part]
                _log.info("{part} work again", part=fault.part.value)
                if self.may_claim:
                    self.on_change()


def is_exhausted(number: int | None) -> bool:
    """Whether an error number says that this machine lacks something."""
    return number in _EXHAUSTED


def check_resources() -> None:
    """See that a process of this account could be given descriptors and temporary files; blocks.

    Raises:
        OSError: it could not.
    """
    taken: list[int] = []
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(_FREE_BYTES))
            file.flush()
            taken.extend(os.dup(file.fileno()) for _ in range(_FREE_DESCRIPTORS))
    finally:
        for descriptor in taken:
            os.close(descriptor)


#: Seconds for which the rates of a job are kept while nothing of it runs: between two batches, or before a retry.
_KEPT_IDLE_S = 60.0
#: Jobs of which nothing runs that are kept at most.
_MOST_IDLE = 1000
#: Seconds without a byte after which a transfer does not move any more, whatever was said last.
_STALLED_AFTER_S = 15.0
#: Jobs that are remembered as listed.
_MOST_LISTED = 10_000


@frozen
class ReportedProgress:
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
    reported: ReportedProgress | None = None


@define(eq=False)
class _WatchedJob:
    bytes_rate: SmoothedRate
    files_rate: SmoothedRate
    elements: dict[int, _RunningElement] = field(factory=dict)
    #: Bytes that the running elements have moved, all together.
    moving: int = 0
    #: The most bytes, proven and moving, that were told since something was last lost.
    reported: int = 0


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

    def update(self, job_id: int, element_id: int, progress: ReportedProgress) -> None:
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
            job.reported = 0
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
        if now_s - element.changed_s <= _STALLED_AFTER_S:
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
        job.reported = max(job.reported, proven + job.moving)
        return Moving(max(job.reported - proven, 0), job.bytes_rate.at(now_s), job.files_rate.at(now_s))

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

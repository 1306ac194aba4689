"""Waiting for a job: often at first, then less often, and over a restart of the service."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from pdm.workqueue.client.errors import (
    ConnectionBrokenError,
    JobTimeoutError,
    TemporaryRefusalError,
    UnreachableError,
)
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.wire.responses import JobView

#: Seconds between two questions: a short job is seen to end at once, a long one costs the service little.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _GROWTH = 0.05, 2.0, 1.3


class Waiting:
    """Asks for a job until it has ended.

    Args:
        reactor: keeps time.
        ask: fetches the job.
        on_progress: told of each answer.
        patience_s: seconds without any answer after which the last error is raised.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        ask: Callable[[], Deferred[JobView]],
        on_progress: Callable[[JobView], object],
        patience_s: float,
    ) -> None:
        self._reactor = reactor
        self._ask = ask
        self._on_progress = on_progress
        self._patience_s = patience_s

    async def until_end(self, job_id: int, timeout_s: float | None) -> JobView:
        """The ended job.

        Raises:
            JobTimeoutError: the time is up.
            WorkqueueClientError: the service says no, or was away for too long.
        """
        begun = heard = self._reactor.seconds()
        pause = _FIRST_PAUSE_S
        job: JobView | None = None
        while True:
            try:
                job = await self._ask()
            except (UnreachableError, ConnectionBrokenError, TemporaryRefusalError):
                # A service that never answered is not there; one that did may be restarting.
                if job is None or self._reactor.seconds() - heard > self._patience_s:
                    raise
            else:
                heard = self._reactor.seconds()
                self._on_progress(job)
                if JobStatus.parse(job.status).is_final:
                    return job
            if timeout_s is not None:
                left = begun + timeout_s - self._reactor.seconds()
                if left <= 0:
                    raise JobTimeoutError(
                        f"job {job_id} had not ended after {timeout_s:g} s",
                        "It goes on: wait longer, or cancel it.",
                        job,
                    )
                pause = min(pause, left)
            await deferLater(self._reactor, pause)
            pause = min(pause * _GROWTH, _LONGEST_PAUSE_S)

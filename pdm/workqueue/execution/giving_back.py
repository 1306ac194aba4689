"""Returns to the queue what running batches have not begun, while streams are idle, here or at other nodes.

A batch is claimed as a whole, and should take about two seconds. Where its elements are slower than those before, it
would keep them from streams that have nothing to do. This is looked at now and then, in memory: batches that take as
long as they should are left alone, and nothing is asked of the database.
"""

from __future__ import annotations

import math

from attrs import define, field
from twisted.internet.interfaces import IReactorTime

from pdm.workqueue.execution.batch import RunningBatch
from pdm.workqueue.execution.claimer import Claimer
from pdm.workqueue.execution.executor import Executor
from pdm.workqueue.telemetry.background import Periodic

_LOOK_EVERY_S = 0.5
#: A batch is left alone until its helper has worked on it for so many seconds; and it keeps what takes as long.
_LEAST_S = 1.0


@define(eq=False, kw_only=True)
class GivingBack:
    """Gives idle streams their part of what is claimed here."""

    reactor: IReactorTime
    executor: Executor
    claimer: Claimer
    _periodic: Periodic = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._periodic = Periodic(self.reactor, "give back to idle streams", _LOOK_EVERY_S, self._look)

    def start(self) -> None:
        self._periodic.start()

    async def stop(self) -> None:
        await self._periodic.stop()

    def _look(self) -> None:
        streams = self.executor.streams
        idle_here = streams.free if self.claimer.is_idle else 0
        idle = idle_here + streams.idle_elsewhere
        if not idle:
            return
        is_idle_elsewhere = idle > idle_here
        slow = [
            running
            for running, slot in self.executor.on_streams()
            if self._is_slow(running) and streams.has_room(slot, elsewhere=is_idle_elsewhere)
        ]
        # All streams, those of these batches and the idle ones, get equal parts.
        kept_part = len(slow) / (len(slow) + idle)
        for running in slow:
            self._return_part(running, kept_part)

    def _is_slow(self, running: RunningBatch) -> bool:
        """Whether what has not begun takes longer than a whole batch should."""
        begun, seconds = running.pace()
        if seconds < _LEAST_S:
            return False
        return seconds * len(running.not_begun()) > self.executor.batch_sizes.time_s(running.batch.job) * max(begun, 1)

    def _return_part(self, running: RunningBatch, kept_part: float) -> None:
        waiting = running.not_begun()
        begun, seconds = running.pace()
        keeps = max(math.ceil(len(waiting) * kept_part), int(begun / seconds * _LEAST_S))
        running.return_elements(waiting[keeps:])
        self.executor.batch_sizes.shorten(running)

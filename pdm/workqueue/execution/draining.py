"""Drain of this node: operators stop it from starting anything, so that it can be stopped without losing work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.store import node_work
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.store.node_work import DrainOrder
from pdm.workqueue.telemetry.background import DueTimer

#: Seconds between two looks at the order, beside those that a signal causes.
_LOOK_EVERY_S = 5.0


@define(eq=False, kw_only=True)
class Drain:
    """Whether this node is drained. The order is kept in the database, so it outlives a restart.

    Attributes:
        incarnation: of this node.
        requeue_not_begun: returns to the queue what was claimed and has not begun.
        requeue_all: ends all that runs; the elements go back to the queue.
        on_resume: called when work may be started again.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    incarnation: str
    requeue_not_begun: Callable[[], None]
    requeue_all: Callable[[], Awaitable[None]]
    on_resume: Callable[[], None]
    _order: DrainOrder | None = None
    _given_back: bool = False
    _timer: DueTimer | None = None
    _log: Logger = field(factory=Logger)

    @property
    def is_ordered(self) -> bool:
        """Whether nothing may be started."""
        return self._order is not None

    @property
    def message(self) -> str | None:
        """Why nothing may be started; None if it may."""
        return None if self._order is None else self._order.message

    async def start(self) -> None:
        """Read the order, before anything is started."""
        await self._look()
        self._timer = DueTimer(self.reactor, "drain of this node", _LOOK_EVERY_S, self._look)
        self._timer.start()

    async def stop(self) -> None:
        if self._timer is not None:
            await self._timer.stop()

    def look_soon(self) -> None:
        """The order may have changed."""
        if self._timer is not None:
            self._timer.wake()

    async def _look(self) -> float:
        """Follow the order; returns seconds until the next look."""
        try:
            order = await self.database.read(
                "read the drain of this node", node_work.drain_of, self.incarnation, self.clock()
            )
        except DatabaseUnavailableError:
            return _LOOK_EVERY_S
        before, self._order = self._order, order
        if order is None:
            self._given_back = False
            if before is not None:
                self._log.info("this node is not drained any more: it starts work again")
                self.on_resume()
            return _LOOK_EVERY_S
        if before is None or before.message != order.message:
            self._log.warn("this node is drained: {message}; it starts nothing more", message=order.message)
        self.requeue_not_begun()
        if order.left_s is None:
            self._given_back = False
            return _LOOK_EVERY_S
        if order.left_s > 0:
            self._given_back = False
            return min(order.left_s, _LOOK_EVERY_S)
        if not self._given_back:
            self._given_back = True
            self._log.warn("the deadline of the drain is over: what still runs goes back to the queue")
            await self.requeue_all()
        return _LOOK_EVERY_S

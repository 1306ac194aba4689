"""A node that claims nothing because of a fault of its own says why, and returns what has not begun to the others."""

from __future__ import annotations

from attrs import define, field
from twisted.internet.interfaces import IReactorTime

from pdm.workqueue.execution.executor import Executor
from pdm.workqueue.execution.lease import Lease
from pdm.workqueue.execution.service_health import ServiceHealth
from pdm.workqueue.store import nodes
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseClosedError, DatabaseUnavailableError
from pdm.workqueue.telemetry.background import DueTimer

_LOOK_EVERY_S, _AGAIN_AFTER_S = 0.2, 1.0
_LONGEST_REASON = 300


@define(eq=False, kw_only=True)
class SickNode:
    """Says whether this node is sick; does nothing on SQLite, where there is no other one."""

    reactor: IReactorTime
    database: Database
    incarnation: str
    lease: Lease
    service_health: ServiceHealth
    executor: Executor
    #: As it stands in the database for this `Lease.generation`.
    _said: str | None = None
    _generation: int = 0
    _timer: DueTimer = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._timer = DueTimer(self.reactor, "say whether this node is sick", _AGAIN_AFTER_S, self._look)

    def start(self) -> None:
        if self.database.is_shared:
            self._timer.start()

    async def stop(self) -> None:
        await self._timer.stop()

    async def _look(self) -> float:
        if not self.lease.is_held or self.database.unavailable is not None:
            # Nobody could be told.
            return _LOOK_EVERY_S
        if self.lease.generation != self._generation:
            # Who takes a lease counts as healthy.
            self._said, self._generation = None, self.lease.generation
        reason = self._reason()
        if reason is not None:
            self.executor.requeue_not_begun()
        if reason != self._said:
            try:
                # Other transactions may take long, or wait: that may be the fault.
                await self.database.run_for_lease(
                    "say whether this node is sick", nodes.set_sick, self.incarnation, reason
                )
            except (DatabaseUnavailableError, DatabaseClosedError):
                return _AGAIN_AFTER_S
            self._said = reason
        return _LOOK_EVERY_S

    def _reason(self) -> str | None:
        if self.service_health.may_claim:
            return None
        return ", ".join(
            f"{fault.part.value}: {fault.reason}"[:_LONGEST_REASON] for fault in self.service_health.faults
        )

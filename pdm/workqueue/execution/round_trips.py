"""Whether the connection of this node to the database is slow, while those of other nodes are not.

Each transaction takes several round trips, and keeps rows locked meanwhile. So a node whose way to the database is slow
would delay what other nodes could do at once, and lose its lease now and then. It claims nothing until its connection
is fast again. If the database is slow for all nodes, none stops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from attrs import define, field
from twisted.internet.interfaces import IReactorTime

from pdm.workqueue.domain.node_reports import NodeReport
from pdm.workqueue.execution.service_health import PartFaultyError, ServiceHealth, ServicePart
from pdm.workqueue.store import nodes
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseClosedError, DatabaseUnavailableError
from pdm.workqueue.telemetry.background import Periodic

_MEASURE_EVERY_S = 1.0
#: Round trips that are looked at: all must be slow, or all fast, to change the verdict.
_LATEST = 3
#: Seconds. From the first on a round trip is slow; up to the second it is fast. A renewal of the lease takes several.
_SLOW_S, _FAST_S = 0.25, 0.1


class ConnectionSlowError(PartFaultyError):
    """The connection to the database is slow."""


@define(eq=False, kw_only=True)
class RoundTrips:
    """Measures round trips to the database, and reports a connection that is slow.

    Attributes:
        others: the latest reports of the other nodes.
        is_slow: as measured; what follows from it depends on the other nodes.
    """

    reactor: IReactorTime
    database: Database
    service_health: ServiceHealth
    others: Callable[[], Sequence[NodeReport]]
    is_slow: bool = field(default=False, init=False)
    #: The fastest of the round trips for which it was found to be slow.
    _slow_s: float = field(default=0.0, init=False)
    _latest: deque[float] = field(init=False, factory=lambda: deque(maxlen=_LATEST))
    _periodic: Periodic = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._periodic = Periodic(self.reactor, "measure round trips", _MEASURE_EVERY_S, self._measure)

    def start(self) -> None:
        if self.database.is_shared:
            self._periodic.start()

    async def stop(self) -> None:
        await self._periodic.stop()

    async def _measure(self) -> None:
        if not self.others():
            self.is_slow = False
            self._latest.clear()
            return
        try:
            # Where nothing queues: with slow connections, other transactions wait for each other.
            self._latest.append(await self.database.run_for_lease("measure a round trip", nodes.round_trip_s))
        except (DatabaseUnavailableError, DatabaseClosedError):
            # An outage is reported by the database itself.
            return
        if len(self._latest) == _LATEST:
            if not self.is_slow and min(self._latest) >= _SLOW_S:
                self.is_slow, self._slow_s = True, min(self._latest)
            elif max(self._latest) <= _FAST_S:
                self.is_slow = False
        reason = self._reason()
        if reason is not None:
            self.service_health.report(ServicePart.CONNECTIONS, reason, self._check)

    def _reason(self) -> str | None:
        """Why nothing is claimed; None if the connection is fast, or no other node that claims has a faster one."""
        if not (self.is_slow and any(other.claims and not other.slow for other in self.others())):
            return None
        return f"a round trip takes {self._slow_s:.2f} s, and other nodes have faster ones"

    async def _check(self) -> None:
        reason = self._reason()
        if reason is not None:
            raise ConnectionSlowError(reason)

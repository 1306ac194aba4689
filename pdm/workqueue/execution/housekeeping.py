"""Forgets what is only kept for a while."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.store import purging
from pdm.workqueue.store.database import Database, DatabaseClosedError
from pdm.workqueue.telemetry.background import Periodic

#: For so long a request with an ``Idempotency-Key`` may be repeated.
KEYS_KEPT = timedelta(days=7)
_PERIOD_S = 3600.0
_AT_ONCE = 1000


@define(eq=False)
class Housekeeping:
    """Purges the database once an hour, a little in each transaction."""

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    _periodic: Periodic | None = None
    _log: Logger = field(factory=Logger)

    def start(self) -> None:
        self._periodic = Periodic(self.reactor, "forget what is old", _PERIOD_S, self.purge)
        self._periodic.start()

    async def stop(self) -> None:
        if self._periodic is not None:
            await self._periodic.stop()

    async def purge(self) -> None:
        """Forget the keys of requests that are older than `KEYS_KEPT`; a part that fails does not keep the others."""
        before = self.clock() - KEYS_KEPT
        after, count = (0, ""), 0
        while True:
            keys = await self.database.read("find old keys", purging.old_keys, before, after, _AT_ONCE)
            if not keys:
                break
            after = keys[-1]
            try:
                await self.database.run("forget old keys", purging.forget_keys, keys, before)
            except DatabaseClosedError:
                raise
            except Exception:
                self._log.failure("{count} old Idempotency-Keys could not be forgotten", count=len(keys))
            else:
                count += len(keys)
        if count:
            self._log.info("{count} Idempotency-Keys of old requests are forgotten", count=count)

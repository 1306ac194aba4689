"""Whether this daemon can do its work now, and why not.

Beyond `ServiceHealth`, which learns of faults from work, the parts are tried: a transaction is committed, a file is
written beside the logs, a helper is started. Each check has a time limit, and its result is kept for some seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from attrs import Factory, define, field

from pdm.workqueue.agents.pool import AgentKind
from pdm.workqueue.execution.executor import Executor
from pdm.workqueue.execution.lease import Lease
from pdm.workqueue.execution.service_health import ServicePart
from pdm.workqueue.movers.dummy import DummyMover
from pdm.workqueue.store.leases import write_probe
from pdm.workqueue.store.schema_revisions import check_schema
from pdm.workqueue.telemetry.background import SharedCall, run_in_thread
from pdm.workqueue.telemetry.logging import bounded, escaped, redacted

#: Seconds for which the result of a check is kept: a transaction is cheap, a helper takes a fraction of a CPU second.
_DATABASE_KEPT_S, _LOGS_KEPT_S, _HELPER_KEPT_S, _FAILURE_KEPT_S = 2.0, 5.0, 60.0, 2.0
#: Seconds for which a request waits for the result of a check.
_LIMIT_S, _HELPER_LIMIT_S = 2.0, 5.0
_LONGEST_REASON = 500


class Stage(enum.Enum):
    """Where the daemon stands in its life."""

    STARTING = "the daemon is starting"
    RUNNING = ""
    STOPPING = "the daemon is stopping"


@define(eq=False, kw_only=True)
class Readiness:
    """Finds the reasons why this daemon is not ready."""

    executor: Executor
    lease: Lease
    stage: Stage = Stage.STARTING
    _checks: Mapping[str, SharedCall[None]] = field(
        init=False, default=Factory(lambda self: self._make_checks(), takes_self=True)
    )

    def started(self) -> None:
        """All parts have started."""
        self.stage = Stage.RUNNING

    async def stop(self) -> None:
        """The daemon begins to stop; waits for running checks, which use its parts."""
        self.stage = Stage.STOPPING
        await self._checks["helpers"].over()

    async def reasons(self) -> list[str]:
        """Why the daemon is not ready, a line each; empty if it is ready."""
        if self.stage is not Stage.RUNNING:
            return [self.stage.value]
        faults = self.executor.context.service_health.faults
        # A lock timeout now and then is no reason to send clients elsewhere: all daemons would meet it.
        found = {each.part.value: each.reason for each in faults if each.part is not ServicePart.TRANSACTIONS}
        if not self.lease.is_held:
            found["lease"] = "the lease of this daemon has ended: nothing is claimed"
        for name, check in self._checks.items():
            outcome = await check.outcome()
            if outcome.error is not None:
                found[name] = str(outcome.error) or type(outcome.error).__name__
        return [f"{name}: {escaped(bounded(redacted(reason), _LONGEST_REASON))}" for name, reason in found.items()]

    def _make_checks(self) -> Mapping[str, SharedCall[None]]:
        reactor = self.executor.context.reactor

        def shared(function: Any, kept_s: float, limit_s: float = _LIMIT_S) -> SharedCall[None]:
            return SharedCall(reactor, function, kept_s=kept_s, failure_kept_s=_FAILURE_KEPT_S, limit_s=limit_s)

        return {
            "database": shared(self._check_database, _DATABASE_KEPT_S),
            "attempt logs": shared(self._check_logs, _LOGS_KEPT_S),
            "helpers": shared(self._check_helper, _HELPER_KEPT_S, _HELPER_LIMIT_S),
        }

    async def _check_database(self) -> None:
        await self.executor.database.run("is the database written", write_probe, self.lease.worker.incarnation)
        await self.executor.database.read("is the schema current", check_schema)

    async def _check_logs(self) -> None:
        await run_in_thread(self.executor.context.logs.check)

    async def _check_helper(self) -> None:
        await self.executor.pool.try_start(AgentKind(DummyMover().helper, "", {}))

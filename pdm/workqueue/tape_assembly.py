"""Part of the composition root: visits of elements that wait for tape systems."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.waits import WaitPolicy
from pdm.workqueue.execution.preparing import Preparation
from pdm.workqueue.execution.staging import TapeVisits
from pdm.workqueue.execution.tape import TapeApis
from pdm.workqueue.execution.waits import WaitPoller
from pdm.workqueue.store.database import Database

#: Requests of one visit of a tape API at most, and seconds until a helper for one has started.
_REQUESTS_OF_VISIT, _HELPER_START_S = 6, 35.0


def wait_policy(settings: Settings) -> WaitPolicy:
    """How tape systems are polled."""
    tape = settings.tape
    return WaitPolicy(
        poll_s=tape.poll_s,
        longest_poll_s=max(tape.longest_poll_s, tape.poll_s),
        stage_timeout_s=tape.stage_timeout_s,
        archive_timeout_s=tape.archive_timeout_s,
        lifetime_s=tape.lifetime_s,
    )


def wait_poller(
    *,
    reactor: Any,
    settings: Settings,
    database: Database,
    clock: Callable[[], datetime],
    preparation: Preparation,
    incarnation: str,
    on_work: Callable[[], None],
) -> WaitPoller:
    """Visits of elements that wait for tape systems."""
    policy, timeout_s = wait_policy(settings), settings.tape.timeout_s
    visits = TapeVisits(
        database=database,
        sites=preparation.sites,
        apis=TapeApis(preparation=preparation, pool=preparation.pool, timeout_s=timeout_s),
        clock=clock,
        policy=policy,
    )
    return WaitPoller(
        reactor=reactor,
        database=database,
        clock=clock,
        policy=policy,
        look=visits.look,
        incarnation=incarnation,
        # A visit is a few requests; each may wait for a helper to start.
        lease_s=_REQUESTS_OF_VISIT * (timeout_s + _HELPER_START_S),
        on_work=on_work,
    )

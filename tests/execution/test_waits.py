"""Visits of waits in which the service itself fails."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.holds import Wait, WaitingElement, WaitPolicy
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.execution.waits import WaitPoller
from pdm.workqueue.store import wait_visits
from pdm.workqueue.store.wait_visits import WaitVisit
from tests.store.stores import Store
from tests.store.test_waits import count_rows, gathered, staged


async def _broken(wait: Wait, job: JobRecord, members: Sequence[WaitingElement]) -> WaitVisit:
    raise ValueError("a fault")


def test_a_fault_of_the_service_holds_nothing_longer_than_its_job_asks_for(
    store: Store, lost_errors: list[LogEvent]
) -> None:
    store.worker()
    job = staged(store, 2)
    (wait,) = gathered(store)
    nobody: Any = None
    poller = WaitPoller(
        reactor=Clock(),
        database=nobody,
        clock=lambda: store.now,
        policy=WaitPolicy(
            poll_s=1.0, longest_poll_s=60.0, stage_timeout_s=86400.0, archive_timeout_s=86400.0, lifetime_s=86400.0
        ),
        look=_broken,
        incarnation="w",
        lease_s=30.0,
        on_work=lambda: None,
    )

    def visit() -> None:
        members = store.run(wait_visits.members, wait)
        found: list[WaitVisit] = []
        Deferred.fromCoroutine(poller._found(wait, job, members)).addCallback(found.append)
        store.run(wait_visits.settle_visit, found[0], store.now)

    visit()
    assert store.job(job.id).counters.held == 2
    store.now += timedelta(days=1)
    visit()
    assert store.job(job.id).counters.failed == 2
    failure = store.element(job.id, 1).failure
    assert failure is not None
    assert (store.element(job.id, 1).status, failure.code) == (JobStatus.FAILED, FailureCode.INTERNAL)
    assert count_rows(store) == (0, 0)
    assert len(lost_errors) == 2
    lost_errors.clear()

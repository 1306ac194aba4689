"""Waiting for a job: how often it asks, what it survives, when it gives up. Time is a Clock; the service a script."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from pdm.workqueue.client.connection import JobPoller
from pdm.workqueue.client.errors import (
    ConnectionBrokenError,
    InvalidRequestError,
    JobTimeoutError,
    NotFoundError,
    UnreachableError,
    WorkqueueClientError,
)
from pdm.workqueue.wire.responses import JobView
from tests.client.samples import job_view

AWAY = UnreachableError("queue:1 cannot be reached")


class Service:
    """Answers with each of a list in turn, the last one for ever, and notes when it was asked."""

    def __init__(self, clock: Clock, answers: Sequence[str | WorkqueueClientError]) -> None:
        self.clock = clock
        self.answers = list(answers)
        self.asked_at: list[float] = []
        self.waits: list[float] = []

    def __call__(self, wait_s: float) -> Deferred[JobView]:
        self.asked_at.append(self.clock.seconds())
        self.waits.append(wait_s)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return fail(answer) if isinstance(answer, WorkqueueClientError) else succeed(job_view(status=answer))


def wait(
    answers: Sequence[str | WorkqueueClientError], timeout_s: float | None = None, seconds: float = 0
) -> tuple[Service, list[JobView | Failure], list[str]]:
    clock = Clock()
    service = Service(clock, answers)
    seen: list[str] = []
    waiting = JobPoller(clock, fetch_job=service, on_progress=lambda job: seen.append(job.status), outage_s=60)
    results: list[JobView | Failure] = []
    Deferred.fromCoroutine(waiting.until_end(7, timeout_s)).addBoth(results.append)
    clock.pump([0.01] * round(seconds * 100))
    return service, results, seen


def test_an_ended_job_is_back_at_once() -> None:
    service, results, seen = wait(["DONE"])
    assert [job.status for job in results if isinstance(job, JobView)] == ["DONE"]
    assert service.asked_at == [0.0]
    assert seen == ["DONE"]


@pytest.mark.parametrize("status", ["DONE", "FAILED", "CANCELLED"])
def test_each_final_status_ends_the_waiting(status: str) -> None:
    _, results, seen = wait(["SUBMITTED", "RUNNING", "HELD", status], seconds=2)
    assert len(results) == 1
    assert seen == ["SUBMITTED", "RUNNING", "HELD", status]


def test_pauses_grow_up_to_two_seconds() -> None:
    service, results, _ = wait(["RUNNING"], seconds=60)
    pauses = [later - earlier for earlier, later in pairwise(service.asked_at)]
    assert pauses[0] < 0.1
    assert all(later >= earlier - 0.02 for earlier, later in pairwise(pauses))
    assert 1.9 < pauses[-1] < 2.1
    assert not results


def test_the_service_is_asked_to_wait_for_the_next_status() -> None:
    service, _, _ = wait(["SUBMITTED", "RUNNING", "DONE"])
    # A change is followed at once by the next question.
    assert service.asked_at == [0.0, 0.0, 0.0]
    assert service.waits[0] == 0.0
    assert all(seconds > 0 for seconds in service.waits[1:])


def test_an_earlier_service_is_asked_without_waiting() -> None:
    refusal = InvalidRequestError(400, "Invalid input", "unknown query parameter 'wait'")
    service, results, _ = wait(["RUNNING", refusal, "RUNNING", "DONE"], seconds=2)
    assert [type(result) for result in results] == [JobView]
    assert service.waits[1] > 0
    assert service.waits[2:] == [0.0, 0.0]


def test_the_time_is_up_exactly_then() -> None:
    service, results, _ = wait(["RUNNING"], timeout_s=5, seconds=6)
    (failure,) = results
    assert isinstance(failure, Failure)
    assert isinstance(failure.value, JobTimeoutError)
    assert failure.value.job.status == "RUNNING"
    assert service.asked_at[-1] == pytest.approx(5, abs=0.03)


def test_a_restart_of_the_service_is_waited_for() -> None:
    broken = ConnectionBrokenError("broke")
    _, results, seen = wait(["RUNNING", broken, AWAY, AWAY, "RUNNING", "DONE"], seconds=5)
    assert [type(result) for result in results] == [JobView]
    assert seen == ["RUNNING", "RUNNING", "DONE"]


def test_a_service_that_stays_away_is_reported() -> None:
    service, results, _ = wait(["RUNNING", AWAY], seconds=70)
    (failure,) = results
    assert isinstance(failure, Failure)
    assert failure.value is AWAY
    assert 60 < service.asked_at[-1] < 63


def test_a_service_that_was_never_there_is_reported_at_once() -> None:
    service, results, _ = wait([AWAY])
    assert isinstance(results[0], Failure)
    assert service.asked_at == [0.0]


def test_a_refusal_is_final() -> None:
    _, results, _ = wait(["RUNNING", NotFoundError(404, "Not found", "there is no job 7")], seconds=1)
    assert isinstance(results[0], Failure)
    assert "there is no job 7" in str(results[0].value)

"""Background tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent

from pdm.workqueue.telemetry.background import Background, Periodic, start_background


def test_a_failure_is_logged_under_its_name(lost_errors: list[LogEvent], result_of: Callable[[Any], Any]) -> None:
    async def work() -> None:
        raise RuntimeError("bad")

    assert result_of(start_background("sweep", work())) is None
    (event,) = lost_errors
    assert event["name"] == "sweep"
    assert event["log_failure"].check(RuntimeError)
    lost_errors.clear()


def test_cancelled_work_is_no_failure(result_of: Callable[[Any], Any]) -> None:
    ended = []

    async def work() -> None:
        try:
            await Deferred[None]()
        finally:
            ended.append(True)

    running = start_background("wait", work())
    running.cancel()
    assert result_of(running) is None
    assert ended == [True]


def test_an_owner_waits_for_what_it_has_started_and_for_what_that_starts(result_of: Callable[[Any], Any]) -> None:
    owner = Background()
    first: Deferred[None] = Deferred()
    second: Deferred[None] = Deferred()

    async def wait_for(one: Deferred[None]) -> None:
        await one
        if one is first:
            owner.start("second", wait_for(second))

    assert result_of(owner.over()) is None
    owner.start("first", wait_for(first))
    over = Deferred.fromCoroutine(owner.over())
    first.callback(None)
    assert not over.called
    second.callback(None)
    assert result_of(over) is None


class Runs:
    """A function for `Periodic` whose runs are counted and ended by the test."""

    def __init__(self) -> None:
        self.count = 0
        self.running: list[Deferred[None]] = []

    async def __call__(self) -> None:
        self.count += 1
        run: Deferred[None] = Deferred()
        self.running.append(run)
        await run

    def end(self) -> None:
        self.running.pop(0).callback(None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_runs_never_overlap(clock: Clock) -> None:
    runs = Runs()
    periodic = Periodic(clock, "sweep", 10, runs)
    periodic.start()
    assert runs.count == 0
    clock.advance(10)
    clock.pump([10] * 5)
    assert runs.count == 1
    runs.end()
    clock.advance(9)
    assert runs.count == 1
    clock.advance(1)
    assert runs.count == 2


def test_a_failed_run_is_logged_and_the_next_comes(clock: Clock, lost_errors: list[LogEvent]) -> None:
    runs = []

    def fail() -> None:
        runs.append(clock.seconds())
        raise RuntimeError("bad")

    Periodic(clock, "sweep", 10, fail).start()
    clock.pump([10, 10, 10])
    assert runs == [10, 20, 30]
    assert [event["name"] for event in lost_errors] == ["sweep"] * 3
    lost_errors.clear()


def test_a_plain_function_will_do(clock: Clock) -> None:
    runs: list[float] = []
    Periodic(clock, "sweep", 1, lambda: runs.append(clock.seconds())).start()
    clock.pump([1, 1])
    assert runs == [1, 2]


def test_stop_waits_for_the_current_run(clock: Clock, result_of: Callable[[Any], Any]) -> None:
    runs = Runs()
    periodic = Periodic(clock, "sweep", 10, runs)
    periodic.start()
    clock.advance(10)
    stopping = Deferred.fromCoroutine(periodic.stop())
    assert not stopping.called
    runs.end()
    result_of(stopping)
    assert clock.getDelayedCalls() == []


def test_stop_between_runs(clock: Clock, result_of: Callable[[Any], Any]) -> None:
    periodic = Periodic(clock, "sweep", 10, Runs())
    periodic.start()
    result_of(periodic.stop())
    assert clock.getDelayedCalls() == []
    result_of(periodic.stop())


def test_a_stop_from_inside_a_run_does_not_plan_another(clock: Clock) -> None:
    stops: list[Deferred[None]] = []

    def stop() -> None:
        stops.append(Deferred.fromCoroutine(periodic.stop()))

    periodic = Periodic(clock, "once", 1, stop)
    periodic.start()
    clock.advance(1)
    assert [each.called for each in stops] == [True]
    assert clock.getDelayedCalls() == []


def test_starting_twice_is_once(clock: Clock) -> None:
    runs: list[int] = []
    periodic = Periodic(clock, "sweep", 1, lambda: runs.append(1))
    periodic.start()
    periodic.start()
    clock.advance(1)
    assert runs == [1]

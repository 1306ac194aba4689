"""The order in which parts start and stop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent
from twisted.python.failure import Failure

from pdm.workqueue.services import OrderedServices


class Daemon:
    """Services whose parts write down what happens, and wait where told to."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.waits: dict[str, Deferred[None]] = {}
        self.fails: set[str] = set()
        self.failures: list[Failure] = []
        self.services = OrderedServices(lambda: self.events.append("ready"), self._failed)
        for name in ("a", "b", "c"):
            self.services.add(
                name, start=partial(self._step, f"start {name}"), stop=partial(self._step, f"stop {name}")
            )

    async def _step(self, step: str) -> None:
        self.events.append(step)
        if step in self.fails:
            raise RuntimeError(step)
        if step in self.waits:
            await self.waits[step]
            self.events.append(f"{step} done")

    def _failed(self, failure: Failure) -> None:
        self.events.append("failed")
        self.failures.append(failure)


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


ResultOf = Callable[[Any], Any]


def test_in_order_and_back(daemon: Daemon, result_of: ResultOf) -> None:
    daemon.services.startService()
    assert daemon.events == ["start a", "start b", "start c", "ready"]
    daemon.events.clear()
    result_of(daemon.services.stopService())
    assert daemon.events == ["stop c", "stop b", "stop a"]


def test_each_waits_for_the_one_before(daemon: Daemon, result_of: ResultOf) -> None:
    daemon.waits = {"start b": Deferred(), "stop b": Deferred()}
    daemon.services.startService()
    assert daemon.events == ["start a", "start b"]
    daemon.waits["start b"].callback(None)
    assert daemon.events[2:] == ["start b done", "start c", "ready"]
    stopping = daemon.services.stopService()
    assert daemon.events[5:] == ["stop c", "stop b"]
    assert not stopping.called
    daemon.waits["stop b"].callback(None)
    result_of(stopping)
    assert daemon.events[-1] == "stop a"


def test_a_failed_start_stops_what_had_started(daemon: Daemon, result_of: ResultOf) -> None:
    daemon.fails = {"start b"}
    daemon.services.startService()
    assert daemon.events == ["start a", "start b", "stop a", "failed"]
    assert daemon.failures[0].check(RuntimeError)
    result_of(daemon.services.stopService())
    assert daemon.events.count("stop a") == 1


def test_a_failed_stop_does_not_keep_the_others_running(
    daemon: Daemon, result_of: ResultOf, lost_errors: list[LogEvent]
) -> None:
    daemon.services.startService()
    daemon.fails = {"stop b"}
    result_of(daemon.services.stopService())
    assert daemon.events[-2:] == ["stop b", "stop a"]
    (event,) = lost_errors
    assert event["part"] == "b"
    lost_errors.clear()


def test_a_stop_during_the_start(daemon: Daemon, result_of: ResultOf) -> None:
    daemon.waits = {"start b": Deferred()}
    daemon.services.startService()
    stopping = daemon.services.stopService()
    assert not stopping.called
    daemon.waits["start b"].callback(None)
    result_of(stopping)
    assert daemon.events == ["start a", "start b", "start b done", "stop b", "stop a"]


def test_a_stop_while_the_last_part_starts_is_not_ready(daemon: Daemon, result_of: ResultOf) -> None:
    daemon.waits = {"start c": Deferred()}
    daemon.services.startService()
    stopping = daemon.services.stopService()
    daemon.waits["start c"].callback(None)
    result_of(stopping)
    assert "ready" not in daemon.events
    assert daemon.events[-3:] == ["stop c", "stop b", "stop a"]


def test_plain_functions_are_parts_too(result_of: ResultOf) -> None:
    events: list[str] = []
    services = OrderedServices(lambda: events.append("ready"), lambda _: None)
    services.add("plain", start=lambda: events.append("start"), stop=lambda: events.append("stop"))
    services.startService()
    result_of(services.stopService())
    assert events == ["start", "ready", "stop"]


def test_a_fault_in_the_callback_is_logged(result_of: ResultOf, lost_errors: list[LogEvent]) -> None:
    def broken(_: Failure) -> None:
        raise KeyError("x")

    services = OrderedServices(lambda: 1 / 0, broken)  # type: ignore[arg-type]
    services.startService()
    result_of(services.stopService())
    assert len(lost_errors) == 1
    lost_errors.clear()

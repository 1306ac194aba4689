"""The gauge of the reactor's lag, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent, globalLogPublisher

from pdm.workqueue.telemetry.clocks import ReactorLag


@pytest.fixture
def lines() -> Iterator[list[str]]:
    found: list[str] = []

    def observe(event: LogEvent) -> None:
        if event.get("log_namespace") == "pdm.workqueue.telemetry.clocks.ReactorLag":
            found.append(formatEvent(event))

    globalLogPublisher.addObserver(observe)  # type: ignore[arg-type]
    yield found
    globalLogPublisher.removeObserver(observe)  # type: ignore[arg-type]


def test_blocking_calls_are_measured_and_logged_once_a_minute(lines: list[str]) -> None:
    clock = Clock()
    gauge = ReactorLag(clock)
    gauge.start()
    clock.pump([0.02] * 50)
    assert gauge.worst_s < 0.001
    assert lines == []
    clock.advance(0.3)
    assert gauge.worst_s == pytest.approx(0.28, abs=0.001)
    clock.advance(0.2)
    assert lines == ["the reactor was 280 ms late: something blocks it"]
    clock.pump([0.02] * 3100)
    assert lines[1:] == ["the reactor was 180 ms late: something blocks it"]
    gauge.stop()
    gauge.stop()
    assert lines[2:] == ["the reactor was at most 280 ms late"]
    assert not clock.getDelayedCalls()

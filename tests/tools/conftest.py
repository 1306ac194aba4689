"""Directories on the real grid, and tools helpers that are driven directly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdm.testgrid import TestGrid
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.movers import TOOL_MOVERS
from pdm.workqueue.wire.agent_events import AgentEvent, FailedEvent, LogEvent
from tests.grid.conftest import StartHelper, own, shared, sites  # noqa: F401 - fixtures
from tests.helpers.driver import HelperProcess
from tests.protocols.places import require_tools

MODULE = "pdm.workqueue.helpers.main_tools"


@pytest.fixture(autouse=True)
def installed_tools(request: pytest.FixtureRequest) -> None:
    """The tools are installed; for tests on the grid."""
    if request.node.get_closest_marker("grid") is not None:
        require_tools()


def helper_as(grid: TestGrid, **changes: str) -> HelperProcess:
    return HelperProcess(["-m", MODULE], {**grid.environment(), **changes})


@pytest.fixture(scope="session")
def start_helper() -> StartHelper:
    return helper_as


@pytest.fixture
def with_tool(grid: TestGrid, tmp_path: Path) -> Iterator[Callable[[str, str], HelperProcess]]:
    """Starts a helper that finds a script in place of a tool; ``"$REAL"`` in the script is the tool."""
    running: list[HelperProcess] = []

    def start(tool: str, script: str) -> HelperProcess:
        file = tmp_path / tool
        file.write_text(f"#!/bin/bash\nREAL=/usr/bin/{tool}\n{script}\n")
        file.chmod(0o755)
        helper = helper_as(grid, PATH=f"{tmp_path}:{os.defpath}")
        helper.__enter__()
        running.append(helper)
        return helper

    yield start
    for helper in running:
        helper.end()


def judged(event: AgentEvent | None) -> str:
    assert isinstance(event, FailedEvent), event
    failure = TOOL_MOVERS[JobProtocol.GRIDFTP].classify(event.fault)
    return f"{failure.scope} {failure.code}"


def log_of(events: list[AgentEvent], key: int) -> list[str]:
    return [event.text for event in events if isinstance(event, LogEvent) and event.key == key]

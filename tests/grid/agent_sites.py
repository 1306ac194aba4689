"""Directories at both sites, and GridFTP helpers that are driven directly."""

from __future__ import annotations

import os
from pathlib import Path

from pdm.testgrid import TestGrid
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.wire.agent_events import AgentEvent, FailedEvent
from pdm.workqueue.wire.agent_requests import CopyItem
from tests.helpers.driver import HelperProcess, copy_item, put

MODULE = "pdm.workqueue.helpers.main_gridftp"
#: Larger than any machine copies before a test can say stop.
HUGE = 64 * 1024**3


class Sites:
    """A directory of alice's at each of two sites.

    Attributes:
        a: at the source site.
        b: at the destination site.
    """

    def __init__(self, grid: TestGrid, name: str) -> None:
        self.grid = grid
        self.a, self.b = (self._directory(site, name) for site in ("A", "B"))

    def _directory(self, site: str, name: str) -> Path:
        directory = self.grid.sites[site].root / name
        directory.mkdir()
        return self.grid.give(directory)

    def url(self, path: Path) -> str:
        return self.grid.sites["A" if path.is_relative_to(self.a) else "B"].url(path)

    def put(self, path: Path, content: bytes = b"content") -> Path:
        put(path, content)
        for directory in (self.a, self.b):
            self.grid.give(directory)
        return path

    def item(self, source: Path, destination: Path, key: int = 1, attempt: int = 1) -> CopyItem:
        size = source.stat().st_size if source.exists() else 7
        return copy_item(key, self.url(source), self.url(destination), size, attempt)

    def huge(self) -> Path:
        source = self.put(self.a / "huge", b"")
        os.truncate(source, HUGE)
        return source

    def arriving(self) -> int:
        """Bytes of all files at the destination."""
        return sum(path.stat().st_blocks * 512 for path in self.b.rglob("*") if path.is_file())


def helper_as(grid: TestGrid, **changes: str) -> HelperProcess:
    return HelperProcess(["-m", MODULE], {**grid.environment(), **changes})


def judged(event: AgentEvent) -> str:
    assert isinstance(event, FailedEvent), event
    failure = MOVERS[JobProtocol.GRIDFTP].classify(event.fault)
    return f"{failure.scope} {failure.code}"

"""Directories of the tests on the real grid."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attrs import frozen

from pdm.testgrid import TestGrid
from tests.grid.agent_sites import Sites, helper_as
from tests.helpers.driver import HelperProcess

_numbers = itertools.count(1)

StartHelper = Callable[[TestGrid], HelperProcess]


@frozen
class GridDirectories:
    """A fresh directory at each site, owned by alice.

    Attributes:
        grid: where they are.
        a: at site A (number 1).
        b: at site B (number 2).
    """

    grid: TestGrid
    a: Path
    b: Path

    def give(self, path: Path | None = None) -> None:
        """Give alice the files that the test has written; in the directory at A by default."""
        self.grid.give(self.a if path is None else path)


@pytest.fixture
def grid_directories(grid: TestGrid) -> Iterator[GridDirectories]:
    """Empty directories for one test, at both sites; removed afterwards, when both servers are running again."""
    sites = (grid.sites["A"], grid.sites["B"])
    directories = GridDirectories(grid, *(site.root / f"test{next(_numbers)}" for site in sites))
    for directory in (directories.a, directories.b):
        directory.mkdir()
        grid.give(directory)
    yield directories
    for site in sites:
        site.server.thaw()
        if site.server.pid is None:
            site.server.start()
    for directory in (directories.a, directories.b):
        shutil.rmtree(directory)


@pytest.fixture
def sites(grid: TestGrid, request: pytest.FixtureRequest) -> Iterator[Sites]:
    number = getattr(request.config, "gridftp_agent_directories", 0) + 1
    request.config.gridftp_agent_directories = number  # type: ignore[attr-defined]
    made = Sites(grid, f"agent{number}")
    yield made
    for site in grid.sites.values():
        site.server.thaw()
        if site.server.pid is None:
            site.server.start()
    for directory in (made.a, made.b):
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def start_helper() -> StartHelper:
    """Starts the helper under test; other packages override it."""
    return helper_as


@pytest.fixture(scope="module")
def shared(grid: TestGrid, start_helper: StartHelper) -> Iterator[HelperProcess]:
    with start_helper(grid) as running:
        yield running


@pytest.fixture
def own(grid: TestGrid, start_helper: StartHelper) -> Iterator[HelperProcess]:
    """A helper of its own for a test that breaks something."""
    with start_helper(grid) as running:
        yield running

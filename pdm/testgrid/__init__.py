"""A real grid on loopback, for tests, demonstrations and benchmarks; also of other projects.

``TestGrid(directory)`` is the grid as a context manager; ``python -m pdm.testgrid up DIR`` and ``down DIR`` are the
same as commands. ``DIR/grid.json`` describes it.
"""

from __future__ import annotations

from pdm.testgrid.grid import GridSite, GridUser, TestGrid
from pdm.testgrid.grid_servers import GridFtpServer
from pdm.testgrid.processes import GridError, GridMissingError, missing_programs

__all__ = ["GridError", "GridFtpServer", "GridMissingError", "GridSite", "GridUser", "TestGrid", "missing_programs"]

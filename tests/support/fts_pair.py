"""Two daemons on one grid: one that answers as an FTS3, and one that has its copies made by it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pdm.testgrid import TestGrid
from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService


class FtsPair(NamedTuple):
    """Daemons that are not started.

    Attributes:
        fts: has a port for clients of FTS3, that all users of the grid may use.
        worker: names it as the FTS3 of its site B.
    """

    fts: TestService
    worker: TestService


def make_fts_pair(
    grid: TestGrid, directory: Path, queue: Mapping[str, str] | None = None, **settings: Mapping[str, str]
) -> FtsPair:
    """Make both in a directory.

    Args:
        grid: whose sites both have.
        directory: for both.
        queue: settings of both.
        settings: sections with keys of the worker's configuration.
    """
    fts = TestService(directory / "fts", grid.description(), grid.directory)
    host, port = grid.credentials.host, reserve_port()
    fts.init(
        queue=queue or {},
        fts={"host": "localhost", "port": str(port)},
        tls={"certificate": str(host.certificate), "key": str(host.key)},
    )
    # By which its callers know it.
    shutil.copyfile(next(Path(grid.credentials.trust).glob("*.0")), fts.directory / "certificates" / "ca.crt")
    worker = TestService(directory / "worker", grid.description(), grid.directory)
    worker.init(queue=queue or {}, **settings)
    name_fts(worker, f"https://localhost:{port}")
    return FtsPair(fts, worker)


def name_fts(service: TestService, url: str) -> None:
    """Let site B of a daemon name an FTS3."""
    (file,) = (service.directory / "sites.d").glob("*.conf")
    text = file.read_text()
    assert "[B]" in text
    file.write_text(text.replace("[B]", f"[B]\nfts = {url}"))

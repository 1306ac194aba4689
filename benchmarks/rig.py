"""What every benchmark needs: a grid, a daemon, a user, and honest figures."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService
from pdm.workqueue.blocking import BlockingWorkqueueClient
from pdm.workqueue.client.settings import ClientSettings


@contextlib.contextmanager
def rig(*, with_grid: bool, **settings: dict[str, str]) -> Iterator[tuple[TestService, dict[str, Any] | None]]:
    """A running daemon, on a running grid if asked for; all is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="pdm-bench-"))
    folder.chmod(0o755)
    grid = TestGrid(folder / "grid") if with_grid else None
    try:
        description = None
        if grid is not None:
            grid.up()
            description = json.loads((folder / "grid" / "grid.json").read_text())
        service = TestService(folder / "instance", description, folder / "grid" if with_grid else None)
        service.init(**settings)
        with service.running():
            yield service, description
    finally:
        if grid is not None:
            grid.down()
        shutil.rmtree(folder, ignore_errors=True)


def client_of(service: TestService, user: str) -> BlockingWorkqueueClient:
    """A client with the user's certificate."""
    certificate, key = service.credentials(user)
    settings = ClientSettings(service.url or "", certificate, key, service.directory / "certificates" / "ca.crt")
    return BlockingWorkqueueClient.from_settings(settings)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, its ended children included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(fields[at]) for at in (11, 12, 13, 14)) / 100.0


def peak_memory_mib(pid: int) -> float:
    """The most memory a process has had at once."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def report(name: str, figures: dict[str, Any]) -> None:
    """Print the figures for people, and as one JSON line for programs."""
    for key, value in figures.items():
        print(f"  {key:40} {_shown(value)}")
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(json.dumps({"benchmark": name, "machine": machine, "at": at, **figures}))


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{part} {number:.4g}" for part, number in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def arguments(description: str, **defaults: int) -> argparse.Namespace:
    """The benchmark's numbers, each with an option of its name."""
    parser = argparse.ArgumentParser(description=description)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()

"""What every benchmark needs: its options, a fresh daemon (on a grid of its own), and a place for its result.

Everything is ended and removed afterwards, also after ^C or SIGTERM: servers by their marks, daemons and floors as the
children that they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attrs import frozen
from caller import Caller
from catalogue import CATALOGUE
from figures import BenchmarkError, machine, now, save, shown
from meter import Meter

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService

RESULTS = Path(__file__).resolve().parent / "results"
#: Names the directory on the disk that the whole run has, which whoever runs the benchmarks removes.
KEEP_IN = "PDM_BENCH_DIRECTORY"
_MEMORY = Path("/dev/shm")
_GIB = 1024**3


@frozen
class Rig:
    """A daemon that runs, and what it runs on.

    Attributes:
        service: the daemon.
        grid: its grid; None without one.
        directory: for the benchmark's own files, on the file system of the database.
        meter: of the daemon and the servers.
    """

    service: TestService
    grid: TestGrid | None
    directory: Path
    meter: Meter

    def caller(self, user: str = "alice") -> Caller:
        return Caller(self.service, user)

    @property
    def pid(self) -> int:
        """The process number of the daemon."""
        assert self.service.process is not None
        return self.service.process.pid

    @property
    def port(self) -> int:
        """The port of the daemon's API."""
        return urlsplit(self.service.url or "").port or 0

    @property
    def real_grid(self) -> TestGrid:
        """The grid of a rig that was asked for with one."""
        assert self.grid is not None
        return self.grid

    @property
    def sites(self) -> tuple[Path, Path]:
        """The directories of sites A and B."""
        return self.real_grid.sites["A"].root, self.real_grid.sites["B"].root


@contextlib.contextmanager
def rig(users: Sequence[str] = (), *, need_bytes: int = 0, **settings: dict[str, str]) -> Iterator[Rig]:
    """A running daemon; all is gone afterwards.

    Args:
        users: of the grid, each with a delegated proxy; without any there is no grid, and no site but simulated ones.
        need_bytes: how much the sites must hold: they lie in memory where there is room for it.
        settings: sections with keys of the daemon's configuration.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(directory_for_all("pdm-bench-"))
        grid = None
        if users:
            where = stack.enter_context(directory_for_all("pdm-bench-grid-", storage_directory(need_bytes)))
            grid = TestGrid(where / "grid", users=users, log_level="ERROR,WARN")
            stack.callback(grid.down)
            grid.up()
        service = TestService(
            directory / "instance", grid.description() if grid else None, grid.directory if grid else None
        )
        service.init(**settings)
        # What still runs when the figures are there is not worth waiting for; without a daemon, stop() says so.
        stack.callback(end_daemon, service)
        service.start()
        assert service.process is not None
        for user in users:
            service.delegate(user)
        servers = [site.server.pid for site in grid.sites.values() if site.server.pid] if grid else []
        yield Rig(service, grid, directory, Meter(service.process.pid, servers))


def end_daemon(service: TestService) -> None:
    """Stop a daemon, or kill it where it does not stop soon; nothing if it has ended."""
    if service.process is None:
        return
    try:
        service.stop(10)
    except Exception as error:
        print(f"the daemon was killed: {str(error)[:300]}", file=sys.stderr)
        if service.process is not None:
            service.kill()


@contextlib.contextmanager
def directory_for_all(prefix: str, where: Path | None = None) -> Iterator[Path]:
    """A directory that accounts of the grid may enter; removed afterwards, and no ^C disturbs that.

    On the disk it is removed once all benchmarks of the run are over: ext4 passes by inodes that were deleted in the
    last minutes one by one, so what one benchmark tidies up would make each new log of the next ten times as dear.
    """
    kept = os.environ.get(KEEP_IN) if where is None else None
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=kept or where))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)


def storage_directory(need_bytes: int) -> Path | None:
    """Memory, if what is needed is less than half of what is free there; else the usual place."""
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 2 * need_bytes + _GIB:
        return _MEMORY
    print(f"no room for {need_bytes / _GIB:.1f} GiB in {_MEMORY}: the sites lie on disk", file=sys.stderr)
    return None


def file_system(path: Path) -> str:
    """The type of the file system that a path is on."""
    found = ("", "?")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if path.is_relative_to(mount) and len(mount) >= len(found[0]):
            found = (mount, kind)
    return found[1]


def options_of(description: str, **defaults: tuple[int | str, int | str]) -> argparse.Namespace:
    """The benchmark's options, each with its default for a full and for a quick run.

    Args:
        description: of the program.
        defaults: option → full and quick value; the type is that of the value.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="DIR", help="directory of the results")
    parser.add_argument("--name", default=Path(sys.argv[0]).stem, help="name of the benchmark in the results")
    for name, (full, quick) in defaults.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(full), help=f"default {full}, with --quick {quick}"
        )
    options = parser.parse_args()
    for name, (full, quick) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; the exit status tells whether there are figures.

    SIGTERM is as ^C, and neither disturbs the tidying up once it has begun.
    """

    def interrupted(number: int, frame: object) -> None:
        for one in (signal.SIGINT, signal.SIGTERM):
            # Not SIG_IGN: Python makes an error of a signal that was on its way meanwhile.
            signal.signal(one, _heard)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    try:
        main()
    except BenchmarkError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _heard(number: int, frame: object) -> None:
    """A further signal changes nothing."""


def report(options: argparse.Namespace, figures: dict[str, Any], *, name: str | None = None) -> None:
    """Give out a result: for people, as one line of JSON, and as a file for `table.py`.

    Args:
        options: of the run.
        figures: what was measured; the names that the page knows stand in `table`.
        name: of the benchmark where the program has several.
    """
    benchmark = CATALOGUE[name or options.name]
    sizes = {
        key: value for key, value in vars(options).items() if key not in ("quick", "json", "name") and value is not None
    }
    result: dict[str, Any] = {
        "benchmark": benchmark.name,
        "at": now(),
        "quick": options.quick,
        "sizes": sizes,
        "machine": machine(),
        **figures,
    }
    result["bars"] = [{"bar": bar.text, "figure": found, "met": met} for bar, found, met in benchmark.judged(result)]
    print(f"{benchmark.title}  [{', '.join(f'{key} {value}' for key, value in sizes.items())}]")
    for key, value in figures.items():
        print(f"  {key:28} {shown(value)}")
    for bar in result["bars"]:
        print(f"  {'meets' if bar['met'] else 'MISSES'} the bar: {bar['bar']} (is {shown(bar['figure'])})")
    print(json.dumps(result), flush=True)
    save(result, options.json)

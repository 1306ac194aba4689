"""COPY of small files between GridFTP sites by an FTS3 that one of them names, against copies by the service itself.

The FTS3 is a second daemon on the same machine, so that both share its cores: its CPU is told apart. Both copies
compare checksums at both ends. After each run the trees must be identical.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrs import define, field
from caller import Caller
from figures import BenchmarkError
from meter import Cpu, Meter, sum_cpu
from rig import directory_for_all, end_daemon, file_system, options_of, report, run, storage_directory
from rounds import Comparison, Contender, timed
from trees import make_tree, require_logs, require_same

from pdm.testgrid import TestGrid
from tests.support.fts_pair import make_fts_pair

_TIMEOUT_S = 600.0
_KIB = 1024
_USER = "alice"


@define
class Copies:
    """Copies of one tree, each into a directory of its own.

    Attributes:
        fts: of the daemon that is the FTS3.
        fts_cpu: what it has used for each copy by it.
    """

    grid: TestGrid
    caller: Caller
    fts: Meter
    files: Sequence[Path]
    number: int = 0
    job: dict[str, Any] = field(factory=dict)
    fts_cpu: list[Cpu] = field(factory=list)

    @property
    def source(self) -> Path:
        return self.grid.sites["A"].root / "tree"

    @property
    def destination(self) -> Path:
        return self.grid.sites["B"].root / f"copy{self.number}"

    def prepare(self) -> None:
        self.number += 1
        self.destination.mkdir()
        self.grid.give(self.destination)

    def copy(self, **options: str) -> float:
        def work() -> None:
            job = self.caller.submit(
                "copy",
                src_siteid=1,
                src_filepath=f"{self.source}/",
                dst_siteid=2,
                dst_filepath=f"{self.destination}/",
                extra_opts=options,
            )
            self.job = self.caller.done(job["id"], _TIMEOUT_S)

        before = self.fts.cpu()
        seconds = timed(work)
        if not options:
            self.fts_cpu.append(self.fts.cpu() - before)
        return seconds

    def check(self) -> None:
        require_same(self.source, self.destination)
        elements = self.job["num_elements"]
        if elements != len(self.files) + 1:
            raise BenchmarkError(f"{elements} elements for {len(self.files)} files")
        require_logs(self.caller.logs, str(self.job["log_uid"]), elements)
        shutil.rmtree(self.destination)


@contextlib.contextmanager
def _copies(files: int, folders: int, size: int) -> Iterator[tuple[Copies, Meter]]:
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(directory_for_all("pdm-bench-"))
        where = stack.enter_context(directory_for_all("pdm-bench-grid-", storage_directory(3 * files * size)))
        grid = TestGrid(where / "grid", users=[_USER], log_level="ERROR,WARN")
        stack.callback(grid.down)
        grid.up()
        made = make_tree(grid.sites["A"].root / "tree", files, folders, size)
        grid.give(grid.sites["A"].root / "tree")
        pair = make_fts_pair(grid, directory)
        for service in pair:
            stack.callback(end_daemon, service)
            service.start()
        pair.worker.delegate(_USER)
        caller = stack.enter_context(Caller(pair.worker, _USER))
        servers = [site.server.pid for site in grid.sites.values() if site.server.pid]
        assert pair.fts.process is not None
        assert pair.worker.process is not None
        yield Copies(grid, caller, Meter(pair.fts.process.pid), made), Meter(pair.worker.process.pid, servers)


def main() -> None:
    options = options_of(__doc__ or "", files=(10_000, 1_000), folders=(100, 10), kib=(1, 1), rounds=(2, 2))
    with _copies(options.files, options.folders, options.kib * _KIB) as (copies, meter):
        figures = Comparison(meter, options.files).alternate(
            Contender(copies.copy, copies.prepare, copies.check),
            {"the service itself": Contender(partial(copies.copy, mover="native"), copies.prepare, copies.check)},
            options.rounds,
        )
        # The first copy is the trial.
        used = sum_cpu(copies.fts_cpu[1:])
        figures["cpu ms each, the FTS3"] = {
            name: value
            for name, value in used.ms_each(options.files * options.rounds).items()
            if name in ("daemon", "helpers")
        }
        figures["elements"] = options.files
        figures["checksums"] = "proven at both ends, by both sides"
        figures["trees on"] = file_system(copies.source)
        figures["identical, with logs"] = True
    report(options, figures)


if __name__ == "__main__":
    run(main)

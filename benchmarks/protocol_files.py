"""COPY and LIST of a tree between two sites of SSH, HTTPS or XROOT, against the best bare client over the same files.

The service lists the tree, copies, proves the size of each file and writes a log for each. After each run of either
side the trees must be identical. With ``--delay`` both sides reach the servers over a line with a round trip of so many
milliseconds.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrs import define, field
from bare_clients import missing_clients
from caller import Caller
from figures import BenchmarkError
from rig import file_system, options_of, report, run
from rounds import Comparison, Contender, timed
from storages_rig import StoragesRig, storages_rig
from trees import Kind, make_directories_like, make_tree, require_listing, require_logs, require_same, sizes

_TIMEOUT_S = 600.0
_KIB = 1024


KINDS = {
    "small": Kind((2_000, 400), (20, 4), (1, 1), (5, 2)),
    "large": Kind((1, 1), (1, 1), (1024 * _KIB, 128 * _KIB), (5, 2)),
    "list": Kind((5_000, 1_000), (250, 50), (0, 0), (5, 3)),
}
#: Where each round trip takes its time, fewer files tell the same.
DELAYED_KINDS = {
    "small": Kind((400, 100), (4, 2), (1, 1), (3, 2)),
    "large": Kind((1, 1), (1, 1), (256 * _KIB, 64 * _KIB), (5, 2)),
    "list": Kind((1_000, 400), (50, 20), (0, 0), (5, 2)),
}


@define
class Runs:
    """Copies, or listings, of one tree by either side."""

    on: StoragesRig
    caller: Caller
    files: Sequence[Path]
    kind: str
    number: int = 0
    job: dict[str, Any] = field(factory=dict)

    @property
    def source(self) -> Path:
        return self.on.roots[0] / "tree"

    @property
    def folders(self) -> Sequence[Path]:
        return sorted({self.source, *((self.source / file).parent for file in self.files)})

    @property
    def destination(self) -> Path:
        return self.on.roots[1] / f"copy{self.number}"

    # -- copies

    def prepare_copy(self) -> None:
        self.number += 1
        self.destination.mkdir()
        self.on.storages.give(self.destination)

    def copy(self) -> float:
        def work() -> None:
            job = self.caller.submit(
                "copy",
                src_siteid=1,
                src_filepath=f"{self.source}/",
                dst_siteid=2,
                dst_filepath=f"{self.destination}/",
                protocol=self.on.route.protocol,
                extra_opts={"verify": "size"},
            )
            self.job = self.caller.done(job["id"], _TIMEOUT_S)

        return timed(work)

    def check_copy(self) -> None:
        elements = self.job["num_elements"]
        if elements != len(self.files) + 1:
            raise BenchmarkError(f"{elements} elements for {len(self.files)} files")
        require_logs(self.caller.logs, str(self.job["log_uid"]), elements)
        self.check_bare_copy()

    def prepare_bare_copy(self) -> None:
        self.number += 1
        make_directories_like(self.source, self.destination)
        self.on.storages.give(self.destination)

    def bare_copy(self, mode: str) -> float:
        return self.on.route.copy(mode, self.source, self.destination, self.files)

    def check_bare_copy(self) -> None:
        require_same(self.source, self.destination)
        shutil.rmtree(self.destination)

    # -- listings

    def list_(self) -> float:
        def work() -> None:
            job = self.caller.submit(
                "list", src_siteid=1, src_filepath=str(self.source), protocol=self.on.route.protocol
            )
            self.job = self.caller.done(job["id"], _TIMEOUT_S)

        return timed(work)

    def check_list(self) -> None:
        element = self.caller.call("GET", f"/jobs/{self.job['id']}/elements/0")
        require_listing(element["entries"], self.source, sizes(self.source))
        require_logs(self.caller.logs, self.job["log_uid"], 1)

    def bare_list(self, mode: str) -> float:
        return self.on.route.list_tree(mode, self.source, self.folders, len(self.files))

    def compare(self, comparison: Comparison, rounds: int) -> dict[str, Any]:
        route = self.on.route
        if self.kind == "list":
            return comparison.alternate(
                Contender(self.list_, check=self.check_list),
                {mode: Contender(partial(self.bare_list, mode)) for mode in route.list_modes()},
                rounds,
            )
        return comparison.alternate(
            Contender(self.copy, self.prepare_copy, self.check_copy),
            {
                mode: Contender(partial(self.bare_copy, mode), self.prepare_bare_copy, self.check_bare_copy)
                for mode in route.copy_modes(self.kind)
            },
            rounds,
        )


def main() -> None:
    options = options_of(
        __doc__ or "", protocol=("ssh", "ssh"), kind=("small", "small"), delay=(0, 0), files=(0, 0), folders=(-1, -1),
        kib=(0, 0), rounds=(0, 0),
    )  # fmt: skip
    missing = missing_clients(options.protocol)
    if missing:
        print(f"skipped: {', '.join(missing)} not found: as root, script/bootstrap installs what the rows need")
        return
    kind = (DELAYED_KINDS if options.delay else KINDS)[options.kind]
    kind.complete(options)
    size = options.kib * _KIB or 16
    # A client that cannot copy from site to site keeps all files in memory once more.
    with storages_rig(options.protocol, options.delay, 3 * options.files * size) as on, on.caller() as caller:
        files = make_tree(on.roots[0] / "tree", options.files, options.folders, size)
        on.storages.give(on.roots[0])
        by_bytes = options.kind == "large"
        count, unit = (options.files * size // _KIB**2, "MiB/s") if by_bytes else (options.files, "files/s")
        runs = Runs(on, caller, files, options.kind)
        figures = runs.compare(Comparison(on.rig.meter, count, unit, options.files), options.rounds)
        figures["elements"] = options.files
        figures["checksums"] = "none: nothing is moved" if options.kind == "list" else "off: size"
        figures["trees on"] = file_system(on.roots[0])
        figures["database on"] = file_system(on.rig.directory)
        figures["identical, with logs"] = True
    report(options, figures)


if __name__ == "__main__":
    run(main)

"""COPY with ``sync=checksum`` of a tree that has not changed, against the bare listing of both sides.

Checksums of each file are compared at both ends, by the servers. Not one byte may be moved: afterwards each file at the
destination is the same as before, to the nanosecond.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bare
from attrs import define, field
from caller import Caller
from figures import BenchmarkError
from rig import Rig, file_system, options_of, report, rig, run
from rounds import Comparison, Contender, timed
from trees import make_tree, require_logs

_TIMEOUT_S = 900.0


def _versions(tree: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tree.rglob("*") if path.is_file()}


@define
class Comparisons:
    """Comparisons of one tree with its copy by either side."""

    rig: Rig
    caller: Caller
    files: int
    versions: dict[Path, tuple[int, int]]
    job: dict[str, Any] = field(factory=dict)

    def ours(self) -> float:
        def compare() -> None:
            source, destination = (f"{site / 'tree'}/" for site in self.rig.sites)
            job = self.caller.submit(
                "copy", src_siteid=1, src_filepath=source, dst_siteid=2, dst_filepath=destination,
                extra_opts={"sync": "checksum"},
            )  # fmt: skip
            self.job = self.caller.done(job["id"], _TIMEOUT_S)

        return timed(compare)

    def check(self) -> None:
        if self.job["already_there"] != self.files:
            raise BenchmarkError(f"{self.job['already_there']} of {self.files} files were found to be the same")
        if _versions(self.rig.sites[1] / "tree") != self.versions:
            raise BenchmarkError("files of the destination were written to")
        require_logs(self.caller.logs, self.job["log_uid"], self.files + 1)

    def bare(self) -> float:
        environment = self.rig.real_grid.environment("alice")
        return sum(
            bare.list_tree(site.url(site.root / "tree"), environment, self.rig.directory, self.files)
            for site in self.rig.real_grid.sites.values()
        )


def main() -> None:
    options = options_of(__doc__ or "", files=(10_000, 400), folders=(100, 4), rounds=(5, 2))
    with rig(["alice"]) as on, on.caller() as caller:
        source, destination = (site / "tree" for site in on.sites)
        make_tree(source, options.files, options.folders, 1024)
        shutil.copytree(source, destination)
        for tree in (source, destination):
            on.real_grid.give(tree)
        comparisons = Comparisons(on, caller, options.files, _versions(destination))
        figures = Comparison(on.meter, options.files).alternate(
            Contender(comparisons.ours, check=comparisons.check),
            {"globus-url-copy -fast -r -do FILE SRC DST, of both sides": Contender(comparisons.bare)},
            options.rounds,
        )
        figures["checksums"] = "compared at both ends; the bare listings compute none"
        figures["trees on"] = file_system(on.sites[0])
        figures["nothing moved, with logs"] = True
    report(options, figures)


if __name__ == "__main__":
    run(main)

"""REMOVE of a tree at a GridFTP site, against ``gfal-rm -r``, which gets a smaller one.

Rates are of files and directories together. Without gfal-rm there is nothing to compare with, and no result.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bare
from attrs import define, field
from caller import Caller
from figures import BenchmarkError
from rig import Rig, file_system, options_of, report, rig, run
from rounds import Comparison, Contender, timed
from trees import make_tree, require_logs

_MISSING = """\
SKIPPED: there is no gfal-rm on this machine to compare with. As root:
    apt-get install --no-install-recommends gfal2-util-scripts python3-gfal2 gfal2-plugin-gridftp"""


@define
class Removals:
    """Removals of fresh trees by either side."""

    rig: Rig
    caller: Caller
    files: int
    folders: int
    job: dict[str, Any] = field(factory=dict)

    @property
    def tree(self) -> Path:
        return self.rig.sites[0] / "tree"

    @property
    def bare_tree(self) -> Path:
        return self.rig.sites[0] / "bare-tree"

    def make(self, tree: Path, files: int, folders: int) -> None:
        make_tree(tree, files, folders, 16)
        self.rig.real_grid.give(tree)

    def ours(self) -> float:
        def remove() -> None:
            job = self.caller.submit("remove", src_siteid=1, src_filepath=str(self.tree))
            self.job = self.caller.done(job["id"], 600)

        return timed(remove)

    def check(self) -> None:
        if self.tree.exists():
            raise BenchmarkError(f"{self.tree} is still there")
        require_logs(self.caller.logs, self.job["log_uid"], self.job["num_elements"])

    def bare(self) -> float:
        site = self.rig.real_grid.sites["A"]
        environment = self.rig.real_grid.environment("alice")
        return bare.gfal_rm(site.url(self.bare_tree), environment, self.rig.directory)

    def check_bare(self) -> None:
        if self.bare_tree.exists():
            raise BenchmarkError(f"gfal-rm left {self.bare_tree}")


def main() -> None:
    options = options_of(
        __doc__ or "", files=(10_000, 500), folders=(500, 25), bare_files=(200, 20), bare_folders=(10, 2), rounds=(3, 2)
    )
    if not bare.has_gfal_rm():
        print(_MISSING, file=sys.stderr)
        return
    with rig(["alice"]) as on, on.caller() as caller:
        removals = Removals(on, caller, options.files, options.folders)
        figures = Comparison(on.meter, options.files + options.folders + 1, "entries/s").alternate(
            Contender(
                removals.ours, lambda: removals.make(removals.tree, options.files, options.folders), removals.check
            ),
            {
                "gfal-rm -r": Contender(
                    removals.bare,
                    lambda: removals.make(removals.bare_tree, options.bare_files, options.bare_folders),
                    removals.check_bare,
                )
            },
            options.rounds,
            bare_count=options.bare_files + options.bare_folders + 1,
        )
        figures["checksums"] = "none: nothing is moved"
        figures["trees on"] = file_system(on.sites[0])
        figures["gone, with logs"] = True
    report(options, figures)


if __name__ == "__main__":
    run(main)

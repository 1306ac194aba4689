"""LIST of a tree at a GridFTP site, against the fastest bare listing: ``globus-url-copy -fast -r -do``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bare
from attrs import define, field
from caller import Caller
from rig import Rig, file_system, options_of, report, rig, run
from rounds import Comparison, Contender, timed
from trees import make_tree, require_listing, require_logs, sizes


@define
class Listings:
    """Listings of one tree by either side."""

    rig: Rig
    caller: Caller
    wanted: dict[str, int]
    job: dict[str, Any] = field(factory=dict)

    @property
    def source(self) -> Path:
        return self.rig.sites[0] / "tree"

    def ours(self) -> float:
        def list_it() -> None:
            job = self.caller.submit("list", src_siteid=1, src_filepath=str(self.source))
            self.job = self.caller.done(job["id"], 300)

        return timed(list_it)

    def check(self) -> None:
        element = self.caller.call("GET", f"/jobs/{self.job['id']}/elements/0")
        require_listing(element["entries"], self.source, self.wanted)
        require_logs(self.caller.logs, self.job["log_uid"], 1)

    def bare(self) -> float:
        site = self.rig.real_grid.sites["A"]
        environment = self.rig.real_grid.environment("alice")
        return bare.list_tree(site.url(self.source), environment, self.rig.directory, len(self.wanted))


def main() -> None:
    options = options_of(__doc__ or "", files=(10_000, 2_000), folders=(500, 100), rounds=(9, 3))
    with rig(["alice"]) as on, on.caller() as caller:
        make_tree(on.sites[0] / "tree", options.files, options.folders, 16)
        listings = Listings(on, caller, sizes(on.sites[0] / "tree"))
        figures = Comparison(on.meter, options.files).alternate(
            Contender(listings.ours, check=listings.check),
            {"globus-url-copy -fast -r -do FILE SRC DST": Contender(listings.bare)},
            options.rounds,
        )
        figures["checksums"] = "none: nothing is moved"
        figures["trees on"] = file_system(on.sites[0])
        figures["complete, with logs"] = True
    report(options, figures)


if __name__ == "__main__":
    run(main)

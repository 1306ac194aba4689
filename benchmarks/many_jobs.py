"""COPY of a tree as many jobs of several users at once, against the same tree as one job."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from attrs import define, field
from caller import Caller
from figures import BenchmarkError
from rig import Rig, file_system, options_of, report, rig, run
from rounds import Comparison, Contender, timed
from trees import make_tree, require_logs, require_same

USERS = ("alice", "bob", "carol", "dave")
_TIMEOUT_S = 900.0


@define
class Jobs:
    """Copies of the tree: as one job, or each of its parts as a job of the users in turn."""

    rig: Rig
    callers: list[Caller]
    parts: list[str]
    verify: str
    number: int = 0
    ended: list[dict[str, Any]] = field(factory=list)

    @property
    def source(self) -> Path:
        return self.rig.sites[0] / "tree"

    @property
    def destination(self) -> Path:
        return self.rig.sites[1] / f"copy{self.number}"

    def prepare_one(self) -> None:
        self.number += 1
        self.destination.mkdir()
        self.rig.real_grid.give(self.destination)

    def prepare_many(self) -> None:
        self.number += 1
        self.destination.mkdir()
        for number, part in enumerate(self.parts):
            (self.destination / part).mkdir()
            self.rig.real_grid.give(self.destination / part, USERS[number % len(USERS)])

    def one(self) -> float:
        return timed(lambda: self._copy([(self.callers[0], "")]))

    def many(self) -> float:
        return timed(
            lambda: self._copy([(self.callers[number % len(USERS)], part) for number, part in enumerate(self.parts)])
        )

    def _copy(self, what: list[tuple[Caller, str]]) -> None:
        jobs = [
            caller.submit(
                "copy",
                src_siteid=1,
                src_filepath=f"{self.source / part}/",
                dst_siteid=2,
                dst_filepath=f"{self.destination / part}/",
                extra_opts={"verify": self.verify},
            )
            for caller, part in what
        ]
        self.ended = [caller.done(job["id"], _TIMEOUT_S) for (caller, _), job in zip(what, jobs, strict=True)]

    def check(self) -> None:
        require_same(self.source, self.destination)
        shutil.rmtree(self.destination)
        for job in self.ended:
            require_logs(self.callers[0].logs, job["log_uid"], job["num_elements"])


def main() -> None:
    options = options_of(
        __doc__ or "", files=(10_000, 200), folders=(100, 10), jobs=(10, 10), verify=("size", "size"), rounds=(3, 1)
    )
    if options.files % options.jobs or options.folders % options.jobs:
        raise BenchmarkError("files and directories must be multiples of jobs")
    with rig(USERS, need_bytes=2 * 1024 * options.files) as on, contextlib.ExitStack() as stack:
        parts = [f"part{number}" for number in range(options.jobs)]
        for part in parts:
            make_tree(on.sites[0] / "tree" / part, options.files // options.jobs, options.folders // options.jobs, 1024)
        callers = [stack.enter_context(on.caller(user)) for user in USERS]
        jobs = Jobs(on, callers, parts, options.verify)
        figures = Comparison(on.meter, options.files).alternate(
            Contender(jobs.many, jobs.prepare_many, jobs.check),
            {"the same tree as one job": Contender(jobs.one, jobs.prepare_one, jobs.check)},
            options.rounds,
        )
        figures["checksums"] = "proven at both ends" if options.verify == "checksum" else "off: size"
        figures["trees on"] = file_system(on.sites[0])
        figures["database on"] = file_system(on.directory)
        figures["identical, with logs"] = True
    report(options, figures)


if __name__ == "__main__":
    run(main)

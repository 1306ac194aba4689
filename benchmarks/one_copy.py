"""One 1 KiB copy on an idle daemon, submission to DONE, against the same copy in a warm agent without the queue.

The agent alone copies, proves and renames; the daemon also lists the source first, and keeps books. For comparison the
agent is also timed with a listing before each copy, as the daemon has it done.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Literal

from attrs import define
from caller import Caller
from figures import BenchmarkError, spread
from helper import Helper
from rig import Rig, options_of, report, rig, run
from rounds import timed
from trees import require_logs

from pdm.workqueue.wire.agent_requests import CopyItem, CopyRequest, ListRequest, TimeLimits

_MODULE = "pdm.workqueue.helpers.main_gridftp"
#: Between two copies, so that each meets an idle daemon.
_REST_S = 0.05


@define
class Copies:
    """One file, copied again and again to names of their own."""

    rig: Rig
    caller: Caller
    helper: Helper
    file: Path
    directory: Path
    verify: Literal["checksum", "size"]
    number: int = 0

    def by_daemon(self) -> float:
        destination = self._next()
        job = {}

        def copy() -> None:
            nonlocal job
            job = self.caller.submit(
                "copy",
                src_siteid=1,
                src_filepath=str(self.file),
                dst_siteid=2,
                dst_filepath=str(destination),
                extra_opts={"verify": self.verify},
            )
            job = self.caller.ended(job["id"])

        seconds = timed(copy)
        self._check(destination)
        require_logs(self.caller.logs, job["log_uid"], 2)
        return seconds

    def by_agent(self, *, listed: bool) -> float:
        destination = self._next()
        site_a, site_b = (self.rig.real_grid.sites[name] for name in ("A", "B"))
        source, target = site_a.url(self.file), site_b.url(destination)
        temporary = f"{site_b.url(self.directory)}/.pdm-bench.{self.number}.1.part"
        item = CopyItem(1, source, target, temporary, [], self.file.stat().st_size)

        def copy() -> None:
            if listed:
                self.helper.run(ListRequest(self.helper.new_id(), 0, source, None, TimeLimits()))
            self.helper.run(CopyRequest(self.helper.new_id(), [item], "never", self.verify, TimeLimits()))

        seconds = timed(copy)
        self._check(destination)
        return seconds

    def _next(self) -> Path:
        self.number += 1
        return self.directory / f"copy{self.number}"

    def _check(self, destination: Path) -> None:
        if destination.read_bytes() != self.file.read_bytes():
            raise BenchmarkError(f"{destination} is not {self.file}")
        destination.unlink()
        time.sleep(_REST_S)


def main() -> None:
    options = options_of(__doc__ or "", rounds=(100, 15), verify=("checksum", "checksum"))
    with rig(["alice"]) as on, on.caller() as caller, Helper(_MODULE, on.real_grid.environment("alice")) as helper:
        file, directory = on.sites[0] / "one", on.sites[1] / "copies"
        file.write_bytes(os.urandom(1024))
        directory.mkdir()
        for path in (file, directory):
            on.real_grid.give(path)
        copies = Copies(on, caller, helper, file, directory, options.verify)
        first = [copies.by_daemon(), copies.by_agent(listed=False), copies.by_agent(listed=True)]
        ours, bare, listed = [], [], []
        before = on.meter.cpu()
        for _ in range(options.rounds):
            ours.append(copies.by_daemon())
            bare.append(copies.by_agent(listed=False))
            listed.append(copies.by_agent(listed=True))
        cpu = on.meter.cpu() - before
        p50, p50_bare, p50_listed = (statistics.median(side) * 1000 for side in (ours, bare, listed))
        figures = {
            "unit": "ms",
            "ratio": spread([other / mine for mine, other in zip(ours, bare, strict=True)]),
            "ours": spread([seconds * 1000 for seconds in ours]),
            "ours, first run": first[0] * 1000,
            "bare": spread([seconds * 1000 for seconds in bare]),
            "bare is": "the same copy in a warm agent",
            "bare, with its listing": spread([seconds * 1000 for seconds in listed]),
            "p50 over bare (ms)": p50 - p50_bare,
            "p50 over bare with its listing (ms)": p50 - p50_listed,
            "cpu ms each, ours": {
                part: value for part, value in cpu.ms_each(options.rounds).items() if part in ("daemon", "helpers")
            },
            "peak MiB": on.meter.peak_memory(),
            "checksums": "proven at both ends, by both sides" if options.verify == "checksum" else "off: size",
            "identical, with logs": True,
        }
    report(options, figures)


if __name__ == "__main__":
    run(main)

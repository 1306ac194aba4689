"""Memory of the daemon with many elements queued: one job whose listing shows them, and whose work never ends.

With ``--compare yes`` the destination has as many files, all of them the same, so that the job is done once all are
compared. The peak counts from the start of the daemon, the listing of all elements included. What is compared with is
the same daemon before.
"""

from __future__ import annotations

import time
from typing import Any

from figures import spread
from meter import memory_mib
from rig import file_system, options_of, report, rig, run

_TIMEOUT_S = 900.0
_LOOK_S = 0.5


def main() -> None:
    options = options_of(__doc__ or "", elements=(1_000_000, 50_000), jobs=(1, 1), rounds=(5, 5), compare=("no", "no"))
    with rig() as on, on.caller("admin") as caller:
        idle = memory_mib(on.pid, "VmRSS")
        before = on.meter.cpu()
        began = time.perf_counter()
        each = options.elements // options.jobs
        asked: dict[str, Any] = {"dummy": {"files": each, "hang": True}}
        if options.compare == "yes":
            asked = {"sync": "size", "dummy": {"files": each, "there": each, "size": 1}}
        jobs = [
            caller.submit(
                "copy", src_siteid=1, src_filepath=f"/tree{number}", dst_siteid=2, dst_filepath=f"/copy{number}",
                protocol="DUMMY", extra_opts=asked,
            )
            for number in range(options.jobs)
        ]  # fmt: skip
        for job in jobs:
            caller.wait(job["id"], _TIMEOUT_S, lambda seen: seen["num_elements"] == each + 1)
            caller.wait_until_listed(job["id"])
        seconds = time.perf_counter() - began
        cpu = on.meter.cpu() - before
        resident = []
        for _ in range(options.rounds):
            time.sleep(_LOOK_S)
            resident.append(memory_mib(on.pid, "VmRSS"))
        figures = {
            "unit": "MiB resident",
            "ratio": spread([idle / value for value in resident]),
            "ours": spread(resident),
            "bare": spread([idle]),
            "bare is": "the same daemon with an empty queue",
            "listed/s": options.elements / seconds,
            "cpu ms each, ours": cpu.ms_each(options.elements),
            "peak MiB": on.meter.peak_memory(),
            "database on": file_system(on.directory),
        }
    report(options, figures)


if __name__ == "__main__":
    run(main)

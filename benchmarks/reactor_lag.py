"""How late the reactor is at worst while a listing puts 100,000 elements into the database, by the daemon's own gauge.

What is compared with is the gauge of a daemon that does nothing for as long. Each round has a daemon of its own, which
logs its worst moment when it stops.
"""

from __future__ import annotations

import re
import time

from figures import BenchmarkError, spread
from rig import Rig, file_system, options_of, report, rig, run

_TIMEOUT_S = 300.0
_SAYS = re.compile(r"the reactor was at most (\d+) ms late")


def worst_ms(on: Rig) -> float:
    """End the daemon, and read what its gauge says."""
    on.service.stop(30)
    said = _SAYS.findall(on.service.log_path.read_text(errors="replace"))
    if not said:
        raise BenchmarkError("the daemon did not say how late its reactor was")
    return float(said[-1])


def main() -> None:
    options = options_of(__doc__ or "", elements=(100_000, 10_000), rounds=(5, 2))
    ours, bare, rates = [], [], []
    for _ in range(options.rounds):
        with rig() as on:
            with on.caller("admin") as caller:
                began = time.perf_counter()
                job = caller.submit(
                    "copy", src_siteid=1, src_filepath="/tree", dst_siteid=2, dst_filepath="/copy", protocol="DUMMY",
                    extra_opts={"dummy": {"files": options.elements, "hang": True}},
                )  # fmt: skip
                caller.wait(job["id"], _TIMEOUT_S, lambda seen: seen["num_elements"] == options.elements + 1)
                seconds = time.perf_counter() - began
            disk = file_system(on.directory)
            ours.append(worst_ms(on))
            rates.append(options.elements / seconds)
        with rig() as on:
            time.sleep(seconds)
            bare.append(worst_ms(on))
    figures = {
        "unit": "ms late at worst",
        "ratio": spread([idle / max(busy, 1.0) for idle, busy in zip(bare, ours, strict=True)]),
        "ours": spread(ours),
        "bare": spread(bare),
        "bare is": "a daemon that does nothing",
        "listed/s": spread(rates)["median"],
        "database on": disk,
    }
    report(options, figures)


if __name__ == "__main__":
    run(main)

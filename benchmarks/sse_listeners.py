"""The latency of one client while 1,000 others listen to the events of all jobs, and what the listeners cost.

What is compared with is the same client alone, before each round, at the same daemon and with the same jobs: one of
simulated work each second, whose three events each listener gets. One kept connection, ``GET /jobs/N`` with a pause
between two requests.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from caller import API, Caller, tls_context
from figures import BenchmarkError, ratios, spread
from meter import memory_mib
from rest_load import Connections, get
from rig import Rig, file_system, options_of, report, rig, run

_HOLDER = Path(__file__).with_name("hold_listeners.py")
_PAUSE_S = 0.005
#: Seconds between two jobs, and the events of each.
_JOB_EVERY_S, _EVENTS_OF_JOB = 1.0, 3
#: Seconds until the last events have come.
_ARRIVAL_S = 2.0


def submit(caller: Caller) -> int:
    number: int = caller.submit("list", src_siteid=1, src_filepath="/x", protocol="DUMMY")["id"]
    return number


def latencies_ms(kept: Connections, caller: Caller, path: str, seconds: float) -> tuple[list[float], int]:
    """Of requests, one after the other; and how many jobs were submitted meanwhile."""
    found, jobs = [], 0
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        if passed >= jobs * _JOB_EVERY_S:
            submit(caller)
            jobs += 1
        found.append(kept.load(lambda: get("localhost", path), requests=1).seconds * 1000)
        time.sleep(_PAUSE_S)
    return found, jobs


@contextmanager
def listening(on: Rig, count: int) -> Iterator[tuple[IO[str], IO[str]]]:
    """Listeners in a process of its own; yields its input and output."""
    authority = on.service.directory / "certificates" / "ca.crt"
    arguments = [on.service.url or "", str(authority), *map(str, on.service.credentials("admin")), str(count)]
    holder = subprocess.Popen(
        [sys.executable, str(_HOLDER), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        if not holder.stdout.readline():
            raise BenchmarkError("the streams could not be opened")
        yield holder.stdin, holder.stdout
        holder.stdin.close()
        holder.wait(30)


def received(to: IO[str], back: IO[str]) -> int:
    """Events that the listeners have got since the last question."""
    to.write("\n")
    to.flush()
    return int(back.readline() or 0)


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def main() -> None:
    options = options_of(__doc__ or "", listeners=(1000, 100), seconds=(10, 3), rounds=(3, 1))
    alone: list[list[float]] = []
    beset: list[list[float]] = []
    grown, opened, cpu_ms = 0.0, 0.0, []
    with rig(server={"new_connections": "0"}) as on, on.caller("admin") as caller:
        path = f"{API}/jobs/{caller.done(submit(caller), 30)['id']}"
        with Connections(on.service.url or "", tls_context(on.service, "admin"), 1) as kept:
            latencies_ms(kept, caller, path, 2.0)
            before = memory_mib(on.pid, "VmRSS")
            for _ in range(options.rounds):
                used = on.meter.cpu().daemon
                found, _ = latencies_ms(kept, caller, path, options.seconds)
                alone.append(found)
                used = (on.meter.cpu().daemon - used) / len(found) * 1000
                with listening(on, options.listeners) as (to, back):
                    opened = memory_mib(on.pid, "VmRSS") - before
                    received(to, back)
                    busy = on.meter.cpu().daemon
                    found, jobs = latencies_ms(kept, caller, path, options.seconds)
                    time.sleep(_ARRIVAL_S)
                    busy = (on.meter.cpu().daemon - busy) * 1000 - used * len(found)
                    beset.append(found)
                    events = jobs * _EVENTS_OF_JOB * options.listeners
                    if (got := received(to, back)) != events:
                        raise BenchmarkError(f"the listeners have got {got:,} events instead of {events:,}")
                    cpu_ms.append(busy / events)
                    grown = max(grown, memory_mib(on.pid, "VmRSS") - before)
        figures: dict[str, Any] = {
            "unit": "ms, median of a client",
            "ratio": ratios(*([statistics.median(one) for one in each] for each in (alone, beset))),
            "ours": spread([statistics.median(one) for one in beset]),
            "bare": spread([statistics.median(one) for one in alone]),
            "bare is": "the same client alone",
            "p95 (ms)": {"with": spread([p95(one) for one in beset]), "alone": spread([p95(one) for one in alone])},
            "cpu ms of an event of a listener": spread(cpu_ms),
            "growth of the daemon (MiB)": grown,
            "of the first streams alone (MiB)": opened,
            "database on": file_system(on.directory),
        }
    report(options, figures)


if __name__ == "__main__":
    run(main)

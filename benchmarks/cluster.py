"""Several daemons on one PostgreSQL: what an element costs on each part, and how the rate grows with the daemons.

``--shape zero``: elements of no work, as one job: CPU of daemons, helpers and PostgreSQL for each element with 1, 2 and
3 daemons, against one daemon on SQLite in the same rounds. ``--shape jobs``: the same for jobs of one element.
``--shape sleep``: elements that sleep, so that the processors are not the limit: the rate with each number of daemons.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import define, field, frozen
from caller import Caller
from dummy_elements import Work
from figures import BenchmarkError, spread
from meter import Cpu, Meter
from postgresql import Postgresql, Written, postgresql
from rig import Rig, directory_for_all, end_daemon, file_system, options_of, report, run

from pdm.testgrid.service import TestService

_TIMEOUT_S = 900.0
#: Sessions of PostgreSQL publish their counters within this time.
_COUNTED_AFTER_S = 1.2
#: Streams of each daemon, for work that sleeps.
_STREAMS = 4


@frozen
class Cluster:
    """Daemons on one database, submitted to through the first one."""

    services: Sequence[TestService]
    server: Postgresql | None
    rig: Rig

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far: of all daemons, of their helpers, of PostgreSQL."""
        total = Cpu()
        for service in self.services:
            assert service.process is not None
            total += Meter(service.process.pid).cpu()
        server = 0.0 if self.server is None else Meter(None, [self.server.pid]).cpu().servers
        return {"daemons": total.daemon, "helpers": total.helpers, "postgresql": server}

    def sizes(self) -> dict[str, int]:
        """Bytes of the database and of the logs of all daemons."""
        logs = sum(_size(service.directory / "var" / "logs") for service in self.services)
        if self.server is not None:
            return {"database": self.server.size(), "logs": logs}
        files = self.services[0].directory.glob("var/*.sqlite*")
        return {"database": sum(file.stat().st_size for file in files), "logs": logs}


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


@define
class Side:
    """What one number of daemons did, in all rounds."""

    rates: list[float] = field(factory=list)
    cpu_ms: list[dict[str, float]] = field(factory=list)
    written: list[Written] = field(factory=list)
    bytes_each: dict[str, float] = field(factory=dict)

    def figures(self, elements: int) -> dict[str, Any]:
        found: dict[str, Any] = {"rate": spread(self.rates)}
        parts = {part: statistics.median(one[part] for one in self.cpu_ms) for part in self.cpu_ms[0]}
        found["cpu ms each"] = parts | {"all": statistics.median(sum(one.values()) for one in self.cpu_ms)}
        found["bytes each"] = self.bytes_each
        if self.written:
            last = self.written[-1]
            found["postgresql each"] = {
                "commits": last.commits / elements,
                "log bytes": last.wal_bytes / elements,
                "flushes": last.wal_syncs / elements,
            }
        return found


@contextlib.contextmanager
def cluster(name: str, number: int, server: Postgresql | None, **settings: dict[str, str]) -> Iterator[Cluster]:
    """Some daemons on a fresh database; on SQLite without a server."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(directory_for_all(f"pdm-bench-{name}-"))
        services: list[TestService] = []
        if server is not None:
            settings["database"] = {"url": server.make_database(f"{name}_{directory.name[-8:].lower()}")}
        for at in range(number):
            service = TestService(directory / f"node{at}")
            service.init(**settings)
            if services:
                _share_key(services[0], service)
            stack.callback(end_daemon, service)
            service.start()
            services.append(service)
        assert services[0].process is not None
        yield Cluster(services, server, Rig(services[0], None, directory, Meter(services[0].process.pid)))


def _share_key(first: TestService, other: TestService) -> None:
    """All daemons of a cluster seal credentials with the same key."""
    for key in first.directory.glob("var/*.key"):
        shutil.copy2(key, other.directory / "var" / key.name)


def zero_work(on: Cluster, caller: Caller, elements: int, *, many: bool) -> tuple[float, dict[str, float]]:
    """Seconds, and CPU milliseconds of each part for each element."""
    # Its jobs are told from those of earlier runs by their label.
    work = Work(on.rig, caller, elements, many, number=time.time_ns())
    if many:
        work.prepare_many_jobs()
    before = on.cpu()
    seconds = work.many_jobs() if many else work.one_job()
    after = on.cpu()
    if not many and work.job["num_done"] != elements + 1:
        raise BenchmarkError(f"{work.job['num_done']} elements done instead of {elements + 1}")
    return seconds, {part: (after[part] - before[part]) / elements * 1000 for part in after}


def measure(on: Cluster, side: Side, elements: int, shape: str) -> None:
    with on.rig.caller("admin") as caller:
        began = None
        before = on.sizes()
        if on.server is not None:
            time.sleep(_COUNTED_AFTER_S)
            began = on.server.written()
        if shape == "sleep":
            seconds, cpu_ms = sleeping(on, caller, elements)
        else:
            seconds, cpu_ms = zero_work(on, caller, elements, many=shape == "jobs")
        side.rates.append(elements / seconds)
        side.cpu_ms.append(cpu_ms)
        after = on.sizes()
        side.bytes_each = {part: (after[part] - before[part]) / elements for part in after}
        if on.server is not None and began is not None:
            time.sleep(_COUNTED_AFTER_S)
            side.written.append(on.server.written() - began)


def sleeping(on: Cluster, caller: Caller, elements: int) -> tuple[float, dict[str, float]]:
    """A job whose elements sleep; timed from the end of the listing."""
    before = on.cpu()
    job = caller.submit(
        "copy", src_siteid=1, src_filepath="/tree", dst_siteid=2, dst_filepath="/copy", protocol="DUMMY",
        extra_opts={"dummy": {"files": elements, "delay": 0.1}},
    )  # fmt: skip
    caller.wait_until_listed(job["id"])
    began = time.perf_counter()
    caller.done(job["id"], _TIMEOUT_S)
    seconds = time.perf_counter() - began
    after = on.cpu()
    return seconds, {part: (after[part] - before[part]) / elements * 1000 for part in after}


def main() -> None:
    options = options_of(
        __doc__ or "", shape=("zero", "zero"), elements=(0, 0), rounds=(3, 1), daemons=(3, 2), sqlite=(1, 1)
    )
    sizes = {"zero": (10_000, 1_000), "jobs": (2_000, 300), "sleep": (1_200, 240)}
    options.elements = options.elements or sizes[options.shape][options.quick]
    # All daemons together begin a route with that many streams.
    route_start = str(_STREAMS * options.daemons)
    streams = {"agents": {"max_agents": str(_STREAMS)}, "queue": {"route_start": route_start}}
    settings = streams if options.shape == "sleep" else {}
    names = ["sqlite"] if options.sqlite else []
    names += [str(number) for number in range(1, options.daemons + 1)]
    sides = {name: Side() for name in names}
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(directory_for_all("pdm-bench-postgresql-"))
        server = stack.enter_context(postgresql(directory / "server"))
        for _ in range(options.rounds):
            for name, side in sides.items():
                number, on = (1, None) if name == "sqlite" else (int(name), server)
                with cluster(f"nodes{name}", number, on, **settings) as daemons:
                    # The first run fills caches and starts helpers.
                    measure(daemons, Side(), max(options.elements // 10, 100), options.shape)
                    measure(daemons, side, options.elements, options.shape)
                print(f"  . {name:>8}: {side.figures(options.elements)}", flush=True)
        figures: dict[str, Any] = {name: side.figures(options.elements) for name, side in sides.items()}
        figures["unit"] = "elements/s"
        if options.sqlite:
            least = figures["sqlite"]["cpu ms each"]["all"]
            figures["cpu each, of SQLite's"] = {
                name: figures[name]["cpu ms each"]["all"] / least for name in names if name != "sqlite"
            }
        figures["rate, of one daemon's"] = {
            name: figures[name]["rate"]["median"] / figures["1"]["rate"]["median"] for name in names if name != "sqlite"
        }
        figures["database on"] = file_system(directory)
    report(options, figures)


if __name__ == "__main__":
    run(main)

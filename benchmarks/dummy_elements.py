"""Elements of simulated, zero-second work: what the queue itself costs for each.

Run: ``.venv/bin/python benchmarks/dummy_elements.py``
"""

from __future__ import annotations

import time

from rig import arguments, client_of, cpu_seconds, peak_memory_mib, report, rig


def main() -> None:
    options = arguments(__doc__ or "", elements=10_000)
    with rig(with_grid=False) as (service, _), client_of(service, "admin") as client:
        assert service.process is not None
        pid = service.process.pid
        cpu = cpu_seconds(pid)
        began = time.perf_counter()
        job = client.copy(1, "/tree", 2, "/copy", protocol="DUMMY", options={"dummy": {"files": options.elements}})
        done = client.wait(job.id, 600)
        seconds = time.perf_counter() - began
        assert done.status == "DONE", done
        assert done.num_done == options.elements + 1
        logs = sum(1 for _ in (service.directory / "var" / "logs").glob("*/*/*/attempt1.log"))
        assert logs == options.elements + 1, logs
        report(
            "dummy elements",
            {
                "elements": options.elements,
                "submit to DONE (s)": seconds,
                "elements per second": options.elements / seconds,
                "daemon CPU per element (ms)": (cpu_seconds(pid) - cpu) / options.elements * 1000,
                "daemon peak memory (MiB)": peak_memory_mib(pid),
                "every element has its log": True,
            },
        )


if __name__ == "__main__":
    main()

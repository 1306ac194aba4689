"""The latency of one client while others hold 2,000 idle TLS connections and send bodies by the byte.

What is compared with is the same client alone, before and after, at the same daemon. One kept connection, one request
at a time: ``GET /jobs/N`` and ``POST /list`` of simulated work in turn.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

from caller import API, tls_context
from figures import BenchmarkError, ratios, spread
from meter import memory_mib
from rest_load import Connections, get, post
from rig import file_system, options_of, report, rig, run

_HOLDER = Path(__file__).with_name("hold_connections.py")
_BODY = json.dumps({"src_siteid": 1, "src_filepath": "/x", "protocol": "DUMMY"}).encode()


def median_ms(kept: Connections, path: str, requests: int) -> float:
    """The median of some requests, one after the other."""
    asked = itertools.cycle([post("localhost", f"{API}/list", _BODY), get("localhost", path)])
    return statistics.median(kept.load(lambda: next(asked), requests=1).seconds * 1000 for _ in range(requests))


def main() -> None:
    options = options_of(__doc__ or "", idle=(2000, 200), slow=(50, 10), requests=(1000, 200), rounds=(3, 1))
    alone, beset = [], []
    with rig(server={"new_connections": "0"}) as on, on.caller("admin") as caller:
        job = caller.done(caller.submit("list", **json.loads(_BODY))["id"], 30)
        path = f"{API}/jobs/{job['id']}"
        with Connections(on.service.url or "", tls_context(on.service, "admin"), 1) as kept:
            median_ms(kept, path, options.requests)
            before = memory_mib(on.pid, "VmRSS")
            grown = 0.0
            for _ in range(options.rounds):
                alone.append(median_ms(kept, path, options.requests))
                holder = subprocess.Popen(
                    [
                        sys.executable, str(_HOLDER), on.service.url or "",
                        str(on.service.directory / "certificates" / "ca.crt"), str(options.idle), str(options.slow),
                    ],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                with holder:
                    assert holder.stdout is not None
                    assert holder.stdin is not None
                    if not holder.stdout.readline():
                        raise BenchmarkError("the connections could not be held")
                    beset.append(median_ms(kept, path, options.requests))
                    grown = max(grown, memory_mib(on.pid, "VmRSS") - before)
                    holder.stdin.close()
                    holder.wait(30)
        figures = {
            "unit": "ms, median of a client",
            "ratio": ratios(alone, beset),
            "ours": spread(beset),
            "bare": spread(alone),
            "bare is": "the same client alone",
            "growth of the daemon (MiB)": grown,
            "database on": file_system(on.directory),
        }
    report(options, figures)


if __name__ == "__main__":
    run(main)

"""REST requests over mutual TLS with kept connections, against a bare Klein route that does the least it can.

``--route job``: ``GET /jobs/N`` of a job that has ended. ``--route list``: ``POST /list``, as ``pdm`` sends it, with an
Idempotency-Key; the listings (of no work) run as they come, in the same daemon, and their cost is in its figures. Apart
from that, once more with the lane of listings kept busy, so that submitting is all that happens.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable
from typing import Any

from attrs import define
from caller import API, Caller, tls_context
from figures import ratios, spread
from meter import Cpu, Meter, sum_cpu
from rest_floor import serving
from rest_load import Connections, get, post
from rig import file_system, options_of, report, rig, run

_BODY = {"src_siteid": 1, "src_filepath": "/x", "protocol": "DUMMY"}
#: Listings that never end: more than any lane has places.
_HOLDERS = 32
_DRAIN_S = 600.0


@define
class Slices:
    """Load on one server, slice after slice."""

    connections: Connections
    meter: Meter
    request: Callable[[], bytes]
    seconds: float
    rates: list[float]
    cpu: list[Cpu]
    requests: int = 0

    def run(self) -> None:
        before = self.meter.cpu()
        loaded = self.connections.load(self.request, self.seconds)
        self.cpu.append(self.meter.cpu() - before)
        self.rates.append(loaded.rate)
        self.requests += loaded.requests

    def forget(self) -> None:
        """What was run so far does not count."""
        self.rates.clear()
        self.cpu.clear()
        self.requests = 0

    def cpu_ms(self) -> dict[str, float]:
        each = sum_cpu(self.cpu).ms_each(self.requests)
        return {part: each[part] for part in ("daemon", "helpers", "client")}


def keep_listings_waiting(caller: Caller) -> None:
    """Keep the lane of listings busy for good."""
    held = [caller.submit("list", **_BODY, priority=0, extra_opts={"dummy": {"hang": True}}) for _ in range(_HOLDERS)]
    caller.wait(held[0]["id"], 30, lambda job: job["status"] == "RUNNING")


def alternate(one: Slices, other: Slices, rounds: int, between: Callable[[], None]) -> None:
    """Slices of both in turn."""
    for _ in range(rounds):
        one.run()
        between()
        other.run()


def main() -> None:
    options = options_of(__doc__ or "", route=("job", "job"), connections=(16, 16), slice_ms=(2000, 500), rounds=(7, 2))
    submits = options.route == "list"
    with rig() as on, on.caller("admin") as caller, contextlib.ExitStack() as stack:
        job = caller.submit("list", **_BODY)
        caller.done(job["id"], 30)
        floor = stack.enter_context(serving(on.service.directory / "certificates", on.directory / "floor.sqlite"))
        context = tls_context(on.service, "admin")
        body = json.dumps(_BODY).encode()

        def ours() -> bytes:
            if submits:
                return post("localhost", f"{API}/list", body, f"Idempotency-Key: {uuid.uuid4()}")
            return get("localhost", f"{API}/jobs/{job['id']}")

        def bare() -> bytes:
            return post("localhost", "/list", body) if submits else get("localhost", "/jobs/1")

        def slices(url: str, pid: int, request: Callable[[], bytes]) -> Slices:
            kept = stack.enter_context(Connections(url, context, options.connections))
            return Slices(kept, Meter(pid), request, options.slice_ms / 1000, [], [])

        def settle_down() -> None:
            if submits:
                caller.wait_until_idle(_DRAIN_S)

        mine, other = slices(on.service.url or "", on.pid, ours), slices(floor.url, floor.pid, bare)
        # The first slices pay for what is done once.
        alternate(mine, other, 1, settle_down)
        mine.forget()
        other.forget()
        alternate(mine, other, options.rounds, settle_down)
        figures: dict[str, Any] = {
            "unit": "requests/s",
            "ratio": ratios(mine.rates, other.rates),
            "ours": spread(mine.rates),
            "bare": spread(other.rates),
            "bare is": "a bare Klein route" + (" with one SQLite insert, a commit each" if submits else ""),
            "cpu ms each, ours": mine.cpu_ms(),
            "cpu ms each, bare": other.cpu_ms(),
            "peak MiB": on.meter.peak_memory(),
            "database on": file_system(on.directory),
        }
        if submits:
            held, beside = slices(on.service.url or "", on.pid, ours), slices(floor.url, floor.pid, bare)
            keep_listings_waiting(caller)
            alternate(held, beside, options.rounds, lambda: None)
            figures |= {
                "ours, no listing runs": spread(held.rates),
                "ratio, no listing runs": ratios(held.rates, beside.rates),
                "cpu ms each, no listing runs": held.cpu_ms(),
            }
    report(options, figures)


if __name__ == "__main__":
    run(main)

"""The page of a job in a browser: the first view of a large job, and what live updates of a busy one cost.

The first view is asked for on new connections, so the handshake is in it. A refresh is what ``live.js`` asks for at
most once a second. Then Chromium watches a job that runs as fast as it can.
"""

from __future__ import annotations

import os
import ssl
import time
from pathlib import Path
from typing import Any

from caller import tls_context
from elements_answer import Answer, ask
from figures import BenchmarkError, spread
from meter import all_times
from playwright.sync_api import Response, sync_playwright
from rest_load import connect
from rig import Rig, file_system, options_of, report, rig, run

_FRAGMENTS = ("head", "facts", "progress", "errors", "elements", "timeline")
_CHROMIUM = "/usr/bin/chromium"


def first_views(on: Rig, job: int, rounds: int, context: ssl.SSLContext) -> list[tuple[float, Answer]]:
    """Seconds from the beginning of the handshake, and the answer, of each view."""
    views = []
    for _ in range(rounds):
        began = time.perf_counter()
        with connect(on.service.url or "", context) as connection:
            answer = ask(connection, f"/web/jobs/{job}")
        views.append((time.perf_counter() - began, answer))
    return views


def refresh_cost(on: Rig, job: int, refreshes: int, context: ssl.SSLContext) -> tuple[float, int]:
    """CPU milliseconds of the daemon, and bytes, of one refresh; handshakes are subtracted."""
    path = f"/web/jobs/{job}?" + "&".join(f"fragment={name}" for name in _FRAGMENTS)
    costs, size = [], 0
    for asked in ("/web/static/icon.svg", path):
        before = on.meter.cpu().daemon
        for _ in range(refreshes):
            with connect(on.service.url or "", context) as connection:
                size = len(ask(connection, asked).body)
        costs.append((on.meter.cpu().daemon - before) / refreshes * 1000)
    return costs[1] - costs[0], size


def _browser_seconds(daemon: int) -> float:
    """CPU seconds of this process' descendants but the daemon: the browser and its driver."""
    times = all_times()
    total = 0.0
    for pid, each in times.items():
        above = pid
        while above in times and above not in (daemon, os.getpid()):
            above = times[above].parent
        if above == os.getpid() and pid != above:
            total += each.own
    return total


def watched(on: Rig, job: int, seconds: float) -> dict[str, Any]:
    """What a browser costs that watches a job."""
    certificate, key = on.service.credentials("admin")
    url = on.service.url or ""
    sizes: list[int] = []

    def count(response: Response) -> None:
        if "fragment=" in response.url:
            sizes.append(len(response.body()))

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        certificates: Any = [{"origin": url, "certPath": certificate, "keyPath": key}]
        context = browser.new_context(base_url=url, ignore_https_errors=True, client_certificates=certificates)
        page = context.new_page()
        page.goto(f"/web/jobs/{job}")
        page.on("response", count)
        with on.caller("admin") as caller:
            page.wait_for_timeout(2000)
            sizes.clear()
            done = caller.job(job)["num_done"]
            cpu, began = _browser_seconds(on.pid), time.perf_counter()
            page.wait_for_timeout(seconds * 1000)
            passed = time.perf_counter() - began
            cpu = _browser_seconds(on.pid) - cpu
            found = caller.job(job)
        browser.close()
    if not sizes:
        raise BenchmarkError("the page was not refreshed")
    return {
        "files/s": (found["num_done"] - done) / passed,
        "still runs at the end": found["status"] == "RUNNING",
        "refreshes/s": len(sizes) / passed,
        "bytes/s": sum(sizes) / passed,
        "browser and driver, CPU ms/s": cpu / passed * 1000,
    }


def main() -> None:
    options = options_of(__doc__ or "", elements=(100_000, 20_000), rounds=(20, 5), seconds=(20, 8))
    if not Path(_CHROMIUM).exists():
        raise BenchmarkError(f"there is no {_CHROMIUM}: script/bootstrap installs it")
    with rig() as on, on.caller("admin") as caller:
        context = tls_context(on.service, "admin")
        where = {"src_siteid": 1, "src_filepath": "/tree", "dst_siteid": 2, "dst_filepath": "/copy"}
        dummy = {"files": options.elements, "size": 1000, "hang": True}
        large = caller.submit("copy", **where, protocol="DUMMY", extra_opts={"dummy": dummy})["id"]
        caller.wait(large, 300, lambda seen: seen["num_elements"] == options.elements + 1)
        caller.wait_until_listed(large)
        # Templates are compiled at their first use.
        ask(connect(on.service.url or "", context), f"/web/jobs/{large}")
        views = first_views(on, large, options.rounds, context)
        refresh_ms, refresh_bytes = refresh_cost(on, large, options.rounds * 5, context)
        caller.cancel(large)
        busy = caller.submit(
            "copy", **where, protocol="DUMMY", extra_opts={"dummy": {"files": options.elements, "size": 1000}}
        )["id"]
        caller.wait(busy, 300, lambda seen: seen["num_done"] > 1)
        live = watched(on, busy, options.seconds)
        figures = {
            "unit": "ms of a first view, handshake included",
            "ours": spread([seconds * 1000 for seconds, _ in views]),
            "first view (ms)": spread([seconds * 1000 for seconds, _ in views]),
            "KB of a first view": len(views[0][1].body) / 1000,
            "refresh": {"daemon, CPU ms": refresh_ms, "bytes": refresh_bytes},
            "live": live,
            "database on": file_system(on.directory),
        }
    report(options, figures)


if __name__ == "__main__":
    run(main)

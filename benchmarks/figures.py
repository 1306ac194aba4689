"""Figures: spreads and ratios of alternating runs, and the result of a benchmark as JSON and for people."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Spread = dict[str, float]
#: A figure below this has no meaning as a divisor: the clock did not see it.
_LEAST = 1e-9


class BenchmarkError(Exception):
    """The benchmark measured something that did not do its work; there is no figure."""


def spread(values: Sequence[float]) -> Spread:
    """Minimum, median and maximum of at least one value."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(ours: Sequence[float], bare: Sequence[float]) -> Spread:
    """Ours over bare, run by run: both of a pair met the same weather.

    Args:
        ours: rates, in the order of the rounds.
        bare: rates of the same rounds.
    """
    return spread([mine / max(other, _LEAST) for mine, other in zip(ours, bare, strict=True)])


def best_of(rates: Mapping[str, Sequence[float]]) -> str:
    """The name with the highest median rate."""
    return max(rates, key=lambda name: statistics.median(rates[name]))


def contenders(trial: Mapping[str, float], within: float = 0.7) -> list[str]:
    """Those of a first trial that may turn out to be the best: at least ``within`` of the best rate, best first."""
    least = max(trial.values()) * within
    return sorted((name for name, rate in trial.items() if rate >= least), key=lambda name: -trial[name])


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": model.group(1) if model else "",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def save(result: Mapping[str, Any], directory: Path) -> Path:
    """Write a result to a file of its own; the newest of a benchmark sorts last."""
    directory.mkdir(parents=True, exist_ok=True)
    at = str(result["at"]).replace(":", "").replace("-", "")
    path = directory / f"{result['benchmark']}-{at}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def load_newest(directory: Path) -> dict[str, dict[str, Any]]:
    """The newest result of each benchmark in a directory, by name."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        name = str(result["benchmark"])
        if name not in newest or newest[name]["at"] <= result["at"]:
            newest[name] = result
    return newest


def now() -> str:
    """The present moment as results have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def shown(value: object) -> str:
    """A figure for people: three or four digits that mean something."""
    if isinstance(value, Mapping):
        if set(value) == {"min", "median", "max"}:
            return f"{shown(value['median'])} ({shown(value['min'])} to {shown(value['max'])})"
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        if value and abs(value) < 100:
            return f"{value:.3g}"
        return f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(shown(part) for part in value)
    return str(value)

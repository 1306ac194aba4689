"""Alternating rounds: ours, then each bare contender, again and again, in the same weather."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from attrs import field, frozen
from figures import best_of, contenders, ratios, shown, spread
from meter import Cpu, Meter, sum_cpu


def _nothing() -> None:
    """Nothing to prepare, or to check."""


@frozen
class Contender:
    """One side of a comparison.

    Attributes:
        run: one run, timed and metered; gives seconds.
        prepare: before each run.
        check: after each run: fails unless the run has done its work; tidies up.
    """

    run: Callable[[], float]
    prepare: Callable[[], None] = _nothing
    check: Callable[[], None] = _nothing


@frozen
class Side:
    """The runs of one side: rates and CPU.

    Attributes:
        rates: things a second.
        cpu: of each run.
    """

    rates: list[float] = field(factory=list)
    cpu: list[Cpu] = field(factory=list)


def timed(function: Callable[[], object]) -> float:
    """Seconds that a function takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@frozen
class Comparison:
    """Runs both sides and keeps what they did.

    Attributes:
        meter: of daemon and servers.
        count: things that each of our runs does.
        unit: of the rates.
        elements: what CPU is told for each of, where that is not what the rates count.
    """

    meter: Meter
    count: int
    unit: str = "files/s"
    elements: int | None = None

    def alternate(
        self,
        ours: Contender,
        bare: Mapping[str, Contender],
        rounds: int,
        *,
        bare_count: int | None = None,
    ) -> dict[str, Any]:
        """A trial of all, then the rounds with those that may be the best; the figures of a result.

        Args:
            ours: the service.
            bare: name → a bare contender.
            rounds: how many times both sides run; the trial does not count.
            bare_count: things that a bare run does, where they are not as many as ours.
        """
        bare_count = bare_count or self.count
        first = Side()
        self._run("service", ours, self.count, first)
        trial = {}
        for name, contender in bare.items():
            side = Side()
            self._run(name, contender, bare_count, side)
            trial[name] = side.rates[0]
        names = contenders(trial)
        mine, others = Side(), {name: Side() for name in names}
        for _ in range(rounds):
            self._run("service", ours, self.count, mine)
            for name in names:
                self._run(name, bare[name], bare_count, others[name])
        best = best_of({name: side.rates for name, side in others.items()})
        return {
            "unit": self.unit,
            "ratio": ratios(mine.rates, others[best].rates),
            "ours": spread(mine.rates),
            "ours, first run": first.rates[0],
            "bare": spread(others[best].rates),
            "bare is": best,
            "bare modes": {
                name: spread(others[name].rates)["median"] if name in others else rate for name, rate in trial.items()
            },
            "cpu ms each, ours": sum_cpu(mine.cpu).ms_each((self.elements or self.count) * rounds),
            "cpu ms each, bare": sum_cpu(others[best].cpu).ms_each((self.elements or bare_count) * rounds),
            "peak MiB": self.meter.peak_memory(),
        }

    def _run(self, name: str, contender: Contender, count: int, side: Side) -> None:
        contender.prepare()
        before = self.meter.cpu()
        seconds = contender.run()
        side.cpu.append(self.meter.cpu() - before)
        contender.check()
        side.rates.append(count / seconds)
        print(f"  . {shown(count / seconds):>8} {self.unit:10} {name}", file=sys.stderr, flush=True)

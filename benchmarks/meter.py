"""CPU seconds and memory of the daemon, its helpers, the servers and the client, each apart, from ``/proc``.

Sessions of a server and helpers come and go: what has ended is in the time of the children that their parent has
waited for, what lives or waits to be waited for is found by its parent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from attrs import asdict, frozen
from figures import BenchmarkError

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
#: Written to ``clear_refs``, it makes the kernel forget the peak of resident memory.
_RESET_PEAK = "5"
#: How often a look at all processes is repeated when children end meanwhile.
_LOOKS = 50


@frozen
class ProcessTimes:
    """Of one process, in seconds: its own, and of its children that have ended and were waited for."""

    parent: int
    own: float
    ended: float


def read_times(pid: int) -> ProcessTimes | None:
    """Times of a process; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in brackets may have blanks and brackets.
    fields = text.rpartition(")")[2].split()
    user, system, ended_user, ended_system = (int(fields[at]) / _TICKS_A_SECOND for at in (11, 12, 13, 14))
    return ProcessTimes(int(fields[1]), user + system, ended_user + ended_system)


def all_times() -> dict[int, ProcessTimes]:
    """Times of every process of the machine, zombies too."""
    found = {int(entry.name): read_times(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    return {pid: times for pid, times in found.items() if times is not None}


def steady_times(
    parents: Sequence[int], read: Callable[[int], ProcessTimes | None] = read_times
) -> dict[int, ProcessTimes]:
    """Times of every process, none of whose parents has waited for a child meanwhile.

    Sessions end when their client does, which is just when somebody looks: one that goes between the look at its parent
    and the look at itself would be in neither.

    Raises:
        BenchmarkError: a parent is gone.
    """
    for _ in range(_LOOKS):
        before = {pid: read(pid) for pid in parents}
        table = all_times()
        after = {pid: read(pid) for pid in parents}
        if None in after.values():
            raise BenchmarkError(f"one of the processes {list(parents)} has ended")
        if all(_ended(before[pid]) == _ended(after[pid]) for pid in parents):
            break
    # The last look is as good as there is.
    return table | {pid: times for pid, times in after.items() if times is not None}


def _ended(times: ProcessTimes | None) -> float | None:
    return None if times is None else times.ended


def descendants(pid: int, table: dict[int, ProcessTimes]) -> list[int]:
    """Children, their children and so on."""
    children: dict[int, list[int]] = {}
    for child, times in table.items():
        children.setdefault(times.parent, []).append(child)
    found, waiting = [], [pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            found.append(child)
            waiting.append(child)
    return found


def below(pid: int, table: dict[int, ProcessTimes]) -> float:
    """CPU seconds of all that a process has ever started."""
    living = sum(table[child].own + table[child].ended for child in descendants(pid, table))
    return living + (table[pid].ended if pid in table else 0.0)


@frozen
class Cpu:
    """CPU seconds, user and system, by part."""

    daemon: float = 0.0
    helpers: float = 0.0
    servers: float = 0.0
    client: float = 0.0

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(*(getattr(self, name) + value for name, value in asdict(other).items()))

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(*(getattr(self, name) - value for name, value in asdict(other).items()))

    def ms_each(self, count: int) -> dict[str, float]:
        """Milliseconds for each of ``count`` things."""
        return {name: value / max(count, 1) * 1000 for name, value in asdict(self).items()}


@frozen
class Meter:
    """Reads what the parts have used so far.

    Attributes:
        daemon: process number; None where there is none.
        servers: process numbers of the servers; their sessions are found.
    """

    daemon: int | None = None
    servers: Sequence[int] = ()

    def cpu(self) -> Cpu:
        """CPU seconds so far; those of the client are this process's, and of commands that it has waited for."""
        table = steady_times([*self.servers, *([] if self.daemon is None else [self.daemon])])
        daemon = helpers = 0.0
        if self.daemon is not None:
            daemon = table[self.daemon].own
            helpers = below(self.daemon, table)
        servers = sum(table[pid].own + below(pid, table) for pid in self.servers)
        return Cpu(daemon, helpers, servers, sum(os.times()[:4]))

    def peak_memory(self) -> dict[str, float]:
        """The most memory in MiB that the daemon, and any one of its living helpers, has had at once."""
        if self.daemon is None:
            return {}
        helpers = descendants(self.daemon, all_times())
        return {
            "daemon": memory_mib(self.daemon, "VmHWM"),
            "helper": max((memory_mib(pid, "VmHWM") for pid in helpers), default=0.0),
        }


def memory_mib(pid: int, what: str) -> float:
    """``VmRSS`` (resident now) or ``VmHWM`` (its peak) of a process in MiB; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) / 1024
    return 0.0


def reset_peak(pid: int) -> None:
    """Let the peak of a process's memory count from now."""
    Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)


def sum_cpu(parts: Iterable[Cpu]) -> Cpu:
    """All together."""
    total = Cpu()
    for part in parts:
        total += part
    return total

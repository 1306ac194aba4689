"""CPU of processes that come and go is not lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import IO

import pytest
from figures import BenchmarkError
from meter import Cpu, Meter, ProcessTimes, below, descendants, steady_times

#: Uses a quarter of a second of CPU, and prints it; in a child process on request.
_BURN = "import time; e = time.process_time() + 0.25\nwhile time.process_time() < e: pass\n"
_PARENT = f"""
import subprocess, sys
for line in sys.stdin:
    child = subprocess.Popen([sys.executable, "-c", {_BURN!r} + "print('burnt', flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    print("living", flush=True)
    sys.stdin.readline()
    child.communicate(b"\\n")
    print("ended", flush=True)
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        _pipe(process.stdin).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def test_a_session_counts_while_it_lives_and_after_it_has_ended(parent: subprocess.Popen[str]) -> None:
    meter = Meter(servers=[parent.pid])
    before = meter.cpu()

    for expected in ("living", "ended"):
        _pipe(parent.stdin).write("\n")
        _pipe(parent.stdin).flush()
        assert _pipe(parent.stdout).readline() == f"{expected}\n"
        used = (meter.cpu() - before).servers
        # Once, not twice: neither lost on the way nor counted as a child and as its parent's past.
        assert 0.2 <= used < 0.48


def test_helpers_are_distinguished_from_their_daemon(parent: subprocess.Popen[str]) -> None:
    meter = Meter(daemon=parent.pid)
    before = meter.cpu()
    _pipe(parent.stdin).write("\n")
    _pipe(parent.stdin).flush()
    _pipe(parent.stdout).readline()

    used = meter.cpu() - before

    assert used.helpers >= 0.2
    assert used.daemon < 0.2
    memory = meter.peak_memory()
    assert 1 < memory["helper"] < 200
    assert 1 < memory["daemon"] < 200
    _pipe(parent.stdin).write("\n")
    _pipe(parent.stdin).flush()


def test_all_below_counts_once() -> None:
    table = {
        1: ProcessTimes(0, 100.0, 1000.0),
        10: ProcessTimes(1, 1.0, 2.0),
        11: ProcessTimes(10, 4.0, 8.0),
        12: ProcessTimes(11, 16.0, 32.0),
        20: ProcessTimes(1, 64.0, 128.0),
    }

    assert sorted(descendants(10, table)) == [11, 12]
    assert below(10, table) == 2.0 + 4.0 + 8.0 + 16.0 + 32.0
    assert below(99, table) == 0.0


def test_a_look_is_repeated_when_a_child_ends_meanwhile() -> None:
    seen = [1.0, 2.0, 2.0, 3.0, 3.0, 3.0]

    def read(pid: int) -> ProcessTimes:
        return ProcessTimes(1, 0.0, seen.pop(0))

    assert steady_times([7], read)[7].ended == 3.0
    assert not seen


def test_a_parent_that_is_gone_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="has ended"):
        steady_times([7], lambda pid: None)


def test_cpu_adds_up_and_is_shared_out() -> None:
    used = Cpu(1.0, 2.0, 3.0, 4.0) + Cpu(1.0, 0.0, 0.0, 0.0) - Cpu(0.0, 1.0, 0.0, 0.0)

    assert used.ms_each(1000) == {"daemon": 2.0, "helpers": 1.0, "servers": 3.0, "client": 4.0}


def test_the_client_is_this_process_and_the_commands_that_it_ran() -> None:
    before = Meter().cpu()
    subprocess.run([sys.executable, "-c", _BURN], check=True, env=dict(os.environ))

    assert (Meter().cpu() - before).client >= 0.2

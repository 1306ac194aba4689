"""Processes are known by the marks in their environment, and only those are hit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdm.testgrid.processes import end_marked, marked, signal_marked, signal_process

# Says when it is ready, then waits for good.
_WAITING = "echo ready; while true; do sleep 60; done"


@contextmanager
def started(script: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        ["/bin/bash", "-c", script],
        env={"PATH": os.environ["PATH"], **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_marked_process_and_its_children_end(tmp_path: Path) -> None:
    marks = {"PDM_TEST_MARK": str(tmp_path)}
    with started(f"sleep 60 & {_WAITING}", **marks):
        assert end_marked(marks) >= 2
        assert marked(marks) == []


def test_a_process_that_refuses_to_end_is_killed(tmp_path: Path) -> None:
    marks = {"PDM_TEST_MARK": str(tmp_path)}
    # An ignored signal stays ignored in the program that takes the shell's place.
    with started("trap '' TERM; echo ready; exec sleep 60", **marks):
        assert end_marked(marks) == 1
        assert marked(marks) == []


def test_a_frozen_process_ends(tmp_path: Path) -> None:
    marks = {"PDM_TEST_MARK": str(tmp_path)}
    with started(_WAITING, **marks):
        signal_marked(marks, signal.SIGSTOP)
        assert end_marked(marks) >= 1


def test_all_marks_must_be_there(tmp_path: Path) -> None:
    with started(_WAITING, PDM_TEST_MARK=str(tmp_path), PDM_TEST_NAME="A") as process:
        other = {"PDM_TEST_MARK": str(tmp_path), "PDM_TEST_NAME": "B"}
        assert process.pid in marked({"PDM_TEST_MARK": str(tmp_path)})
        assert marked(other) == []
        assert not signal_process(process.pid, other, signal.SIGKILL)
        assert end_marked(other) == 0
        assert process.poll() is None


def test_the_spared_process_gets_no_signal(tmp_path: Path) -> None:
    marks = {"PDM_TEST_MARK": str(tmp_path)}
    with started(_WAITING, **marks) as spared, started(_WAITING, **marks) as hit:
        reached = signal_marked(marks, signal.SIGKILL, spare=spared.pid)
        assert hit.wait() == -signal.SIGKILL
        assert hit.pid in reached
        assert spared.poll() is None


def test_a_process_whose_program_is_just_changing_is_found(tmp_path: Path) -> None:
    marks = {"PDM_TEST_MARK": str(tmp_path)}
    again = tmp_path / "again"
    again.write_text(f"exec /bin/bash {again}\n")
    with started(f"echo ready; exec /bin/bash {again}", **marks) as process:
        assert all(marked(marks) == [process.pid] for _ in range(50))

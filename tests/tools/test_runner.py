"""Tools as child processes: their lines, their groups, their ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pdm.workqueue.helpers.storage import StoppedError, StorageError
from pdm.workqueue.helpers.tools.runner import LIST, Deadline, ToolCommand, ToolRunner


def deadline(stall_s: float = 20.0, total_s: float = 40.0) -> Deadline:
    return Deadline(stall_s, time.monotonic() + total_s)


def shell(script: str, **more: object) -> ToolCommand:
    return ToolCommand(["sh", "-c", script], **more)  # type: ignore[arg-type]


def run(command: ToolCommand) -> tuple[int, list[str], list[str]]:
    heard: list[str] = []
    complained: list[str] = []
    status = ToolRunner().run(command, deadline(), heard.append, complained.append)
    return status, heard, complained


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_lines_of_both_outputs_and_the_status() -> None:
    assert run(shell("echo one; echo two >&2; printf three; exit 7")) == (7, ["one", "three"], ["two"])


def test_a_shared_pipe_keeps_the_order() -> None:
    status, heard, complained = run(shell("echo 1; echo 2 >&2; echo 3", is_merged=True))
    assert (status, heard, complained) == (0, ["1", "2", "3"], [])


def test_a_carriage_return_ends_a_line_only_where_the_tool_rewrites_lines() -> None:
    assert run(shell(r"printf 'a\rb\n'"))[1] == ["a\rb"]
    assert run(shell(r"printf 'a\rb\n'", rewrites_lines=True))[1] == ["a", "b"]


def test_names_that_are_not_utf_8_come_out_as_they_are() -> None:
    assert os.fsencode(run(shell(r"printf '\351\n'"))[1][0]) == b"\xe9"


def test_a_list_is_a_file_that_is_on_no_disk() -> None:
    command = ToolCommand(["cat", LIST], lines=["one", "two"])
    assert run(command) == (0, ["one", "two"], [])


def test_a_line_is_heard_when_it_is_printed() -> None:
    heard: list[float] = []
    began = time.monotonic()
    ToolRunner().run(shell("echo now; sleep 2"), deadline(), lambda line: heard.append(time.monotonic() - began))
    assert heard[0] < 1.5


def test_a_tool_that_is_interrupted_is_gone_within_a_second_with_all_that_it_started(tmp_path: Path) -> None:
    """Also what ignores SIGTERM."""
    pids = tmp_path / "pids"
    script = f"trap '' TERM; sleep 60 & echo $! > {pids}; echo $$ >> {pids}; echo ready; wait; sleep 60"
    runner = ToolRunner()
    ready = threading.Event()
    asked_at = 0.0

    def interrupt() -> None:
        nonlocal asked_at
        assert ready.wait(20)
        asked_at = time.monotonic()
        runner.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(StoppedError):
        runner.run(shell(script), deadline(), lambda line: ready.set())
    thread.join()
    assert time.monotonic() - asked_at < 1.0
    wait_until(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()), 1.0)
    with pytest.raises(StoppedError):
        runner.run(shell("echo never"), deadline(), lambda line: None)
    runner.resume()
    assert runner.run(shell("exit 3"), deadline(), lambda line: None) == 3


@pytest.mark.parametrize(("limits", "code"), [((0.6, 30.0), "STALLED"), ((30.0, 0.6), "TIMEOUT")])
def test_a_tool_that_takes_too_long_is_ended(limits: tuple[float, float], code: str) -> None:
    with pytest.raises(StorageError) as caught:
        ToolRunner().run(shell("sleep 60"), deadline(*limits), lambda line: None)
    assert caught.value.code == code


def test_progress_puts_a_stall_off() -> None:
    until = deadline(1.5)
    status = ToolRunner().run(
        shell("for i in 1 2 3 4 5 6; do sleep 0.5; echo $i; done"), until, lambda _: until.moved()
    )
    assert status == 0


def test_a_tool_ends_with_the_helper_even_if_that_is_killed(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import time; from pdm.workqueue.helpers.tools.runner import *;"
        f"command = ToolCommand(['sh', '-c', 'echo $$ > {pid}; sleep 60']);"
        "ToolRunner().run(command, Deadline(60, time.monotonic() + 60), print)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as helper:
        wait_until(lambda: pid.exists() and pid.read_text().strip() != "")
        helper.send_signal(signal.SIGKILL)
    wait_until(lambda: not alive(int(pid.read_text())), 2.0)


def test_a_killed_tool_reports_the_signal() -> None:
    assert run(shell("kill -9 $$"))[0] == -signal.SIGKILL


def test_what_is_not_installed_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "setpriv").symlink_to("/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StorageError, match="install the package gfal2-util-scripts") as caught:
        run(ToolCommand(["gfal-ls", "x"]))
    assert (caught.value.code, caught.value.scope) == ("DEPENDENCY_MISSING", "service")


def test_no_tool_sees_credentials_of_single_endpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PDM_CREDENTIALS", "secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    seen = dict(line.split("=", 1) for line in run(ToolCommand(["env"], {"MORE": "1"}))[1])
    assert not {"PDM_CREDENTIALS", "PYTHONPATH"} & seen.keys()
    assert (seen["MORE"], seen["TZ"]) == ("1", "UTC")

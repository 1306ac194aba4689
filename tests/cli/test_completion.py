"""Completion: candidates for a word, and what bash, zsh and fish make of them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from pdm.testgrid.processes import missing_of
from pdm.testgrid.service import TestService, service_environment
from pdm.workqueue.cli.completion import Node, bash_lines, command_table, complete, split_line
from pdm.workqueue.cli.main import pdm

_ROOT = Path(__file__).resolve().parents[2]
_SCRIPTS = _ROOT / "etc" / "completion"
_BREAKS = " \t\n\"'@><=;|&(:"


class FixedValues:
    """A service with two sites, one job and a directory."""

    def sites(self) -> Sequence[tuple[str, str]]:
        return [("RAL", "disk"), ("RAL-tape", "tape"), ("CERN", "")]

    def jobs(self) -> Sequence[tuple[str, str]]:
        return [("12", "DONE COPY /data"), ("7", "FAILED")]

    def entries(self, site: str, directory: str) -> tuple[str, Sequence[tuple[str, bool]]]:
        names = [("run 7", True), ("run*", False), (".hidden", False), ("a\x1b[31m", False)]
        return directory or "/data/", names if site == "RAL" else []


@pytest.fixture(scope="module")
def table() -> Node:
    return json.loads(json.dumps(command_table(pdm, click.Context(pdm, info_name="pdm", **pdm.context_settings))))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pdm sched", ["schedule "]),
        ("pdm webhook t", ["test "]),
        ("pdm cp --sy", ["--sync "]),
        ("pdm cp --sync m", ["mtime "]),
        ("pdm cp --sync=m", ["mtime "]),
        ("pdm -F j", ["json "]),
        ("pdm -F json stat", ["stat ", "status "]),
        ("pdm cp RA", ["RAL:", "RAL-tape:"]),
        ("pdm cp --label RA", []),
        ("pdm cp RAL:/x CE", ["CERN:"]),
        ("pdm cp RAL:", [r"/data/run\ 7/", r"/data/run\\\* "]),
        ("pdm cp RAL:/x/ru", [r"/x/run\ 7/", r"/x/run\\\* "]),
        ("pdm cp 'RAL:/x/run ", ["RAL:/x/run 7/"]),
        (r"pdm cp RAL:/x/run\ ", [r"/x/run\ 7/"]),
        ("pdm ls RAL:/x/.h", ["/x/.hidden "]),
        ("pdm site show C", ["CERN "]),
        ("pdm status 1", ["12 "]),
        ("pdm schedule add '0 3 * * *' -- cp --overw", ["--overwrite "]),
        ("pdm nothing x", []),
        ("pdm complet", []),
    ],
)
def test_candidates(table: Node, line: str, expected: list[str]) -> None:
    words, typed = split_line(line)
    assert list(bash_lines(complete(words[1:], table, FixedValues()), typed, _BREAKS)) == expected


def test_files_of_this_machine_are_left_to_the_shell(table: Node) -> None:
    assert [each.help for each in complete(["cp", "--batch", "/et"], table, FixedValues())] == ["files"]


def test_a_service_that_does_not_answer_costs_one_wait(tmp_path: Path) -> None:
    environment = service_environment(
        HOME=str(tmp_path), PDM_URL="https://127.0.0.1:9", XDG_CACHE_HOME=str(tmp_path / "cache")
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "pdm.workqueue.cli", "complete", "bash", "--", "pdm site show ", ":"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
    # One file says that it failed; the second completion has not tried again.
    assert len(list((tmp_path / "cache" / "pdm" / "completion").iterdir())) == 1


@pytest.mark.full
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_real_shells_complete_sites_and_remote_paths(shell: str, service: TestService, tmp_path: Path) -> None:
    missing = missing_of(shell)
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"{shell} is not installed: run script/bootstrap as root")
    assert not missing
    site = service.directory / "storage" / "a"
    (site / "data set").mkdir(exist_ok=True)
    (site / "data set" / "only").touch()
    certificates = service.directory / "certificates"
    environment = service_environment(
        HOME=str(tmp_path),
        PDM_URL=str(service.url),
        PDM_CERT=str(certificates / "admin.crt"),
        PDM_KEY=str(certificates / "admin.key"),
        PDM_CA=str(certificates / "ca.crt"),
        TERM="dumb",
        PS1="ready> ",
    )
    if shell == "fish":
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source {_SCRIPTS}/pdm.fish; complete -C 'pdm ls local-a:/data\\ set/o'"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "local-a:/data set/only" in done.stdout.replace("\\", ""), done
        return
    start, load = {
        "bash": (["bash", "--norc", "-i"], f"source {_SCRIPTS}/pdm.bash"),
        "zsh": (["zsh", "-f", "-i"], f"fpath=({_SCRIPTS} $fpath); autoload -Uz compinit; compinit -u"),
    }[shell]
    # Each TAB completes one part.
    screen = _type(start, environment, [f"{load}\n", "pdm ls local-a:/da\t", "on\t"], r"data\\ set/only")
    assert re.search(r"data\\ set/only", screen), screen


def _type(command: list[str], environment: dict[str, str], texts: Sequence[str], until: str) -> str:
    """Type into an interactive shell; returns what its terminal has shown."""
    leader, follower = pty.openpty()
    shell = subprocess.Popen(command, env=environment, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    screen = ""
    try:
        for text in texts:
            os.write(leader, text.encode())
            screen += _shown(leader, 8.0 if text.endswith("\t") else 2.0, until)
    finally:
        shell.kill()
        shell.wait()
        os.close(leader)
    return screen


def _shown(leader: int, longest_s: float, until: str) -> str:
    text, end = "", time.monotonic() + longest_s
    with contextlib.suppress(OSError):
        while time.monotonic() < end and not re.search(until, text):
            if select.select([leader], [], [], 0.2)[0]:
                text += os.read(leader, 65536).decode(errors="replace")
    return text

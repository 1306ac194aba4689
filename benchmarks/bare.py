"""The bare tools that the service is compared with: globus-url-copy in its list modes, and gfal-rm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from attrs import frozen
from figures import BenchmarkError

#: Much longer than anything here takes; a mode that hangs must not hang the benchmark.
_LONGEST_S = 900.0
_SHOWN = 600


@frozen
class ListMode:
    """A way to run globus-url-copy over a list of files.

    Attributes:
        options: of each process; the list follows them.
        processes: how many share the list.
    """

    options: str
    processes: int = 1

    @property
    def name(self) -> str:
        times = f" in {self.processes} processes" if self.processes > 1 else ""
        return f"globus-url-copy {self.options} -f LIST{times}"


@frozen
class Single:
    """globus-url-copy of one file, named on its command line."""

    options: str

    @property
    def name(self) -> str:
        return f"globus-url-copy {self.options} SRC DST".replace("  ", " ")


Mode = ListMode | Single
_PROVE = "-verify-checksum -checksum-alg ADLER32"
SIZE_MODES: Sequence[Mode] = (ListMode("-c -fast -v"), ListMode("-cc 4 -pp -fast"), ListMode("-pp", 2))
CHECKSUM_MODES: Sequence[Mode] = (
    ListMode(f"-c -fast -v {_PROVE}"),
    ListMode(f"-c -fast -v {_PROVE}", 2),
    ListMode(f"-cc 4 -pp -fast {_PROVE}"),
)
#: Those that do not wait for each answer: the others copy ten files a second where an answer takes 20 ms.
FAR_SIZE_MODES: Sequence[Mode] = (ListMode("-cc 4 -pp -fast"), ListMode("-pp", 2))
FAR_CHECKSUM_MODES: Sequence[Mode] = (ListMode(f"-cc 4 -pp -fast {_PROVE}"), ListMode(f"-pp {_PROVE}", 2))
ONE_FILE_MODES: Sequence[Mode] = (Single(""), Single("-fast"), ListMode("-c -fast -v"))
ONE_FILE_CHECKSUM_MODES: Sequence[Mode] = (Single(_PROVE), Single(f"-fast {_PROVE}"))


def copy(mode: Mode, pairs: Sequence[tuple[str, str]], environment: Mapping[str, str], directory: Path) -> float:
    """Copy files with a bare tool.

    Args:
        mode: how.
        pairs: source and destination URL of each file; the directories are there.
        environment: makes the tool the user.
        directory: for lists and what the tool prints.

    Returns:
        Seconds from the start of the processes to the end of the last.

    Raises:
        BenchmarkError: the tool failed, or did not end.
    """
    arguments = mode.options.split()
    if isinstance(mode, Single):
        commands = [["globus-url-copy", *arguments, *pairs[0]]]
    else:
        commands = []
        share = -(-len(pairs) // mode.processes)
        for number in range(mode.processes):
            part = directory / f"list{number}"
            lines = pairs[number * share : (number + 1) * share]
            part.write_text("".join(f'"{source}" "{destination}"\n' for source, destination in lines))
            commands.append(["globus-url-copy", *arguments, "-f", str(part)])
    return run_all(commands, environment, directory)


def list_tree(url: str, environment: Mapping[str, str], directory: Path, expected: int) -> float:
    """The fastest bare listing: what a recursive copy would copy, written to a file; seconds.

    Raises:
        BenchmarkError: the tool failed, or did not find ``expected`` files.
    """
    found = directory / "found"
    found.unlink(missing_ok=True)
    # The destination is never looked at.
    command = ["globus-url-copy", "-fast", "-r", "-do", str(found), f"{url}/", f"{url}-nowhere/"]
    seconds = run_all([command], environment, directory)
    lines = sum(1 for line in found.read_text().splitlines() if " size=" in line)
    if lines != expected:
        raise BenchmarkError(f"globus-url-copy -do found {lines} files instead of {expected}")
    return seconds


def has_gfal_rm() -> bool:
    return shutil.which("gfal-rm") is not None


def gfal_rm(url: str, environment: Mapping[str, str], directory: Path) -> float:
    """Remove a tree with gfal-rm; seconds. Whether it is gone must be looked at.

    The library is known to abort now and then when its process ends, after all work is done.
    """
    # Its scripts would take the interpreter of our virtual environment, which does not know gfal2.
    whole = {**environment, "GFAL_PYTHONBIN": "/usr/bin/python3"}
    return run_all([["gfal-rm", "-r", url]], whole, directory, good={0, -signal.SIGABRT, -signal.SIGSEGV})


def run_all(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str], directory: Path, good: Collection[int] = (0,)
) -> float:
    """Run commands side by side; seconds until all have ended with a good status."""
    whole = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(directory), **environment}
    processes: list[subprocess.Popen[bytes]] = []
    outputs = [directory / f"output{number}" for number in range(len(commands))]
    began = time.perf_counter()
    try:
        for command, output in zip(commands, outputs, strict=True):
            with output.open("wb") as file:
                processes.append(
                    subprocess.Popen(command, env=whole, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
                )
        for process in processes:
            process.wait(max(began + _LONGEST_S - time.perf_counter(), 0.1))
        seconds = time.perf_counter() - began
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{' '.join(commands[0][:8])} did not end within {_LONGEST_S:g} s") from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    for command, process, output in zip(commands, processes, outputs, strict=True):
        if process.returncode not in good:
            said = os.fsdecode(output.read_bytes()[-_SHOWN:])
            raise BenchmarkError(f"{' '.join(command[:8])}: status {process.returncode}: {said}")
    return seconds

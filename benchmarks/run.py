"""Runs benchmarks one after the other, each in a process of its own; see ``script/bench``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from catalogue import CATALOGUE, Benchmark
from rig import KEEP_IN, directory_for_all

_HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="script/bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures the service against bare tools and floors, in turn, in the same run.",
        epilog="benchmarks:\n"
        + "\n".join(f"  {benchmark.name:22}{benchmark.title}" for benchmark in CATALOGUE.values())
        + "\n\nFurther options are those of the programs (--files, --rounds, ...): benchmarks/PROGRAM.py --help.\n"
        "Each result is a file in the directory of results; benchmarks/table.py makes the page of them.",
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all without any")
    parser.add_argument("--quick", action="store_true", help="small sizes: all in less than three minutes")
    parser.add_argument(
        "--json", type=Path, metavar="DIR", help="directory of the results; benchmarks/results without it"
    )
    options, further = parser.parse_known_args()
    unknown = [name for name in options.names if name not in CATALOGUE]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(CATALOGUE)}")
    if options.quick:
        further.append("--quick")
    if options.json:
        further += ["--json", str(options.json.resolve())]
    with directory_for_all("pdm-bench-run-") as directory:
        os.environ[KEEP_IN] = str(directory)
        return _run_all(options.names or list(CATALOGUE), further)


def _run_all(names: Sequence[str], further: Sequence[str]) -> int:
    began = time.monotonic()
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        begun = time.monotonic()
        status = run(CATALOGUE[name], further)
        print(f"-- {name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        if status < 0 or status == 128 + signal.SIGINT:
            return 128 + signal.SIGINT
        if status:
            failed.append(name)
    print(f"-- all: {time.monotonic() - began:.0f} s", file=sys.stderr)
    if failed:
        print(f"script/bench: FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(benchmark: Benchmark, further: Sequence[str]) -> int:
    """Run one benchmark; its exit status. What interrupts us interrupts it, and we wait until it has tidied up."""
    program = _HERE / f"{benchmark.program}.py"
    command = [sys.executable, str(program), *benchmark.arguments, "--name", benchmark.name, *further]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:

        def pass_on(number: int, frame: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())

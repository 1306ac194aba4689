"""The demonstration behind ``script/demo``: a tree of odd names, copied between two sites and compared."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdm.testgrid import TestGrid, missing_programs
from pdm.testgrid.service import TestService

MIB = 1024 * 1024
BIG_FILE = 256 * MIB
#: Names that break tools which quote, split or decode carelessly.
ODD_NAMES = (
    "two words.txt",
    " blank in front",
    "blank behind ",
    "100%.dat",
    "per%41cent",
    "hash#tag",
    "what?",
    "star*",
    'double "quotes"',
    "single 'quotes'",
    "semi;colon & ampersand",
    "back\\slash",
    "new\nline",
    "tab\tstop",
    "-leading-dash",
    "--help",
    "naïve café",
    "日本語のファイル",
    "emoji 🚀",
    "[brackets]",
    "~tilde",
    "n" * 255,
)
EMPTY_DIRECTORIES = ("empty", "empty below/empty too", "odd/leer ß")


def say(title: str) -> None:
    print(f"\n\x1b[1m== {title}\x1b[0m" if sys.stdout.isatty() else f"\n== {title}", flush=True)


def make_tree(directory: Path) -> None:
    """At least 200 files, empty directories, odd names and one large file."""
    for number in range(180):
        place = directory / f"run{number % 6}" / f"day {number % 5}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"event{number:04}.dat").write_bytes(hashlib.sha256(b"%d" % number).digest() * (1 + number * 7 % 96))
    (directory / "odd").mkdir()
    for name in ODD_NAMES:
        (directory / "odd" / name).write_text(f"the file named {name!r}\n")
    (directory / "odd" / "nothing in it").write_bytes(b"")
    for name in EMPTY_DIRECTORIES:
        (directory / name).mkdir(parents=True)
    block = os.urandom(MIB)
    with (directory / "large.bin").open("wb") as file:
        for _ in range(BIG_FILE // MIB):
            file.write(block)


def give_to(account: str | None, directory: Path) -> None:
    """Let the account that the site acts as own a tree."""
    if account is not None and os.geteuid() == 0:
        for path in (directory, *directory.rglob("*")):
            shutil.chown(path, account)


def sums(directory: Path) -> dict[str, str]:
    """Relative path → SHA-256 of a file, or ``directory``."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_dir():
            found[name] = "directory"
        else:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


class Demonstration:
    """Grid, daemon and user of one run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.grid: TestGrid | None = None
        self.service: TestService | None = None

    def bring_up(self) -> tuple[str, Path, Path, str | None]:
        """Start everything; returns the user, both sites' directories, and the account that owns files there."""
        lacking = missing_programs()
        description: Mapping[str, Any] | None = None
        account = None
        if lacking:
            say("no grid here: " + ", ".join(lacking) + " not installed; two local directories serve as sites")
        else:
            say("two GridFTP sites on loopback")
            began = time.monotonic()
            self.grid = TestGrid(self.directory / "grid")
            self.grid.up()
            description = json.loads((self.directory / "grid" / "grid.json").read_text())
            for name, site in description["sites"].items():
                print(f"  site {name}: {site['endpoints']['gsiftp']}  directory {site['root']}")
            account = description["users"]["alice"].get("account")
            print(f"  up in {time.monotonic() - began:.1f} s")
        say("the daemon")
        self.service = TestService(
            self.directory / "instance", description, self.directory / "grid" if description else None
        )
        self.service.init()
        print(f"  pdm admin init {self.service.directory}\n  ready at {self.service.start()}")
        if description is None:
            storage = self.service.directory / "storage"
            return "admin", storage / "a", storage / "b", None
        return "alice", Path(description["sites"]["A"]["root"]), Path(description["sites"]["B"]["root"]), account

    def take_down(self) -> None:
        if self.service is not None and self.service.process is not None:
            self.service.stop()
        if self.grid is not None:
            self.grid.down()

    def pdm(self, user: str, arguments: Sequence[str], *, quiet: bool = False) -> subprocess.CompletedProcess[str]:
        """Run the user's command where one can see it; it must succeed."""
        if self.service is None:
            raise SystemExit("the daemon is not running")
        if not quiet:
            print("  $ pdm " + " ".join(arguments), flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "pdm.workqueue.cli", *arguments],
            env=self.service.environment(user),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"pdm {' '.join(arguments)} ended with {done.returncode}\n{self.service.tail()}")
        return done


def demonstrate(demonstration: Demonstration) -> None:
    """Everything between up and down.

    Raises:
        SystemExit: something is not as it must be; the text says what.
    """
    user, source, destination, account = demonstration.bring_up()
    names = ("A", "B") if demonstration.grid is not None else ("local-a", "local-b")
    tree, copy = source / "demo tree", destination / "demo tree"
    make_tree(tree)
    give_to(account, tree)
    at = [f"{name}:demo tree" for name in names]

    if demonstration.grid is not None:
        say("a proxy for the service")
        print(demonstration.pdm(user, ["delegate"]).stdout, end="")
    say("the copy")
    began = time.monotonic()
    job = json.loads(demonstration.pdm(user, ["-F", "json", "cp", at[0], at[1]]).stdout)
    seconds = time.monotonic() - began
    print(
        f"  job {job['id']}: {job['status']}, {job['num_done']} of {job['num_elements']} elements, "
        f"{job['bytes_done'] / MIB:.0f} MiB in {seconds:.1f} s"
    )
    say("the listing")
    print(demonstration.pdm(user, ["ls", "-l", at[1]]).stdout, end="")
    say("the log of one attempt")
    print(demonstration.pdm(user, ["logs", f"{job['id']}.1"]).stdout, end="")

    say("both sides")
    before, after = sums(tree), sums(copy)
    shown = [name for name in before if name.startswith("odd/") or name in EMPTY_DIRECTORIES or name == "large.bin"]
    for name in shown:
        short = name if len(name) < 60 else f"{name[:50]}... ({len(name)} characters)"
        print(f"  {before[name][:16]:16}  {after.get(name, 'missing')[:16]:16}  {short!r}")
    print(f"  ... and {len(before) - len(shown)} more")
    files = sum(value != "directory" for value in before.values())
    if before != after:
        different = sorted(set(before.items()) ^ set(after.items()))
        raise SystemExit(f"the trees differ: {different[:5]}")
    print(
        f"\nidentical at both sites by SHA-256: {files} files, {len(before) - files} directories, "
        f"{sum(path.stat().st_size for path in tree.rglob('*') if path.is_file()) / MIB:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave everything running and say how to use it")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="pdm-demo-"))
    # The accounts of the sites must be able to pass through.
    directory.chmod(0o755)
    demonstration = Demonstration(directory)
    kept = False
    try:
        demonstrate(demonstration)
        kept = arguments.keep
    finally:
        if not kept:
            demonstration.take_down()
            shutil.rmtree(directory, ignore_errors=True)
    if kept and demonstration.service is not None:
        service = demonstration.service
        user = "alice" if demonstration.grid is not None else "admin"
        environment = {
            name: value for name, value in service.environment(user).items() if name.startswith(("PDM_", "X509_"))
        }
        say("it is still running; to use it")
        for name, value in environment.items():
            print(f"  export {name}={value}")
        print(f"  {Path(sys.executable).parent}/pdm jobs")
        say("to end it")
        pid = service.process.pid if service.process is not None else "?"
        print(f"  kill {pid}; {sys.executable} -m pdm.testgrid down {directory / 'grid'}; rm -r {directory}")


if __name__ == "__main__":
    main()

"""COPY between GridFTP and another protocol, through the service, against what the slower end gives alone.

The bare tools copy the same files from the source to a local directory, and from there to the destination, each by
itself; the longer of both times counts: ``globus-url-copy`` for GRIDFTP, ``sftp`` for SSH, nothing for FILE. Neither
side proves more than sizes. After each run of the service the trees must be identical.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from attrs import define, field
from figures import BenchmarkError
from helper import Helper
from meter import Meter
from rig import directory_for_all, file_system, options_of, report, run, storage_directory
from rounds import Comparison, Contender, timed
from trees import make_tree, require_same

from pdm.testgrid.storages import TestStorages
from pdm.workqueue.wire.agent_requests import CopyItem, CopyRequest, TimeLimits

_KIB = 1024
_MODULE = "pdm.workqueue.helpers.main_relay"
_TIMEOUT_S = 600.0
#: Files, directories, KiB of each, rounds; and those of a quick run.
_KINDS = {"small": ((2_000, 20, 1, 5), (400, 4, 1, 2)), "large": ((1, 1, 2 * _KIB**2, 5), (1, 1, 256 * _KIB, 2))}


@define
class Copies:
    """One tree, copied again and again.

    Attributes:
        source: protocol at A.
        destination: protocol at B.
        files: of the tree, relative to it.
    """

    storages: TestStorages
    helper: Helper
    source: str
    destination: str
    files: list[Path]
    size: int
    scratch: Path
    number: int = 0
    tools: dict[str, float] = field(factory=dict)

    @property
    def tree(self) -> Path:
        return self.storages.root("A") / "tree"

    @property
    def copy(self) -> Path:
        return self.storages.root("B") / f"copy{self.number}"

    def prepare(self) -> None:
        self.number += 1
        for directory in {(self.copy / file).parent for file in self.files}:
            directory.mkdir(parents=True, exist_ok=True)
        self.storages.give(self.copy)

    def by_relay(self) -> float:
        items = [
            CopyItem(
                key,
                self.storages.url(self.source, "A", self.tree / file),
                self.storages.url(self.destination, "B", self.copy / file),
                self.storages.url(self.destination, "B", (self.copy / file).parent / f".pdm-bench.{key}.1.part"),
                [],
                self.size,
            )
            for key, file in enumerate(self.files)
        ]
        return timed(lambda: self.helper.run(CopyRequest(self.helper.new_id(), items, "never", "size", TimeLimits())))

    def check(self) -> None:
        require_same(self.tree, self.copy)
        shutil.rmtree(self.copy)

    def by_tools(self) -> float:
        """Seconds of the slower end alone."""
        local = self.scratch / "local"
        try:
            got = self._ends(self.source)[0](self.tree, local)
            if self.source == "file":
                shutil.copytree(self.tree, local)
            put = self._ends(self.destination)[1](local, self.copy)
        finally:
            shutil.rmtree(local, ignore_errors=True)
        self.tools = {"get": got, "put": put}
        return max(got, put)

    def remove(self) -> None:
        shutil.rmtree(self.copy)

    def _ends(self, protocol: str) -> tuple[Callable[[Path, Path], float], Callable[[Path, Path], float]]:
        nothing: Callable[[Path, Path], float] = lambda source, destination: 0.0  # noqa: E731
        if protocol == "file":
            return nothing, nothing
        if protocol == "ssh":
            return (
                lambda source, local: self._sftp("A", f'get -r "{source}" "{local}"'),
                lambda local, copy: self._sftp("B", f'put -r "{local}/." "{copy}"'),
            )
        return (
            lambda source, local: self._guc(self.storages.url("gridftp", "A", source), f"file://{local}"),
            lambda local, copy: self._guc(f"file://{local}", self.storages.url("gridftp", "B", copy)),
        )

    def _guc(self, source: str, destination: str) -> float:
        return self._run(["globus-url-copy", "-cd", "-r", "-fast", f"{source}/", f"{destination}/"])

    def _sftp(self, site: str, command: str) -> float:
        environment, server = self.storages.environment(), self.storages.sftp[site]
        batch = self.scratch / "batch"
        batch.write_text(f"{command}\n")
        options = [f"IdentityFile={environment['PDM_SSH_KEY']}", "BatchMode=yes"]
        options.append(f"UserKnownHostsFile={environment['PDM_SSH_KNOWN_HOSTS']}")
        arguments = [word for option in options for word in ("-o", option)]
        return self._run(
            ["sftp", "-q", *arguments, "-b", str(batch), "-P", str(server.port), f"{server.user}@localhost"]
        )

    def _run(self, command: list[str]) -> float:
        environment = {**os.environ, **self.storages.environment()}

        def work() -> None:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
            if done.returncode:
                raise BenchmarkError(f"{command[0]} failed: {done.stdout}{done.stderr}")

        return timed(work)


@contextlib.contextmanager
def _copies(source: str, destination: str, files: int, directories: int, size: int) -> Iterator[Copies]:
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(directory_for_all("pdm-bench-sites-", storage_directory(4 * files * size)))
        storages = stack.enter_context(TestStorages(where / "storages"))
        if "gridftp" in (source, destination):
            for site in "AB":
                storages.gridftp(site)
        made = make_tree(storages.root("A") / "tree", files, directories, size)
        storages.give(storages.root("A"))
        scratch = where / "scratch"
        scratch.mkdir()
        helper = stack.enter_context(Helper(_MODULE, storages.environment()))
        yield Copies(storages, helper, source, destination, list(made), size, scratch)


def main() -> None:
    options = options_of(
        __doc__ or "", source=("gridftp", "gridftp"), destination=("ssh", "ssh"), kind=("small", "small"),
        rounds=(0, 0),
    )  # fmt: skip
    missing = [name for name in ("globus-url-copy", "sftp") if shutil.which(name) is None]
    if missing:
        print(f"skipped: {', '.join(missing)} not found: as root, script/bootstrap installs what the rows need")
        return
    files, directories, kib, rounds = _KINDS[options.kind][1 if options.quick else 0]
    with _copies(options.source, options.destination, files, directories, kib * _KIB) as copies:
        by_bytes = options.kind == "large"
        count, unit = (kib // _KIB, "MiB/s") if by_bytes else (files, "files/s")
        meter = Meter(copies.helper.process.pid, [])
        figures = Comparison(meter, count, unit, files).alternate(
            Contender(copies.by_relay, copies.prepare, copies.check),
            {"the slower end alone": Contender(copies.by_tools, copies.prepare, copies.remove)},
            options.rounds or rounds,
        )
        figures["last run of the tools (s)"] = copies.tools
        figures["trees on"] = file_system(copies.tree)
        figures["identical"] = True
    report(options, figures)


if __name__ == "__main__":
    run(main)

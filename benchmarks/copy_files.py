"""COPY of a tree between two GridFTP sites, against the best way to run the bare tool over the same files.

The service lists the tree, copies, proves each file and writes a log for each; the bare tool gets the list of files and
the directories at the destination for nothing. After each run of either side the trees must be identical. With a delay,
whatever is said between service, servers and tools takes a round trip of that time; the API of the service does not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import bare
import network_delay
from attrs import define, field
from caller import Caller
from figures import BenchmarkError
from rig import Rig, file_system, options_of, report, rig, run
from rounds import Comparison, Contender, timed
from trees import Kind, make_directories_like, make_tree, require_logs, require_same

_TIMEOUT_S = 900.0
_KIB = 1024


KINDS = {
    "small": Kind((10_000, 400), (100, 4), (1, 1), (3, 2)),
    "medium": Kind((100, 10), (10, 2), (16 * _KIB, 16 * _KIB), (5, 2)),
    "large": Kind((1, 1), (0, 0), (4 * _KIB * _KIB, 128 * _KIB), (5, 2)),
}


@define
class Copies:
    """Copies of one tree by either side, each into a directory of its own."""

    rig: Rig
    caller: Caller
    files: Sequence[Path]
    verify: str
    number: int = 0
    job: dict[str, object] = field(factory=dict)

    @property
    def source(self) -> Path:
        return self.rig.sites[0] / "tree"

    @property
    def destination(self) -> Path:
        return self.rig.sites[1] / f"copy{self.number}"

    def prepare_ours(self) -> None:
        self.number += 1
        self.destination.mkdir()
        self.rig.real_grid.give(self.destination)

    def ours(self) -> float:
        def copy() -> None:
            job = self.caller.submit(
                "copy",
                src_siteid=1,
                src_filepath=f"{self.source}/",
                dst_siteid=2,
                dst_filepath=f"{self.destination}/",
                extra_opts={"verify": self.verify},
            )
            self.job = self.caller.done(job["id"], _TIMEOUT_S)

        return timed(copy)

    def check_ours(self) -> None:
        self.check_copy()
        elements = self.job["num_elements"]
        if elements != len(self.files) + 1:
            raise BenchmarkError(f"{elements} elements for {len(self.files)} files")
        require_logs(self.caller.logs, str(self.job["log_uid"]), len(self.files) + 1)

    def prepare_bare(self) -> None:
        self.number += 1
        make_directories_like(self.source, self.destination)
        self.rig.real_grid.give(self.destination)

    def by_tool(self, mode: bare.Mode) -> float:
        site_a, site_b = (self.rig.real_grid.sites[name] for name in ("A", "B"))
        pairs = [(site_a.url(self.source / file), site_b.url(self.destination / file)) for file in self.files]
        return bare.copy(mode, pairs, self.rig.real_grid.environment("alice"), self.rig.directory)

    def check_copy(self) -> None:
        require_same(self.source, self.destination)
        shutil.rmtree(self.destination)

    def contenders(self, modes: Sequence[bare.Mode]) -> Mapping[str, Contender]:
        return {mode.name: Contender(partial(self.by_tool, mode), self.prepare_bare, self.check_copy) for mode in modes}


def modes_for(kind: str, verify: str, *, far: bool) -> Sequence[bare.Mode]:
    """The bare modes that may be the best for a kind of tree, between servers that are far away or not."""
    if far:
        return bare.FAR_CHECKSUM_MODES if verify == "checksum" else bare.FAR_SIZE_MODES
    if kind == "large":
        return bare.ONE_FILE_CHECKSUM_MODES if verify == "checksum" else bare.ONE_FILE_MODES
    return bare.CHECKSUM_MODES if verify == "checksum" else bare.SIZE_MODES


def main() -> None:
    options = options_of(
        __doc__ or "", kind=("small", "small"), verify=("size", "size"), files=(0, 0), folders=(-1, -1), kib=(0, 0),
        rounds=(0, 0), round_trip_ms=(0, 0),
    )  # fmt: skip
    kind = KINDS[options.kind]
    kind.complete(options)
    size = options.kib * _KIB
    if options.round_trip_ms:
        network_delay.enter_namespace()
    with rig(["alice"], need_bytes=2 * options.files * size) as on, on.caller() as caller:
        files = make_tree(on.sites[0] / "tree", options.files, options.folders, size)
        on.real_grid.give(on.sites[0] / "tree")
        if options.round_trip_ms:
            network_delay.delay_loopback(options.round_trip_ms / 1000, [on.port])
        copies = Copies(on, caller, files, options.verify)
        by_bytes = options.kind != "small"
        count, unit = (options.files * size // _KIB**2, "MiB/s") if by_bytes else (options.files, "files/s")
        figures = Comparison(on.meter, count, unit, options.files).alternate(
            Contender(copies.ours, copies.prepare_ours, copies.check_ours),
            copies.contenders(modes_for(options.kind, options.verify, far=options.round_trip_ms > 0)),
            options.rounds,
        )
        figures["elements"] = options.files
        figures["checksums"] = "proven at both ends, by both sides" if options.verify == "checksum" else "off: size"
        figures["trees on"] = file_system(on.sites[0])
        figures["database on"] = file_system(on.directory)
        figures["identical, with logs"] = True
    report(options, figures)


if __name__ == "__main__":
    run(main)

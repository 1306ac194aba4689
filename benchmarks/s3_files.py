"""COPY of a tree, or of one large file, between a directory and a bucket of S3, against rclone at the same server.

Both verify each file by its MD5, the service by an ADLER32 besides; rclone is given what makes it faster: it looks at
nothing at the destination. The server is one of other makes: moto is a Python program, and is the limit of both sides.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from attrs import define
from caller import Caller
from figures import BenchmarkError
from meter import Meter
from rig import directory_for_all, end_daemon, options_of, report, run, storage_directory
from rounds import Comparison, Contender, timed
from trees import make_tree, sizes

from pdm.testgrid.identities import GridCredentials, make_credentials
from pdm.testgrid.service import TestService
from tests.support.s3_servers import ACCESS_KEY, MAKES, SECRET_KEY, S3Server

_TIMEOUT_S = 1800.0
_KIB = 1024
_USER = "alice"
_RCLONE = Path(sys.executable).parent / "rclone"
_TRANSFERS = (4, 16)


@define
class Copies:
    """Copies of one tree by either side, each to or from a place of its own."""

    caller: Caller
    server: S3Server
    environment: Mapping[str, str]
    directory: Path
    upwards: bool
    verify: str
    number: int = 0

    @property
    def source(self) -> Path:
        return self.directory / "tree"

    @property
    def back(self) -> Path:
        return self.directory / f"copy{self.number}"

    def prepare(self) -> None:
        self.number += 1

    def copy(self) -> float:
        bucket, local = {"site": 2, "path": f"/copy{self.number}/"}, {"site": 1, "path": f"{self.source}/"}
        if not self.upwards:
            bucket, local = {"site": 2, "path": "/tree/"}, {"site": 1, "path": f"{self.back}/"}
        source, destination = (local, bucket) if self.upwards else (bucket, local)

        def work() -> None:
            job = self.caller.submit(
                "copy",
                src_siteid=source["site"],
                src_filepath=source["path"],
                dst_siteid=destination["site"],
                dst_filepath=destination["path"],
                protocol="FILE" if self.upwards else "S3",
                extra_opts={"verify": self.verify},
            )
            self.caller.done(job["id"], _TIMEOUT_S)

        return timed(work)

    def rclone(self, transfers: int) -> float:
        ends = (self.source, f"S:bucket/copy{self.number}") if self.upwards else ("S:bucket/tree", self.back)
        return timed(lambda: self.call("copy", "--transfers", str(transfers), "--no-check-dest", *map(str, ends)))

    def call(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(_RCLONE), *arguments], env=dict(self.environment), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BenchmarkError(f"rclone {arguments[0]}: {done.stderr[-2000:]}")
        return done.stdout

    def check(self) -> None:
        """All files are there with their sizes; then they are removed."""
        wanted = sizes(self.source)
        if not self.upwards:
            if sizes(self.back) != wanted:
                raise BenchmarkError("what came is not what was there")
            shutil.rmtree(self.back)
            return
        place = f"S:bucket/copy{self.number}"
        listed = self.call("lsf", "-R", "--files-only", "--format", "sp", "--exclude", ".pdm-*", place).splitlines()
        found = {path: int(size) for size, _, path in (line.partition(";") for line in listed)}
        if found != wanted:
            raise BenchmarkError(f"{len(found)} files of {len(wanted)}, or others, are there")
        self.call("purge", place)


@contextlib.contextmanager
def _copies(make: str, upwards: bool, verify: str, need_bytes: int) -> Iterator[tuple[Copies, Meter]]:
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(directory_for_all("pdm-bench-"))
        where = stack.enter_context(directory_for_all("pdm-bench-s3-", storage_directory(need_bytes)))
        credentials = make_credentials(where / "credentials", (_USER,)) if _made(where / "credentials") else None
        assert credentials is not None
        server = MAKES[make](where, make, credentials)
        stack.callback(server.stop)
        server.start()
        service = _service(credentials, directory / "instance", server)
        stack.callback(end_daemon, service)
        service.start()
        asked = {"kind": "s3-key", "access_key": ACCESS_KEY, "secret": SECRET_KEY}
        if service.call(_USER, "POST", "/credentials", asked)[0] != 201:
            raise BenchmarkError("the keys are not taken")
        assert service.process is not None
        assert server.pid is not None
        environment = {
            "PATH": os.defpath,
            "HOME": str(directory),
            "RCLONE_CA_CERT": str(next(credentials.trust.glob("*.0"))),
            "RCLONE_CONFIG_S_TYPE": "s3",
            "RCLONE_CONFIG_S_PROVIDER": "Other",
            "RCLONE_CONFIG_S_ENDPOINT": f"https://localhost:{server.port}",
            "RCLONE_CONFIG_S_ACCESS_KEY_ID": ACCESS_KEY,
            "RCLONE_CONFIG_S_SECRET_ACCESS_KEY": SECRET_KEY,
            "RCLONE_CONFIG_S_NO_CHECK_BUCKET": "true",
        }
        caller = stack.enter_context(Caller(service, _USER))
        meter = Meter(service.process.pid, [server.pid])
        yield Copies(caller, server, environment, where, upwards, verify), meter


def _made(directory: Path) -> bool:
    directory.mkdir(mode=0o755)
    return True


def _service(credentials: GridCredentials, directory: Path, server: S3Server) -> TestService:
    """A daemon, not started, with a FILE site and the bucket."""
    user = credentials.users[_USER]
    grid = {"ca_dir": str(credentials.trust), "users": {_USER: {"cert": str(user.certificate), "key": str(user.key)}}}
    service = TestService(directory, grid)
    service.init(credentials={"trust_dir": str(credentials.trust)})
    trust = directory / "certificates" / "trust"
    for file in credentials.trust.iterdir():
        (trust / file.name).write_bytes(file.read_bytes())
    sites = f"[local]\nid = 1\nfile = file:///\n[bucket]\nid = 2\ns3 = {server.endpoint}\n"
    (directory / "sites.d" / "sites.conf").write_text(sites)
    return service


def main() -> None:
    options = options_of(
        __doc__ or "", server=("rclone", "rclone"), direction=("up", "up"), verify=("checksum", "checksum"),
        files=(10_000, 1_000), folders=(100, 10), kib=(1, 1), rounds=(3, 2),
    )  # fmt: skip
    size = options.kib * _KIB
    with _copies(options.server, options.direction == "up", options.verify, 4 * options.files * size) as (
        copies,
        meter,
    ):
        make_tree(copies.source, options.files, options.folders, size)
        if options.direction != "up":
            copies.call("copy", str(copies.source), "S:bucket/tree")
        by_bytes = options.files == 1
        count, unit = (size // _KIB**2, "MiB/s") if by_bytes else (options.files, "files/s")
        figures = Comparison(meter, count, unit, options.files).alternate(
            Contender(copies.copy, copies.prepare, copies.check),
            {
                f"rclone --transfers {transfers}": Contender(
                    partial(copies.rclone, transfers), copies.prepare, copies.check
                )
                for transfers in _TRANSFERS[: 1 if by_bytes else None]
            },
            options.rounds,
        )
    report(options, figures)


if __name__ == "__main__":
    run(main)

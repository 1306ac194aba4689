"""Faults of copies between GRIDFTP and each other protocol, through a real daemon: what is told, kept and left."""

from __future__ import annotations

import filecmp
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService
from pdm.testgrid.storage_servers import ServerProcess, descendants
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import FailureCode, FailureScope, hint_for
from tests.protocols.places import Places, endpoint_of, owner
from tests.protocols.stands import freeze
from tests.support.loopback import service_of, ssh_settings
from tests.support.s3_servers import ACCESS_KEY, SECRET_KEY, RcloneServer
from tests.support.variants import usual

OTHERS = ("ssh", "https", "xroot", "file", "s3")
PAIRS = [*itertools.product(["gridftp"], OTHERS), *itertools.product(OTHERS, ["gridftp"])]
SITES = {
    (protocol, letter): 2 * n + m
    for n, protocol in enumerate(("gridftp", *OTHERS))
    for m, letter in enumerate("AB", start=1)
}
_MIB = 1024 * 1024
#: Takes longer to copy than it takes to freeze a server that has got the first bytes.
SIZE = 224 * _MIB
#: What all helpers of the daemon may have in memory, each of them: far less than the file.
MOST_MEMORY = 192 * _MIB
_WAIT_S = 60.0
pytestmark = [pytest.mark.grid, pytest.mark.timeout(180)]


class ObjectPlaces:
    """The directories of a test at both sites, also those in the bucket that both S3 sites share.

    Attributes:
        a: where copies come from.
        b: where they go to.
    """

    def __init__(self, places: Places, objects: RcloneServer) -> None:
        self.places = places
        self.objects = objects
        self.a, self.b = places.a, places.b

    def kept(self, protocol: str, path: Path) -> Path:
        """Where a server of a protocol keeps what it shows under a path."""
        if protocol != "s3":
            return path
        return self.objects.directory / self.objects.name / "bucket" / path.relative_to("/")

    def server(self, protocol: str, site: str) -> Any:
        return self.objects if protocol == "s3" else self.places.storages.server(protocol, site)

    def left(self, protocol: str) -> list[Path]:
        """Temporary names at the destination; the markers of directories that rclone needs are none."""
        return [path for path in self.kept(protocol, self.b).rglob(".pdm-*") if path.name != ".pdm-directory"]


@pytest.fixture(scope="module")
def objects(storages: TestStorages, open_directory: Path) -> Iterator[RcloneServer]:
    assert storages.credentials is not None
    directory = open_directory / "relayed-objects"
    directory.mkdir(mode=0o755)
    server = RcloneServer(directory, "rclone", storages.credentials)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def service(
    storages: TestStorages, objects: RcloneServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestService]:
    def endpoint(protocol: str, letter: str) -> str:
        return objects.endpoint if protocol == "s3" else endpoint_of(storages, protocol, letter)

    sections = [
        f"[{protocol}-{letter}]\nid = {number}\n{protocol} = {endpoint(protocol, letter)}\n"
        for (protocol, letter), number in SITES.items()
    ]
    service = service_of(
        storages,
        tmp_path_factory.mktemp("relayed") / "instance",
        "\n".join(sections),
        queue={"first_pause": "100ms", "longest_pause": "300ms", "stall": "2s", "total": "60s"},
        ssh=ssh_settings(storages.environment()),
    )
    with service.running():
        service.delegate("alice")
        for letter in "AB":
            key = {"kind": "s3-key", "access_key": ACCESS_KEY, "secret": SECRET_KEY, "site": SITES["s3", letter]}
            assert service.call("alice", "POST", "/credentials", key)[0] in (200, 201)
        yield service
    assert "Traceback" not in service.log_path.read_text()


@pytest.fixture
def ground(places: Places, objects: RcloneServer, service: TestService) -> Iterator[ObjectPlaces]:
    yield ObjectPlaces(places, objects)
    objects.thaw()
    if service.process is None:
        service.start()


class Copy:
    """A copy of one file that is under way.

    Attributes:
        source: where the source's server keeps it.
        job: its number.
    """

    def __init__(self, service: TestService, ground: ObjectPlaces, pair: tuple[str, str], size: int = SIZE) -> None:
        self.service, self.ground, self.pair = service, ground, pair
        self.source = ground.kept(pair[0], ground.a / "file")
        self.arrived_at = ground.kept(pair[1], ground.b / "new" / "file")
        written = ground.a / "file"
        with written.open("wb") as file:
            file.write(os.urandom(_MIB))
            # The rest is a hole, which costs no memory and ends with bytes that must arrive, too.
            file.truncate(size - 7)
            file.seek(0, os.SEEK_END)
            file.write(b"the end")
        if pair[0] == "s3":
            # What it has not written itself, it does not see.
            ground.objects.put(written)
            written.unlink()
        self.arrived_at.parent.mkdir(parents=True, exist_ok=True)
        ground.places.storages.give(ground.a)
        ground.places.storages.give(ground.b)
        job = service.submit(
            "alice",
            "copy",
            src_siteid=SITES[pair[0], "A"],
            src_filepath=str(ground.a / "file"),
            protocol=pair[0],
            dst_siteid=SITES[pair[1], "B"],
            dst_filepath=str(ground.b / "new" / "file"),
            max_tries=10,
        )
        self.job = int(job["id"])

    def freeze(self, side: int) -> ServerProcess:
        """Stop the server of a side in the middle."""
        server: ServerProcess = self.ground.server(self.pair[side], "AB"[side])
        until("bytes arrive", self.has_begun)
        freeze(server)
        assert not self.arrived_at.exists(), "the copy was over before its server was frozen"
        return server

    def has_begun(self) -> bool:
        """Whether bytes have come to the destination's server."""
        # An object in parts has a record with its name, and bytes that nobody sees.
        return any(path.stat().st_size > 0 for path in self.ground.left(self.pair[1]))

    @property
    def element(self) -> dict[str, Any]:
        found: dict[str, Any] = self.service.call("alice", "GET", f"/jobs/{self.job}/elements/1")[1]
        return found

    def check_failure(self, code: FailureCode, scope: FailureScope) -> None:
        """The first failure, once there is one, says whose fault it is, and what to do."""
        until("an attempt fails", lambda: self.element.get("error"))
        error = self.element["error"]
        assert (error["code"], error["scope"], error["retryable"]) == (code, scope, True), error
        assert error["hint"] == hint_for(code, JobType.COPY)

    def check_memory(self) -> None:
        """No helper has had in memory what would be most of the file."""
        assert max(helpers_of(self.service).values(), default=0) < MOST_MEMORY

    def check_whole(self) -> None:
        """The next attempt copies all of it, and nothing is left of those before."""
        ended = self.service.wait_for("alice", self.job, timeout_s=_WAIT_S)
        assert ended["status"] == "DONE", (self.element, self.service.tail())
        assert filecmp.cmp(self.source, self.arrived_at, shallow=False)
        assert self.element["attempts"] > 1
        self.check_nothing_left()

    def check_nothing_left(self) -> None:
        until("temporary names are gone", lambda: not self.ground.left(self.pair[1]))


def until(what: str, condition: Callable[[], object]) -> None:
    give_up_at = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < give_up_at, f"in vain: {what}"
        time.sleep(0.005)


def helpers_of(service: TestService) -> Mapping[int, int]:
    """The processes that a daemon has started → most bytes that each has had in memory."""
    assert service.process is not None
    found = {}
    for pid in descendants(service.process.pid):
        status = Path(f"/proc/{pid}/status")
        if status.exists() and "VmHWM" in (text := status.read_text()):
            found[pid] = int(text.partition("VmHWM:")[2].split()[0]) * 1024
    return found


def _named(value: object) -> str | None:
    return " to ".join(value) if isinstance(value, tuple) else None


def _pairs(every_time: tuple[str, str]) -> list[Any]:
    """All pairs, of which one is tested every time."""
    return [pair if pair == every_time else pytest.param(pair, marks=pytest.mark.full) for pair in PAIRS]


def _server_side(pair: tuple[str, str]) -> int:
    """The side of a pair that has a server."""
    return 0 if pair[0] != "file" else 1


_STALLS = [(pair, side) for pair in PAIRS for side in (0, 1) if pair[side] != "file"]


@pytest.mark.parametrize(
    ("pair", "side"), usual(_STALLS, [(("gridftp", "https"), 0), (("file", "gridftp"), 1)]), ids=_named
)
def test_a_server_that_stalls(pair: tuple[str, str], side: int, service: TestService, ground: ObjectPlaces) -> None:
    copy = Copy(service, ground, pair)
    server = copy.freeze(side)
    copy.check_failure(FailureCode.STALLED, (FailureScope.SOURCE, FailureScope.DESTINATION)[side])
    # The other end gave or took nothing meanwhile that had to be kept.
    copy.check_memory()
    server.thaw()
    copy.check_whole()
    copy.check_memory()


@pytest.fixture
def small_disk(ground: ObjectPlaces, pair: tuple[str, str]) -> Iterator[Path]:
    """A file system of 4 MiB where the destination of a pair keeps its files."""
    directory = ground.kept(pair[1], ground.b / "new")
    directory.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(directory)]
    if not owner() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    ground.places.storages.give(ground.b)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize("pair", _pairs(("ssh", "gridftp")), ids=_named)
def test_a_disk_that_is_full(
    pair: tuple[str, str], service: TestService, ground: ObjectPlaces, small_disk: Path
) -> None:
    copy = Copy(service, ground, pair, 20 * _MIB)
    # These two, in the middle of a file, tell no reason: XRootD closes the connection.
    code = FailureCode.SERVER_ERROR if pair[1] in ("https", "s3") else FailureCode.NO_SPACE
    copy.check_failure(code, FailureScope.DESTINATION)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    copy.check_whole()


@pytest.mark.parametrize("pair", _pairs(("gridftp", "https")), ids=_named)
def test_a_cancel_in_the_middle(pair: tuple[str, str], service: TestService, ground: ObjectPlaces) -> None:
    copy = Copy(service, ground, pair)
    until("bytes arrive", copy.has_begun)
    assert service.call("alice", "DELETE", f"/jobs/{copy.job}")[0] == 200
    assert service.wait_for("alice", copy.job)["status"] == "CANCELLED"
    copy.check_nothing_left()
    assert not copy.arrived_at.exists()


@pytest.mark.parametrize("pair", _pairs(("file", "gridftp")), ids=_named)
def test_a_helper_that_is_killed(pair: tuple[str, str], service: TestService, ground: ObjectPlaces) -> None:
    copy = Copy(service, ground, pair)
    server = copy.freeze(_server_side(pair))
    for pid in helpers_of(service):
        os.kill(pid, signal.SIGKILL)
    copy.check_failure(FailureCode.CRASHED, FailureScope.SERVICE)
    server.thaw()
    copy.check_whole()


@pytest.mark.parametrize("pair", _pairs(("gridftp", "file")), ids=_named)
def test_a_daemon_that_is_killed(pair: tuple[str, str], service: TestService, ground: ObjectPlaces) -> None:
    copy = Copy(service, ground, pair)
    server = copy.freeze(_server_side(pair))
    service.kill()
    server.thaw()
    service.start()
    copy.check_whole()

"""S3 servers of two makes: the everyday session through the daemon, large objects, small ones in groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest

from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.wire.agent_events import DoneEvent
from pdm.workqueue.wire.agent_requests import CopyRequest
from tests.helpers.driver import LIMITS, HelperProcess, adler, copy_item, entries, outcomes
from tests.security import canary
from tests.support.everyday_session import SessionEnd, everyday_session, failed_steps
from tests.support.loopback import service_of
from tests.support.s3_servers import ACCESS_KEY, MAKES, SECRET_KEY, S3Server

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]
LOCAL = 1
_NUMBERS = {make: number for number, make in enumerate(MAKES, start=LOCAL + 1)}
#: Steps of the everyday session that fail: directories without keys are listed still.
_FAILS = {"seaweedfs": ["rm -r"]}
_MIB = 1024 * 1024
pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
canary.watched(SECRET_KEY)
SESSION_TOKEN = canary.watched("canary+session+of/moto==")


@pytest.fixture(scope="module")
def servers(storages: TestStorages, open_directory: Path) -> Iterator[Mapping[str, S3Server]]:
    assert storages.credentials is not None
    directory = open_directory / "s3-servers"
    directory.mkdir(mode=0o755)
    made = {make: kind(directory, make, storages.credentials) for make, kind in MAKES.items()}
    try:
        for server in made.values():
            server.start()
        yield made
    finally:
        for server in made.values():
            server.stop()


@pytest.fixture(scope="module")
def service(
    storages: TestStorages, servers: Mapping[str, S3Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestService]:
    sections = [f"[local]\nid = {LOCAL}\nfile = file:///\n"]
    sections += [f"[{make}]\nid = {_NUMBERS[make]}\ns3 = {server.endpoint}\n" for make, server in servers.items()]
    directory = tmp_path_factory.mktemp("s3") / "instance"
    queue = {"first_pause": "100ms", "longest_pause": "300ms", "stall": "30s", "total": "60s"}
    service = service_of(storages, directory, "\n".join(sections), queue=queue)
    with service.running():
        yield service
    assert "Traceback" not in service.log_path.read_text()


def test_the_everyday_session_works_with_each(
    service: TestService, servers: Mapping[str, S3Server], tmp_path: Path
) -> None:
    wanted = {"src_siteid": _NUMBERS["moto"], "src_filepath": "~", "protocol": "S3"}
    refused = service.call("alice", "POST", "/list", wanted)
    assert (refused[0], "pdm s3-key SITE" in refused[1]["detail"]) == (409, True)
    given = subprocess.run(
        [sys.executable, "-m", "pdm.workqueue.cli", "s3-key", "moto", "--session-token", "--until", "2099-03-02T11:04"],
        input=f"{ACCESS_KEY}\n{SECRET_KEY}\n{SESSION_TOKEN}\n",
        env=dict(service.environment("alice")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (given.stdout, given.stderr) == (f"stored: {ACCESS_KEY}, valid until 2099-03-02 11:04:00 UTC\n", "")
    for make in servers.keys() - {"moto"}:
        asked = {"kind": "s3-key", "access_key": ACCESS_KEY, "secret": SECRET_KEY, "site": _NUMBERS[make]}
        assert service.call("alice", "POST", "/credentials", asked)[0] == 201
    for make in servers:
        (tmp_path / make).mkdir()
        local = SessionEnd(LOCAL, "FILE", str(tmp_path / make))
        steps = everyday_session(service, "alice", SessionEnd(_NUMBERS[make], "S3", "/"), local, tmp_path / make)
        assert ([step.partition(":")[0] for step in failed_steps(steps)], len(steps)) == (_FAILS.get(make, []), 12)


@pytest.fixture(scope="module")
def helper(
    storages: TestStorages, servers: Mapping[str, S3Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HelperProcess]:
    keys = tmp_path_factory.mktemp("s3-keys") / "keys"
    keys.write_text(json.dumps({"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}))
    given = {server.endpoint: {"file": str(keys), "account": None} for server in servers.values()}
    environment = {
        **storages.environment(),
        "PDM_CREDENTIALS": json.dumps(given),
        "PDM_FILE_ROOTS": json.dumps([quote(str(tmp_path_factory.getbasetemp()))]),
    }
    with HelperProcess(RELAY, environment) as process:
        yield process


@pytest.mark.parametrize("make", MAKES)
def test_large_objects_go_in_parts_there_and_back(
    helper: HelperProcess, servers: Mapping[str, S3Server], tmp_path: Path, make: str
) -> None:
    content = os.urandom(20 * _MIB + 1)
    (tmp_path / "file").write_bytes(content)
    there, copied = (f"{servers[make].endpoint}/large/{name}" for name in ("a", "b"))
    places = [f"file://{tmp_path}/file", there, copied, f"file://{tmp_path}/back"]
    for source, destination in pairwise(places):
        item = copy_item(1, source, destination, len(content))
        done = outcomes(helper.run(CopyRequest(helper.new_id(), [item], "never", "checksum", LIMITS)))[1]
        assert isinstance(done, DoneEvent), done
        assert done.checksum == adler(content)
    assert (tmp_path / "back").read_bytes() == content
    assert set(entries(helper.list(f"{servers[make].endpoint}/large"))) == {"a", "b"}


@pytest.mark.parametrize("make", MAKES)
def test_small_files_go_in_groups_there_and_back(
    helper: HelperProcess, servers: Mapping[str, S3Server], tmp_path: Path, make: str
) -> None:
    names = [f"small {number} +%&é" for number in range(100)]
    (tmp_path / "d").mkdir()
    for name in names:
        (tmp_path / "d" / name).write_text(name)
        os.utime(tmp_path / "d" / name, (1_000_000_000, 1_000_000_000))
    places = [f"file://{tmp_path}/d", f"{servers[make].endpoint}/groups", f"file://{tmp_path}/back"]
    for source, destination in pairwise(places):
        items = [
            copy_item(key, f"{source}/{quote(name)}", f"{destination}/{quote(name)}", len(name.encode()))
            for key, name in enumerate(names)
        ]
        ended = outcomes(helper.run(CopyRequest(helper.new_id(), items, "different", "checksum", LIMITS)))
        assert {type(event) for event in ended.values()} == {DoneEvent}, ended
    assert {path.name: path.read_text() for path in (tmp_path / "back").iterdir()} == {name: name for name in names}

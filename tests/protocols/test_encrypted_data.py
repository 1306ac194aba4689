"""A GridFTP server that makes no data connection unless it is encrypted: copies by the service, and between servers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from attrs import evolve

from pdm.testgrid.grid_servers import GridFtpServer
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import credentials as helpers_credentials
from pdm.workqueue.helpers.backends import gridftp
from pdm.workqueue.helpers.gridftp import connections
from pdm.workqueue.helpers.storage import Timeouts
from pdm.workqueue.wire import agent_events, agent_requests
from tests.helpers.driver import HelperProcess, adler, copy_item
from tests.protocols.places import Places

pytestmark = [pytest.mark.grid, pytest.mark.timeout(180)]
#: Above 256 KiB a file is copied alone; this one has more bytes than are decrypted ahead of a slow reader.
_LARGE = 24 * 1024 * 1024 + 3


@pytest.fixture(scope="module")
def server(storages: TestStorages) -> Iterator[GridFtpServer]:
    running = GridFtpServer(evolve(storages.gridftp("A").settings, name="encrypting", encrypts=True))
    running.start()
    yield running
    running.stop()


def _contents() -> dict[str, bytes]:
    return {"large": os.urandom(_LARGE), "empty": b"", **{f"small{n}": os.urandom(1000 * n) for n in range(1, 20)}}


def _copied(helper: HelperProcess, items: list[agent_requests.CopyItem]) -> dict[int, str | None]:
    return {
        key: event.checksum if isinstance(event, agent_events.DoneEvent) else repr(event)
        for key, event in helper.copy(items).items()
    }


def test_files_come_and_go_through_the_service(relay: HelperProcess, server: GridFtpServer, places: Places) -> None:
    contents = dict(enumerate(_contents().items()))
    for name, content in contents.values():
        places.put(places.a / name, content)
    (places.a / "back").mkdir()
    (places.b / "new").mkdir()
    for directory in (places.a, places.b):
        places.storages.give(directory)
    proven = {key: adler(content) for key, (_, content) in contents.items()}
    for source, target in (
        (f"file://{places.a}", f"{server.url}{places.b}/new"),
        (f"{server.url}{places.b}/new", f"file://{places.a}/back"),
    ):
        items = [
            copy_item(key, f"{source}/{name}", f"{target}/{name}", len(content))
            for key, (name, content) in contents.items()
        ]
        assert _copied(relay, items) == proven
    assert {path.name: path.read_bytes() for path in (places.a / "back").iterdir()} == dict(contents.values())


@pytest.mark.parametrize("streams", [1, 4], ids=["near", "far away"])
def test_a_server_that_is_far_away(
    streams: int, storages: TestStorages, server: GridFtpServer, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By several connections of block mode, which either end makes."""
    for name, value in storages.environment().items():
        monkeypatch.setenv(name, value)
    assert storages.credentials is not None
    monkeypatch.setattr(helpers_credentials, "_DEFAULT_TRUST", str(storages.credentials.trust))
    if streams > 1:
        monkeypatch.setattr(connections, "_FAR_AWAY_S", 0.0)
    content = os.urandom(_LARGE)
    backend = gridftp.GridFtpBackend.from_environment()
    backend.timeouts = Timeouts.within(60.0)
    url = StorageUrl(f"{server.url}{places.b}/file")
    backend.write(url, iter([content[start : start + 1_000_000] for start in range(0, _LARGE, 1_000_000)]), _LARGE)
    assert (places.b / "file").read_bytes() == content
    assert b"".join(backend.read(url)) == content
    backend._session.connections.drop_all()


@pytest.mark.parametrize("encrypts", ["source", "destination"])
def test_files_go_between_servers_of_which_one_encrypts(
    encrypts: str, storages: TestStorages, server: GridFtpServer, places: Places
) -> None:
    contents = dict(enumerate(_contents().items()))
    for name, content in contents.values():
        places.put(places.a / name, content)
    other = storages.gridftp("B").url
    source, target = (server.url, other) if encrypts == "source" else (other, server.url)
    items = [
        copy_item(key, f"{source}{places.a}/{name}", f"{target}{places.b}/{name}", len(content))
        for key, (name, content) in contents.items()
    ]
    with HelperProcess(["-m", "pdm.workqueue.helpers.main_gridftp"], storages.environment()) as helper:
        assert _copied(helper, items) == {key: adler(content) for key, (_, content) in contents.items()}
    assert {path.name: path.read_bytes() for path in places.b.iterdir()} == dict(contents.values())

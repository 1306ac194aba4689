"""HTTPS servers that send their clients elsewhere for bytes: followed, and with no credential of the user's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.testgrid.storages import TestStorages
from pdm.workqueue.wire.agent_events import DoneEvent, FailedEvent
from pdm.workqueue.wire.agent_requests import PathItem
from tests.helpers.driver import HelperProcess, adler, copy_item
from tests.protocols.places import Places, judged
from tests.support.redirecting_server import RedirectingServer

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]
TOKEN = "canary-token"
pytestmark = pytest.mark.timeout(180)


def server_of(storages: TestStorages) -> RedirectingServer:
    credentials = storages.credentials
    assert credentials is not None
    return RedirectingServer(credentials.host.certificate, credentials.host.key, credentials.trust)


@pytest.fixture
def door(storages: TestStorages) -> Iterator[RedirectingServer]:
    with server_of(storages) as running:
        yield running


@pytest.fixture
def pool(storages: TestStorages) -> Iterator[RedirectingServer]:
    with server_of(storages) as running:
        yield running


@pytest.fixture
def helper(storages: TestStorages, door: RedirectingServer, tmp_path: Path) -> Iterator[HelperProcess]:
    (tmp_path / "token").write_text(TOKEN)
    told = json.dumps({door.url: {"file": str(tmp_path / "token"), "account": None}})
    with HelperProcess(RELAY, {**storages.environment(), "PDM_CREDENTIALS": told}) as running:
        yield running


def alone(server: RedirectingServer) -> bool:
    """Whether nothing of the user's came with any request."""
    return bool(server.seen) and all(seen.token is None and not seen.certificate for seen in server.seen)


def test_bytes_are_read_where_the_door_sends_us(
    door: RedirectingServer, pool: RedirectingServer, helper: HelperProcess, places: Places
) -> None:
    content = os.urandom(700_000)
    door.files["/directory/f"] = pool.files["/directory/f"] = content
    door.elsewhere["GET"] = pool.url
    item = copy_item(1, f"{door.url}/directory/f", places.url("file", places.b / "f"), len(content))
    done = helper.copy([item])[1]
    assert isinstance(done, DoneEvent) and done.checksum == adler(content), done
    assert (places.b / "f").read_bytes() == content
    assert alone(pool)
    assert all(seen.token == f"Bearer {TOKEN}" and seen.certificate for seen in door.seen)


@pytest.mark.parametrize("wants_first", [True, False])
def test_bytes_are_written_where_the_door_sends_us(
    wants_first: bool, door: RedirectingServer, pool: RedirectingServer, helper: HelperProcess, places: Places
) -> None:
    content = os.urandom(2_000_000)
    # One store, as the pool is the door's.
    pool.files = door.files
    pool.wants_first = wants_first
    door.elsewhere["PUT"] = f"{pool.url}"
    source = places.put(places.a / "f", content)
    item = copy_item(1, places.url("file", source), f"{door.url}/directory/f", len(content))
    done = helper.copy([item])[1]
    assert isinstance(done, DoneEvent) and done.checksum == adler(content), done
    assert door.files == {"/directory/f": content}
    assert [seen.method for seen in pool.seen] == ["PUT"] and alone(pool)


def test_a_copy_between_servers_is_asked_for_where_the_door_sends_us(
    door: RedirectingServer, pool: RedirectingServer, helper: HelperProcess
) -> None:
    pool.files = door.files
    door.files["/directory/f"] = b"content"
    door.elsewhere["COPY"] = pool.url
    done = helper.copy([copy_item(1, f"{door.url}/directory/f", f"{door.url}/directory/g", 7)])[1]
    assert isinstance(done, DoneEvent) and done.checksum == adler(b"content"), done
    assert door.files == {"/directory/f": b"content", "/directory/g": b"content"}
    assert [seen.method for seen in pool.seen] == ["COPY"] and alone(pool)


def test_the_token_is_sent_on_to_the_same_server_only(
    door: RedirectingServer, helper: HelperProcess, places: Places
) -> None:
    door.files["/directory/f"] = door.files["/other/directory/f"] = b"content"
    door.elsewhere["GET"] = "/other"
    item = copy_item(1, f"{door.url}/directory/f", places.url("file", places.b / "f"), 7)
    outcome = helper.copy([item])[1]
    # It goes round in circles, for the door sends on what it has sent on.
    assert judged("https", outcome) == "source UNSUPPORTED"
    gets = [seen for seen in door.seen if seen.method == "GET"]
    assert len(gets) == 6 and all(seen.token == f"Bearer {TOKEN}" for seen in gets)


def test_a_token_that_a_server_sends_back_is_left_out(door: RedirectingServer, helper: HelperProcess) -> None:
    door.echoes = True
    failed = helper.list(f"{door.url}/nothing")[-1]
    assert judged("https", failed) == "source SERVER_ERROR"
    assert isinstance(failed, FailedEvent)
    assert "Authorization: Bearer ***" in failed.fault.message
    assert TOKEN not in failed.fault.message


@pytest.mark.parametrize(
    "where",
    [
        "http://localhost:1",
        "file:///etc",
        "https://user:secret@localhost:1",
        "ftp://localhost",
        "//-oProxy",
        "https://localhost:1:2",
        "gopher:x",
    ],
)
@pytest.mark.parametrize("method", ["GET", pytest.param("PUT", marks=pytest.mark.full)])
def test_only_https_is_followed(
    method: str, where: str, door: RedirectingServer, helper: HelperProcess, places: Places
) -> None:
    door.files["/directory/f"] = b"content"
    door.elsewhere[method] = where
    there = places.url("file", places.b / "f")
    if method == "GET":
        item = copy_item(1, f"{door.url}/directory/f", there, 7)
    else:
        item = copy_item(1, places.url("file", places.put(places.a / "f")), f"{door.url}/directory/g", 7)
    assert judged("https", helper.copy([item])[1]).endswith(" UNSUPPORTED")
    assert list(places.b.iterdir()) == []
    assert door.files == {"/directory/f": b"content"}


@pytest.mark.parametrize("method", ["PROPFIND", "DELETE", "MOVE"])
def test_names_are_the_doors_own(
    method: str, door: RedirectingServer, pool: RedirectingServer, helper: HelperProcess
) -> None:
    door.files["/directory/f"] = pool.files["/directory/f"] = b"content"
    door.elsewhere[method] = pool.url
    url = f"{door.url}/directory/f"
    outcome = helper.rename(url, f"{door.url}/directory/g") if method == "MOVE" else helper.remove(PathItem(0, url))[0]
    assert judged("https", outcome).endswith(" UNSUPPORTED")
    assert pool.seen == [] and pool.files == {"/directory/f": b"content"}

"""Free space of the destination of a copy, asked from real servers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pdm.testgrid.processes import missing_of
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.wire.agent_events import DoneEvent, LogEvent
from pdm.workqueue.wire.agent_requests import ListRequest
from tests.helpers.driver import LIMITS, HelperProcess
from tests.protocols.places import Places
from tests.support.webdav_servers import WebDavServer, webdav_server

#: Other tests write to the same file system meanwhile.
_TOLERANCE = 4 << 30


def _is_free(directory: Path, counted: int | None) -> bool:
    found = os.statvfs(directory)
    return counted is not None and abs(found.f_bavail * found.f_frsize - counted) <= _TOLERANCE


@pytest.mark.parametrize("place", ["", "/not/there/yet", "/taken", "/taken/below"])
@pytest.mark.parametrize("protocol", ["file", "ssh", "xroot"])
def test_servers_that_can_tell(relay: HelperProcess, places: Places, protocol: str, place: str) -> None:
    source = places.put(places.a / "source" / "f").parent
    places.put(places.b / "taken")
    destination = places.url(protocol, places.b) + place
    free = relay.free_bytes(places.url("ssh" if protocol == "file" else protocol, source), destination)
    assert _is_free(places.b, free)


@pytest.fixture(scope="module")
def servers(storages: TestStorages, open_directory: Path) -> Iterator[dict[str, WebDavServer]]:
    credentials = storages.credentials
    assert credentials is not None
    directory = open_directory / "quotas"
    directory.mkdir(mode=0o755)
    with ExitStack() as stack:
        made = {}
        for make in ("wsgidav", "nginx"):
            made[make] = webdav_server(make, directory, directory / f"of-{make}", credentials, storages.account)
            if missing_of(*made[make].programs):
                pytest.skip(f"{make} is not installed")
            made[make].start()
            stack.callback(made[make].stop)
        yield made


@pytest.mark.parametrize("place", ["", "/not/there/yet"])
def test_a_webdav_server_with_quota_properties(
    relay: HelperProcess, places: Places, servers: dict[str, WebDavServer], place: str
) -> None:
    source = places.put(places.a / "source" / "f").parent
    server = servers["wsgidav"]
    assert _is_free(server.exported, relay.free_bytes(places.url("ssh", source), server.url + place))


def test_webdav_servers_without_quota_properties(
    relay: HelperProcess, places: Places, servers: dict[str, WebDavServer]
) -> None:
    source = places.put(places.a / "source" / "f").parent
    assert relay.free_bytes(places.url("ssh", source), servers["nginx"].url) is None
    # XRootD's, with properties of its own choice.
    assert relay.free_bytes(places.url("https", source), places.url("https", places.b)) is None


def test_a_small_copy_is_not_asked_for(relay: HelperProcess, places: Places) -> None:
    small, large = places.put(places.a / "small"), places.put(places.a / "large")
    os.truncate(large, 1 << 30)
    destination = places.url("ssh", places.b)
    for path, is_asked in ((small, False), (large, True)):
        url = places.url("ssh", path)
        request = ListRequest(relay.new_id(), 0, url, None, LIMITS, space_at=destination)
        done = relay.run(request)[-1]
        assert isinstance(done, DoneEvent)
        assert _is_free(places.b, done.free) is is_asked


def test_a_server_that_is_away_ends_no_listing(own: HelperProcess, places: Places) -> None:
    large = places.put(places.a / "large")
    os.truncate(large, 1 << 30)
    request = ListRequest(own.new_id(), 0, places.url("ssh", large), None, LIMITS, space_at="https://localhost:1/d")
    events = own.run(request)
    assert isinstance(events[-1], DoneEvent)
    assert events[-1].free is None
    (line,) = [event.text for event in events if isinstance(event, LogEvent)]
    assert line.startswith("the free space of the destination is not known: ")

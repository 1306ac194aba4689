"""Buckets in the names of hosts (``s3sv://``), as clients of FTS3 name them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.testgrid.identities import GridCredentials, make_credentials, make_host
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import credentials as helpers_credentials
from pdm.workqueue.helpers.backends.http_servers import known_server
from pdm.workqueue.helpers.backends.s3_groups import GroupedS3Backend
from pdm.workqueue.helpers.storage import StorageError, Timeouts
from pdm.workqueue.http.fts.calls import ServersOfUrls, read_url
from tests.security import canary
from tests.support.s3_server import ACCESS_KEY, SmallS3Server

SECRET = canary.watched("canary/secret+of=hosts/4711")
pytestmark = pytest.mark.timeout(180)


def _port(server: SmallS3Server) -> str:
    return server.url.rpartition(":")[2]


@pytest.fixture(scope="module")
def credentials(open_directory: Path) -> GridCredentials:
    directory = open_directory / "s3-hosts"
    directory.mkdir()
    return make_credentials(directory, ("alice",))


@pytest.fixture
def server(
    credentials: GridCredentials, open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SmallS3Server]:
    """Each name leads to it; its certificate is for one bucket."""
    host = make_host(open_directory / "s3-hosts", credentials.authority, "bucket", ["bucket.localhost"])
    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda address, timeout: connect(("127.0.0.1", address[1]), timeout)
    )
    with SmallS3Server(host.certificate, host.key, SECRET) as running:
        yield running


@pytest.fixture
def backend(
    credentials: GridCredentials, server: SmallS3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> GroupedS3Backend:
    keys = tmp_path / "keys"
    keys.write_text(json.dumps({"access_key": ACCESS_KEY, "secret_key": SECRET}))
    given = {
        f"s3sv://{bucket}.localhost:{_port(server)}": {"file": str(keys), "account": None} for bucket in ("bucket", "b")
    }
    monkeypatch.setenv("PDM_CREDENTIALS", json.dumps(given))
    monkeypatch.setattr(helpers_credentials, "_DEFAULT_TRUST", str(credentials.trust))
    made = GroupedS3Backend()
    made.timeouts = Timeouts.within(30.0)
    return made


def _url(text: str) -> StorageUrl:
    """The URL below which the door has the storage of a client's URL."""
    found = read_url(text, ServersOfUrls(buckets_in_paths=False))
    return StorageUrl(f"{found.server.url}{StorageUrl(found.text).encoded_path}")


def test_objects_of_such_a_bucket(server: SmallS3Server, backend: GroupedS3Backend) -> None:
    server.put("d/a b", b"content")
    at = f"s3s://bucket.localhost:{_port(server)}/d"
    url = _url(f"{at}/a%20b")
    assert url == f"s3sv://bucket.localhost:{_port(server)}/d/a%20b"
    assert b"".join(backend.read(url)) == b"content"
    assert [name for name, _ in backend.entries(_url(at))] == [b"a b"]
    backend.rename(url, _url(f"{at}/c"), replace=False)
    temporary = _url(f"{at}/.pdm-1.part")
    backend.expect_rename(temporary, _url(f"{at}/new"), (), None)
    backend.write(temporary, iter((b"more",)), 4)
    backend.rename(temporary, _url(f"{at}/new"), replace=False)
    assert {key: data for key, (data, _) in server.objects.items()} == {b"d/c": b"content", b"d/new": b"more"}
    assert backend.remove_at_once([_url(f"{at}/c"), _url(f"{at}/new")]) == [True, True]
    assert (server.objects, {request.bucket for request in server.seen}) == ({}, {"bucket"})
    backend._client.close_idle(known_server(url))


def test_the_certificate_must_be_for_the_bucket(server: SmallS3Server, backend: GroupedS3Backend) -> None:
    with pytest.raises(StorageError, match=r"not valid for 'b\.localhost'"):
        backend.stat(_url(f"s3s://b.localhost:{_port(server)}/a"))
    assert server.seen == []

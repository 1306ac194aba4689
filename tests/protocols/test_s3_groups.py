"""Many small files at once: to and from S3 in groups, and removed by one request."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import pytest

from pdm.testgrid.identities import GridCredentials, make_credentials
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import credentials as helpers_credentials
from pdm.workqueue.helpers.backends import http_connection
from pdm.workqueue.helpers.backends.http_servers import known_server
from pdm.workqueue.helpers.backends.s3_groups import GroupedS3Backend
from pdm.workqueue.helpers.storage import Timeouts
from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent, LogEvent
from pdm.workqueue.wire.agent_requests import CopyRequest, PathItem, RemoveRequest
from tests.helpers.driver import LIMITS, HelperProcess, copy_item, outcomes
from tests.protocols.places import judged
from tests.security import canary
from tests.support.s3_server import ACCESS_KEY, S3Reply, S3Request, SmallS3Server, s3_error

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]
SECRET = canary.watched("canary/secret+of=groups/4711")
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def credentials(open_directory: Path) -> GridCredentials:
    directory = open_directory / "s3-groups"
    directory.mkdir()
    return make_credentials(directory, ("alice",))


@pytest.fixture
def server(credentials: GridCredentials) -> Iterator[SmallS3Server]:
    # On a new port each time: the helper remembers what a server cannot do.
    with SmallS3Server(credentials.host.certificate, credentials.host.key, SECRET) as running:
        yield running


@pytest.fixture
def environment(credentials: GridCredentials, server: SmallS3Server, tmp_path: Path) -> dict[str, str]:
    keys = tmp_path / "keys"
    keys.write_text(json.dumps({"access_key": ACCESS_KEY, "secret_key": SECRET}))
    return {
        "X509_CERT_DIR": str(credentials.trust),
        "PDM_CREDENTIALS": json.dumps({server.endpoint: {"file": str(keys), "account": None}}),
        "PDM_FILE_ROOTS": json.dumps([quote(str(tmp_path))]),
    }


@pytest.fixture
def helper(environment: dict[str, str]) -> Iterator[HelperProcess]:
    with HelperProcess(RELAY, environment) as process:
        yield process


def _url(server: SmallS3Server, key: bytes | str) -> str:
    raw = key.encode() if isinstance(key, str) else key
    return f"{server.endpoint}/{quote_from_bytes(raw, safe='/~')}"


def _small_files(directory: Path, count: int = 40) -> list[Path]:
    files = [directory / f"f{number:02}" for number in range(count)]
    for number, path in enumerate(files):
        path.write_bytes(b"%d" % number * number)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    return files


def _copy_all(
    helper: HelperProcess, pairs: list[tuple[str, str, int]], overwrite: str, verify: str = "checksum"
) -> tuple[dict[int, AgentEvent], set[int]]:
    """The outcomes, and the keys of the files that went in a group."""
    items = [copy_item(key, *pair) for key, pair in enumerate(pairs)]
    events = helper.run(CopyRequest(helper.new_id(), items, overwrite, verify, LIMITS))  # type: ignore[arg-type]
    together = {event.key for event in events if isinstance(event, LogEvent) and "with others" in event.text}
    return outcomes(events), together


@pytest.mark.parametrize("page", [1000, 5])
def test_local_files_go_in_groups_and_replace_nothing(
    helper: HelperProcess, server: SmallS3Server, tmp_path: Path, page: int
) -> None:
    server.has_conditions, server.page = False, page
    files = _small_files(tmp_path)
    server.put("g/f07", b"another")
    for number in range(page, 20):
        # More than one page of names that begin as all of them do.
        server.put(f"g/f-{number}")

    def writes_meanwhile(request: S3Request) -> None:
        looks = request.method == "HEAD" or request.query.get("prefix", "").startswith("g/f")
        if looks and b"g/f10" not in server.objects:
            server.put("g/f09", b"another")

    server.rules.append(writes_meanwhile)
    pairs = [(f"file://{path}", _url(server, f"g/{path.name}"), path.stat().st_size) for path in files]
    with files[5].open("ab") as longer:
        longer.write(b"more")

    ended, together = _copy_all(helper, pairs, "never")

    failed = {key: judged("s3", event) for key, event in ended.items() if not isinstance(event, DoneEvent)}
    assert failed == {5: "source SIZE_CHANGED", 7: "destination EXISTS", 9: "destination EXISTS"}
    assert server.objects[b"g/f09"][0] == server.objects[b"g/f07"][0] == b"another"
    wanted = {f"g/{path.name}".encode(): path.read_bytes() for key, path in enumerate(files) if key not in failed}
    assert {key: server.objects[key][0] for key in wanted} == wanted
    assert together >= set(range(len(files))) - set(failed)
    asked = {what for key in wanted for what in server.whats(key)}
    assert asked == ({"PUT"} if page == 1000 else {"HEAD", "PUT"})


@pytest.mark.parametrize("heeds", [True, False])
def test_a_server_that_heeds_conditions_is_not_asked_before(
    environment: dict[str, str], server: SmallS3Server, tmp_path: Path, heeds: bool
) -> None:
    """It has shown it with an object of the first group."""
    server.has_conditions = heeds
    files = _small_files(tmp_path)
    pairs = [(f"file://{path}", _url(server, f"g/{path.name}"), path.stat().st_size) for path in files]
    later = [(source, url.replace("/g/f", "/g/later"), size) for source, url, size in pairs]

    def writes_meanwhile(request: S3Request) -> None:
        # After the names were listed.
        if request.method == "PUT" and request.key.startswith(b"g/later") and b"g/later05" not in server.objects:
            server.put("g/later05", b"another")

    with HelperProcess(RELAY, environment) as helper:
        first, _ = _copy_all(helper, pairs, "never")
        assert {type(event) for event in first.values()} == {DoneEvent}
        server.seen.clear()
        if heeds:
            server.rules.append(writes_meanwhile)
        ended, _ = _copy_all(helper, later, "never")
    failed = {key: judged("s3", event) for key, event in ended.items() if not isinstance(event, DoneEvent)}
    looks = [request for request in server.seen if request.query.get("prefix", "").startswith("g/later")]
    if heeds:
        assert failed == {5: "destination EXISTS"}
        assert server.objects[b"g/later05"][0] == b"another"
        # Only the one that was there then is copied alone.
        assert {what for n in range(40) if n != 5 for what in server.whats(b"g/later%02d" % n)} == {"PUT"}
    else:
        assert failed == {}
    assert bool(looks) != heeds
    # No temporary name of theirs has ever been there, in any case.
    assert not [request for request in server.seen if b".pdm-" in request.key.lower() and request.method != "PUT"]


@pytest.mark.parametrize("verify", ["size", "checksum"])
def test_objects_that_the_server_does_not_confirm_are_looked_at(
    helper: HelperProcess, server: SmallS3Server, tmp_path: Path, verify: str
) -> None:
    files = _small_files(tmp_path)

    def unconfirmed(request: S3Request) -> S3Reply | None:
        if request.what != "PUT" or not request.key.startswith(b"g/f"):
            return None
        if request.key == b"g/f05":
            return S3Reply(200)
        if request.key == b"g/f07" and request.key not in server.objects:
            # What was written is unknown to the client.
            server.put(request.key, request.body)
            return S3Reply(307, b"", {"Location": server.endpoint})
        reply = server._own(request)
        return S3Reply(reply.status, reply.body)

    server.rules.append(unconfirmed)
    pairs = [(f"file://{path}", _url(server, f"g/{path.name}"), path.stat().st_size) for path in files]

    ended, together = _copy_all(helper, pairs, "never", verify)

    failed = judged("s3", ended.pop(5))
    assert failed == ("transfer CHECKSUM_MISMATCH" if verify == "size" else "destination NOT_FOUND")
    assert {type(event) for event in ended.values()} == {DoneEvent}
    assert together >= set(ended)
    wanted = {f"g/f{key:02}".encode(): files[key].read_bytes() for key in ended}
    assert {key: data for key, (data, _) in server.objects.items() if key != b"g/"} == wanted
    assert [server.whats(key) for key in (b"g/f08", b"g/f07")] == [["PUT", "GET"], ["PUT", "PUT", "GET"]]


def test_objects_come_to_local_directories_in_groups(
    helper: HelperProcess, server: SmallS3Server, tmp_path: Path
) -> None:
    files = _small_files(tmp_path)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "f03").write_bytes(b"another")
    for path in files:
        server.put(f"g/{path.name}", path.read_bytes())
    pairs = [
        (_url(server, f"g/{path.name}"), f"file://{tmp_path}/back/{path.name}", path.stat().st_size) for path in files
    ]

    ended, together = _copy_all(helper, pairs, "never")

    assert judged("s3", ended.pop(3)) == "destination EXISTS"
    assert {type(event) for event in ended.values()} == {DoneEvent}
    assert together == set(ended)
    there = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert there == {path.name: path.read_bytes() for path in files} | {"f03": b"another"}


def test_copies_between_local_directories_stay_in_the_kernel(helper: HelperProcess, tmp_path: Path) -> None:
    files = _small_files(tmp_path)
    (tmp_path / "back").mkdir()
    pairs = [(f"file://{path}", f"file://{tmp_path}/back/{path.name}", path.stat().st_size) for path in files]
    ended, together = _copy_all(helper, pairs, "never")
    assert ({type(event) for event in ended.values()}, together) == ({DoneEvent}, set())


@pytest.mark.parametrize(
    "refusal", [None, s3_error(501, "NotImplemented"), S3Reply(400, b"what?"), S3Reply(200, b"{}")]
)
def test_many_objects_are_removed_by_one_request(
    helper: HelperProcess, server: SmallS3Server, refusal: S3Reply | None
) -> None:
    keys = [f"r/ <&>'\" é {number}".encode() for number in range(60)] + [b"r/odd\x01", b"r/cr\r"]
    for key in keys:
        server.put(key)
    server.put("r/stays")
    server.locked = {keys[7]}
    server.rules.append(lambda request: refusal if request.what == "POST delete" else None)
    items = [PathItem(number, _url(server, key)) for number, key in enumerate([*keys, b"r/gone"])]
    for _ in range(2):
        ended = outcomes(helper.run(RemoveRequest(helper.new_id(), items, LIMITS)))
        assert judged("s3", ended.pop(7)) == "source PERMISSION_DENIED"
        assert {type(event) for event in ended.values()} == {DoneEvent}
        assert set(server.objects) == {b"r/stays", keys[7]}
    alone = {request.key for request in server.seen if request.what == "DELETE"}
    assert alone == ({keys[7], b"r/odd\x01", b"r/cr\r"} if refusal is None else {*keys, b"r/gone"})
    # A server that does not do it is not asked again.
    assert server.whats().count("POST delete") == (2 if refusal is None else 1)


def test_a_request_that_takes_the_server_long_is_not_given_up(
    credentials: GridCredentials, environment: dict[str, str], server: SmallS3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike a request without an effect on a connection that has had others."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(helpers_credentials, "_DEFAULT_TRUST", str(credentials.trust))
    monkeypatch.setattr(http_connection, "_ANSWER_S", 0.2)
    server.put("a")
    server.rules.append(lambda request: time.sleep(1.0) if request.what == "POST delete" else None)
    backend = GroupedS3Backend()
    backend.timeouts = Timeouts.within(30.0)
    url = StorageUrl(_url(server, "a"))
    assert backend.stat(url) is not None
    assert backend.remove_at_once([url]) == [True]
    assert (server.objects, server.whats().count("POST delete")) == ({}, 1)
    backend._client.close_idle(known_server(url))

"""The door itself: identities, addresses, methods, and answers that are JSON whatever happens."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.threads import deferToThread

from pdm.workqueue import __version__
from pdm.workqueue.certificates.pem import to_pem
from pdm.workqueue.config.access_settings import UserSettings
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.limits import Route
from pdm.workqueue.execution.streams import RouteState
from pdm.workqueue.http import app
from pdm.workqueue.http.endpoint import Allow, Endpoint
from pdm.workqueue.http.endpoints import ENDPOINTS
from tests.http.service import ROOT, Certificates, Service

_VALUES = {
    "job_id": "1",
    "element_id": "0",
    "attempt": "1",
    "site_id": "1",
    "user_id": "1",
    "delegation_id": "0123456789abcdef",
    "credential_id": "1",
    "schedule_id": "1",
    "webhook_id": "1",
    "log_uid": "0123456789abcdef",
    "node": "node1",
}


def path_of(endpoint: Endpoint) -> str:
    """A path of the endpoint, with some values in it."""
    return endpoint.path.format(**_VALUES)


# -- who calls


@pytest_twisted.ensureDeferred
async def test_without_a_certificate_nothing_is_open_but_health(service: Service) -> None:
    for endpoint in ENDPOINTS:
        answer = await service.call(None, endpoint.method, path_of(endpoint), raw=b"{}" if endpoint.body else None)
        if endpoint.allow is Allow.EVERYBODY:
            assert answer.json == {"status": "ok", "version": __version__, "faults": []}
        else:
            assert (answer.status, answer.problem) == (401, "certificate-needed"), endpoint.name


def test_health_is_the_only_open_endpoint() -> None:
    assert [endpoint.path for endpoint in ENDPOINTS if endpoint.allow is Allow.EVERYBODY] == ["/health"]


@pytest_twisted.ensureDeferred
async def test_whoami(service: Service) -> None:
    answer = (await service.call("whoami user", "GET", "/whoami")).json
    assert answer["subject"] == "/DC=org/DC=test/CN=whoami user"
    assert answer["role"] == "user"
    assert answer["limited_proxy"] is False
    assert answer["credential_valid_until"] is None
    assert len(answer["delegation_id"]) == 16
    assert (await service.call("operator", "GET", "/whoami")).json["role"] == "operator"
    await service.give_credential("whoami user")
    answer = (await service.call("whoami user", "GET", "/whoami")).json
    assert answer["credential_valid_until"].endswith("Z")


@pytest_twisted.ensureDeferred
async def test_a_proxy_is_its_end_entity(service: Service) -> None:
    user = service.certificates.of("proxied")
    plain = (await service.call(user, "GET", "/whoami")).json
    proxy = (await service.call(user.proxy().proxy(), "GET", "/whoami")).json
    assert proxy["user_id"] == plain["user_id"]
    assert proxy["certificate_valid_until"] < plain["certificate_valid_until"]


@pytest_twisted.ensureDeferred
async def test_a_limited_proxy_may_submit(service: Service) -> None:
    """Storage servers and FTS take limited proxies for moving data, and that is what this service does."""
    limited = service.certificates.of("limited").proxy(limited=True)
    assert (await service.call(limited, "GET", "/whoami")).json["limited_proxy"] is True
    body = {"src_siteid": 1, "src_filepath": "f", "protocol": "DUMMY"}
    assert (await service.call(limited, "POST", "/list", body)).status == 200


@pytest_twisted.ensureDeferred
async def test_a_kept_connection_ends_with_its_proxy(own_service: Service) -> None:
    proxy = own_service.certificates.of("lasting").proxy(lifetime=timedelta(hours=2))
    assert (await own_service.call(proxy, "GET", "/whoami")).status == 200
    own_service.skip[0] = timedelta(hours=3)
    answer = await own_service.call(proxy, "GET", "/whoami")
    assert (answer.status, answer.problem) == (401, "certificate-needed")
    assert "expired at" in answer.json["detail"]


@pytest_twisted.ensureDeferred
async def test_only_listed_users_where_so_configured(certificates: Certificates, tmp_path: Path) -> None:
    (tmp_path / "users").write_text(f"{certificates.of('listed').dn}\n")
    settings = UserSettings(register="listed", listed_users=tmp_path / "users")
    service = Service(tmp_path, certificates, settings)
    await service.start()
    try:
        assert (await service.call("listed", "GET", "/jobs")).status == 200
        answer = await service.call("unlisted", "GET", "/jobs")
        assert (answer.status, answer.problem) == (403, "forbidden")
        assert "/CN=unlisted" in answer.json["detail"]
    finally:
        await service.stop()


# -- addresses and methods


_NOWHERE = (
    "/nothing",
    "/jobs/abc",
    "/jobs/-1",
    "/jobs/1.5",
    "/jobs/9223372036854775808",
    "/jobs/" + "9" * 5000,
    "/jobs/٣",
    "/jobs/1/elements/x",
    "/jobs//elements",
    "//jobs",
    "/sites/%00",
    "/../../jobs",
)


@pytest_twisted.ensureDeferred
async def test_an_unknown_address_is_404_in_json(service: Service) -> None:
    for path in _NOWHERE:
        answer = await service.call("alice", "GET", path)
        assert (answer.status, answer.problem) == (404, "not-found"), path
    # Whatever can be done with a job that is there.
    answer = await service.call("alice", "DELETE", "/jobs/9223372036854775808")
    assert (answer.status, answer.problem) == (404, "not-found")


@pytest_twisted.ensureDeferred
async def test_a_wrong_method_is_405_and_names_the_right_ones(service: Service) -> None:
    for path in {endpoint.path for endpoint in ENDPOINTS}:
        known = {endpoint.method for endpoint in ENDPOINTS if endpoint.path == path}
        expected = known | {"OPTIONS"} | ({"HEAD"} if "GET" in known else set())
        for method in {"PATCH", "PUT"} - known:
            answer = await service.call("alice", method, path.format(**_VALUES))
            assert (answer.status, answer.problem) == (405, "method-not-allowed")
            assert set(answer.header("Allow").split(", ")) == expected
        answer = await service.call("alice", "OPTIONS", path.format(**_VALUES))
        assert (answer.status, answer.body) == (204, b"")
        assert set(answer.header("Allow").split(", ")) == expected


@pytest_twisted.ensureDeferred
async def test_head_is_get_without_the_body(service: Service) -> None:
    job = await service.submit("header")
    for path in ("/health", "/jobs", f"/jobs/{job['id']}", f"/jobs/{job['id']}/elements", "/jobs/0"):
        get, head = await service.call("header", "GET", path), await service.call("header", "HEAD", path)
        assert (head.status, head.body) == (get.status, b"")
        assert head.header("Content-Length") == str(len(get.body))
        assert head.header("Content-Type") == get.header("Content-Type")


@pytest_twisted.ensureDeferred
async def test_a_trailing_slash_is_forgiven(service: Service) -> None:
    assert (await service.call("alice", "GET", "/jobs/")).status == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET %s/jobs/\xff\xfe HTTP/1.1\r\nHost: localhost\r\n", 400),
        (b"GET %s/jobs/%%ff HTTP/1.1\r\nHost: localhost\r\n", 400),
        (b"GET %s/health HTTP/1.1\r\nHost: a..b\r\n", 400),
        (b"GET %s/health HTTP/1.1\r\nHost: \xff\xfe\r\n", 400),
        (b"GET %s/health HTTP/1.1\r\n", 200),
        (b"G\xffT %s/health HTTP/1.1\r\nHost: localhost\r\n", 400),
        (b"GET %s/health HTTP/1.0\r\n", 200),
    ],
)
@pytest_twisted.ensureDeferred
async def test_odd_bytes_in_the_head(service: Service, head: bytes, status: int) -> None:
    request = head.replace(b"%s", ROOT.encode()) + b"Connection: close\r\n\r\n"
    answer = await deferToThread(raw_exchange, service, request)
    assert answer.split(b" ", 2)[1] == str(status).encode()
    assert b"<html" not in answer.lower()


@pytest_twisted.ensureDeferred
async def test_an_address_that_comes_again_is_judged_as_at_first(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Klein is not asked again; each part of what it looked at counts all the same, and few addresses are kept."""
    monkeypatch.setattr(app, "_MAX_CACHED_ROUTES", 3)
    job = await service.submit("again")
    own = f"/jobs/{job['id']}"
    for _ in range(3):
        for host in ("localhost", "a..b", "127.0.0.1", ".".join(["x" * 60] * 10)):
            head = f"GET {ROOT}/health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
            answer = await deferToThread(raw_exchange, service, head)
            assert answer.split(b" ", 2)[1] == (b"400" if host == "a..b" else b"200"), host
        assert (await service.call("again", "GET", own)).json["id"] == job["id"]
        assert (await service.call("again", "GET", f"{own}?a=b")).problem == "invalid-input ?a"
        assert (await service.call("again", "HEAD", own)).body == b""
        assert (await service.call("again", "PUT", own)).status == 405
        assert (await service.call("again", "GET", f"{own}/nothing")).status == 404
        assert (await service.call("other", "GET", own)).problem == "job-not-found"
        assert (await service.call(None, "GET", own)).problem == "certificate-needed"


def raw_exchange(service: Service, *sent: bytes, user: str | None = None, port: int | None = None) -> bytes:
    """Send bytes as they are, to the port of the API by default, and read until the service closes; blocks."""
    context = ssl.create_default_context(cadata=to_pem(service.certificates.authority.certificate).decode())
    if user is not None:
        bundle = service.directory / f"raw-{user}.pem"
        service.certificates.of(user).write_bundle(bundle)
        context.load_cert_chain(bundle)
    with (
        socket.create_connection(("localhost", port or service.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        for part in sent:
            secure.sendall(part)
        received = b""
        while part := secure.recv(65536):
            received += part
        return received


# -- the table and what is made of it


@pytest_twisted.ensureDeferred
async def test_openapi_is_valid_and_complete(service: Service) -> None:
    document = (await service.call("alice", "GET", "/openapi.json")).json
    # Its imports take seconds, in each process that collects the tests.
    from openapi_spec_validator import validate

    validate(document)
    listed = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert listed == {(endpoint.path, endpoint.method) for endpoint in ENDPOINTS}
    schemas = document["components"]["schemas"]
    options = schemas["SubmitCopy"]["properties"]["extra_opts"]["anyOf"]
    assert {"$ref": "#/components/schemas/CopyOptions"} in options
    assert schemas["CopyOptions"]["properties"]["verify"]["enum"] == ["checksum", "size"]
    submit = document["paths"]["/copy"]["post"]
    assert set(submit["responses"]) >= {"200", "400", "401", "403", "409", "413", "415", "422", "500"}
    schemas = document["components"]["schemas"]
    assert "src_siteid" in schemas["SubmitCopy"]["required"]
    assert schemas["JobView"]["properties"]["type"]["enum"] == list(JobType.__members__)
    assert {"name", "in"} <= set(document["paths"]["/jobs"]["get"]["parameters"][0])


def test_every_endpoint_has_words() -> None:
    for endpoint in ENDPOINTS:
        assert endpoint.summary, endpoint.name
        assert endpoint.description, endpoint.name


@pytest_twisted.ensureDeferred
async def test_every_answer_has_a_request_id(service: Service) -> None:
    answers = [await service.call("alice", "GET", path) for path in ("/jobs", "/health", "/nothing", "/jobs/0")]
    assert len({answer.header("X-Request-Id") for answer in answers}) == len(answers)


@pytest_twisted.ensureDeferred
async def test_sites(service: Service) -> None:
    sites = (await service.call("alice", "GET", "/sites")).json
    assert [site["id"] for site in sites] == [1, 2, 3, 4]
    assert sites[0] == {
        "id": 1,
        "name": "NORTH",
        "description": "the first",
        "default_folder": "/store/user",
        "protocols": ["GRIDFTP", "DUMMY", "FILE"],
        "endpoints": {
            "GRIDFTP": "gsiftp://north.example.org:2811",
            "DUMMY": "dummy://north",
            "FILE": "file:///srv/north",
        },
        "alternatives": {},
        "owner": None,
        "public": True,
        "limit_in": None,
        "limit_out": None,
        "authorities": [],
        "myproxy": None,
        "mover": "native",
        "tape": None,
        "oidc": None,
        "fts": None,
        "state": "ok",
        "reason": None,
    }
    one = (await service.call("alice", "GET", "/sites/1")).json
    assert [each["state"] for each in one.pop("health")] == ["closed"] * 3
    assert one == sites[0]
    assert (await service.call("alice", "GET", "/sites/9")).problem == "not-found"


@pytest_twisted.ensureDeferred
async def test_routes(service: Service) -> None:
    assert (await service.call("alice", "GET", "/routes")).json == []
    timestamp = datetime(2026, 3, 1, 12, 0, 1, 500, tzinfo=UTC)
    words = "2 bring 10.0 elements/s: one more is tried"
    service.routes.append(
        RouteState(
            route=Route(1, 2),
            running=2,
            limit=3,
            least=1,
            most=4,
            throughput=10.5,
            unit="elements/s",
            reason=words,
            decided_at=timestamp,
            changed_at=timestamp,
        )
    )
    service.routes.append(
        RouteState(
            route=Route(2, None),
            running=0,
            limit=2,
            least=1,
            most=4,
            throughput=None,
            unit=None,
            reason="as many as",
            decided_at=timestamp,
            changed_at=timestamp,
        )
    )
    first, second = (await service.call("alice", "GET", "/routes")).json
    assert first == {
        "source": 1,
        "destination": 2,
        "running": 2,
        "limit": 3,
        "least": 1,
        "most": 4,
        "throughput": 10.5,
        "unit": "elements/s",
        "reason": words,
        "decided_at": "2026-03-01T12:00:01Z",
        "changed_at": "2026-03-01T12:00:01Z",
        "node": None,
    }
    assert (second["destination"], second["throughput"], second["unit"]) == (None, None, None)

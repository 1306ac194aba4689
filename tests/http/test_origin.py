"""What a page of another site makes a browser send is refused on every route that may change something."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import pytest_twisted
from twisted.web.http_headers import Headers

from pdm.workqueue.http.access import foreign_origin
from pdm.workqueue.http.endpoints import ENDPOINTS
from tests.http.service import Service
from tests.http.test_surface import path_of

#: What Chromium and Firefox send: for a form without and with a referrer policy, for `fetch`, and of old ones.
_FOREIGN: dict[str, dict[str, Any]] = {
    "form": {"Origin": "https://evil.example", "Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"},
    "form without referrer": {"Origin": "null", "Sec_Fetch_Site": "cross-site"},
    "fetch": {"Origin": "https://evil.example", "Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"},
    "sibling": {"Origin": "https://other.localhost", "Sec_Fetch_Site": "same-site"},
    "typed": {"Sec_Fetch_Site": "none"},
    "old browser": {"Origin": "https://evil.example"},
    "old browser, sandboxed": {"Origin": "null"},
}
_CONTENT_TYPES = ("application/x-www-form-urlencoded", "text/plain", "application/json")
_ACTS = [endpoint for endpoint in ENDPOINTS if endpoint.method != "GET"]


@pytest_twisted.ensureDeferred
async def test_a_foreign_page_can_do_nothing_on_any_route(service: Service) -> None:
    before = await service.call("victim", "GET", "/jobs")
    for endpoint in _ACTS:
        for (name, headers), content_type in zip(_FOREIGN.items(), cycle(_CONTENT_TYPES), strict=False):
            sent = headers | {"Content_Type": content_type}
            answer = await service.call("victim", endpoint.method, path_of(endpoint), raw=b"{}", **sent)
            assert (answer.status, answer.problem) == (403, "forbidden"), (endpoint.name, name)
            assert "nothing was done" in answer.json["detail"]
    assert (await service.call("victim", "GET", "/jobs")).json == before.json
    for path in ("/nowhere", "/jobs/1/nothing"):
        assert (await service.call("victim", "POST", path, raw=b"", **_FOREIGN["form"])).status == 403


@pytest_twisted.ensureDeferred
async def test_programs_and_own_pages_act_as_before(service: Service) -> None:
    host = f"localhost:{service.port}"
    own: dict[str, dict[str, Any]] = {
        "program": {},
        "own fetch": {"Origin": f"https://{host}", "Sec_Fetch_Site": "same-origin"},
        "own form": {"Origin": "null", "Sec_Fetch_Site": "same-origin"},
        "old browser": {"Origin": f"https://{host}"},
    }
    for endpoint in _ACTS:
        statuses = set()
        for headers in own.values():
            answer = await service.call("acting", endpoint.method, path_of(endpoint), raw=b"[]", **headers)
            assert b"another site" not in answer.body
            statuses.add(answer.status)
        assert len(statuses) == 1, endpoint.name
    body = {"src_siteid": 1, "src_filepath": "data", "protocol": "DUMMY"}
    for headers in own.values():
        assert (await service.call("acting", "POST", "/list", body, **headers)).status == 200


@pytest_twisted.ensureDeferred
async def test_a_foreign_page_reads_nothing(service: Service) -> None:
    """Without CORS headers a browser hides the response from the page, and refuses to send other methods or types."""
    for endpoint in ENDPOINTS:
        for method in {"GET", "HEAD", "OPTIONS"} if endpoint.method == "GET" else {"OPTIONS"}:
            sent = _FOREIGN["fetch"] | {"Access_Control_Request_Method": endpoint.method}
            answer = await service.call("victim", method, path_of(endpoint), **sent)
            assert b"another site" not in answer.body, endpoint.name
            assert not [name for name in answer.headers if name.startswith("access-control")]
            assert answer.header("X-Content-Type-Options") == "nosniff"
            assert answer.header("Referrer-Policy") == "no-referrer"
            assert answer.header("Cross-Origin-Resource-Policy") == "same-origin"


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("pdm.example.org", "https://pdm.example.org"),
        ("pdm.example.org:443", "https://pdm.example.org"),
        ("pdm.example.org", "https://pdm.example.org:443"),
        ("pdm.example.org:", "https://pdm.example.org"),
        ("PDM.Example.org:8443", "HTTPS://pdm.example.ORG:8443"),
        ("[::1]:8443", "https://[::1]:8443"),
        ("[2001:DB8::1]", "https://[2001:db8::1]:443"),
        ("192.0.2.1:8443", "https://192.0.2.1:8443"),
    ],
)
def test_an_origin_is_the_services_own(host: str, origin: str) -> None:
    assert foreign_origin(Headers({"Host": [host], "Origin": [origin]})) is None


@pytest.mark.parametrize(
    ("hosts", "origins"),
    [
        (["pdm.example.org"], ["http://pdm.example.org"]),
        (["pdm.example.org:8443"], ["https://pdm.example.org"]),
        (["pdm.example.org:8443"], ["https://pdm.example.org:9443"]),
        (["pdm.example.org"], ["https://pdm.example.org.evil.example"]),
        (["pdm.example.org"], ["https://evil.example"]),
        (["pdm.example.org"], ["https://user@pdm.example.org"]),
        (["pdm.example.org"], ["https://pdm.example.org/"]),
        (["pdm.example.org"], ["https://pdm.example.org, https://evil.example"]),
        (["pdm.example.org"], ["https://pdm.example.org", "https://evil.example"]),
        (["pdm.example.org"], ["https://pdm.example.org"] * 2),
        (["pdm.example.org", "evil.example"], ["https://evil.example"]),
        (["pdm.example.org"], ["null"]),
        (["pdm.example.org"], [""]),
        (["pdm.example.org"], ["pdm.example.org"]),
        (["[::1]"], ["https://::1"]),
        (["[::1"], ["https://[::1"]),
        (["a b"], ["https://a b"]),
        ([""], ["https://"]),
        (["null"], ["null"]),
        ([], ["https://pdm.example.org"]),
    ],
)
def test_an_origin_is_foreign(hosts: list[str], origins: list[str]) -> None:
    evidence = foreign_origin(Headers({"Host": hosts, "Origin": origins}))
    assert evidence == f"Origin: {', '.join(origins)}"
    if origins != ["null"]:
        assert foreign_origin(Headers({"Host": hosts, "Origin": origins, "Sec-Fetch-Site": ["same-origin"]}))


@pytest.mark.parametrize(
    "sites",
    [
        ["cross-site"],
        ["same-site"],
        ["none"],
        [""],
        ["Same-Origin"],
        ["same-origin"] * 2,
        ["same-origin", "cross-site"],
    ],
)
def test_what_is_not_same_origin_is_foreign(sites: list[str]) -> None:
    headers = Headers({"Host": ["h"], "Origin": ["https://h"], "Sec-Fetch-Site": sites})
    assert foreign_origin(headers) == f"Sec-Fetch-Site: {', '.join(sites)}"


def test_what_is_shown_of_a_header_is_bounded() -> None:
    assert len(foreign_origin(Headers({"Host": ["h"], "Origin": ["x" * 10_000]})) or "") < 300

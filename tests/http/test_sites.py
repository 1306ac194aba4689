"""Sites that users make: who sees, uses, changes and removes them; drains, bans, and the log of all that."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import pytest_twisted
from attrs import evolve

from pdm.workqueue.certificates.pem import to_pem
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.limits import Route
from pdm.workqueue.domain.sites import LAST_FILE_SITE, Actor
from pdm.workqueue.execution.endpoint_checks import EndpointCheck, SiteCheckRunningError
from pdm.workqueue.execution.streams import RouteState
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.store import sites as stored_sites
from pdm.workqueue.wire.sites import SiteBody, SiteChanges
from tests.http.service import Service

ensure = pytest_twisted.ensureDeferred
GOOD: dict[str, Any] = {"name": "LAB", "endpoints": {"DUMMY": "dummy://lab"}}


async def made(service: Service, user: str, name: str, **more: Any) -> dict[str, Any]:
    answer = await service.call(user, "POST", "/sites", GOOD | {"name": name} | more)
    assert answer.status == 201, answer.body
    found: dict[str, Any] = answer.json
    return found


@ensure
async def test_a_site_is_made_changed_and_removed(service: Service) -> None:
    authority = service.certificates.authority
    pem = "a comment\n" + to_pem(authority.certificate).decode()
    body = {
        "name": "Mine",
        "endpoints": {"gridftp": ["gsiftp://a:2811/", "gsiftp://b:2811"], "2": "dummy://x"},
        "description": "of my own",
        "default_folder": "/data",
        "public": True,
        "limit_in": 3,
        "authorities": pem,
    }
    site = (await service.call("maker", "POST", "/sites", body)).json
    assert site["id"] > LAST_FILE_SITE
    assert site["endpoints"] == {"GRIDFTP": "gsiftp://a:2811", "DUMMY": "dummy://x"}
    assert site["alternatives"] == {"GRIDFTP": ["gsiftp://b:2811"]}
    assert (site["limit_in"], site["limit_out"], site["public"], site["state"]) == (3, None, True, "ok")
    assert site["authorities"] == [authority.dn]
    assert site["owner"] == await service.user_id("maker")
    path = f"/sites/{site['id']}"
    assert (await service.call("maker", "GET", path)).json == site
    # The same again is the same; another one of the name is refused, in any case of its letters.
    assert (await service.call("maker", "POST", "/sites", body)).json == site
    again = await service.call("maker", "POST", "/sites", body | {"name": "MINE", "limit_in": 4})
    assert (again.status, again.problem) == (409, "conflict $.name")
    changes = {"limit_in": None, "description": "", "endpoints": {"DUMMY": "dummy://y"}, "name": "Ours"}
    changed = (await service.call("maker", "PATCH", path, changes)).json
    assert (changed["name"], changed["limit_in"], changed["description"]) == ("Ours", None, "")
    assert (changed["protocols"], changed["alternatives"], changed["default_folder"]) == (["DUMMY"], {}, "/data")
    assert (await service.call("maker", "PATCH", path, {})).json == changed
    assert (await service.call("maker", "DELETE", path)).status == 204
    assert (await service.call("maker", "GET", path)).problem == "not-found"
    assert (await service.call("maker", "DELETE", path)).problem == "not-found"
    # A number is never used again.
    assert (await made(service, "maker", "Mine"))["id"] > site["id"]


@ensure
async def test_changes_by_two_daemons_are_both_made(service: Service) -> None:
    """The other daemon has changed something that this one has not seen yet."""
    site = await made(service, "changer", "Shared")
    path = f"/sites/{site['id']}"
    by = Actor(await service.user_id("changer"), service.certificates.of("changer").dn)
    await service.database.run(
        "change", stored_sites.change, site["id"], lambda seen: evolve(seen, limit_in=7), by, service.now()
    )
    changed = (await service.call("changer", "PATCH", path, {"limit_out": 5})).json
    assert (changed["limit_in"], changed["limit_out"]) == (7, 5)
    refused = await service.call("changer", "PATCH", path, {"myproxy": "no port"})
    assert refused.problem == "invalid-input $.myproxy"
    changed = (await service.call("changer", "PATCH", path, {"myproxy": "myproxy.example.org:7512"})).json
    assert changed["myproxy"] == "myproxy.example.org:7512"
    assert (await service.call("changer", "PATCH", path, {"myproxy": None})).json["myproxy"] is None
    changed = (await service.call("changer", "PATCH", path, {"fts": "https://fts3.example.org:8446/"})).json
    assert changed["fts"] == "https://fts3.example.org:8446"
    assert (await service.call("changer", "PATCH", path, {"fts": None})).json["fts"] is None
    refused = await service.call("changer", "PATCH", path, {"name": "north"})
    assert (refused.status, refused.problem) == (409, "conflict $.name")


@ensure
async def test_a_private_site_is_its_owners(service: Service) -> None:
    site = await made(service, "owner", "Private")
    number, path = site["id"], f"/sites/{site['id']}"
    for method, route, body in (
        ("GET", path, None),
        ("PATCH", path, {}),
        ("DELETE", path, None),
        ("POST", f"{path}/check", None),
    ):
        foreign = await service.call("stranger", method, route, body)
        nothing = await service.call("stranger", method, route.replace(str(number), "1999999"), body)
        assert (foreign.status, foreign.problem) == (404, "not-found"), route
        assert foreign.json["detail"] == nothing.json["detail"].replace("1999999", str(number))
    assert number not in [each["id"] for each in (await service.call("stranger", "GET", "/sites")).json]
    assert number in [each["id"] for each in (await service.call("owner", "GET", "/sites")).json]
    job = {"src_siteid": number, "src_filepath": "f", "protocol": "DUMMY"}
    assert (await service.call("owner", "POST", "/list", job)).status == 200
    refused = await service.call("stranger", "POST", "/list", job)
    assert (refused.status, refused.problem) == (400, "invalid-input $.src_siteid")
    refused = await service.call("stranger", "GET", "/jobs?site=Private")
    assert refused.problem == "invalid-input ?site"
    assert len((await service.call("owner", "GET", "/jobs?site=Private")).json) == 1
    # Two users may each have a private site of one name; an operator sees both, and uses neither.
    other = await made(service, "stranger", "Private")
    seen = [each["id"] for each in (await service.call("operator", "GET", "/sites")).json]
    assert {number, other["id"]} <= set(seen)
    assert (await service.call("operator", "POST", "/list", job)).status == 400
    assert (await service.call("operator", "POST", f"{path}/check")).status == 403


@ensure
async def test_a_private_site_is_invisible_to_other_users(service: Service) -> None:
    number = (await made(service, "hider", "Hidden"))["id"]
    token = {"kind": "token", "secret": "opaque", "site": number}
    refused = await service.call("stranger", "POST", "/credentials", token)
    assert (refused.status, refused.problem) == (400, "invalid-input $.site")
    for method in ("GET", "DELETE"):
        assert (await service.call("stranger", method, f"/sites/{number}/session")).problem == "not-found"
    timestamp = service.now()
    for route in (Route(1, 2), Route(1, number), Route(number, None)):
        service.routes.append(
            RouteState(
                route=route,
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
    counts = [len((await service.call(user, "GET", "/routes")).json) for user in ("stranger", "hider", "operator")]
    service.routes.clear()
    assert counts == [1, 3, 3]


@ensure
async def test_credentials_for_a_site_go_with_it(service: Service) -> None:
    number = (await made(service, "leaver", "Left"))["id"]
    token = {"kind": "token", "secret": "opaque", "site": number}
    assert (await service.call("leaver", "POST", "/credentials", token)).status == 201
    assert (await service.call("leaver", "DELETE", f"/sites/{number}")).status == 204
    assert (await service.call("leaver", "GET", "/credentials")).json == []


@ensure
async def test_a_public_site_is_used_by_all_and_changed_by_its_owner(service: Service) -> None:
    site = await made(service, "publisher", "Open", public=True)
    path = f"/sites/{site['id']}"
    assert (await service.call("reader", "GET", path)).json["name"] == "Open"
    await service.submit("reader", src_siteid=site["id"])
    for method, body in (("PATCH", {"name": "Taken"}), ("DELETE", None)):
        answer = await service.call("reader", method, path, body)
        assert (answer.status, answer.problem) == (403, "forbidden")
    for user in ("reader", "publisher"):
        answer = await service.call(user, "POST", "/sites", GOOD | {"name": "Open"})
        assert (answer.status, answer.problem) == (409, "conflict $.name")
    assert (await service.call("operator", "PATCH", path, {"description": "seen"})).json["owner"] == site["owner"]


@ensure
async def test_sites_of_files_stay_as_they_are(service: Service) -> None:
    for user in ("anybody", "operator"):
        for method, body in (("PATCH", {"name": "X"}), ("DELETE", None)):
            answer = await service.call(user, method, "/sites/1", body)
            assert (answer.status, answer.problem) == (409, "conflict")
    assert (await service.call("anybody", "POST", "/sites", GOOD | {"name": "north"})).problem == "conflict $.name"


@ensure
async def test_a_site_with_unfinished_jobs_is_not_removed(service: Service) -> None:
    site = await made(service, "busy", "Busy")
    job = await service.submit("busy", "/copy", dst_siteid=site["id"])
    path = f"/sites/{site['id']}"
    answer = await service.call("busy", "DELETE", path)
    assert (answer.status, answer.problem) == (409, "conflict")
    assert "1 jobs" in answer.json["detail"]
    for token in await service.claim(job["id"]):
        await service.settle(token, JobStatus.FAILED)
    assert (await service.call("busy", "DELETE", path)).status == 204
    # The job keeps its number.
    assert (await service.call("busy", "GET", f"/jobs/{job['id']}")).json["dst_siteid"] == site["id"]


@ensure
async def test_a_site_that_is_removed_while_a_job_is_registered(service: Service) -> None:
    site = await made(service, "racing", "Racing")
    number = site["id"]
    # As another daemon would: this one does not know yet.
    by = Actor(await service.user_id("racing"), "/CN=racing")
    await service.database.run("remove", stored_sites.remove, number, by, service.now())
    service.context.site_directory._version = 10**9
    try:
        body = {"src_siteid": number, "src_filepath": "f", "protocol": "DUMMY"}
        answer = await service.call("racing", "POST", "/list", body)
        assert (answer.status, answer.problem) == (400, "invalid-input $")
    finally:
        service.context.site_directory._version = None
        await service.context.site_directory.refresh()
    assert (await service.call("racing", "GET", "/jobs")).json == []
    assert (await service.call("racing", "GET", f"/sites/{number}")).status == 404


@ensure
async def test_directories_of_the_machine_are_for_operators(service: Service) -> None:
    body = GOOD | {"name": "Disk", "endpoints": {"FILE": "file:///"}}
    answer = await service.call("curious", "POST", "/sites", body)
    assert (answer.status, answer.problem) == (403, "forbidden $.endpoints.FILE")
    site = await made(service, "curious", "Disk")
    answer = await service.call("curious", "PATCH", f"/sites/{site['id']}", {"endpoints": {"3": "file:///etc"}})
    assert (answer.status, answer.problem) == (403, "forbidden $.endpoints.3")
    assert (await service.call("operator", "POST", "/sites", body)).status == 201


@ensure
async def test_the_number_of_sites_is_limited(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_sites, "MOST_OF_OWNER", 2)
    await made(service, "greedy", "One")
    await made(service, "greedy", "Two")
    answer = await service.call("greedy", "POST", "/sites", GOOD | {"name": "Three"})
    assert (answer.status, answer.problem) == (409, "conflict")


@ensure
async def test_a_check_is_logged(service: Service) -> None:
    """What it does is tested on the real grid."""
    site = await made(service, "checker", "Checked")
    (check,) = (await service.call("checker", "POST", f"/sites/{site['id']}/check")).json
    assert (check["ok"], check["reachable"], check["login"], check["listing"]) == (False, False, None, None)
    assert (check["url"], check["seconds"], check["error"]["code"]) == ("dummy://lab", 0.5, "CONNECTION")
    assert check["error"]["hint"]


@ensure
async def test_one_check_at_a_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(user_id: int, site: Site) -> list[EndpointCheck]:
        raise SiteCheckRunningError

    monkeypatch.setattr(service.context, "check_site", busy)
    answer = await service.call("checker", "POST", "/sites/1/check")
    assert (answer.status, answer.problem) == (409, "conflict")


# -- operators


@ensure
async def test_a_drained_site_shows_the_reason(service: Service) -> None:
    site = await made(service, "drained", "Drained", public=True)
    path = f"/sites/{site['id']}"
    job = await service.submit("drained", src_siteid=site["id"])
    answer = await service.call("operator", "POST", f"{path}/drain", {"message": "new disks"})
    assert (answer.json["state"], answer.json["reason"]) == ("drained", "new disks")
    assert (await service.call("drained", "GET", path)).json["reason"] == "new disks"
    waiting = (await service.call("drained", "GET", f"/jobs/{job['id']}/status")).json["waiting"]
    assert waiting == [f"site Drained ({site['id']}) is drained: new disks"]
    later = await service.submit("drained", src_siteid=site["id"])
    assert later["waiting"] == waiting
    assert (await service.call("operator", "POST", f"{path}/drain", {"message": "still"})).json["reason"] == "still"
    for _ in range(2):
        assert (await service.call("operator", "POST", f"{path}/resume")).json["state"] == "ok"
    assert "waiting" not in (await service.call("drained", "GET", f"/jobs/{job['id']}")).json
    assert (await service.call("operator", "POST", "/sites/99/drain", {"message": "x"})).status == 404
    # Sites of the files too.
    assert (await service.call("operator", "POST", "/sites/2/drain", {"message": "x"})).json["state"] == "drained"
    assert (await service.call("operator", "POST", "/sites/2/resume")).json["state"] == "ok"


@ensure
async def test_a_banned_user_may_look_and_cancel_and_no_more(service: Service) -> None:
    job = await service.submit("banned")
    number = job["user_id"]
    answer = await service.call("operator", "POST", f"/users/{number}/ban", {"message": "call us"})
    assert answer.json["banned"] == "call us"
    for method, path, body in (
        ("POST", "/list", {"src_siteid": 1, "src_filepath": "f", "protocol": "DUMMY"}),
        ("POST", "/sites", GOOD),
        ("PATCH", "/sites/1", {}),
        ("POST", f"/jobs/{job['id']}/retry", None),
        ("PUT", "/delegation/0123456789abcdef/credential", {}),
    ):
        refused = await service.call("banned", method, path, body)
        assert (refused.status, refused.problem) == (403, "forbidden")
        assert "call us" in refused.json["detail"]
    seen = (await service.call("banned", "GET", f"/jobs/{job['id']}")).json
    assert seen["waiting"] == ["its user is banned: call us"]
    assert (await service.call("banned", "DELETE", f"/jobs/{job['id']}")).status == 200
    assert (await service.call("operator", "POST", f"/users/{number}/unban")).json["banned"] is None
    await service.submit("banned")
    users = (await service.call("operator", "GET", "/users?limit=1000")).json
    assert [each["id"] for each in users] == sorted(each["id"] for each in users)
    (me,) = [each for each in users if each["role"] == "operator"]
    answer = await service.call("operator", "POST", f"/users/{me['id']}/ban", {"message": "x"})
    assert (answer.status, answer.problem) == (409, "conflict")
    assert (await service.call("operator", "POST", "/users/9999/ban", {"message": "x"})).status == 404
    assert (await service.call("operator", "POST", "/users/9999/unban")).status == 404


@ensure
async def test_operator_routes_are_closed_to_users(service: Service) -> None:
    site = await made(service, "simple", "Simple")
    for method, path, body in (
        ("POST", f"/sites/{site['id']}/drain", {"message": "x"}),
        ("POST", f"/sites/{site['id']}/resume", None),
        ("POST", "/sites/999/drain", {"message": "x"}),
        ("POST", "/users/1/ban", {"message": "x"}),
        ("POST", "/users/1/unban", None),
        ("POST", "/users/999/unban", None),
        ("GET", "/users", None),
        ("GET", "/audit", None),
    ):
        answer = await service.call("simple", method, path, body)
        assert (answer.status, answer.problem) == (403, "forbidden"), path


@ensure
async def test_all_of_it_is_in_the_audit_log(own_service: Service) -> None:
    site = await made(own_service, "audited", "Seen")
    path = f"/sites/{site['id']}"
    user = site["owner"]
    await own_service.call("audited", "PATCH", path, {"public": True})
    await own_service.call("operator", "POST", f"{path}/drain", {"message": "disks"})
    await own_service.call("operator", "POST", f"{path}/resume")
    await own_service.call("operator", "POST", f"/users/{user}/ban", {"message": "abuse"})
    await own_service.call("operator", "POST", f"/users/{user}/unban")
    # What is refused, or changes nothing, is no act.
    await own_service.call("operator", "POST", f"/users/{user}/unban")
    await own_service.call("stranger", "DELETE", path)
    await own_service.call("audited", "DELETE", path)
    acts = (await own_service.call("operator", "GET", "/audit")).json
    names = {name: own_service.certificates.of(name).dn for name in ("audited", "operator")}
    assert [(act["subject"], act["action"], act["target"]) for act in acts] == [
        (names["audited"], "site.create", f"site {site['id']}"),
        (names["audited"], "site.change", f"site {site['id']}"),
        (names["operator"], "site.drain", f"site {site['id']}"),
        (names["operator"], "site.resume", f"site {site['id']}"),
        (names["operator"], "user.ban", f"user {user}"),
        (names["operator"], "user.unban", f"user {user}"),
        (names["audited"], "site.remove", f"site {site['id']}"),
    ]
    assert [act["details"] for act in acts][2:5:2] == ["disks", "abuse"]
    page = (await own_service.call("operator", "GET", f"/audit?limit=2&after={acts[1]['id']}")).json
    assert page == acts[2:4]


# -- bad input

_HUGE = 10**40


def _wrong(key: str) -> list[tuple[str, Any]]:
    """Values of a key that are refused, and the place that the refusal names below it."""
    named: list[tuple[str, Any]]
    every: list[Any] = [1.5, [1], {"x": 1}] if key != "endpoints" else [1.5, [1], {}, None, "gsiftp://h"]
    if key == "name":
        texts = ["", "1st", "a:b", "a b", "a\0", "a\nb", "x" * 65, "-a", 7, None, True]
        return [("", value) for value in (*every, *texts)]
    if key in ("limit_in", "limit_out"):
        return [("", value) for value in (*every, 0, -1, 1_000_001, _HUGE, "3", True)]
    if key == "public":
        return [("", value) for value in (*every, 1, "yes", _HUGE)]
    if key == "description":
        return [("", value) for value in (*every, 7, "a\nb", "\0", "x" * 501, "\x1b[2J")]
    if key == "default_folder":
        return [("", value) for value in (*every, 7, "", "data", "/a/../b", "/a\0", "/a\nb", "/" + "x" * 5000)]
    if key == "authorities":
        bad = "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"
        return [("", value) for value in (*every, 7, "x", "\0", bad, "x" * 65537)]
    if key == "oidc":
        parts: dict[str, list[Any]] = {
            "issuer": [7, "", "http://i", "https://u@i", "https://i?x", "https://i#", "i", "https://i\n", "x" * 501],
            "client_id": [7, "", "a b", "é", "x" * 301],
            "client_secret": [7, "", "a\0", "x" * 301],
            "scope": [7, "", 'a"b', "a  b", " a", "x" * 1001],
            "audience": ["a", [1], [""], ["a b"], ["a"] * 11],
            "base_path": [7, "", "a", "/a/../b", "/a\0"],
            "exchange": [7, "yes", None],
        }
        whole: dict[str, Any] = {"issuer": "https://i", "client_id": "c"}
        alone = [(".issuer", {"client_id": "c"}), (".client_id", {"issuer": "https://i", "client_secret": "s"})]
        named = [(f".{part}", whole | {part: value}) for part, values in parts.items() for value in values]
        return [("", 1.5), ("", [1]), ("", "https://i"), (".x", {"x": 1}), *alone, *named]
    if key == "fts":
        urls = [
            "",
            "https://h",
            "http://h:1",
            "https://h:0",
            "https://h:99999",
            "https://u@h:1",
            "https://h:1/x",
            "h:1",
        ]
        return [("", value) for value in (*every, 7, True, *urls, "https://h\0:1", "https://" + "x" * 300 + ":1")]
    if key == "mover":
        return [("", value) for value in (*every, 7, True, "", "Tools", "fts")]
    if key == "tape":
        urls_refused = [
            "",
            "h",
            "http://h",
            "https://",
            "https://u@h",
            "https://h:0",
            "https://h/?x",
            "https://h/\n",
            "x" * 501,
        ]
        return [("", value) for value in (*every, 7, True, *urls_refused)]
    if key == "myproxy":
        return [("", value) for value in (*every, 7, True, "", "h", "h:", "h:0", "h:65536", "-h:1", "h h:1", "a\n:1")]
    urls = [
        *(
            "http://h:1",
            "gsiftp://",
            "gsiftp://u@h:1",
            "gsiftp://h:1/p",
            "gsiftp://h:0",
            "gsiftp://h:99999",
            "gsiftp://-h",
        ),
        *("gsiftp://h:1?x", "gsiftp://h\0", "gsiftp://h h", "gsiftp://hé", "gsiftp://h\r\nX: y", "-x"),
    ]
    named = [(".GRIDFTP", {"GRIDFTP": url}) for url in urls]
    named += [(".GRIDFTP", {"GRIDFTP": ["gsiftp://h:1", url]}) for url in urls]
    named += [(".GRIDFTP", {"GRIDFTP": ["gsiftp://h:1", "gsiftp://h:1/"]}), (".FTP", {"FTP": "ftp://h"})]
    named += [(".0", {"GRIDFTP": "gsiftp://h:1", "0": "gsiftp://i:1"}), (".9", {"9": "x://y"})]
    no_urls: list[Any] = [1, None, [], {}, "", "x" * 2001, [1], ["a"] * 21]
    typed = [{"GRIDFTP": value} for value in no_urls]
    return [*[("", value) for value in every], *named, *[("[...]", value) for value in typed]]


@pytest.mark.parametrize("struct", [SiteBody, SiteChanges])
@ensure
async def test_bad_sites(service: Service, struct: type[msgspec.Struct]) -> None:
    method, path = "POST", "/sites"
    if struct is SiteChanges:
        method, path = "PATCH", f"/sites/{(await made(service, 'bad', 'Changed'))['id']}"
    before = (await service.call("bad", "GET", "/sites")).json
    wrong = []
    for field in msgspec.structs.fields(struct):
        key = field.encode_name
        for place, value in _wrong(key):
            answer = await service.call("bad", method, path, GOOD | {key: value})
            places = {
                f"invalid-input $.{key}{place}",
                f"invalid-input $.{key}[...]",
                f"invalid-input $.{key}[...][...]",
            }
            if answer.status != 400 or not any(answer.problem.startswith(each) for each in places):
                wrong.append(f"{key}={value!r:.80}: {answer.status} {answer.body[:300]!r}")
        if key in GOOD and struct is SiteBody:
            without = {name: value for name, value in GOOD.items() if name != key}
            assert (await service.call("bad", method, path, without)).problem == f"invalid-input $.{key}"
    assert not wrong, "\n".join(wrong)
    for raw, place in (
        (b"", "$"),
        (b"[]", "$"),
        (b"null", "$"),
        (b'{"name": "\xff"}', "$"),
        (b'{"name": "\\ud800"}', "$"),
        (json.dumps(GOOD | {"colour": 1}).encode(), "$.colour"),
        (b'{"endpoints":' + b'{"x":' * 50_000 + b"1" + b"}" * 50_001, "$"),
    ):
        answer = await service.call("bad", method, path, raw=raw)
        assert answer.status == 400, raw[:50]
        assert answer.problem.startswith(f"invalid-input {place}"), raw[:50]
    assert (await service.call("bad", "GET", "/sites")).json == before


@ensure
async def test_bad_messages_and_pages(service: Service) -> None:
    values: list[Any] = [1, None, "", " ", "a\nb", "\0", "x" * 501, [], {}, True]
    for path in ("/sites/1/drain", "/users/1/ban"):
        for value in values:
            answer = await service.call("operator", "POST", path, {"message": value})
            assert (answer.status, answer.problem) == (400, "invalid-input $.message"), value
        assert (await service.call("operator", "POST", path, {})).problem == "invalid-input $.message"
        answer = await service.call("operator", "POST", path, {"message": "x", "colour": 1})
        assert answer.problem == "invalid-input $.colour"
    for path in ("/users", "/audit"):
        for query in ("limit=0", "limit=1001", "limit=x", "after=-1", "after=" + "9" * 40, "colour=1"):
            answer = await service.call("operator", "GET", f"{path}?{query}")
            assert (answer.status, answer.problem) == (400, f"invalid-input ?{query.partition('=')[0]}")
    for number in ("0", "9223372036854775807"):
        assert (await service.call("operator", "POST", f"/users/{number}/ban", {"message": "x"})).status == 404
        assert (await service.call("operator", "DELETE", f"/sites/{number}")).status == 404

"""The views of sites, credentials and operators, and the acts on them."""

from __future__ import annotations

import re

import pytest
import pytest_twisted

from pdm.workqueue.domain.enums import JobStatus
from tests.http.service import Service

_OPERATORS = ("", "/queue", "/routes", "/users", "/audit")


async def _page(service: Service, user: str, path: str, status: int = 200) -> str:
    answer = await service.browse(user, path)
    assert answer.status == status, answer.body
    return answer.body.decode()


@pytest_twisted.ensureDeferred
async def test_a_site_is_added_changed_checked_and_removed(service: Service) -> None:
    form = {
        "name": "lab",
        "endpoints": "GRIDFTP gsiftp://one.example.org:2811\nGRIDFTP gsiftp://two.example.org:2811\n",
        "description": "<b>about</b>",
        "limit_in": "3",
    }
    added = await service.act("founder", "/web/sites/add", form)
    assert added.status == 303
    where = added.header("Location")
    shown = await _page(service, "founder", where)
    assert "&lt;b&gt;about&lt;/b&gt;" in shown
    assert "two.example.org" in shown
    listed = await _page(service, "founder", "/web/sites")
    assert f'href="{where}"' in listed
    assert "0 of 3" in listed
    assert "missing for GRIDFTP" in listed
    assert "<code>pdm delegate</code>" in listed
    filled = await _page(service, "founder", f"{where}/change")
    assert "GRIDFTP gsiftp://two.example.org:2811" in filled
    changed = await service.act("founder", f"{where}/change", form | {"description": "other", "limit_in": ""})
    assert changed.status == 303
    site = (await service.call("founder", "GET", where.replace("/web", ""))).json
    assert (site["description"], site["limit_in"]) == ("other", None)
    checked = await service.act("founder", f"{where}/check")
    assert checked.status == 200
    assert "Result of the check" in checked.body.decode()
    assert (await service.browse("stranger", where)).status == 404
    assert (await service.act("stranger", f"{where}/remove")).status == 404
    assert (await service.act("founder", f"{where}/remove")).status == 303
    assert (await service.browse("founder", where)).status == 404


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"endpoints": "GRIDFTP"}, "a protocol and a URL"),
        ({"endpoints": "NOTHING http://h"}, "NOTHING"),
        ({"endpoints": "FILE file:///etc"}, "only operators"),
        ({"name": "<img>"}, "letter"),
        ({"name": ""}, "name"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_wrong_site_is_shown_again_with_what_is_wrong(
    service: Service, changes: dict[str, str], words: str
) -> None:
    form = {"name": "wrong", "endpoints": "GRIDFTP gsiftp://one.example.org:2811", "description": "kept"} | changes
    answer = await service.act("founder", "/web/sites/add", form)
    assert answer.status in (400, 403)
    page = answer.body.decode()
    assert words in page
    assert 'value="kept"' in page
    assert "<img>" not in page


@pytest_twisted.ensureDeferred
async def test_credentials_are_shown_with_the_command_that_renews_them(service: Service) -> None:
    empty = await _page(service, "bare", "/web/credentials")
    assert "holds no credential" in empty
    assert "<code>pdm delegate</code>" in empty
    body = {"kind": "token", "secret": "abcdef.ghi", "site": 1}
    stored = await service.call("bare", "POST", "/credentials", body)
    assert stored.status == 201, stored.body
    shown = await _page(service, "bare", "/web/credentials")
    assert "pdm token" in shown
    assert "abcdef" not in shown
    number = stored.json["id"]
    assert (await service.act("stranger", f"/web/credentials/{number}/remove")).status == 404
    assert (await service.act("bare", f"/web/credentials/{number}/remove")).status == 303
    assert "holds no credential" in await _page(service, "bare", "/web/credentials")


@pytest_twisted.ensureDeferred
async def test_views_of_operators_are_closed_to_all_others(service: Service) -> None:
    user = await service.user_id("curious")
    for part in _OPERATORS:
        assert 'role="alert"' in await _page(service, "curious", f"/web/operators{part}", 403)
    for act, form in (("ban", {"message": "x"}), ("unban", {})):
        answer = await service.act("curious", f"/web/operators/users/{user}/{act}", form)
        assert answer.status == 403
    for act, form in (("drain", {"message": "x"}), ("resume", {})):
        answer = await service.act("curious", f"/web/sites/1/{act}", form)
        assert answer.status == 403
    assert "Operators" not in re.findall(r">([A-Z]\w+)</a>", await _page(service, "curious", "/"))
    assert "Operators" in re.findall(r">([A-Z]\w+)</a>", await _page(service, "operator", "/"))


@pytest_twisted.ensureDeferred
async def test_operators_see_routes_failures_queue_and_daemons(service: Service) -> None:
    await service.copied("mover", "a", "b", status=JobStatus.FAILED)
    waiting = (await service.submit("patient"))["id"]
    service.context.activity.clear()
    overview = await _page(service, "operator", "/web/operators")
    assert 'class="chart waterfall"' in overview
    assert "Table of failures" in overview
    assert "Table of nodes" in overview
    queue = await _page(service, "operator", "/web/operators/queue")
    assert service.certificates.of("patient").dn in queue
    assert waiting > 0
    for part in _OPERATORS:
        assert " style=" not in await _page(service, "operator", f"/web/operators{part}")


@pytest_twisted.ensureDeferred
async def test_a_user_is_banned_and_a_site_drained(service: Service) -> None:
    user = await service.user_id("noisy")
    assert (await service.act("operator", f"/web/operators/users/{user}/ban", {"message": "<i>stop</i>"})).status == 303
    assert (await service.act("operator", f"/web/operators/users/{user}/ban", {})).status == 400
    assert "&lt;i&gt;stop&lt;/i&gt;" in await _page(service, "operator", "/web/operators/users")
    refused = await service.act("noisy", "/web/sites/add", {"name": "x", "endpoints": "DUMMY dummy://x"})
    assert refused.status == 403
    assert (await service.act("operator", f"/web/operators/users/{user}/unban")).status == 303
    assert (await service.act("operator", "/web/sites/1/drain", {"message": "repairs"})).status == 303
    assert "repairs" in await _page(service, "noisy", "/web/sites")
    assert (await service.act("operator", "/web/sites/1/resume")).status == 303
    assert "repairs" not in await _page(service, "noisy", "/web/sites")
    audit = await _page(service, "operator", "/web/operators/audit")
    assert audit.index("site.resume") < audit.index("site.drain") < audit.index("user.ban")
    assert "older" not in await _page(service, "operator", "/web/operators/audit?before=2")

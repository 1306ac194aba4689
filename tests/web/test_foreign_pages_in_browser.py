"""Chromium with a user's certificate on a page of another site: it can change nothing, and read nothing."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from playwright.sync_api import Page

from pdm.workqueue.http.endpoints import ENDPOINTS
from pdm.workqueue.web import PAGES
from tests.http.service import ROOT
from tests.http.test_surface import path_of
from tests.web.browser import Chromium, Site

pytestmark = pytest.mark.full

_FOREIGN = "https://evil.example/"
#: Method and path of all routes that change something.
_ACTS = [
    *((endpoint.method, ROOT + path_of(endpoint)) for endpoint in ENDPOINTS if endpoint.method != "GET"),
    *((page.method, re.sub("<.*?>", "1", page.path)) for page in PAGES if page.method != "GET"),
]
_POSTS = [path for method, path in _ACTS if method == "POST"]

#: A form of each kind that a page may send to a path, into a frame that is removed when it has loaded.
_SEND_FORM = """
([url, type]) => new Promise(resolve => {
  const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), {name: "sent"}));
  const form = document.createElement("form");
  Object.assign(form, {action: url, method: "post", enctype: type, target: "sent"});
  form.append(Object.assign(document.createElement("input"), {name: "path", value: "/made"}));
  document.body.append(form);
  frame.onload = () => { frame.remove(); form.remove(); resolve(); };
  form.submit();
})
"""
_FETCH = """
([url, method, mode]) => fetch(url, {method, mode, credentials: "include", body: "{}"})
  .then(answer => answer.type + answer.status, () => "refused")
"""
_READ = """
([url, mode]) => fetch(url, {mode, credentials: "include"}).then(async answer => await answer.text(), () => "refused")
"""


@pytest.fixture
def foreign(chromium: Chromium) -> Page:
    """A page of another site, in a browser that has alice's certificate."""
    page = chromium.open("/")
    page.route(_FOREIGN, lambda route: route.fulfill(content_type="text/html", body="<title>Evil</title><body>"))
    page.goto(_FOREIGN)
    return page


def _state(site: Site) -> list[Any]:
    paths = ("/jobs?limit=1&order=newest", "/sites", "/credentials", "/schedules", "/webhooks")
    return [site.service.call("alice", "GET", path) for path in paths]


def test_forms_are_refused_on_each_route(site: Site, foreign: Page) -> None:
    before = _state(site)
    for path in _POSTS:
        for kind in ("application/x-www-form-urlencoded", "text/plain"):
            with foreign.expect_response(site.url + path) as caught:
                foreign.evaluate(_SEND_FORM, [site.url + path, kind])
            assert caught.value.status == 403, path
    assert _state(site) == before


def _refusals(site: Site) -> Counter[str]:
    """Paths of the POST requests that the daemon has refused, from its log; a browser hides their responses."""
    return Counter(re.findall(r" POST (\S+) 403 ", site.service.log_path.read_text()))


def test_requests_of_scripts_are_refused_on_each_route(site: Site, foreign: Page) -> None:
    before, refused = _state(site), _refusals(site)
    for method, path in _ACTS:
        for mode in ("cors", "no-cors"):
            # Methods other than POST are not sent at all: the browser asks first, or does not know them without CORS.
            assert foreign.evaluate(_FETCH, [site.url + path, method, mode]) == "refused", path
    assert _refusals(site) - refused == Counter(_POSTS + _POSTS)
    assert _state(site) == before


def test_nothing_is_read(site: Site, foreign: Page) -> None:
    paths = [ROOT + path_of(endpoint) for endpoint in ENDPOINTS if endpoint.method == "GET"]
    for path in (*paths, "/", "/web/files"):
        assert foreign.evaluate(_READ, [site.url + path, "cors"]) == "refused", path
        assert foreign.evaluate(_READ, [site.url + path, "no-cors"]) in ("", "refused"), path

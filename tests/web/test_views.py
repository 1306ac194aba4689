"""Each view in a browser: accessibility at two widths, light and dark, names of files as text, and its picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import frozen

from tests.web.browser import WIDTHS, Chromium, Site, violations

pytestmark = pytest.mark.full

_IMAGES = Path(__file__).parents[2] / "docs" / "images"


@frozen
class View:
    """A view: its name, its address by the jobs of the site, the user that sees it, and whether docs/ has a picture."""

    name: str
    path: Callable[[Site], str]
    user: str | None = "alice"
    has_picture: bool = False


def _of(job: str, rest: str = "") -> Callable[[Site], str]:
    return lambda site: f"/web/jobs/{site.jobs[job]}{rest}"


def _files(site: Site) -> str:
    listing = site.jobs["list"]
    return f"/web/files?site=1:FILE&path=/data&job={listing}&to_site=1:FILE&to_path=/data&to_job={listing}"


VIEWS = (
    View("jobs", lambda site: "/", has_picture=True),
    View("job", _of("running"), has_picture=True),
    View("job-held", _of("held"), has_picture=True),
    View("job-failed", _of("failed"), has_picture=True),
    View("job-names", _of("hostile")),
    View("elements", _of("hostile", "/elements"), has_picture=True),
    View("errors", _of("failed", "/errors")),
    View("log", _of("failed", "/elements/1/log"), has_picture=True),
    View("receipt", _of("hostile", "/receipt"), has_picture=True),
    View("missing", _of("bob")),
    View("no-certificate", lambda site: "/", None, has_picture=True),
    View("files", _files, has_picture=True),
    View("sites", lambda site: "/web/sites", has_picture=True),
    View("site", lambda site: "/web/sites/1", "admin"),
    View("site-add", lambda site: "/web/sites/add"),
    View("credentials", lambda site: "/web/credentials", has_picture=True),
    View("operators", lambda site: "/web/operators", "admin", has_picture=True),
    View("queue", lambda site: "/web/operators/queue", "admin"),
    View("routes", lambda site: "/web/operators/routes", "admin"),
    View("users", lambda site: "/web/operators/users", "admin"),
    View("audit", lambda site: "/web/operators/audit", "admin"),
)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_a_view_is_accessible(view: View, site: Site, chromium: Chromium) -> None:
    page = chromium.open(view.path(site), view.user, width=max(WIDTHS))
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    if view.has_picture:
        page.screenshot(path=_IMAGES / f"{view.name}.png")
    for summary in page.locator("main details > summary").all():
        summary.click()
    if view.name == "credentials":
        assert page.get_by_role("region", name="Table of logins").get_by_role("row").count() == 3
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        # Nothing is wider than the window: only tables scroll.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert violations(page) == [], width


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_a_view_is_readable_without_scripts(view: View, site: Site, chromium: Chromium) -> None:
    page = chromium.open(view.path(site), view.user, javascript=False)
    assert page.locator("h1").inner_text()
    assert page.locator("main img").count() == 0

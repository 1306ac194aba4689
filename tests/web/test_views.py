"""Each view in a browser: accessibility at two widths, light and dark, names of files as text, and its picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from attrs import frozen

from tests.web.browser import SCHEMES, WIDTHS, Chromium, Site, violations

pytestmark = pytest.mark.full

_IMAGES = Path(__file__).parents[2] / "docs" / "images"


@frozen
class View:
    """A view: the name of its picture, its address by the jobs of the site, and the user that sees it."""

    name: str
    path: Callable[[Site], str]
    user: str | None = "alice"


VIEWS = (
    View("jobs", lambda site: "/"),
    View("no-certificate", lambda site: "/", user=None),
    View("files", lambda site: f"/web/files?site=1:FILE&path=/data&job={site.jobs['list']}&to_site=2:FILE"),
)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_view_is_accessible(
    view: View, scheme: Literal["light", "dark"], width: int, site: Site, chromium: Chromium
) -> None:
    page = chromium.open(view.path(site), view.user, width=width, scheme=scheme)
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    assert violations(page) == []
    # Nothing is wider than the window: only tables scroll.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == max(WIDTHS) and scheme == "light":
        _IMAGES.mkdir(exist_ok=True)
        page.screenshot(path=_IMAGES / f"{view.name}.png", full_page=False)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_a_view_is_readable_without_scripts(view: View, site: Site, chromium: Chromium) -> None:
    page = chromium.open(view.path(site), view.user, javascript=False)
    assert page.locator("h1").inner_text()
    assert page.locator("main img").count() == 0

"""The two panes of files in Chromium, with a mouse, with the keyboard alone, and without scripts."""

from __future__ import annotations

import contextlib
import re

import pytest
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Locator, Page, expect

from tests.web.browser import HOSTILE_NAMES, WIDTHS, Chromium, Site, violations

pytestmark = pytest.mark.full
expect.set_options(timeout=20_000)


def _list(page: Page, side: str, place: str, path: str) -> None:
    pane = page.locator(f"#{side}")
    pane.get_by_label("Site").select_option(place)
    pane.get_by_label("Path").fill(path)
    pane.get_by_role("button", name="List").click()
    _look_again(page, page.locator(f"#{side} table.entries"))


def _look_again(page: Page, awaited: Locator) -> None:
    """Wait for something that a job brings; also without scripts, which would refresh the page."""
    for _ in range(10):
        if awaited.is_visible() and awaited.is_enabled():
            return
        # The service waits some seconds for the job itself. A script may refresh the page, and the link with it.
        with contextlib.suppress(PlaywrightError):
            page.get_by_role("link", name="Look again").first.click(timeout=5000)
    expect(awaited).to_be_enabled()


def _tree(site: Site, name: str) -> None:
    """Three files and a directory at south, and a directory at north: the route from north is full of other jobs."""
    directory = site.root / "south" / name
    (directory / "sub").mkdir(parents=True)
    for number in (1, 2, 10):
        (directory / f"run{number}.dat").write_text("content" * number)
    (directory / "sub" / "inner").write_text("inner")
    (site.root / "north" / name).mkdir()


def _job_of(page: Page) -> int:
    expect(page).to_have_url(re.compile(r"/web/jobs/\d+$"))
    return int(page.url.rpartition("/")[2])


@pytest.mark.parametrize("javascript", [True, False])
def test_copy_between_two_panes(site: Site, chromium: Chromium, javascript: bool) -> None:
    name = f"copied-{javascript}"
    _tree(site, name)
    page = chromium.open("/web/files", javascript=javascript)
    _list(page, "left", "2:FILE", f"/{name}")
    _list(page, "right", "1:FILE", f"/{name}")
    rows = page.locator("#left tbody tr")
    assert [row.split()[0] for row in rows.all_inner_texts()] == ["sub/", "run1.dat", "run2.dat", "run10.dat"]
    page.get_by_label("Select sub").check()
    page.get_by_label("Select run2.dat").check()
    page.get_by_role("button", name="Copy to the right").click()
    page.get_by_label("What happens to them").select_option("checksum")
    page.get_by_label("Label").fill("from the panes")
    page.get_by_role("button", name="Show the plan").click()
    start = page.get_by_role("button", name="Copy as planned")
    _look_again(page, start)
    expect(page.get_by_role("row", name=re.compile("copy"))).to_contain_text("2")
    assert not (site.root / "north" / name / "run2.dat").exists()
    start.click()
    job = _job_of(page)
    assert site.ended(job) == "DONE"
    copied = sorted(
        str(path.relative_to(site.root / "north" / name)) for path in (site.root / "north" / name).rglob("*")
    )
    assert copied == ["run2.dat", "sub", "sub/inner"]


def test_keyboard_alone(site: Site, chromium: Chromium) -> None:
    _tree(site, "keys")
    page = chromium.open("/web/files")

    def press(*keys: str) -> None:
        for key in keys:
            page.keyboard.press(key)

    def tab_to(label: str) -> None:
        for _ in range(40):
            press("Tab")
            found = page.evaluate("document.activeElement.labels?.[0]?.innerText ?? ''")
            if label in found:
                return
        pytest.fail(f"{label} cannot be reached")

    tab_to("Site")
    page.keyboard.type("south by FILE")
    tab_to("Path")
    page.keyboard.type("/keys")
    press("Enter")
    expect(page.get_by_label("Select run1.dat")).to_be_visible()
    # The first entry is reached by Tab, the others by arrows.
    for _ in range(40):
        press("Tab")
        if page.evaluate("document.activeElement.name") == "name":
            break
    press("ArrowDown", "Space", "Shift+ArrowDown", "Shift+ArrowDown")
    expect(page.locator("#left .selected")).to_have_text("3 selected")
    press("Home", "Enter")
    expect(page.get_by_label("Select inner")).to_be_visible()
    page.get_by_label("Select inner").focus()
    press("Backspace")
    expect(page.get_by_label("Select run1.dat")).to_be_visible()
    # Rename in place: Enter in the field renames.
    page.get_by_label("Select run1.dat").focus()
    press("Space")
    page.get_by_role("button", name="Rename").focus()
    press("Enter")
    expect(page.get_by_label("New name of run1.dat")).to_be_focused()
    press("Control+a")
    page.keyboard.type("run3.dat")
    press("Enter")
    expect(page.get_by_label("Select run3.dat")).to_be_visible()
    assert (site.root / "south" / "keys" / "run3.dat").exists()
    # Make a directory, then remove it and a file.
    page.get_by_label("New directory").focus()
    page.keyboard.type("made")
    press("Enter")
    expect(page.get_by_label("Select made")).to_be_visible()
    page.get_by_label("Select made").focus()
    press("Space")
    page.get_by_role("button", name="Remove…").focus()
    press("Enter")
    expect(page.get_by_role("heading")).to_contain_text("Remove 1 entry")
    page.get_by_role("button", name="Remove 1 entry").focus()
    press("Enter")
    expect(page.get_by_label("Select run3.dat")).to_be_visible()
    expect(page.get_by_label("Select made")).to_have_count(0)
    assert not (site.root / "south" / "keys" / "made").exists()


def test_a_range_with_the_mouse(site: Site, chromium: Chromium) -> None:
    page = chromium.open("/web/files")
    _tree(site, "mouse")
    _list(page, "left", "2:FILE", "/mouse")
    cells = page.locator("#left tbody td.number")
    cells.nth(1).click()
    cells.nth(3).click(modifiers=["Shift"])
    expect(page.locator("#left input[name=name]:checked")).to_have_count(3)


def test_hostile_names_are_text(site: Site, chromium: Chromium) -> None:
    page = chromium.open("/web/files")
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    _list(page, "left", "1:FILE", "/data")
    (site.root / "north" / "hostile").mkdir()
    _list(page, "right", "1:FILE", "/hostile")
    assert page.locator("main img").count() == 0
    boxes = page.locator("#left input[name=name]")
    expect(boxes).to_have_count(len(HOSTILE_NAMES))
    for number in range(len(HOSTILE_NAMES)):
        boxes.nth(number).check()
    page.get_by_role("button", name="Copy to the right").click()
    page.get_by_role("button", name="Show the plan").click()
    start = page.get_by_role("button", name="Copy as planned")
    expect(start).to_be_enabled()
    start.click()
    assert site.ended(_job_of(page)) == "DONE"
    assert {path.name for path in (site.root / "north" / "hostile").iterdir()} >= set(HOSTILE_NAMES)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_steps_of_an_act_are_accessible(site: Site, chromium: Chromium, width: int) -> None:
    view = f"/web/files?site=1:FILE&path=/data&job={site.jobs['list']}&to_site=2:FILE&to_path=/"
    page = chromium.open(view, width=width)
    for button in ("Rename", "Remove…", "Copy to the right"):
        page.goto(view)
        page.locator("#left input[name=name]").first.check()
        page.get_by_role("button", name=button).first.click()
        page.wait_for_load_state()
        assert violations(page) == [], button
        assert page.evaluate("document.documentElement.scrollWidth") <= width, button
    page.get_by_role("button", name="Show the plan").click()
    expect(page.get_by_role("button", name="Copy as planned")).to_be_enabled()
    assert violations(page) == []

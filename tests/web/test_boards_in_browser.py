"""Sites, users and routes in a browser: acts with the keyboard and with messages that look like markup."""

from __future__ import annotations

import pytest

from tests.web.browser import Chromium, violations

pytestmark = pytest.mark.full


def test_a_site_is_added_checked_and_removed_with_the_keyboard(chromium: Chromium) -> None:
    page = chromium.open("/web/sites")
    page.get_by_role("link", name="Add a site").press("Enter")
    page.get_by_label("Name", exact=True).focus()
    page.keyboard.type("lab")
    page.keyboard.press("Tab")
    page.keyboard.type("GRIDFTP gsiftp://gridftp.example.org:2811")
    page.get_by_role("button", name="Add").press("Enter")
    page.get_by_role("heading", name="lab").wait_for()
    assert page.get_by_role("status").first.inner_text() == "Site lab is added."
    page.get_by_role("button", name="Check with my credential").press("Enter")
    page.get_by_role("heading", name="Check").wait_for()
    assert violations(page) == []
    page.get_by_role("button", name="Remove").press("Enter")
    page.get_by_role("heading", name="Sites").wait_for()
    assert page.get_by_role("link", name="lab").count() == 0


def test_a_wrong_site_is_shown_again_with_what_is_wrong(chromium: Chromium) -> None:
    page = chromium.open("/web/sites/add")
    page.get_by_label("Name", exact=True).fill("local")
    page.get_by_label("Endpoints").fill("FILE file:///etc")
    page.get_by_role("button", name="Add").click()
    assert "only operators" in page.get_by_role("alert").inner_text()
    assert page.get_by_label("Name", exact=True).input_value() == "local"
    assert violations(page) == []


def test_an_operator_bans_a_user_with_a_message_that_is_text(chromium: Chromium) -> None:
    page = chromium.open("/web/operators/users", "admin")
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    row = page.get_by_role("row").filter(has_text="CN=bob")
    row.get_by_role("textbox").fill("<img src=x onerror=alert(1)>")
    row.get_by_role("button", name="Ban").click()
    assert "<img src=x onerror=alert(1)>" in row.inner_text()
    assert page.locator("main img").count() == 0
    row.get_by_role("button", name="End the ban").click()
    row.get_by_role("textbox").wait_for()
    page.goto("/web/operators/audit")
    assert page.get_by_role("row").nth(1).inner_text().count("user.unban") == 1

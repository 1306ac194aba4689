"""What a user does in a browser: watch a copy, look into failures, retry, cancel, read a log, keep a receipt."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from pdm.workqueue.domain.formatting import display_name
from tests.web.browser import HOSTILE_NAMES, Chromium, Site, violations

pytestmark = pytest.mark.full


def test_a_copy_is_watched_until_its_end(site: Site, chromium: Chromium) -> None:
    dummy = {"files": 40, "size": 10**6, "delay": 0.4}
    job = site.submit("copy", label="watched", max_active=1, dummy=dummy)
    page = chromium.open(f"/web/jobs/{job}")
    expect(page.locator("h1 .badge")).to_contain_text("RUNNING")
    expect(page.locator("#connection")).to_contain_text("live")
    expect(page.locator(".sentence")).to_contain_text(re.compile(r"Running: [1-9]\d* of 40 files done"))
    # The page that was loaded becomes that of a job that is done: nothing navigates.
    page.evaluate("window.stayed = true")
    expect(page.locator("h1 .badge")).to_contain_text("DONE", timeout=60_000)
    expect(page.locator(".sentence")).to_contain_text("Done: 40 of 40 files")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    assert page.evaluate("window.stayed")


def test_the_list_shows_a_new_job_by_itself(site: Site, chromium: Chromium) -> None:
    page = chromium.open("/")
    expect(page.locator("#connection")).to_contain_text("live")
    job = site.submit("mkdir", src_filepath="/of-the-list")
    expect(page.locator(f"#job-{job} .badge")).to_contain_text("DONE")


def test_a_failure_is_looked_into_and_retried(site: Site, chromium: Chromium) -> None:
    dummy = {"files": 5, "size": 10, "fail": "PERMISSION_DENIED", "fail_times": 1}
    job = site.submit("copy", dummy=dummy)
    assert site.ended(job) == "FAILED"
    page = chromium.open(f"/web/jobs/{job}")
    failures = page.locator("#errors")
    expect(failures).to_contain_text("PERMISSION_DENIED")
    expect(failures.get_by_role("cell", name="5", exact=True)).to_be_visible()
    with page.expect_download() as listed:
        failures.get_by_role("link", name="Copy list").click()
    assert len(Path(listed.value.path()).read_text().splitlines()) == 5
    failures.get_by_role("button", name="Retry these").click()
    expect(page.get_by_role("status").first).to_contain_text("5 elements")
    expect(page.locator("h1 .badge")).to_contain_text("DONE")
    # The message is shown once.
    page.reload()
    expect(page.locator(".message")).to_have_count(0)


def test_what_to_do_about_a_failure_is_seen_on_a_telephone(site: Site, chromium: Chromium) -> None:
    page = chromium.open(f"/web/jobs/{site.jobs['failed']}", width=360)
    group = page.locator("#errors")
    for part in (group.get_by_text("Ask the owner"), group.get_by_role("button", name="Retry these")):
        box = part.first.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    assert violations(page) == []


def test_a_job_is_cancelled_by_the_keyboard_alone(site: Site, chromium: Chromium) -> None:
    job = site.submit(
        "copy", label="unwanted", src_siteid=3, dst_siteid=4, dummy={"files": 3, "size": 10, "hang": True}
    )
    page = chromium.open("/?label=unwanted")
    focused = "document.activeElement.textContent.trim()"

    def tab_to(text: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate(focused) == text:
                return
        pytest.fail(f"the keyboard does not reach {text}")

    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the content"
    page.keyboard.press("Enter")
    tab_to(f"#{job} COPY")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_contain_text(f"#{job}")
    tab_to("Cancel")
    page.keyboard.press("Enter")
    expect(page.locator("h1 .badge")).to_contain_text("CANCELLED")
    assert site.ended(job) == "CANCELLED"


def test_a_job_is_held_and_resumed(site: Site, chromium: Chromium) -> None:
    # On a route without other jobs.
    job = site.submit(
        "copy", label="paused", src_siteid=4, dst_siteid=3, dummy={"files": 300, "size": 10, "delay": 0.5}
    )
    page = chromium.open(f"/web/jobs/{job}")
    expect(page.locator("#element-1 .badge")).to_contain_text("DONE")
    page.locator("#change summary").press("Enter")
    page.get_by_label("Why it is held").fill("<b>full</b>")
    page.get_by_label("Until").fill("12h")
    page.get_by_role("button", name="Hold it so").press("Enter")
    expect(page.locator(".sentence")).to_contain_text("its owner holds it")
    expect(page.locator(".sentence")).to_contain_text("<b>full</b>")
    expect(page.locator("h1 .badge").first).to_contain_text("HELD", timeout=60_000)
    expect(page.locator("#timeline")).to_contain_text("held")
    expect(page.get_by_role("button", name="Hold", exact=True)).to_have_count(0)
    page.get_by_role("button", name="Resume").press("Enter")
    expect(page.locator("h1 .badge")).to_contain_text("RUNNING")
    page.get_by_role("button", name="Cancel").click()
    assert site.ended(job) == "CANCELLED"


def test_the_log_of_a_running_attempt_grows(site: Site, chromium: Chromium) -> None:
    job = site.submit("copy", dummy={"files": 1, "size": 10, "delay": 10.0})
    page = chromium.open(f"/web/jobs/{job}")
    expect(page.locator("#element-1 .badge")).to_contain_text("RUNNING")
    page.locator("#element-1 a").click()
    log = page.locator("#log")
    expect(log).to_contain_text("element=1 attempt=1")
    expect(log).not_to_contain_text("outcome=")
    expect(log).to_contain_text("outcome=DONE", timeout=60_000)
    page.get_by_label("Wrap").uncheck()
    expect(log).not_to_have_class(re.compile("wrap"))
    with page.expect_download() as saved:
        page.get_by_role("link", name="Download").click()
    assert saved.value.suggested_filename == f"job-{job}-element-1-attempt-1.log"
    assert "outcome=DONE" in Path(saved.value.path()).read_text()


def test_a_receipt_is_kept(site: Site, chromium: Chromium) -> None:
    page = chromium.open(f"/web/jobs/{site.jobs['hostile']}")
    page.get_by_role("link", name="Receipt").click()
    with page.expect_download() as saved:
        page.get_by_role("link", name="Download, signed").click()
    lines = [json.loads(line) for line in Path(saved.value.path()).read_text().splitlines()]
    assert lines[0]["job"]["id"] == site.jobs["hostile"]
    assert lines[-1]["signature"]
    done = site.service.pdm("alice", "receipt", "--verify", str(saved.value.path()))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("view", ["", "/elements", "/receipt"])
def test_hostile_names_are_text(view: str, site: Site, chromium: Chromium) -> None:
    page = chromium.open(f"/web/jobs/{site.jobs['hostile']}{view}")
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    shown = page.locator("table").last.inner_text()
    for name in HOSTILE_NAMES:
        assert display_name(name) in shown
    assert page.locator("main img").count() == 0


def test_pages_of_others_and_unknown_ones_are_not_there(site: Site, chromium: Chromium) -> None:
    page = chromium.open("/")
    for path in (f"/web/jobs/{site.jobs['bob']}", "/web/jobs/999999", "/web/unknown"):
        answer = page.goto(path)
        assert answer is not None
        assert answer.status == 404
        expect(page.get_by_role("alert")).to_be_visible()
    answer = page.goto(f"/web/jobs/{site.jobs['running']}")
    assert answer is not None
    assert answer.status == 200

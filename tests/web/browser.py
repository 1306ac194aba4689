"""A real daemon with jobs of all kinds, and the distribution's Chromium, which calls it with users' certificates."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import field, frozen
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from pdm.testgrid.service import TestService, service_environment

CHROMIUM = Path("/usr/bin/chromium")
WIDTHS = (360, 1440)
#: Those of axe whose results depend on colours.
_RULES_OF_COLOURS = ("color-contrast", "link-in-text-block")
#: Names that a page must show as text.
HOSTILE_NAMES = (
    "<img src=x onerror=alert(1)>",
    "x" * 255,
    "\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe",
    "two\nlines",
    "'\"&amp;",
)

_SITES = """
[north]
id = 1
default_folder = /
file = file://{root}/north
dummy = dummy://north

[south]
id = 2
default_folder = /
file = file://{root}/south
dummy = dummy://south

[east]
id = 3
dummy = dummy://east

[west]
id = 4
dummy = dummy://west
"""


@frozen(eq=False)
class Site:
    """The daemon and its users; `jobs` are jobs of alice by what they show.

    Attributes:
        root: has the directories of the sites ``north`` and ``south``.
    """

    service: TestService
    root: Path
    jobs: dict[str, int] = field(factory=dict)

    @property
    def url(self) -> str:
        return self.service.url or ""

    def submit(self, type_: str, user: str = "alice", *, dummy: Mapping[str, Any] | None = None, **fields: Any) -> int:
        """Register a job; with `dummy`, of simulated work."""
        body = {"src_siteid": 1, "src_filepath": "/data", "protocol": "FILE" if dummy is None else "DUMMY", **fields}
        if type_ == "copy":
            body = {"dst_siteid": 2, "dst_filepath": "/copy", **body}
        if dummy is not None:
            body["extra_opts"] = {**fields.get("extra_opts", {}), "dummy": dict(dummy)}
        return int(self.service.submit(user, type_, **body)["id"])

    def ended(self, job: int, user: str = "alice") -> str:
        """Wait for the end of a job; its status."""
        return str(self.service.wait_for(user, job)["status"])


@contextmanager
def running_site(directory: Path) -> Iterator[Site]:
    """A daemon with two sites, the users alice and bob, and the operator ``admin``."""
    service = TestService(directory / "instance")
    # More than the streams of the jobs that never end, which grow with time.
    service.init(queue={"first_pause": "50ms", "longest_pause": "50ms"}, agents={"max_agents": "24"})
    for user in ("alice", "bob"):
        command = [sys.executable, "-m", "pdm.workqueue.cli", "admin", "user", str(service.directory), user]
        subprocess.run(command, env=service_environment(), check=True, capture_output=True)
    for name in ("north/data", "south"):
        (directory / name).mkdir(parents=True)
    (service.directory / "sites.d" / "sites.conf").write_text(_SITES.format(root=directory))
    for name in HOSTILE_NAMES:
        (directory / "north" / "data" / name).write_text("content")
    with service.running():
        site = Site(service, directory)
        _submit_jobs(site)
        yield site


def _submit_jobs(site: Site) -> None:
    """One job for each thing that a page shows."""
    # Those that never end have sites of their own, where they delay no other.
    away: dict[str, Any] = {"src_siteid": 3, "dst_siteid": 4}
    site.jobs["hostile"] = site.submit("copy", label="<b>run7</b>")
    site.jobs["failed"] = site.submit("copy", dummy={"files": 30, "size": 1000, "fail": "PERMISSION_DENIED"})
    site.jobs["running"] = site.submit("copy", label="run8", dummy={"files": 500, "size": 10**6, "delay": 1.0}, **away)
    site.jobs["hanging"] = site.submit("copy", dummy={"files": 3, "size": 10**9, "hang": True}, **away)
    site.jobs["list"] = site.submit("list")
    site.jobs["mkdir"] = site.submit("mkdir", src_filepath="/new")
    site.jobs["held"] = site.submit("copy", label="run9", dummy={"files": 20, "size": 10**6, "delay": 1.0}, **away)
    body = {"message": "the disk of west is full", "until": "30d"}
    assert site.service.call("alice", "POST", f"/jobs/{site.jobs['held']}/hold", body)[0] == 200
    site.jobs["bob"] = site.submit("list", user="bob")
    for job in ("hostile", "failed", "list", "mkdir"):
        site.ended(site.jobs[job])
    _add_logins(site)


_LOGIN = """
    INSERT INTO oidc_logins
        (user_id, site_id, issuer, client_id, generation, subject, logged_in_at, valid_until, due_at, failures, error)
    SELECT user_id, ?, 'https://issuer.example.org/', 'pdm', 1, 'alice', '2026-01-01 00:00:00.000000', ?, ?, ?, ?
    FROM jobs WHERE id = ?
"""


def _add_logins(site: Site) -> None:
    """Logins of alice at token issuers, as they are in the database: one that is renewed, and one that has ended."""
    job, far = site.jobs["list"], "2099-01-01 00:00:00.000000"
    with sqlite3.connect(site.service.directory / "var" / "workqueue.sqlite", timeout=30) as connection:
        connection.execute(_LOGIN, (1, far, far, 0, None, job))
        connection.execute(_LOGIN, (2, None, None, 3, "the refresh token is not valid any more", job))
    connection.close()


@frozen(eq=False)
class Chromium:
    """The browser; its contexts have the certificate of one user each."""

    browser: Browser
    site: Site
    _contexts: list[BrowserContext] = field(factory=list)

    def open(
        self,
        path: str,
        user: str | None = "alice",
        *,
        width: int = 1440,
        javascript: bool = True,
    ) -> Page:
        """A new page at an address of the daemon, which must have no error in the browser's console."""
        certificates: Any = []
        if user is not None:
            certificate, key = self.site.service.credentials(user)
            certificates = [{"origin": self.site.url, "certPath": certificate, "keyPath": key}]
        context = self.browser.new_context(
            base_url=self.site.url,
            # The authority of the instance is not the browser's.
            ignore_https_errors=True,
            client_certificates=certificates,
            java_script_enabled=javascript,
            viewport={"width": width, "height": 900},
            accept_downloads=True,
            reduced_motion="reduce",
        )
        context.set_default_timeout(15_000)
        self._contexts.append(context)
        page = context.new_page()
        page.goto(path)
        return page

    def close_pages(self) -> None:
        while self._contexts:
            self._contexts.pop().close()


@contextmanager
def running_chromium(site: Site) -> Iterator[Chromium]:
    """The distribution's Chromium."""
    if not CHROMIUM.exists():
        text = f"THE TESTS OF THE PAGES CANNOT RUN: there is no {CHROMIUM}"
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)
    expect.set_options(timeout=15_000)
    with sync_playwright() as playwright:
        # The sandbox needs an account other than root.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Chromium(browser, site)
        browser.close()


def violations(page: Page) -> list[str]:
    """What axe finds wrong with a page in light and in dark colours."""
    page.emulate_media(color_scheme="light")
    found = Axe().run(page).response["violations"]
    page.emulate_media(color_scheme="dark")
    options = {"resultTypes": ["violations"], "runOnly": {"type": "rule", "values": list(_RULES_OF_COLOURS)}}
    found += Axe().run(page, options=options).response["violations"]
    return [f"{each['id']}: {node['html']}: {node['failureSummary']}" for each in found for node in each["nodes"]]

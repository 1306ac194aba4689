"""The fixtures of the pages: the service in this process, and for tests in a browser a daemon and Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http.service import certificates, service
from tests.web.browser import Chromium, Site, running_chromium, running_site

__all__ = ["certificates", "service"]


@pytest.fixture(scope="session")
def site(open_directory: Path) -> Iterator[Site]:
    """A daemon with jobs, the same for all tests in a browser."""
    with running_site(open_directory / "web") as site:
        yield site


@pytest.fixture(scope="session")
def _browser(site: Site) -> Iterator[Chromium]:
    with running_chromium(site) as chromium:
        yield chromium


@pytest.fixture
def chromium(_browser: Chromium) -> Iterator[Chromium]:
    """The browser; the pages that a test opens are closed after it."""
    yield _browser
    _browser.close_pages()

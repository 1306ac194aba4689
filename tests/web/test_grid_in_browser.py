"""Two GridFTP sites in the browser: copy between two panes, a failure that is retried, a log, a cancel, a receipt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService
from tests.web.browser import Chromium, Site

pytestmark = [pytest.mark.full, pytest.mark.grid]


@pytest.fixture(scope="module")
def grid_site(grid: TestGrid, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A daemon on the grid, with alice's proxy delegated."""
    service = TestService(tmp_path_factory.mktemp("browser") / "instance", grid.description(), grid.directory)
    service.init(queue={"first_pause": "100ms", "longest_pause": "300ms"})
    with service.running():
        service.delegate("alice")
        yield Site(service, grid.directory)
    assert "Traceback" not in service.log_path.read_text()


@pytest.fixture
def trees(grid: TestGrid) -> Iterator[tuple[Path, Path]]:
    """A tree of alice at the first site, with one file that she cannot read, and a directory at the second."""
    source, destination = (site.root / "browser" for site in grid.sites.values())
    (source / "sub").mkdir(parents=True)
    for number in range(20):
        (source / "sub" / f"file{number}").write_text("content" * number)
    (source / "refused").write_text("not yet")
    with (source / "large").open("wb") as large:
        large.truncate(20 * 2**30)
    destination.mkdir()
    for path in (source, destination):
        grid.give(path)
    (source / "refused").chmod(0)
    yield source, destination
    for path in (source, destination):
        for inside in sorted(path.rglob("*"), reverse=True):
            inside.rmdir() if inside.is_dir() else inside.unlink()
        path.rmdir()


def _list(page: Page, side: str, place: str, path: Path) -> None:
    pane = page.locator(f"#{side}")
    pane.get_by_label("Site").select_option(place)
    pane.get_by_label("Path").fill(str(path))
    pane.get_by_role("button", name="List").click()
    expect(pane.locator("table.entries")).to_be_visible()


def _copy(page: Page, trees: tuple[Path, Path], *names: str) -> int:
    """Copy selected entries of the left pane to the right one; the number of the job."""
    page.goto("/web/files")
    for side, number, path in (("left", 1, trees[0]), ("right", 2, trees[1])):
        _list(page, side, f"{number}:GRIDFTP", path)
    for name in names:
        page.get_by_label(f"Select {name}").check()
    page.get_by_role("button", name="Copy to the right").click()
    page.get_by_role("button", name="Show the plan").click()
    page.get_by_role("button", name="Copy as planned").click()
    expect(page).to_have_url(re.compile(r"/web/jobs/\d+$"))
    return int(page.url.rpartition("/")[2])


def test_a_session_at_two_gridftp_sites(grid_site: Site, chromium: Chromium, trees: tuple[Path, Path]) -> None:
    source, destination = trees
    page = Chromium(chromium.browser, grid_site).open("/web/files")
    try:
        _copy(page, trees, "sub", "refused")
        expect(page.locator("h1 .badge")).to_contain_text("FAILED", timeout=60_000)
        copied = {path.name: path.read_text() for path in (destination / "sub").iterdir()}
        assert copied == {path.name: path.read_text() for path in (source / "sub").iterdir()}
        failures = page.locator("#errors")
        expect(failures).to_contain_text("PERMISSION_DENIED")
        (source / "refused").chmod(0o644)
        failures.get_by_role("button", name="Retry these").click()
        expect(page.locator("h1 .badge")).to_contain_text("DONE", timeout=60_000)
        assert (destination / "refused").read_text() == "not yet"
        page.get_by_role("link", name="Receipt").click()
        with page.expect_download() as saved:
            page.get_by_role("link", name="Download, signed").click()
        verified = grid_site.service.pdm("alice", "receipt", "--verify", str(saved.value.path()))
        assert verified.returncode == 0, verified.stderr

        _copy(page, trees, "large")
        expect(page.locator("#element-1 .badge")).to_contain_text("RUNNING")
        page.locator("#element-1 a").click()
        expect(page.locator("#log")).to_contain_text("element=1 attempt=1")
        page.go_back()
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("h1 .badge")).to_contain_text("CANCELLED", timeout=60_000)
        assert not (destination / "large").exists()
    finally:
        page.context.close()

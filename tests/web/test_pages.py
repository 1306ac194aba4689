"""What is the same for all pages: rendering, fragments, static files, errors, headers."""

from __future__ import annotations

import re

import pytest
import pytest_twisted

from pdm.workqueue.http.problems import InvalidInputError
from pdm.workqueue.web.jobs import JobListQuery
from pdm.workqueue.web.pages import decode_fields, safe_file_name
from tests.http.service import Service


@pytest_twisted.ensureDeferred
async def test_a_page_loads_nothing_from_elsewhere(service: Service) -> None:
    answer = await service.browse("alice", "/")
    assert answer.status == 200
    assert answer.header("Content-Type") == "text/html; charset=utf-8"
    assert answer.header("Content-Security-Policy").startswith("default-src 'self'; frame-ancestors 'none'")
    assert answer.header("X-Content-Type-Options") == "nosniff"
    assert answer.header("Referrer-Policy") == "no-referrer"
    page = answer.body.decode()
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert loaded
    assert all(url.startswith(("/", "#")) and not url.startswith("//") for url in loaded)
    assert " style=" not in page


@pytest_twisted.ensureDeferred
async def test_static_files_are_cached_by_their_content(service: Service) -> None:
    page = (await service.browse("alice", "/")).body.decode()
    urls = re.findall(r'"(/web/static/[^"]+)"', page)
    assert {re.sub(r"\?.*", "", url) for url in urls} >= {"/web/static/style.css", "/web/static/live.js"}
    for url in urls:
        answer = await service.browse(None, url)
        assert answer.status == 200
        assert "immutable" in answer.header("Cache-Control")
        again = await service.browse(None, url, If_None_Match=answer.header("ETag"))
        assert (again.status, again.body) == (304, b"")
        plain = await service.browse(None, url.partition("?")[0])
        assert plain.header("Cache-Control") == "no-cache"
    for name in ("no.css", "..%2fpages.py", "%2e%2e"):
        assert (await service.browse("alice", f"/web/static/{name}")).status == 404


@pytest_twisted.ensureDeferred
async def test_a_fragment_is_one_block(service: Service) -> None:
    fragment = (await service.browse("alice", "/?fragment=jobs")).body.decode()
    assert fragment.lstrip().startswith('<section id="jobs"')
    assert "<html" not in fragment
    assert (await service.browse("alice", "/?fragment=other")).status == 400


@pytest_twisted.ensureDeferred
async def test_errors_are_pages(service: Service) -> None:
    for path, status in (("/web/nothing", 404), ("/?status=odd", 400), ("/?colour=red", 400), ("/?before=x", 400)):
        answer = await service.browse("alice", path)
        assert answer.status == status, path
        assert answer.header("Content-Type") == "text/html; charset=utf-8"
        assert 'role="alert"' in answer.body.decode()
    assert (await service.browse(None, "/")).status == 401


def test_fields_of_forms_are_checked() -> None:
    assert decode_fields([("status", ""), ("before", "12")], JobListQuery) == JobListQuery(before=12)
    for pairs in ([("before", "x")], [("before", "1"), ("before", "2")], [("other", "1")]):
        with pytest.raises(InvalidInputError):
            decode_fields(pairs, JobListQuery)


def test_downloads_have_safe_names() -> None:
    assert safe_file_name('a b/../\N{RIGHT-TO-LEFT OVERRIDE}\n"x.log') == "a_b_.._x.log"
    assert safe_file_name("../..") == "download"
    assert len(safe_file_name("x" * 1000)) == 150

"""Browsers without a certificate get a page that says what to do; programs get a problem as before."""

from __future__ import annotations

from datetime import timedelta

import pytest_twisted

from pdm.workqueue.http.endpoints import ENDPOINTS, ROOT
from pdm.workqueue.web import PAGES
from tests.http.service import Answer, Service
from tests.http.test_surface import path_of

#: What Firefox and Chromium send for a page.
_BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
#: What programs send: curl, requests, `pdm`, and those that say what they want.
_PROGRAMS = ("*/*", "application/json", "application/json, text/html;q=0.5, application/problem+json", "text/csv", "")


def _is_page(answer: Answer) -> bool:
    text = answer.body.decode()
    assert answer.status == 401
    assert answer.header("Content-Type") == "text/html; charset=utf-8"
    assert answer.header("Content-Security-Policy").startswith("default-src 'self'; frame-ancestors 'none'")
    assert answer.header("Cache-Control") == "no-store"
    return ".p12" in text and "pdm admin user" in text and "Firefox" in text and "Chromium" in text


@pytest_twisted.ensureDeferred
async def test_a_browser_without_a_certificate_is_told_how_to_get_in(service: Service) -> None:
    for path in ("/", "/web/jobs/1", "/web/nothing", f"{ROOT}/jobs", f"{ROOT}/jobs/1/receipt"):
        answer = await service.browse(None, path, Accept=_BROWSER)
        assert _is_page(answer), path
        assert "no client certificate was presented" in answer.body.decode()
    again = await service.browse(None, "/", Accept=_BROWSER)
    other = await service.browse(None, "/web/jobs/2", Accept=_BROWSER)
    assert again.body == other.body, "rendered once"


@pytest_twisted.ensureDeferred
async def test_programs_get_a_problem(service: Service) -> None:
    for accept in _PROGRAMS:
        for path in ("/", "/web/jobs/1", f"{ROOT}/jobs"):
            answer = await service.browse(None, path, Accept=accept)
            assert (answer.status, answer.problem) == (401, "certificate-needed"), (accept, path)


@pytest_twisted.ensureDeferred
async def test_no_page_and_no_act_is_open_without_a_certificate(service: Service) -> None:
    for page in PAGES:
        path = page.path
        for word in ("number", "word", "path"):
            path = path.replace(f"<{word}:", "<").replace("<rest>", "x")
        path = "/".join("1" if part.startswith("<") else part for part in path.split("/"))
        answer = await service.call(None, page.method, path, root="", Accept=_BROWSER)
        assert _is_page(answer), page.path
    for endpoint in ENDPOINTS:
        if endpoint.path != "/health":
            assert _is_page(await service.call(None, endpoint.method, path_of(endpoint), Accept=_BROWSER))


@pytest_twisted.ensureDeferred
async def test_a_certificate_that_has_expired_meanwhile(service: Service) -> None:
    """OpenSSL checks it in the handshake only; the connection is kept."""
    ending = service.certificates.authority.user("ending", lifetime=timedelta(hours=1))
    assert (await service.call(ending, "GET", "/", root="", Accept=_BROWSER)).status == 200
    service.skip[0] = timedelta(hours=2)
    try:
        answer = await service.call(ending, "GET", "/", root="", Accept=_BROWSER)
        assert _is_page(answer)
        assert "expired at" in answer.body.decode()
    finally:
        service.skip[0] = timedelta()

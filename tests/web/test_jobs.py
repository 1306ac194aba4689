"""The list of jobs."""

from __future__ import annotations

import re

import pytest_twisted

from tests.http.service import Service


def _listed(page: bytes) -> list[int]:
    return [int(number) for number in re.findall(r'<tr id="job-(\d+)"', page.decode())]


@pytest_twisted.ensureDeferred
async def test_every_type_of_job_is_listed(service: Service) -> None:
    numbers = [(await service.submit("ada", route, label="of ada"))["id"] for route in ("/list", "/copy", "/remove")]
    numbers += [(await service.submit("ada", route, label="run7_x%"))["id"] for route in ("/rename", "/mkdir")]
    page = await service.browse("ada", "/")
    assert _listed(page.body) == numbers[::-1]
    for word in ("LIST", "COPY", "REMOVE", "RENAME", "MKDIR"):
        assert f" {word}</a>" in page.body.decode()
    assert _listed((await service.browse("ada", "/?type=MKDIR&status=SUBMITTED&label=")).body) == numbers[4:]
    assert _listed((await service.browse("ada", "/?status=DONE")).body) == []
    assert _listed((await service.browse("ada", "/?label=RUN7_x%25")).body) == numbers[:2:-1]
    assert _listed((await service.browse("ada", "/?label=run7%25%25")).body) == []
    assert _listed((await service.browse("bob", "/")).body) == []
    assert (await service.browse("bob", "/?user=all")).status == 403
    assert set(_listed((await service.browse("operator", "/?user=all")).body)) >= set(numbers)


@pytest_twisted.ensureDeferred
async def test_the_list_is_paged_both_ways(service: Service) -> None:
    numbers = [(await service.submit("carl"))["id"] for _ in range(102)]
    seen, url, back = [], "/", []
    while True:
        page = (await service.browse("carl", url)).body
        seen += _listed(page)
        back.append(_listed(page))
        found = re.search(r'rel="next" href="([^"]+)"', page.decode())
        if found is None:
            break
        url = found[1].replace("&amp;", "&")
    assert seen == numbers[::-1]
    newer = re.search(r'rel="prev" href="([^"]+)"', page.decode())
    assert newer is not None
    assert _listed((await service.browse("carl", newer[1].replace("&amp;", "&"))).body) == back[1]


@pytest_twisted.ensureDeferred
async def test_names_are_text(service: Service) -> None:
    await service.submit("eve", src_filepath="/<img src=x onerror=alert(1)>\n\N{RIGHT-TO-LEFT OVERRIDE}", label="</td>")
    page = (await service.browse("eve", "/")).body.decode()
    assert "<img src=x" not in page
    assert r"/&lt;img src=x onerror=alert(1)&gt;\n\u202e" in page
    assert "&lt;/td&gt;" in page

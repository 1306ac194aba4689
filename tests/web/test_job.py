"""The pages of one job: its parts, its elements, logs, failures and receipt, and the acts on it."""

from __future__ import annotations

import html
import json
import re
import shlex
import subprocess
from datetime import timedelta

import pytest
import pytest_twisted

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import NewElement
from pdm.workqueue.web import job
from pdm.workqueue.web.job import shell_word
from tests.http.service import Service

_DENIED = AttemptFailure(FailureScope.DESTINATION, FailureCode.PERMISSION_DENIED, "550 <denied>")
_HOSTILE = "<img src=x onerror=alert(1)>\N{RIGHT-TO-LEFT OVERRIDE}\nend"


async def _failed(service: Service, user: str, *names: str) -> int:
    """A COPY job of which all but the first file failed."""
    submitted = await service.submit(user, "/copy", label="run7")
    (listing,) = await service.claim(submitted["id"])
    await service.extend(listing, *(NewElement(JobType.COPY, f"data/{n}", f"copy/{n}", size=10) for n in names))
    await service.settle(listing)
    first, *others = sorted(await service.claim(submitted["id"]))
    await service.settle(first, transferred=10)
    for token in others:
        await service.settle(token, JobStatus.FAILED, _DENIED, log=f"log of {token.element_id} <b>{_HOSTILE}")
    return int(submitted["id"])


@pytest_twisted.ensureDeferred
async def test_a_job_shows_its_parts(service: Service) -> None:
    number = await _failed(service, "ada", "fine", _HOSTILE, "two")
    page = (await service.browse("ada", f"/web/jobs/{number}")).body.decode()
    assert "Partly done: 1 of 3 files done; 2 failed – PERMISSION_DENIED (destination): 550 &lt;denied&gt;." in page
    for part in ("Retry failed", "Receipt", "pdm cp", "Copy list", "Retry these", "Timeline", "NORTH"):
        assert part in page, part
    assert "Cancel</button>" not in page
    assert "data-events" not in page
    assert "<img src=x" not in page
    assert r"data/&lt;img src=x onerror=alert(1)&gt;\u202e\nend" in page
    assert 'href="/web/files?site=1&amp;path=data"' in page
    assert page.count('<tr id="element-') == 4


@pytest_twisted.ensureDeferred
async def test_fragments_are_what_the_page_has(service: Service) -> None:
    number = (await service.submit("ada", "/copy"))["id"]
    names = ("head", "facts", "progress", "errors", "elements", "timeline")
    page = (await service.browse("ada", f"/web/jobs/{number}")).body.decode()
    assert f'data-events="/workqueue/api/v1.0/jobs/{number}/events"' in page
    for name in names:
        fragment = (await service.browse("ada", f"/web/jobs/{number}?fragment={name}")).body.decode()
        assert f'<section id="{name}"' in fragment
        assert fragment.count("<section") == 1
    url = f"/web/jobs/{number}?" + "&".join(f"fragment={name}" for name in names)
    assert (await service.browse("ada", url)).body.decode().count("<section") == len(names)


@pytest_twisted.ensureDeferred
async def test_the_latest_events_are_shown_first(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    number = await _failed(service, "ada", "one", "two")
    url = f"/web/jobs/{number}?fragment=timeline"
    shown = (await service.browse("ada", url)).body.decode()
    assert shown.index("FAILED") < shown.index("registered")
    monkeypatch.setattr(job, "_MOST_EVENTS", 1)
    shown = (await service.browse("ada", url)).body.decode()
    assert "FAILED" in shown
    assert "registered" not in shown


@pytest_twisted.ensureDeferred
async def test_a_job_of_another_user_is_not_there(service: Service) -> None:
    number = await _failed(service, "ada", "one", "two")
    element = f"/web/jobs/{number}/elements/1/log"
    pages = ("", "/errors", "/errors/paths?code=EXISTS&scope=source", "/elements", "/receipt", "/receipt/download")
    for path in (*(f"/web/jobs/{number}{page}" for page in pages), element, f"{element}/download"):
        assert (await service.browse("bob", path)).status == 404, path
        assert (await service.browse("operator", path)).status in {200, 400}, path
    for act in ("cancel", "retry", "hold", "resume", "change"):
        assert (await service.act("bob", f"/web/jobs/{number}/{act}")).status == 404
    assert (await service.job(number)).status is JobStatus.FAILED


@pytest_twisted.ensureDeferred
async def test_acts_redirect_to_the_job_with_a_message(service: Service) -> None:
    number = await _failed(service, "ada", "one", "two", "three")
    answer = await service.act("ada", f"/web/jobs/{number}/retry", {"code": "EXISTS"})
    assert (answer.status, answer.header("Location")) == (303, f"/web/jobs/{number}")
    assert (await service.job(number)).status is JobStatus.FAILED
    answer = await service.act("ada", f"/web/jobs/{number}/retry", {"code": "PERMISSION_DENIED"})
    cookie = answer.header("Set-Cookie").partition(";")[0]
    shown = await service.browse("ada", answer.header("Location"), Cookie=cookie)
    assert "2 elements of job" in shown.body.decode()
    assert "Max-Age=0" in shown.header("Set-Cookie")
    assert (await service.job(number)).counters.submitted == 2
    assert (await service.act("ada", f"/web/jobs/{number}/cancel")).status == 303
    assert (await service.job(number)).status is JobStatus.CANCELLED
    assert (await service.act("ada", f"/web/jobs/{number}/retry", {"code": "ODD"})).status == 400
    assert (await service.browse("ada", f"/web/jobs/{number}/cancel")).status == 404


@pytest_twisted.ensureDeferred
async def test_elements_are_paged_and_found_by_state_code_and_name(service: Service) -> None:
    number = await _failed(service, "ada", *(f"f{n:03}" for n in range(150)))

    async def found(query: str) -> list[int]:
        page = (await service.browse("ada", f"/web/jobs/{number}/elements{query}")).body.decode()
        return [int(each) for each in re.findall(r'<tr id="element-(\d+)"', page)]

    assert await found("") == list(range(100))
    assert await found("?after=99") == list(range(100, 151))
    assert await found("?status=DONE") == [0, 1]
    assert await found("?status=FAILED&code=PERMISSION_DENIED&after=140") == list(range(141, 151))
    assert await found("?name=F14&status=") == list(range(141, 151))
    assert await found("?name=%25") == []
    assert await found(f"?after={2**63 - 1}") == []
    assert (await service.browse("ada", f"/web/jobs/{number}/elements?status=ODD")).status == 400


@pytest_twisted.ensureDeferred
async def test_the_end_of_a_log_is_text_and_the_download_has_all(service: Service) -> None:
    number = await _failed(service, "ada", "one", "two")
    page = (await service.browse("ada", f"/web/jobs/{number}/elements/2/log")).body.decode()
    log = re.search(r'<pre id="log"[^>]*>(.*?)</pre>', page, re.DOTALL)
    assert log is not None
    assert "log of 2 &lt;b&gt;&lt;img src=x" in log[1]
    assert "<b>" not in log[1]
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in page
    answer = await service.browse("ada", f"/web/jobs/{number}/elements/2/log/download?attempt=1")
    assert answer.header("Content-Disposition") == f'attachment; filename="job-{number}-element-2-attempt-1.log"'
    assert answer.header("Content-Type") == "text/plain; charset=utf-8"
    assert b"the first line" in answer.body
    assert b"the last line" in answer.body
    assert (await service.browse("ada", f"/web/jobs/{number}/elements/2/log?attempt=7")).status == 400
    assert (await service.browse("ada", f"/web/jobs/{number}/elements/9/log")).status == 404


@pytest_twisted.ensureDeferred
async def test_failures_in_groups_with_a_list_of_paths(service: Service) -> None:
    number = await _failed(service, "ada", "one", "two words", _HOSTILE)
    page = (await service.browse("ada", f"/web/jobs/{number}/errors")).body.decode()
    url = re.search(r'href="([^"]+/errors/paths[^"]+)"', page)
    assert url is not None
    answer = await service.browse("ada", html.unescape(url[1]))
    assert "attachment" in answer.header("Content-Disposition")
    assert answer.body.decode().splitlines() == [
        "'data/two words'",
        "$'data/" + r"<img src=x onerror=alert(1)>\u202e\nend'",
    ]


@pytest_twisted.ensureDeferred
async def test_a_receipt_is_a_page_and_a_file(service: Service) -> None:
    number = await _failed(service, "ada", "one", _HOSTILE)
    page = (await service.browse("ada", f"/web/jobs/{number}/receipt")).body.decode()
    assert "<img src=x" not in page
    assert "PERMISSION_DENIED" in page
    answer = await service.browse("ada", f"/web/jobs/{number}/receipt/download")
    assert answer.header("Content-Disposition") == f'attachment; filename="job-{number}-receipt.jsonl"'
    assert [json.loads(line)["line"] for line in answer.body.splitlines()] == ["job", *["element"] * 3, "end"]
    assert b'"signature"' in answer.body
    answer = await service.browse("ada", f"/web/jobs/{number}/receipt/download?format=csv")
    assert answer.body.startswith(b"line,number")


@pytest.mark.parametrize("text", ["plain", "two words", "it's", "a\\b", "new\nline'", "\N{RIGHT-TO-LEFT OVERRIDE}x"])
def test_words_of_commands_are_what_a_shell_reads(text: str) -> None:
    word = shell_word(text)
    assert word.isprintable()
    done = subprocess.run(
        ["bash", "-c", f"printf %s {word}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert done.stdout.decode() == text
    if text.isprintable():
        assert shlex.split(word) == [text]


@pytest_twisted.ensureDeferred
async def test_a_job_is_held_resumed_and_changed(service: Service) -> None:
    number = (await service.submit("ada", "/copy"))["id"]
    url = f"/web/jobs/{number}"
    page = (await service.browse("ada", url)).body.decode()
    assert "Hold</button>" in page
    assert "Resume</button>" not in page
    assert (await service.act("ada", f"{url}/hold", {"message": "<b>full", "until": "2h"})).status == 303
    page = (await service.browse("ada", url)).body.decode()
    assert "Held: its owner holds it, since" in page
    assert ": &lt;b&gt;full. What runs ends by itself" in page
    assert page.count("HELD</span>") == 1
    assert "Hold</button>" not in page
    assert "Resume</button>" in page
    assert '<span class="legend-word">held</span> 1' in page
    assert (await service.act("ada", f"{url}/resume")).status == 303
    assert (await service.act("ada", f"{url}/change", {"priority": "2", "max_active": "3"})).status == 303
    page = (await service.browse("ada", url)).body.decode()
    assert "priority 2, at most 2 tries, at most 3 elements at once" in page
    assert "--priority 2 --max-tries 2 --max-active 3" in page
    assert (await service.act("ada", f"{url}/change", {"priority": "2"})).status == 303
    assert (await service.job(number)).max_active is None
    # An operator says why; then it is for operators to resume it.
    assert (await service.act("operator", f"{url}/hold")).status == 400
    assert (await service.act("operator", f"{url}/hold", {"message": "the site asks"})).status == 303
    page = (await service.browse("ada", url)).body.decode()
    assert "the site asks" in page
    assert "Resume</button>" not in page
    assert "Cancel</button>" in page
    assert (await service.act("ada", f"{url}/resume")).status == 403
    assert "Resume</button>" in (await service.browse("operator", url)).body.decode()


@pytest_twisted.ensureDeferred
async def test_elements_that_wait_for_a_retry_are_a_part_of_the_bars(service: Service) -> None:
    number = (await service.submit("ada", "/copy", max_tries=5))["id"]
    (listing,) = await service.claim(number)
    await service.extend(listing, *(NewElement(JobType.COPY, f"data/{n}", f"copy/{n}", size=100) for n in range(3)))
    await service.settle(listing)
    first, second, _ = sorted(await service.claim(number))
    later = service.now() + timedelta(hours=1)
    away = AttemptFailure(FailureScope.SOURCE, FailureCode.CONNECTION, "away")
    await service.settle(first, JobStatus.SUBMITTED, away, not_before=later)
    await service.settle(second, JobStatus.SUBMITTED, away, not_before=later + timedelta(hours=1))
    await service.call("ada", "PATCH", f"/jobs/{number}", {"max_active": 1})
    page = (await service.browse("ada", f"/web/jobs/{number}")).body.decode()
    assert '<span class="legend-word">retrying</span> 2' in page
    assert "queued</span>" not in page
    assert f'wait for a retry, the first at <time datetime="{later.isoformat()}' in html.unescape(page)
    assert "No more runs at once now: at most 1 of its elements may run at once." in page

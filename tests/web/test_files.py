"""The view of files without a browser: listings, acts, copies, and names as text."""

from __future__ import annotations

import html
import re
from typing import Any
from urllib.parse import quote

import pytest
import pytest_twisted

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.filters import FilterRule, PatternList
from pdm.workqueue.domain.jobs import JobRecord, ListedEntry
from pdm.workqueue.web.copies import _literal_pattern
from pdm.workqueue.web.directories import natural_key
from pdm.workqueue.web.files import field_text
from tests.http.service import Answer, Service

_HOSTILE = "<img src=x onerror=alert(1)>\n\N{RIGHT-TO-LEFT OVERRIDE}&%41 \uef80"
_SHOWN = r"&lt;img src=x onerror=alert(1)&gt;\n\u202e&amp;%41 \x80"


async def _open(service: Service, user: str, path: str, *entries: ListedEntry, **form: Any) -> tuple[str, str]:
    """List a directory in the left pane; the address of the view, and its page."""
    answer = await service.act(user, "/web/files/list", {"side": "left", "place": "1:DUMMY", "typed": path, **form})
    assert answer.status == 303, answer.body
    job = await _job(service, answer)
    assert (job.type, job.src_filepath, job.options, job.label) == (JobType.LIST, path, {"depth": 1}, "files")
    (token,) = await service.claim(job.id)
    await service.list_with(token, [ListedEntry("", "directory"), *entries])
    await service.settle(token)
    url = answer.header("Location")
    page = await service.browse(user, url)
    assert page.status == 200, page.body
    return url, page.body.decode()


async def _job(service: Service, answer: Answer, field: str = "job") -> JobRecord:
    number = re.search(rf"[?&]{field}=(\d+)", answer.header("Location"))
    assert number is not None
    return await service.job(int(number[1]))


def _state(page: str, side: str = "left") -> dict[str, Any]:
    """The hidden fields of a pane."""
    form = page.partition(f'data-pane="{side}"')[2].partition('<div class="acts">')[0]
    return {name: html.unescape(value) for name, value in re.findall(r'name="(\w+)" value="([^"]*)"', form)}


def _names(page: str) -> list[str]:
    return re.findall(r'aria-label="Select ([^"]*)"', page)


@pytest_twisted.ensureDeferred
async def test_a_directory_is_sorted_as_people_count(service: Service) -> None:
    names = ["run10", "Run9", "run1", ".hidden", "a2b10", "a2b9"]
    entries = [ListedEntry(name, "file", 2048) for name in names]
    url, page = await _open(service, "ann", "/data", *entries, ListedEntry("zoo", "directory"))
    assert _names(page) == ["zoo", "a2b9", "a2b10", "run1", "Run9", "run10"]
    assert "2.0 KiB" in page and "1 hidden" in page
    assert _names((await service.browse("ann", url + "&hidden=1")).body.decode())[1] == ".hidden"
    # Another user sees neither the listing nor that there is one.
    assert (await service.browse("bob", url)).status == 404


@pytest_twisted.ensureDeferred
async def test_a_large_directory_is_paged(service: Service) -> None:
    entries = [ListedEntry(f"f{number}", "file") for number in range(450)]
    url, page = await _open(service, "ann", "/large", *entries)
    seen = _names(page)
    while (found := re.search(r'rel="next" href="([^"]+)"', page)) is not None:
        page = (await service.browse("ann", html.unescape(found[1]))).body.decode()
        seen += _names(page)
    assert seen == [f"f{number}" for number in range(450)]
    assert "page 3 of 3" in page and "450 entries" in page.replace("\N{NARROW NO-BREAK SPACE}", "")
    assert _names((await service.browse("ann", url + "&page=999")).body.decode())[-1] == "f449"


@pytest_twisted.ensureDeferred
async def test_an_address_alone_starts_nothing(service: Service) -> None:
    """Else a page of another site could list directories by a link."""
    page = await service.browse("idle", "/web/files?site=1&path=/data&to_site=2&to_path=/x")
    assert page.status == 200
    assert (await service.call("idle", "GET", "/jobs")).json == []


@pytest_twisted.ensureDeferred
async def test_hostile_names_are_text_and_stay_exact(service: Service) -> None:
    _, page = await _open(service, "eve", "/data", ListedEntry(_HOSTILE, "directory"))
    assert "<img" not in page.partition("<main")[2]
    assert _SHOWN in page and "\N{RIGHT-TO-LEFT OVERRIDE}" not in page
    state = _state(page)
    for name in re.findall(r'name="name" value="([^"]*)"', page):
        opened = await service.act("eve", "/web/files/list", state | {"open": html.unescape(name)})
        assert (await _job(service, opened)).src_filepath == f"/data/{_HOSTILE}"
        inner = (await service.browse("eve", opened.header("Location") + "&fragment=panes")).body.decode()
        # The path box shows what it can, and unchanged it means the exact path.
        typed = re.search(r'name="typed" value="([^"]*)"', inner)
        assert typed is not None
        again = await service.act(
            "eve", "/web/files/list", _state(inner) | {"place": "1:DUMMY", "typed": html.unescape(typed[1])}
        )
        assert (await _job(service, again)).src_filepath == f"/data/{_HOSTILE}"
        up = await service.act("eve", "/web/files/list", _state(inner) | {"open": ".."})
        assert (await _job(service, up)).src_filepath == "/data"
        asked = await service.act("eve", "/web/files/remove", state | {"name": html.unescape(name)})
        assert _SHOWN in asked.body.decode() and "<img" not in asked.body.decode().partition("<main")[2]
        copying = state | {"name": html.unescape(name), "other_site": "2:DUMMY", "other_path": quote(f"/{_HOSTILE}")}
        chosen = await service.act("eve", "/web/files/copy", copying)
        assert chosen.status == 200 and chosen.body.decode().count(_SHOWN) == 2
        planned = await _job(service, await service.act("eve", "/web/files/plan", copying), "plan")
        assert (planned.src_filepath, planned.dst_filepath) == (f"/data/{_HOSTILE}", f"/{_HOSTILE}/{_HOSTILE}")


@pytest_twisted.ensureDeferred
async def test_acts_are_jobs_after_which_the_directory_is_listed_again(service: Service) -> None:
    _, page = await _open(service, "ann", "/data", ListedEntry("old", "file"), ListedEntry("x", "file"))
    state = _state(page)

    async def acted(path: str, form: dict[str, Any]) -> JobRecord:
        answer = await service.act("ann", path, state | form)
        assert answer.status == 303, answer.body
        job, listing = await _job(service, answer, "act"), await _job(service, answer)
        assert listing.src_filepath == "/data" and listing.after is not None
        assert listing.after.jobs == (job.id,)
        return job

    made = await acted("/web/files/mkdir", {"new_name": "a/b"})
    assert (made.type, made.src_filepath, made.options) == (JobType.MKDIR, "/data/a/b", {"parents": True})
    edited = (await service.act("ann", "/web/files/rename", state | {"name": "old"})).body.decode()
    assert 'form="rename" name="new_name" value="old"' in edited
    renamed = await acted("/web/files/rename", {"old_name": "old", "new_name": "new"})
    assert (renamed.type, renamed.src_filepath, renamed.dst_filepath) == (JobType.RENAME, "/data/old", "/data/new")
    before = len((await service.call("ann", "GET", "/jobs")).json)
    asked = await service.act("ann", "/web/files/remove", state | {"name": ["old", "x"]})
    assert asked.status == 200 and b"cannot be undone" in asked.body
    assert len((await service.call("ann", "GET", "/jobs")).json) == before
    removed = await service.act("ann", "/web/files/remove", state | {"name": ["old", "x"], "confirmed": "1"})
    numbers = [int(number) for number in re.findall(r"act=(\d+)", removed.header("Location"))]
    jobs = [await service.job(number) for number in numbers]
    assert [(job.type, job.src_filepath) for job in jobs] == [
        (JobType.REMOVE, "/data/old"),
        (JobType.REMOVE, "/data/x"),
    ]


@pytest_twisted.ensureDeferred
async def test_a_changed_choice_of_site_acts_on_what_is_shown(service: Service) -> None:
    _, page = await _open(service, "ann", "/data", ListedEntry("x", "file"))
    state = _state(page) | {"place": "2:DUMMY", "typed": "/elsewhere"}
    removed = await service.act("ann", "/web/files/remove", state | {"name": "x", "confirmed": "1"})
    job = await _job(service, removed, "act")
    assert (job.src_siteid, job.src_filepath) == (1, "/data/x")
    # And another site begins at its own default directory.
    other = await service.act("ann", "/web/files/list", _state(page) | {"place": "2:FILE", "typed": "/data"})
    assert (await _job(service, other)).src_filepath != "/data"


@pytest_twisted.ensureDeferred
async def test_a_copy_is_planned_then_carried_out_as_planned(service: Service) -> None:
    _, page = await _open(service, "ann", "/data", ListedEntry("a", "file"), ListedEntry("b*", "directory"))
    state = _state(page) | {"name": ["a", quote("b*")], "other_site": "2:DUMMY", "other_path": "/to"}
    form = state | {"existing": "size", "rules": "- *.tmp\r\n", "preserve": "mtime", "priority": "3", "label": "run7"}
    form["max_active"] = "7"
    planned = await _job(service, await service.act("ann", "/web/files/plan", form), "plan")
    options = {
        "sync": "size",
        "filters": [{"exclude": "*.tmp"}, {"include": "/a"}, {"include": "/b\\*"}, {"exclude": "*"}],
        "preserve": ["mtime"],
    }
    assert (planned.src_filepath, planned.dst_filepath) == ("/data", "/to")
    assert (planned.options, planned.priority, planned.label) == (options | {"dry_run": True}, 3, "run7")
    assert planned.max_active == 7
    view = await service.browse("ann", f"/web/files/plan?plan={planned.id}&fragment=plan")
    assert view.status == 200 and b"disabled" in view.body
    started = await service.act("ann", "/web/files/start", {"plan": str(planned.id)})
    job = await service.job(int(started.header("Location").rpartition("/")[2]))
    assert job.options == options
    same = ("src_siteid", "src_filepath", "dst_siteid", "dst_filepath", "protocol", "priority", "label", "max_tries")
    assert job.max_active == planned.max_active
    assert all(getattr(job, name) == getattr(planned, name) for name in same)
    # A double click starts one copy.
    again = await service.act("ann", "/web/files/start", {"plan": str(planned.id)})
    assert again.header("Location") == started.header("Location")
    # A plan of somebody else, and what is no plan.
    assert (await service.act("bob", "/web/files/start", {"plan": str(planned.id)})).status == 404
    assert (await service.act("ann", "/web/files/start", {"plan": str(job.id)})).status == 400
    at_once = await service.act("ann", "/web/files/plan", state | {"now": "1", "name": "a"})
    job = await service.job(int(at_once.header("Location").rpartition("/")[2]))
    assert (job.src_filepath, job.dst_filepath, job.options) == ("/data/a", "/to/a", {})


@pytest_twisted.ensureDeferred
async def test_a_form_that_is_sent_twice_registers_one_copy(service: Service) -> None:
    _, page = await _open(service, "ann", "/data", ListedEntry("a", "file"))
    state = _state(page) | {"name": "a", "other_site": "2:DUMMY", "other_path": "/to"}
    options = (await service.act("ann", "/web/files/copy", state)).body.decode()
    (token,) = re.findall(r'name="token" value="(\w+)"', options)
    form = state | {"token": token, "now": "1"}
    answers = [await service.act("ann", "/web/files/plan", form | more) for more in ({}, {}, {"priority": "3"})]
    first, again, changed = (answer.header("Location") for answer in answers)
    assert first == again != changed


@pytest_twisted.ensureDeferred
async def test_errors_are_shown_in_the_view(service: Service) -> None:
    _, page = await _open(service, "ann", "/data", ListedEntry("a", "file"))
    state = _state(page)
    for path, form, text in (
        ("remove", {}, "select something first"),
        ("rename", {"name": ["a", "b"]}, "select one entry only"),
        ("rename", {"old_name": "a", "new_name": "b/c"}, "a name has no slash"),
        ("remove", {"name": "../x"}, "a name of an entry is expected"),
        ("mkdir", {}, "type a name"),
        ("copy", {"name": "a"}, "list a directory in the other pane"),
    ):
        answer = await service.act("ann", f"/web/files/{path}", state | form)
        assert answer.status == 400, path
        assert text in answer.body.decode() and 'id="left"' in answer.body.decode(), path
    copying = state | {"name": ["a", "b"], "other_site": "2", "other_path": "/to"}
    for form, text in (
        ({"rules": "*.tmp"}, "&#39;- PATTERN&#39; is expected"),
        ({"rules": "+ *.root"}, "filters can only exclude"),
        ({"delete_extra": "1"}, "one directory only"),
        ({"name": "a", "delete_extra": "1"}, "delete_extra needs sync"),
    ):
        answer = await service.act("ann", "/web/files/plan", copying | form)
        assert answer.status == 400
        assert text in answer.body.decode() and 'name="existing"' in answer.body.decode()
    for place in ("99", "4:SSH", "x", "1:NONE"):
        answer = await service.act("ann", "/web/files/list", {"side": "left", "place": place})
        assert answer.status == 400, place


@pytest_twisted.ensureDeferred
async def test_a_listing_that_fails_says_why(service: Service) -> None:
    answer = await service.act("ann", "/web/files/list", {"side": "right", "place": "1:DUMMY", "typed": "/gone"})
    job = await _job(service, answer, "to_job")
    (token,) = await service.claim(job.id)
    failure = AttemptFailure(FailureScope.SOURCE, FailureCode.NOT_FOUND, "there is no <b>/gone</b>")
    await service.settle(token, JobStatus.FAILED, failure)
    page = (await service.browse("ann", answer.header("Location"))).body.decode()
    assert "there is no &lt;b&gt;/gone&lt;/b&gt;" in page


def test_natural_order() -> None:
    names = ["9", "10", "a1", "A2", "a10", "b", "1a", "", "é2", "٣"]
    assert sorted(names, key=natural_key) == ["", "1a", "9", "10", "a1", "A2", "a10", "b", "é2", "٣"]
    # The numbers of a hostile server have any length.
    longest = "9" * 5000
    assert sorted([f"1{longest}", longest, "run8", "run007"], key=natural_key) == [
        longest,
        f"1{longest}",
        "run007",
        "run8",
    ]


@pytest.mark.parametrize("name", ["a b", "x ", "[a]", "!x", "#", "\\", "a\nb", "*?", "é"])
def test_the_pattern_of_a_name_matches_it_alone(name: str) -> None:
    rules = PatternList([FilterRule(_literal_pattern(name), True), FilterRule("*", False)])
    assert rules.includes(name) and rules.includes(f"{name}/x") and rules.includes(f"{name}/")
    assert not rules.includes(f"{name}x") and not rules.includes(f"d/{name}") and not rules.includes("other")


def test_what_a_field_shows() -> None:
    assert field_text("a\\b é") == "a\\b é"
    assert field_text("a\nb\\") == "a\\nb\\\\"

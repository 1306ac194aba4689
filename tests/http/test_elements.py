"""Jobs, elements, listings and outputs as they come out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
import pytest_twisted
from msgspec import UNSET

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ListedEntry, NewElement
from pdm.workqueue.domain.planning import Skipped
from pdm.workqueue.execution.progress_board import ReportedProgress
from pdm.workqueue.http.views import process_view
from pdm.workqueue.store import listings
from tests.http.service import Service

_TREE = [
    ListedEntry("", "directory"),
    ListedEntry("a", "file", 5, 0o600, 100),
    ListedEntry("sub", "directory"),
    ListedEntry("sub/b", "file"),
]
_NAMES = {"data": ["a", "sub"], "data/sub": ["b"]}


async def _listed(service: Service, user: str, *chunks: list[ListedEntry]) -> int:
    job = await service.submit(user)
    (token,) = await service.claim(job["id"])
    await service.list_with(token, *chunks)
    await service.settle(token)
    return job["id"]


@pytest_twisted.ensureDeferred
async def test_a_listing_stands_in_element_and_output(service: Service) -> None:
    job_id = await _listed(service, "lister", _TREE[:2], _TREE[2:])
    element = (await service.call("lister", "GET", f"/jobs/{job_id}/elements/0")).json
    assert element["listing"] == [_NAMES]
    assert element["entries"]["data"] == [
        {"name": "a", "type": "file", "size": 5, "mode": 0o600, "mtime": 100},
        {"name": "sub", "type": "directory", "size": 0, "mode": None, "mtime": None},
    ]
    assert element["unreadable"] == []
    assert (await service.call("lister", "GET", f"/jobs/{job_id}/elements")).json == [element]
    output = (await service.call("lister", "GET", f"/jobs/{job_id}/elements/0/output")).json
    assert (output["listing"], output["entries"]) == (_NAMES, element["entries"])
    assert (await service.call("lister", "GET", f"/jobs/{job_id}/output")).json == [output]


@pytest_twisted.ensureDeferred
async def test_an_unreadable_directory_is_reported(service: Service) -> None:
    job = await service.submit("unreadable")
    (token,) = await service.claim(job["id"])
    await service.list_with(token, _TREE)
    note = {"path": "sub", "reason": "PERMISSION_DENIED: no"}
    kept = Skipped("data/sub", "directory", "PERMISSION_DENIED", note["reason"])
    await service.database.run("note", listings.add_notes, token, [kept])
    assert (await service.call("unreadable", "GET", f"/jobs/{job['id']}/elements/0")).json["listing"] == []
    await service.settle(token)
    assert (await service.call("unreadable", "GET", f"/jobs/{job['id']}/elements/0")).json["unreadable"] == [note]


@pytest_twisted.ensureDeferred
async def test_the_listing_of_a_copy_is_made_of_what_followed_from_it(service: Service) -> None:
    job = await service.submit("copier", "/copy")
    (listing,) = await service.claim(job["id"])
    files = [NewElement(JobType.COPY, f"data/{name}", f"copy/{name}", size=4) for name in ("x", "deep/er/y", "deep/z")]
    empty = NewElement(JobType.MKDIR, "data/empty", "copy/empty", is_directory=True)
    await service.extend(listing, *files, empty)
    await service.settle(listing)
    expected = {
        "data": ["x", "deep", "empty"],
        "data/deep": ["er", "z"],
        "data/deep/er": ["y"],
        "data/empty": [],
    }
    element = (await service.call("copier", "GET", f"/jobs/{job['id']}/elements/0")).json
    assert element["listing"] == [expected]
    assert element["entries"]["data/deep/er"] == [{"name": "y", "type": "file", "size": 4, "mode": None, "mtime": None}]
    assert element["skipped"] == []
    assert (await service.call("copier", "GET", f"/jobs/{job['id']}/output")).json[0]["listing"] == expected
    array = (await service.call("copier", "GET", f"/jobs/{job['id']}/elements")).json
    assert [each["listing"] for each in array] == [[]] * 5
    assert [(each["id"], each["type"]) for each in array] == [
        (0, "LIST"),
        (1, "COPY"),
        (2, "COPY"),
        (3, "COPY"),
        (4, "MKDIR"),
    ]


@pytest_twisted.ensureDeferred
async def test_the_listing_of_a_removal_is_made_of_what_followed_from_it(service: Service) -> None:
    job = await service.submit("remover", "/remove")
    (listing,) = await service.claim(job["id"])
    await service.extend(
        listing,
        NewElement(JobType.REMOVE, "data/sub/b"),
        NewElement(JobType.REMOVE, "data/sub", is_directory=True, phase=8),
        NewElement(JobType.REMOVE, "data", is_directory=True, phase=9),
    )
    await service.settle(listing)
    element = (await service.call("remover", "GET", f"/jobs/{job['id']}/elements/0")).json
    assert element["listing"] == [{"data": ["sub"], "data/sub": ["b"]}]


@pytest_twisted.ensureDeferred
async def test_a_file_that_is_copied_lists_itself(service: Service) -> None:
    job = await service.submit("single", "/copy", src_filepath="~/f")
    (listing,) = await service.claim(job["id"])
    await service.extend(listing, NewElement(JobType.COPY, "~/f", "copy", size=4))
    await service.settle(listing)
    assert (await service.call("single", "GET", f"/jobs/{job['id']}/elements/0")).json["listing"] == [{"~": ["f"]}]


@pytest_twisted.ensureDeferred
async def test_a_failure_says_why_and_what_to_do(service: Service) -> None:
    job = await service.submit("failing", "/copy")
    (listing,) = await service.claim(job["id"])
    failure = AttemptFailure(FailureScope.SOURCE, FailureCode.NO_SPACE, "disk full")
    later = datetime.now(UTC) + timedelta(hours=1)
    await service.settle(listing, JobStatus.SUBMITTED, failure, not_before=later)
    element = (await service.call("failing", "GET", f"/jobs/{job['id']}/elements/0")).json
    assert element["error"] == {
        "scope": "source",
        "code": "NO_SPACE",
        "retryable": True,
        "hint": "Free space or ask for quota at the destination, then retry the job.",
        "message": "disk full",
    }
    assert element["not_before"] == later.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert (element["status"], element["attempts"], element["max_tries"]) == ("SUBMITTED", 1, 2)


@pytest_twisted.ensureDeferred
async def test_held_elements_count_as_submitted(service: Service) -> None:
    job = await service.submit("holding")
    (listing,) = await service.claim(job["id"])
    failure = AttemptFailure(FailureScope.SERVICE, FailureCode.CREDENTIAL_EXPIRED, "over")
    await service.settle(listing, JobStatus.HELD, failure, counts=False)
    seen = (await service.call("holding", "GET", f"/jobs/{job['id']}")).json
    assert (seen["num_elements"], seen["num_submitted"], seen["held"]) == (1, 1, 1)
    counts = [value for name, value in seen.items() if name.startswith("num_") and name != "num_elements"]
    assert sum(counts) == seen["num_elements"]


@pytest_twisted.ensureDeferred
async def test_status_of_a_transfer(service: Service) -> None:
    job = await service.submit("moving", "/copy")
    (listing,) = await service.claim(job["id"])
    await service.extend(listing, NewElement(JobType.COPY, "data/a", "copy/a", size=100))
    await service.settle(listing)
    path = f"/jobs/{job['id']}/elements/1/status"
    waiting = (await service.call("moving", "GET", path)).json
    unknown = dict.fromkeys(("transferred", "instant", "average", "elapsed"))
    assert waiting == {"jobid": job["id"], "elementid": 1, "status": "SUBMITTED", "attempts": 0} | unknown
    (token,) = await service.claim(job["id"])
    service.board.update(job["id"], 1, ReportedProgress(40, 20.0, 10.0, 4.0))
    running = (await service.call("moving", "GET", path)).json
    assert (running["status"], running["attempts"]) == ("RUNNING", 1)
    assert [running[name] for name in unknown] == [40, 20.0, 10.0, 4.0]
    await service.settle(token, transferred=100)
    done = (await service.call("moving", "GET", path)).json
    assert (done["status"], done["transferred"], done["instant"]) == ("DONE", 100, None)
    assert done["average"] == done["transferred"] / done["elapsed"]


@pytest_twisted.ensureDeferred
async def test_attempts_and_their_outputs(service: Service) -> None:
    job = await service.submit("trying", "/copy")
    at = f"/jobs/{job['id']}/elements/0/output"

    async def refused(path: str) -> str:
        answer = await service.call("trying", "GET", path)
        assert (answer.status, answer.problem) == (400, "output-not-ready")
        return answer.json["detail"]

    assert "no attempt of element 0" in await refused(at)
    assert await refused(f"{at}/1")
    (first,) = await service.claim(job["id"])
    assert "it is RUNNING" in await refused(at)
    assert "attempt 1 of element 0" in await refused(f"{at}/1")
    assert (await service.call("trying", "GET", f"/jobs/{job['id']}/output")).json == []
    failure = AttemptFailure(FailureScope.SOURCE, FailureCode.CONNECTION, "no answer")
    await service.settle(first, JobStatus.SUBMITTED, failure, log="first try")
    (second,) = await service.claim(job["id"])
    latest = (await service.call("trying", "GET", at)).json
    assert (latest["attempt"], latest["status"], latest["type"]) == (1, "FAILED", "LIST")
    assert "first try" in latest["log"]
    assert "is still running" in await refused(f"{at}/2")
    await service.settle(second, log="second try")
    for which, number in ((at, 2), (f"{at}/2", 2), (f"{at}/-1", 2), (f"{at}/1", 1), (f"{at}/-2", 1)):
        output = (await service.call("trying", "GET", which)).json
        assert (output["jobid"], output["elementid"], output["attempt"]) == (job["id"], 0, number)
        assert ("first try" in output["log"]) == (number == 1)
    for number in (0, 3, -3, 2**63 - 1, -(2**63) + 1):
        assert "it has outputs of 1, 2" in await refused(f"{at}/{number}")
    assert (await service.call("trying", "GET", f"{at}/x")).status == 404
    assert (await service.call("trying", "GET", f"/jobs/{job['id']}/elements/7/output")).problem == "element-not-found"


def blank(file: Path, element_id: int) -> None:
    """Take the lines of an element out of the log file of a job; others stay where they are."""
    lines = file.read_bytes().splitlines(keepends=True)
    key = f" {element_id}.1 ".encode()
    file.write_bytes(b"".join(b"x" * (len(line) - 1) + b"\n" if key in line else line for line in lines))


@pytest_twisted.ensureDeferred
async def test_a_log_that_is_gone_is_a_500(own_service: Service, lost_errors: list[object]) -> None:
    service = own_service
    job_id = await service.copied("gone", "a", "b")
    job = await service.job(job_id)
    file = service.directory / "logs" / job.log_uid[:2] / job.log_uid / "log"
    blank(file, 2)
    for path in (f"/jobs/{job_id}/elements/2/output", f"/jobs/{job_id}/elements/2/output/1", f"/jobs/{job_id}/output"):
        answer = await service.call("gone", "GET", path)
        assert (answer.status, answer.problem) == (500, "log-missing")
        assert f"job {job_id}, element 2, attempt 1" in answer.json["detail"]
    at = f"/jobs/{job_id}/elements/1/output"
    assert (await service.call("gone", "GET", at)).status == 200
    assert len(lost_errors) == 3, "an operator should see it"
    file.unlink()
    assert (await service.call("gone", "GET", at)).status == 500
    live = (await service.call("gone", "GET", f"{at}?live=1")).json
    assert (live["log"], live["end"]) == (None, True)
    lost_errors.clear()


@pytest_twisted.ensureDeferred
async def test_a_late_gap_in_a_long_output_does_not_spoil_it(own_service: Service) -> None:
    service = own_service
    job = await service.submit("long", "/copy")
    (listing,) = await service.claim(job["id"])
    await service.extend(listing, *(NewElement(JobType.COPY, f"data/{n}", f"copy/{n}") for n in range(4)))
    await service.settle(listing)
    for token in await service.claim(job["id"]):
        await service.settle(token, log=("x" * 100 + "\n") * 4000)
    record = await service.job(job["id"])
    blank(service.directory / "logs" / record.log_uid[:2] / record.log_uid / "log", 4)
    outputs = (await service.call("long", "GET", f"/jobs/{job['id']}/output")).json
    assert [output["log"] is None for output in outputs] == [False, False, False, False, True]


@pytest_twisted.ensureDeferred
async def test_filters_of_jobs(service: Service) -> None:
    first = await service.submit("filtering", "/copy", label="one")
    second = await service.submit("filtering", "/list", src_siteid=2)
    third = await service.submit("filtering", "/mkdir", label="two & three")
    await service.call("filtering", "DELETE", f"/jobs/{third['id']}")

    async def found(query: str) -> list[int]:
        answer = await service.call("filtering", "GET", f"/jobs?{query}")
        assert answer.status == 200, answer.body
        return [[first["id"], second["id"], third["id"]].index(job["id"]) + 1 for job in answer.json]

    assert await found("") == [1, 2, 3]
    assert await found("type=COPY,4") == [1, 3]
    assert await found("type=copy&type=MKDIR") == [1, 3]
    assert await found("status=CANCELLED") == [3]
    assert await found("status=SUBMITTED&type=LIST") == [2]
    assert await found("site=2") == await found("site=SOUTH") == [1, 2]
    assert await found("site=4") == await found("site=999") == []
    assert await found("label=" + quote("two & three")) == [3]
    assert await found("limit=2") == [1, 2]
    assert await found(f"after={first['id']}&limit=1") == [2]
    assert await found(f"since={first['timestamp']}") == [1, 2, 3]
    assert await found("since=2020-01-01") == [1, 2, 3]
    assert await found("since=2100-01-01T00:00:00%2B01:00") == []


@pytest_twisted.ensureDeferred
async def test_filters_of_elements(service: Service) -> None:
    job_id = await service.copied("sifting", "a", "b", status=JobStatus.FAILED)

    async def found(query: str) -> list[int]:
        answer = await service.call("sifting", "GET", f"/jobs/{job_id}/elements?{query}")
        assert answer.status == 200, answer.body
        return [element["id"] for element in answer.json]

    assert await found("") == [0, 1, 2]
    assert await found("status=FAILED") == await found("type=COPY") == [1, 2]
    assert await found("status=DONE,FAILED&limit=2") == [0, 1]
    assert await found("after=0&limit=1") == [1]
    assert await found("site=2") == await found("site=NORTH") == [0, 1, 2]
    assert await found("site=3") == await found("label=none") == await found("since=2100-01-01") == []
    assert await found("since=2020-01-01&limit=2") == [0, 1]


_FIRST = "host=node7 pid=4711 job=1 element=1"
_DIED = {"host": "node7", "pid": 4711, "ended": "signal 9"}


@pytest.mark.parametrize(
    ("first", "code", "expected"),
    [
        (_FIRST, FailureCode.CRASHED, _DIED),
        (_FIRST, FailureCode.TIMEOUT, _DIED | {"ended": None}),
        ("host=node7 pid=4712 job=1", FailureCode.CRASHED, _DIED | {"pid": 4712, "ended": None}),
        ("host=node7 job=1 element=1", FailureCode.CRASHED, None),
        (f"a path with {_FIRST}", FailureCode.CRASHED, None),
    ],
)
def test_the_process_of_an_attempt_is_that_of_the_first_line(first: str, code: FailureCode, expected: Any) -> None:
    failure = AttemptFailure(FailureScope.SERVICE, code, "the helper process 4711 ended (signal 9; it was silent)")
    found = process_view(f"2027-01-15T08:00:00.250Z 1.1 {first}\n" + "x" * 1000, failure)
    assert (None if found is UNSET else msgspec.to_builtins(found)) == expected

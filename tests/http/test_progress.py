"""How far jobs are, and the logs of attempts that run, as the API gives them out."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ClaimToken, NewElement
from pdm.workqueue.execution.progress_board import ReportedProgress
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.store import listings
from tests.http.service import Certificates, Service, certificates, running, service

__all__ = ["certificates", "service"]

KEYS = {
    *("listing", "bytes_done", "bytes_total", "bytes_moving", "files_done", "files_total"),
    *("instant", "average", "files_per_second", "elapsed", "eta"),
}


async def progress(service: Service, user: str, job_id: int) -> dict[str, Any]:
    """Of a job; the same by both of its routes, but for the time that has passed."""
    job = (await service.call(user, "GET", f"/jobs/{job_id}")).json
    status = (await service.call(user, "GET", f"/jobs/{job_id}/status")).json
    assert status.keys() == {"jobid", "status", "skipped", "already_there", "progress"}
    assert job["progress"].keys() == status["progress"].keys() == KEYS
    assert job["progress"]["bytes_done"] == job["bytes_done"]
    seen: dict[str, Any] = job["progress"]
    return seen


@pytest_twisted.ensureDeferred
async def test_a_copy_from_its_listing_to_its_end(service: Service) -> None:
    job = await service.submit("copying", "/copy")
    waiting = await progress(service, "copying", job["id"])
    assert (waiting["listing"], waiting["elapsed"], waiting["bytes_moving"]) == (True, None, 0)
    (listing,) = await service.claim(job["id"])
    files = [NewElement(JobType.COPY, f"data/{name}", f"copy/{name}", size=100) for name in "abcd"]
    await service.extend(listing, *files[:2])
    tokens = await service.claim(job["id"])
    listed = await progress(service, "copying", job["id"])
    assert (listed["listing"], listed["bytes_total"], listed["files_total"], listed["eta"]) == (True, None, None, None)
    assert listed["elapsed"] >= 0

    await service.extend(listing, *files[2:])
    await service.settle(listing)
    tokens += await service.claim(job["id"])
    elsewhere = await progress(service, "copying", job["id"])
    assert (elsewhere["listing"], elsewhere["bytes_total"], elsewhere["files_total"]) == (False, 400, 4)
    assert [elsewhere[name] for name in ("bytes_moving", "instant", "files_per_second", "eta")] == [None] * 4

    service.board.begin(job["id"], 1)
    service.board.update(job["id"], 1, ReportedProgress(40, 20.0, 10.0, 4.0))
    here = await progress(service, "copying", job["id"])
    assert (here["bytes_done"], here["bytes_moving"], here["files_done"]) == (0, 40, 0)
    for token in tokens:
        service.board.drop(job["id"], token.element_id, finished=True, proven=100)
        await service.settle(token, transferred=100)
    ended = await progress(service, "copying", job["id"])
    assert (ended["bytes_done"], ended["bytes_moving"], ended["files_done"], ended["files_total"]) == (400, 0, 4, 4)
    assert [ended[name] for name in ("instant", "files_per_second", "eta")] == [None] * 3
    assert ended["average"] == 400 / ended["elapsed"]
    (in_list,) = (await service.call("copying", "GET", "/jobs")).json
    assert "progress" not in in_list


@pytest_twisted.ensureDeferred
async def test_a_copy_of_which_a_file_failed(service: Service) -> None:
    job_id = await service.copied("failing", "a", "b", status=JobStatus.FAILED)
    ended = await progress(service, "failing", job_id)
    assert (ended["listing"], ended["files_done"], ended["files_total"], ended["bytes_total"]) == (False, 0, 2, 20)


@pytest_twisted.ensureDeferred
async def test_an_element_that_another_daemon_runs(service: Service) -> None:
    job = await service.submit("elsewhere", "/copy")
    (listing,) = await service.claim(job["id"])
    failure = AttemptFailure(FailureScope.SOURCE, FailureCode.CONNECTION, "no answer")
    await service.settle(listing, JobStatus.SUBMITTED, failure)
    await service.claim(job["id"])
    seen = (await service.call("elsewhere", "GET", f"/jobs/{job['id']}/elements/0/status")).json
    assert [seen[name] for name in ("transferred", "instant", "average", "elapsed")] == [None] * 4


async def begun(service: Service, token: ClaimToken, *lines: str) -> LogRef:
    """The log of an attempt that runs."""
    record = await service.job(token.job_id)
    ref = LogRef(record.log_uid, token.element_id, token.attempt)
    service.logs.open(ref, "the first line")
    for line in lines:
        service.logs.write(ref, line)
    return ref


@pytest.fixture
def seconds() -> list[float]:
    """What the clock shows by which rates are measured."""
    return [0.0]


@pytest.fixture
def timed(certificates: Certificates, tmp_path: Path, seconds: list[float]) -> Iterator[Service]:
    yield from running(Service(tmp_path, certificates, monotonic=lambda: seconds[0]))


@pytest_twisted.ensureDeferred
async def test_a_job_that_outlasts_its_credential_says_so(timed: Service, seconds: list[float]) -> None:
    await timed.give_credential("slow", timedelta(hours=2))
    job = await timed.submit("slow", "/copy", protocol="GRIDFTP")
    assert "warnings" not in job
    (listing,) = await timed.claim(job["id"])
    await timed.extend(listing, NewElement(JobType.COPY, "data/a", "copy/a", size=10_000_000))
    await timed.settle(listing)
    await timed.claim(job["id"])
    path = f"/jobs/{job['id']}"

    async def warnings(moved: int) -> list[str]:
        seconds[0] += 10
        timed.board.update(job["id"], 1, ReportedProgress(moved, moved / 10, moved / 10, seconds[0]))
        return (await timed.call("slow", "GET", path)).json.get("warnings", [])

    timed.board.begin(job["id"], 1)
    # Rate and size are known now: at 100 bytes a second it takes a day.
    (warning,) = await warnings(1000)
    assert "the proxy expires at" in warning
    assert "pdm delegate" in warning
    assert await warnings(5_000_000) == []
    # With another one it may be as slow as it likes; what is known of credentials is known for a moment.
    await timed.give_credential("slow", timedelta(days=30))
    timed.skip[0] += timedelta(minutes=1)
    assert await warnings(5_000_100) == []


@pytest_twisted.ensureDeferred
async def test_a_copy_that_waits_is_estimated_by_an_earlier_one(timed: Service) -> None:
    await timed.give_credential("again", timedelta(hours=2))

    async def listed(*files: NewElement, free: int | None = None) -> str:
        job = await timed.submit("again", "/copy", protocol="GRIDFTP")
        (listing,) = await timed.claim(job["id"])
        await timed.extend(listing, *files)
        if free is not None:
            assert await timed.database.run("free", listings.add_free_bytes, listing, free)
        await timed.settle(listing)
        return f"/jobs/{job['id']}"

    files = [NewElement(JobType.COPY, f"data/{name}", f"copy/{name}", size=40_000) for name in "ab"]
    first = await listed(*files)
    tokens = await timed.claim(int(first.rpartition("/")[2]))
    timed.skip[0] += timedelta(seconds=100)
    running = (await timed.call("again", "GET", first)).json["estimate"]
    assert (running["files"], running["bytes"], running["based_on_jobs"]) == (2, 80_000, 0)
    assert {running[name] for name in ("seconds", "bytes_per_second", "files_per_second", "free_bytes")} == {None}
    assert running["credential_until"] is not None
    for token in tokens:
        await timed.settle(token, transferred=40_000)
    assert "estimate" not in (await timed.call("again", "GET", first)).json

    large = NewElement(JobType.COPY, "data/large", "copy/large", size=8_000_000)
    second = await listed(large, free=7 << 20)
    timed.skip[0] += timedelta(seconds=2)
    answer = (await timed.call("again", "GET", second)).json
    estimate = answer["estimate"]
    assert (estimate["based_on_jobs"], estimate["free_bytes"]) == (1, 7 << 20)
    assert estimate["seconds"] == pytest.approx(8_000_000 / estimate["bytes_per_second"])
    assert estimate["bytes_per_second"] == pytest.approx(800, rel=0.1)
    credential, space = answer["warnings"]
    assert "at the rate of earlier copies this job will take until" in credential
    assert space == (
        "the copy needs 8000000 bytes, but the destination had 7340032 bytes free when the source was listed"
    )


@pytest_twisted.ensureDeferred
async def test_the_log_of_a_running_attempt(service: Service) -> None:
    job = await service.submit("following", "/copy")
    at = f"/jobs/{job['id']}/elements/0/output"

    async def live(query: str = "", which: str = "") -> dict[str, Any]:
        answer = await service.call("following", "GET", f"{at}{which}?live=1{query}")
        assert answer.status == 200, answer.body
        found: dict[str, Any] = answer.json
        return found

    assert (await service.call("following", "GET", f"{at}?live=1")).problem == "output-not-ready"
    (first,) = await service.claim(job["id"])
    nothing = await live()
    assert (nothing["log"], nothing["offset"], nothing["end"], nothing["status"]) == ("", 0, False, "RUNNING")
    ref = await begun(service, first, "one", "two")
    seen = await live()
    assert seen["log"].splitlines()[2].endswith("Z two")
    assert (seen["attempt"], seen["status"], seen["end"], seen["type"]) == (1, "RUNNING", False, "LIST")
    assert (await live(f"&offset={seen['offset']}"))["log"] == ""
    service.logs.write(ref, "three")
    more = await live(f"&offset={seen['offset']}", "/1")
    assert more["log"].endswith("Z three\n")
    assert more["log"].count("\n") == 1

    # Who asks as the reference says is answered as it says.
    for path in (at, f"{at}/1", f"{at}/-1"):
        refused = await service.call("following", "GET", path)
        assert (refused.status, refused.problem) == (400, "output-not-ready")

    await service.logs.close(ref, "the end")
    failure = AttemptFailure(FailureScope.SOURCE, FailureCode.CONNECTION, "no answer")
    await service.settle(first, JobStatus.SUBMITTED, failure, log=None)
    last = await live(f"&offset={more['offset']}", "/1")
    assert (last["log"].partition("Z ")[2], last["status"], last["end"]) == ("the end\n", "FAILED", True)
    (second,) = await service.claim(job["id"])
    await begun(service, second, "again")
    assert "again" in (await live("", "/2"))["log"] == (await live("", "/-1"))["log"] == (await live())["log"]
    assert "three" in (await live("", "/-2"))["log"]
    whole = (await service.call("following", "GET", f"{at}/1")).json
    assert whole["log"] == (await live("", "/1"))["log"]
    assert whole.keys().isdisjoint({"offset", "end"})


@pytest_twisted.ensureDeferred
async def test_a_long_log_comes_in_pieces(service: Service) -> None:
    job = await service.submit("paging", "/mkdir")
    (token,) = await service.claim(job["id"])
    await service.settle(token, log=("x" * 1000 + "\n") * 900)
    at = f"/jobs/{job['id']}/elements/0/output"
    pieces = [(await service.call("paging", "GET", f"{at}?live=1")).json]
    while not pieces[-1]["end"]:
        assert len(pieces[-1]["log"]) <= 256 * 1024
        pieces.append((await service.call("paging", "GET", f"{at}?live=1&offset={pieces[-1]['offset']}")).json)
    assert len(pieces) == 4
    whole = (await service.call("paging", "GET", at)).json
    assert "".join(piece["log"] for piece in pieces) == whole["log"]


@pytest_twisted.ensureDeferred
async def test_what_cannot_be_followed(service: Service) -> None:
    job = await service.submit("lost", "/mkdir")
    (token,) = await service.claim(job["id"])
    await service.settle(token, log=None)
    at = f"/jobs/{job['id']}/elements/0/output"
    gone = (await service.call("lost", "GET", f"{at}?live=1")).json
    assert (gone["log"], gone["end"]) == (None, True)
    for which in ("/2", "/0", "/-2", f"/{2**63 - 1}"):
        answer = await service.call("lost", "GET", f"{at}{which}?live=1")
        assert (answer.status, answer.problem) == (400, "output-not-ready")
    for query, place in (("offset=5", "?offset"), ("live=1&offset=-1", "?offset"), ("live=perhaps", "?live")):
        answer = await service.call("lost", "GET", f"{at}?{query}")
        assert (answer.status, answer.problem) == (400, f"invalid-input {place}")
    assert (await service.call("stranger", "GET", f"{at}?live=1")).problem == "job-not-found"
    assert (
        await service.call("lost", "GET", f"/jobs/{job['id']}/elements/9/output?live=1")
    ).problem == "element-not-found"

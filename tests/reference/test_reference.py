"""The REST reference to the letter: each of its examples, over real TLS, compared in keys, types and codes.

The service may tell more than the reference; it must tell all of that, under the same names and with the same types.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from attrs import frozen
from twisted.internet.defer import Deferred

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import NewElement
from pdm.workqueue.http.endpoints import ENDPOINTS
from pdm.workqueue.store import jobs
from tests.http.service import Answer, Certificates, Service, running
from tests.reference.examples import READS, SUBMISSIONS, Read, Submission

_USER = "reference"
#: Keys whose values the reference only hints at: numbers that are given out, times, hashes, logs, paths of the data.
_FREE = frozenset({"id", "user_id", "job_id", "jobid", "log_uid", "timestamp", "log", "size", "attempts", "listing"})
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\dZ)?")
_SITES = """
[TWELVE]
id = 12
gridftp = gsiftp://twelve.example.org:2811
[THIRTEEN]
id = 13
gridftp = gsiftp://thirteen.example.org:2811
[FOURTEEN]
id = 14
gridftp = gsiftp://fourteen.example.org:2811
[FIFTEEN]
id = 15
gridftp = gsiftp://fifteen.example.org:2811
"""


@frozen
class Prepared:
    """A service in the state that the examples speak of.

    Attributes:
        numbers: the reference's number of a job → ours.
    """

    service: Service
    numbers: dict[str, int]

    def path(self, path: str) -> str:
        return re.sub(r"(?<=/jobs/)\d+", lambda match: str(self.numbers[match.group()]), path)

    async def get(self, path: str) -> Answer:
        return await self.service.call(_USER, "GET", path, Accept="application/json")


@pytest.fixture(scope="module")
def prepared(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    service = Service(tmp_path_factory.mktemp("reference"), certificates)
    for _ in running(service):
        (service.directory / "sites.d" / "sites.conf").write_text(_SITES)
        assert service.context.sites.reload() is None
        yield Prepared(service, pytest_twisted.blockon(Deferred.fromCoroutine(_prepare(service))))


async def _prepare(service: Service) -> dict[str, int]:
    await service.give_credential(_USER)
    body = {"src_siteid": 13, "dst_siteid": 15, "src_filepath": "~/file1.txt", "dst_filepath": "~/file2.txt"}
    numbers = {}
    for name, attempts in (("12345", 1), ("12", 2)):
        answer = await service.call(_USER, "POST", "/copy", body)
        job_id = numbers[name] = int(answer.json["id"])
        (listing,) = await service.claim(job_id)
        await service.extend(listing, NewElement(JobType.COPY, "~/file1.txt", "~/file2.txt", size=123354523))
        await service.settle(listing, log="The output from the list command run on the worker")
        for number in range(1, attempts + 1):
            (copy,) = await service.claim(job_id)
            failure = AttemptFailure(FailureScope.TRANSFER, FailureCode.CONNECTION, "lost")
            log = "The output from the copy command run on the worker"
            if number == attempts:
                await service.settle(copy, log=log)
            else:
                await service.settle(copy, JobStatus.SUBMITTED, failure, log=log)
    return numbers


def _compare(given: Any, expected: Any, where: str = "$") -> None:
    """Check that the answer has what the example has: each key, the same type, and the value where that is fixed."""
    assert type(given) is type(expected), where
    if isinstance(expected, dict):
        if where.rpartition(".")[2].startswith("listing"):
            # Names of directories are the data's.
            for names in given.values():
                assert all(isinstance(name, str) for name in names), where
            return
        assert set(expected) <= set(given), f"{where}: missing {set(expected) - set(given)}"
        for key, value in expected.items():
            _compare(given[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert given or where.endswith(".listing"), where
        for number, item in enumerate(given):
            _compare(item, expected[min(number, len(expected) - 1)], f"{where}[{number}]")
    elif where.endswith(".timestamp"):
        assert _MOMENT.fullmatch(given), where
    elif where.rpartition(".")[2] not in _FREE:
        assert given == expected, where


def test_the_reference_has_nine_gets_and_six_posts() -> None:
    assert (len(READS), len(SUBMISSIONS)) == (9, 6)
    table = {(endpoint.method, re.sub(r"{\w+}", "N", endpoint.path)) for endpoint in ENDPOINTS}
    for read in READS:
        assert ("GET", re.sub(r"(?<=/)\d+", "N", read.path)) in table
    for submission in SUBMISSIONS:
        assert ("POST", submission.path) in table


@pytest.mark.parametrize("read", READS, ids=lambda read: read.path)
@pytest_twisted.ensureDeferred
async def test_reads(prepared: Prepared, read: Read) -> None:
    answer = await prepared.get(prepared.path(read.path))
    assert answer.status == 200
    assert answer.header("Content-Type") == "application/json"
    given = answer.json
    if read.path == "/jobs":
        given = [job for job in given if job["id"] in prepared.numbers.values()]
        assert given
    if read.path.endswith("/elements"):
        # Element 0 is the listing, which the reference's example leaves out.
        assert (given[0]["id"], given[0]["type"]) == (0, "LIST")
        given = given[1:]
    _compare(given, read.reply)


@pytest.mark.parametrize("read", READS, ids=lambda read: read.path)
@pytest_twisted.ensureDeferred
async def test_codes_of_reads(prepared: Prepared, read: Read, lost_errors: list[Any]) -> None:
    """Every code that the reference names can be met, each with a problem in JSON."""
    met = {200}
    if 404 in read.statuses:
        met.add((await prepared.get(re.sub(r"/jobs/\d+", "/jobs/999999", read.path))).status)
        if "/elements/" in read.path:
            path = prepared.path(read.path).replace("/elements/1", "/elements/999")
            assert (await prepared.get(path)).status == 404
    if 400 in read.statuses:
        waiting = (await prepared.service.call(_USER, "POST", "/list", dict(SUBMISSIONS[1].request))).json["id"]
        path = re.sub(r"/jobs/\d+/elements/1", f"/jobs/{waiting}/elements/0", read.path)
        met.add((await prepared.get(path)).status)
        if read.path.endswith("/output/1"):
            assert (await prepared.get(prepared.path(read.path)[:-1] + "7")).status == 400
            assert (await prepared.get(prepared.path(read.path)[:-1] + "0")).status == 400
    if 500 in read.statuses:
        met.add(await _status_without_log(prepared, read.path))
        lost_errors.clear()
    assert met >= set(read.statuses)


async def _status_without_log(prepared: Prepared, path: str) -> int:
    service = prepared.service
    job = await service.database.read("fetch", jobs.fetch, prepared.numbers["12"], None)
    assert job is not None
    log = service.directory / "logs" / job.log_uid[:2] / job.log_uid / "log"
    aside = log.with_suffix(".aside")
    log.rename(aside)
    try:
        return (await prepared.get(prepared.path(path))).status
    finally:
        aside.rename(log)


@pytest.mark.parametrize("submission", SUBMISSIONS, ids=lambda submission: submission.path)
@pytest_twisted.ensureDeferred
async def test_submissions(prepared: Prepared, submission: Submission) -> None:
    service = prepared.service
    # The reference writes "Data:", its clients send the JSON without saying that it is.
    raw = json.dumps(dict(submission.request)).encode()
    for content_type in ("application/json", ""):
        answer = await service.call(_USER, "POST", submission.path, raw=raw, Content_Type=content_type)
        assert answer.status == 200
        _compare(answer.json, dict(submission.reply))
        assert ("dst_siteid" in answer.json) == ("dst_siteid" in submission.reply)
        assert ("dst_filepath" in answer.json) == ("dst_filepath" in submission.reply)
        assert (await prepared.get(f"/jobs/{answer.json['id']}")).json == answer.json
        (element,) = (await prepared.get(f"/jobs/{answer.json['id']}/elements")).json
        first = "LIST" if submission.reply["type"] in ("COPY", "REMOVE") else submission.reply["type"]
        assert (element["id"], element["type"]) == (0, first)


@pytest.mark.parametrize("submission", SUBMISSIONS, ids=lambda submission: submission.path)
@pytest_twisted.ensureDeferred
async def test_codes_of_submissions(
    prepared: Prepared, submission: Submission, monkeypatch: pytest.MonkeyPatch, lost_errors: list[Any]
) -> None:
    service = prepared.service
    before = (await prepared.get("/jobs")).json
    for key in submission.request:
        body = {name: value for name, value in submission.request.items() if name != key}
        answer = await service.call(_USER, "POST", submission.path, body)
        assert (answer.status, answer.problem) == (400, f"invalid-input $.{key}")

    def fail(*args: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(jobs, "submit", fail)
    assert (await service.call(_USER, "POST", submission.path, dict(submission.request))).status == 500
    lost_errors.clear()
    assert (await prepared.get("/jobs")).json == before


@pytest_twisted.ensureDeferred
async def test_no_job_is_an_empty_array(prepared: Prepared) -> None:
    assert (await prepared.service.call("nobody", "GET", "/jobs")).json == []

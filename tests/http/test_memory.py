"""What is answered from memory is what the database says, and only to whom it may be said."""

from __future__ import annotations

import itertools
import tracemalloc
from datetime import timedelta
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.jobs import JobRecord, NewElement
from pdm.workqueue.http import transactions
from pdm.workqueue.store import jobs
from tests.http.service import Service
from tests.http.test_streams import _connection, _get
from tests.support.records import new_job


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the jobs that were read from the database so far."""
    numbers: list[int] = []
    fetch = jobs.fetch

    def observe(session: Any, job_id: int, owner_id: int | None) -> JobRecord | None:
        numbers.append(job_id)
        return fetch(session, job_id, owner_id)

    monkeypatch.setattr(jobs, "fetch", observe)
    return numbers


def lasting(job: dict[str, Any]) -> dict[str, Any]:
    """A job without fields that change between answers, are missing in arrays, or are for operators only."""
    passing = {"progress", "queue", "next_try", "waiting", "owner"}
    return {key: value for key, value in job.items() if key not in passing}


async def _status(service: Service, user: str, job_id: int) -> str:
    """The status of a job, by both routes."""
    job = await service.call(user, "GET", f"/jobs/{job_id}")
    status = await service.call(user, "GET", f"/jobs/{job_id}/status")
    assert (status.json["jobid"], status.json["status"]) == (job_id, job.json["status"])
    return str(status.json["status"])


@pytest_twisted.ensureDeferred
async def test_a_poll_costs_no_look_into_the_database(service: Service, reads: list[int]) -> None:
    job = await service.submit("poller")
    for _ in range(3):
        assert (await service.call("poller", "GET", f"/jobs/{job['id']}")).json == job
        assert await _status(service, "poller", job["id"]) == "SUBMITTED"
    assert reads == []


@pytest_twisted.ensureDeferred
async def test_a_read_after_an_answer_sees_its_result(service: Service) -> None:
    """One user changes a job, another, an operator on a connection of their own, reads it; and the other way round."""
    changers = itertools.cycle(["changer", "operator"])
    readers = itertools.cycle(["operator", "changer"])
    for _ in range(5):
        job_id = (await service.submit("changer", "/copy"))["id"]
        assert await _status(service, next(readers), job_id) == "SUBMITTED"
        (listing,) = await service.claim(job_id)
        assert await _status(service, next(readers), job_id) == "RUNNING"
        await service.extend(listing, *(NewElement(JobType.COPY, f"s/{n}", f"d/{n}") for n in range(3)))
        assert (await service.call(next(readers), "GET", f"/jobs/{job_id}")).json["num_elements"] == 4
        await service.settle(listing)
        assert (await service.call(next(readers), "GET", f"/jobs/{job_id}")).json["num_done"] == 1
        cancelled = (await service.call(next(changers), "DELETE", f"/jobs/{job_id}")).json
        assert cancelled["num_cancelled"] == 3
        assert lasting((await service.call(next(readers), "GET", f"/jobs/{job_id}")).json) == lasting(cancelled)
        retried = (await service.call(next(changers), "POST", f"/jobs/{job_id}/retry")).json
        assert retried.pop("retried") == 3
        assert lasting((await service.call(next(readers), "GET", f"/jobs/{job_id}")).json) == lasting(retried)


@pytest_twisted.ensureDeferred
async def test_readers_beside_a_writer_never_see_time_run_backwards(service: Service) -> None:
    job_id = (await service.submit("forward", "/copy"))["id"]
    (listing,) = await service.claim(job_id)
    await service.extend(listing, *(NewElement(JobType.COPY, f"s/{n}", f"d/{n}") for n in range(30)))
    await service.settle(listing)
    tokens = await service.claim(job_id)
    ended = False

    async def read(user: str, path: str) -> None:
        seen = 0
        while not ended:
            answer = (await service.call(user, "GET", path)).json
            job = answer if isinstance(answer, dict) else answer[-1]
            assert job["num_done"] >= seen
            seen = job["num_done"]
            # What the list of jobs tells, the job itself, asked next, knows too.
            again = (await service.call(user, "GET", f"/jobs/{job_id}")).json["num_done"]
            assert again >= seen
            seen = again

    readers = [
        Deferred.fromCoroutine(read(user, path))
        for user, path in (("forward", f"/jobs/{job_id}"), ("forward", "/jobs"), ("operator", f"/jobs/{job_id}"))
    ]
    for token in tokens:
        await service.settle(token)
        done = (await service.call("forward", "GET", f"/jobs/{job_id}")).json["num_done"]
        assert done == token.element_id + 1
    ended = True
    await gatherResults(readers)
    assert await _status(service, "forward", job_id) == "DONE"


@pytest_twisted.ensureDeferred
async def test_another_users_job_in_memory_is_404(service: Service, reads: list[int]) -> None:
    job = await service.submit("keeper")
    for path in (f"/jobs/{job['id']}", f"/jobs/{job['id']}/status"):
        assert (await service.call("keeper", "GET", path)).status == 200
        answer = await service.call("prying", "GET", path)
        assert (answer.status, answer.problem) == (404, "job-not-found")
        assert (await service.call("operator", "GET", path)).status == 200
    assert reads == []


@pytest_twisted.ensureDeferred
async def test_a_connection_whose_proxy_has_ended_gets_nothing_from_memory(own_service: Service) -> None:
    user = own_service.certificates.of("ending")
    job = await own_service.submit("ending")
    proxy = user.proxy(lifetime=timedelta(hours=2))
    path = f"/jobs/{job['id']}"
    assert (await own_service.call(proxy, "GET", path)).status == 200
    own_service.skip[0] = timedelta(hours=3)
    for _ in range(2):
        answer = await own_service.call(proxy, "GET", path)
        assert (answer.status, answer.problem) == (401, "certificate-needed")
    # The certificate itself lasts, on its own connection.
    assert (await own_service.call(user, "GET", path)).status == 200


@pytest_twisted.ensureDeferred
async def test_a_service_that_has_stopped_answers_nothing_from_memory(own_service: Service) -> None:
    """Another daemon may have the database by then."""
    job = await own_service.submit("stopping")
    await own_service.database.stop()
    answer = await own_service.call("stopping", "GET", f"/jobs/{job['id']}")
    assert (answer.status, answer.problem) == (503, "stopping")


@pytest_twisted.ensureDeferred
@pytest.mark.full
async def test_ten_thousand_jobs_are_listed_page_by_page(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 10_000
    user_id = await service.user_id("lister")
    new = new_job(user_id, JobType.LIST, log_uid="0" * 32)

    def fill(session: Any) -> list[JobRecord]:
        return [jobs.submit(session, new, None, service.now()) for _ in range(count)]

    records = await service.database.run("fill", fill)
    sizes: list[int] = []
    page = jobs.page

    def observe(*args: Any) -> list[JobRecord]:
        found = page(*args)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(jobs, "page", observe)
    listed = (await service.call("lister", "GET", "/jobs")).json
    assert [job["id"] for job in listed] == [record.id for record in records]
    assert (max(sizes), sum(sizes)) == (transactions.PAGE_SIZE, count)
    some = (await service.call("lister", "GET", "/jobs?limit=1300")).json
    assert some == listed[:1300]
    # The newest are cached, the oldest are not any more; both answers are equal.
    for record in (records[0], records[-1]):
        job = (await service.call("lister", "GET", f"/jobs/{record.id}")).json
        assert lasting(job) == listed[records.index(record)]


@pytest_twisted.ensureDeferred
@pytest.mark.full
async def test_a_long_answer_needs_little_memory(service: Service) -> None:
    job_id = (await service.submit("long", "/copy"))["id"]
    (listing,) = await service.claim(job_id)
    name = "/".join(["n" * 200] * 5)
    for start in range(0, 8000, 2000):
        files = (f"{number}/{name}" for number in range(start, start + 2000))
        await service.extend(listing, *(NewElement(JobType.COPY, f"s/{each}", f"d/{each}") for each in files))

    def read() -> int:
        size = 0
        with _connection(service, "long", _get(f"/jobs/{job_id}/elements")) as connection:
            while part := connection.recv(1 << 16):
                size += len(part)
        return size

    await deferToThread(read)
    tracemalloc.start()
    try:
        size = await deferToThread(read)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 16 * 1024**2
    # Some pages of 500 elements, in several forms, each of which is a sixteenth of the answer.
    assert peak < size / 2

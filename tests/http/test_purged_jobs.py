"""Jobs that were purged: 410 with their summary on every route, and their stored receipts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import pytest_twisted
import sqlalchemy as sa
from sqlalchemy.orm import Session
from twisted.internet.defer import Deferred

from pdm.workqueue.client.errors import _BY_STATUS, JobPurgedError, NotFoundError
from pdm.workqueue.client.receipts import receipt_trust, verify_receipt
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.retention import RetentionPolicy
from pdm.workqueue.http.endpoint import Allow
from pdm.workqueue.http.endpoints import ENDPOINTS
from pdm.workqueue.logstore.attempt_log import directory_of
from pdm.workqueue.WorkqueueDB import Job
from tests.http.service import Service

_KEPT = timedelta(days=30)


async def _purge(service: Service, **kept: Any) -> None:
    """Purge all jobs of the service that have ended."""
    retention = service.assembly.timed.retention
    retention.policy = RetentionPolicy(jobs=_KEPT, **kept)
    await service.database.run("age", _age, service.now() - _KEPT - timedelta(minutes=1))
    assert await retention.run()


def _age(session: Session, ended: datetime) -> None:
    session.execute(sa.update(Job).where(Job.finished_at.is_not(None)).values(finished_at=ended))


@pytest.fixture(scope="module")
def purged(service: Service) -> Iterator[tuple[int, int]]:
    """Two purged jobs, the second without a receipt."""

    async def make() -> tuple[int, int]:
        second = await service.copied("ada", "c", status=JobStatus.FAILED)
        # Cached, as after any request.
        assert (await service.call("ada", "GET", f"/jobs/{second}")).status == 200
        uid = (await service.job(second)).log_uid
        await _purge(service, receipts=_KEPT)
        first = await service.copied("ada", "a", "b")
        await _purge(service)
        assert not (service.directory / directory_of("var/logs", uid)).exists()
        return first, second

    return pytest_twisted.blockon(Deferred.fromCoroutine(make()))


@pytest_twisted.ensureDeferred
async def test_every_route_of_a_job_says_what_it_was(service: Service, purged: tuple[int, int]) -> None:
    number = purged[1]
    asked = 0
    for endpoint in ENDPOINTS:
        if "{job_id}" not in endpoint.path or endpoint.allow is Allow.NODES:
            continue
        asked += 1
        path = endpoint.path.format(job_id=number, element_id=0, attempt=1)
        body: dict[str, str] | None = None if endpoint.body is None else {}
        for user, status in (("ada", 410), ("operator", 410), ("mallory", 404)):
            answer = await service.call(user, endpoint.method, path, body)
            assert answer.status == status, (endpoint.method, path, user, answer.body)
            if status == 410:
                assert answer.json["type"].endswith("job-purged")
                assert answer.json["detail"].startswith(f"job {number} ended FAILED on ")
    assert asked > 10
    assert [job["id"] for job in (await service.call("ada", "GET", "/jobs")).json] == []


@pytest_twisted.ensureDeferred
async def test_the_page_of_a_job_says_what_it_was(service: Service, purged: tuple[int, int]) -> None:
    answer = await service.browse("ada", f"/web/jobs/{purged[1]}", Accept="text/html")
    assert answer.status == 410
    assert f"job {purged[1]} ended FAILED on ".encode() in answer.body
    assert (await service.browse("mallory", f"/web/jobs/{purged[1]}", Accept="text/html")).status == 404


@pytest_twisted.ensureDeferred
async def test_a_stored_receipt_outlives_its_job(service: Service, purged: tuple[int, int]) -> None:
    number = purged[0]
    path = f"/jobs/{number}/receipt"
    answer = await service.call("ada", "GET", path)
    assert answer.status == 200
    receipt = verify_receipt(io.BytesIO(answer.body), receipt_trust(service.directory / "trust"), None)
    assert receipt.end.final
    assert receipt.end.outcomes == {"done": 3}
    table = await service.call("ada", "GET", path, Accept="text/csv")
    rows = list(csv.DictReader(io.StringIO(table.body.decode())))
    assert [row["line"] for row in rows] == ["job", "element", "element", "element", "end"]
    assert (await service.call("mallory", "GET", path)).status == 404
    assert "its receipt is kept" in (await service.call("ada", "GET", f"/jobs/{number}")).json["detail"]


def test_the_client_tells_a_purged_job_from_one_that_never_was() -> None:
    assert _BY_STATUS[410] is JobPurgedError
    assert issubclass(JobPurgedError, NotFoundError)

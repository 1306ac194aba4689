"""Retention as the daemon runs it: pace, logs, crashes, and one daemon at a time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import sqlalchemy as sa
from sqlalchemy.orm import Session
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.retention import RetentionPolicy
from pdm.workqueue.execution.retention import Pace, Retention
from pdm.workqueue.logstore.attempt_log import directory_of
from pdm.workqueue.logstore.store import RemovedLogs, remove_logs
from pdm.workqueue.store import claiming, job_changes, jobs, leases, results, retention, users
from pdm.workqueue.store.claim_limits import ClaimLimits
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.records import jobs as job_rows
from tests.support.records import NOW, new_job, verdict

reactor: Any = _reactor
_KEPT = timedelta(days=30)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = Database.open(url, reactor)
    pytest_twisted.blockon(Deferred.fromCoroutine(made.start()))
    yield made
    pytest_twisted.blockon(Deferred.fromCoroutine(made.stop()))


def _end_jobs(session: Session, uids: list[str], status: JobStatus, now: datetime) -> list[int]:
    """Submit jobs of one element, and end them."""
    leases.register_worker(session, leases.WorkerIdentity("w", "w"), now, 60)
    user = users.register(session, "/CN=alice", "user", now).id
    numbers = [jobs.submit(session, new_job(user, log_uid=uid), None, now).id for uid in uids]
    limits = ClaimLimits(elements=1000, batches=100, batch_elements=100, batch_bytes=2**40)
    batches = claiming.claim(session, "w", limits, now)
    verdicts = [verdict(batch.token(element), status) for batch in batches for element in batch.elements]
    results.settle(session, "w", verdicts, now)
    return numbers


def _retention(database: Database, directory: Path, **kept: timedelta | None) -> Retention:
    async def no_receipt(_job_id: int) -> Any:
        raise AssertionError("no receipt is kept")

    return Retention(
        reactor=reactor,
        database=database,
        clock=lambda: NOW + _KEPT + timedelta(hours=1),
        policy=RetentionPolicy(receipts=timedelta(), **kept),
        incarnation="w",
        logs=directory,
        receipt_of=no_receipt,
    )


def _write_logs(directory: Path, *uids: str) -> None:
    for uid in uids:
        place = Path(directory_of(str(directory), uid))
        place.mkdir(parents=True)
        (place / "log").write_text("a line\n")
        (place / "log-other-daemon").write_text("a line\n")
    # As earlier versions wrote them: a file for each attempt.
    (place / "0").mkdir()
    (place / "0" / "attempt1.log").write_text("a line\n")


def _exist(directory: Path, *uids: str) -> list[bool]:
    return [Path(directory_of(str(directory), uid)).exists() for uid in uids]


@pytest_twisted.ensureDeferred
async def test_a_run_that_was_killed_is_completed_by_the_next_one(database: Database, tmp_path: Path) -> None:
    """After the commit that purges a job, its rows and logs are still there."""
    uids = ["aaaa0001", "aaaa0002"]
    numbers = await database.run("end jobs", _end_jobs, uids, JobStatus.DONE, NOW)
    _write_logs(tmp_path, *uids)
    found = await database.read("find", retention.ended_jobs, NOW + _KEPT, None, 10)
    assert await database.run("purge", retention.purge, found, NOW + _KEPT, NOW + _KEPT) == numbers
    # The daemon is killed here.
    made = _retention(database, tmp_path)
    assert await made.run()
    assert _exist(tmp_path, *uids) == [False, False]
    assert made.removed["rows of jobs"] >= 4
    assert made.removed["logs"] == 2

    def count(session: Session) -> int:
        return session.scalar(sa.select(sa.func.count()).select_from(job_rows)) or 0

    assert await database.read("count", count) == 0
    assert await made.run()
    assert not made.removed


@pytest_twisted.ensureDeferred
async def test_logs_may_go_before_their_jobs(database: Database, tmp_path: Path) -> None:
    uids = ["bbbb0001", "bbbb0002"]
    old, retried = await database.run("end jobs", _end_jobs, uids, JobStatus.FAILED, NOW)
    _write_logs(tmp_path, *uids)
    await database.run("retry", job_changes.retry, retried, NOW)
    made = _retention(database, tmp_path, logs=_KEPT)
    assert await made.run()
    # The job that runs again keeps its logs.
    assert _exist(tmp_path, *uids) == [False, True]
    assert await database.job(old) is not None
    assert RemovedLogs.read(tmp_path).ended == (NOW, old)


@pytest_twisted.ensureDeferred
async def test_what_is_kept_for_ever_is_not_touched(database: Database, tmp_path: Path) -> None:
    numbers = await database.run("end jobs", _end_jobs, ["cccc0001"], JobStatus.DONE, NOW)
    _write_logs(tmp_path, "cccc0001")
    made = _retention(database, tmp_path)
    assert await made.run()
    assert not made.removed
    assert await database.job(numbers[0]) is not None
    assert _exist(tmp_path, "cccc0001") == [True]


@pytest_twisted.ensureDeferred
async def test_only_one_daemon_removes_rows(database: Database, tmp_path: Path) -> None:
    await database.run("end jobs", _end_jobs, ["dddd0001"], JobStatus.DONE, NOW)
    other = leases.WorkerIdentity("other", "other")
    await database.run("register", leases.register_worker, other, NOW, 1e9)
    now = datetime.now(NOW.tzinfo) if database.is_shared else NOW + _KEPT
    assert await database.run("take", retention.take_turn, "other", 1e6, now)
    made = _retention(database, tmp_path, jobs=_KEPT)
    assert not await made.run()
    await database.run("end", retention.end_turn, "other")
    assert await made.run()
    assert made.removed["jobs"] == 1


@pytest_twisted.ensureDeferred
async def test_a_part_that_fails_does_not_prevent_the_others(
    database: Database, tmp_path: Path, lost_errors: list[Any]
) -> None:
    numbers = await database.run("end jobs", _end_jobs, ["eeee0001"], JobStatus.DONE, NOW)
    made = _retention(database, tmp_path, jobs=_KEPT, events=_KEPT)
    # It is to store a receipt, which cannot be written.
    made.policy = RetentionPolicy(jobs=_KEPT, events=_KEPT)
    assert await made.run()
    assert made.failures == {"jobs": "no receipt is kept"}
    assert await database.job(numbers[0]) is not None
    assert made.removed["events"] == 3
    assert [event["name"] for event in lost_errors] == ["jobs"]
    lost_errors.clear()


def test_the_pace_follows_the_duration_of_steps() -> None:
    pace = Pace(rows=200, fewest=20, most=1000, target_s=0.02)
    assert pace.after(200, 0.02).rows == 200
    assert pace.after(200, 0.002).rows == 400
    assert pace.after(200, 1.0).rows == 100
    assert pace.after(10, 0.0001).rows == 200
    for _ in range(10):
        pace = pace.after(pace.rows, 10.0)
    assert pace.rows == 20
    for _ in range(10):
        pace = pace.after(pace.rows, 0.0001)
    assert pace.rows == 1000


@pytest.mark.parametrize("uid", ["../../etc", "a/b", "", "x" * 100])
def test_no_name_leads_out_of_the_directory_of_logs(uid: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no log_uid"):
        remove_logs(tmp_path, [uid])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"purged": 3}', '{"purged": ["x", 1]}'])
def test_an_invalid_file_of_places_is_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "removed.json").write_text(text)
    assert RemovedLogs.read(tmp_path) == RemovedLogs()

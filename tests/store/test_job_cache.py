"""The job cache: never older than the database, whatever is written, rolled back or read at the same time."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_twisted
import sqlalchemy as sa
from attrs import evolve
from sqlalchemy import event
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import ClaimToken, Counters, JobRecord, NewElement
from pdm.workqueue.store import claiming, held_elements, job_changes, jobs, leases, results, users
from pdm.workqueue.store.claim_limits import ClaimLimits
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.jobs import LONGEST_TEXT, JobCache
from tests.store.stores import BROKEN, EXPIRED, LEASE_S, START, identity
from tests.support.records import job_record, new_job, verdict

# What mypy knows of it is less than what it can do.
reactor: Any = _reactor

_WORKER = identity()
_LIMITS = ClaimLimits(elements=1000, batches=10, batch_elements=100, batch_bytes=2**40)


@pytest_twisted.async_yield_fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database.open(url, reactor, threads=4)
    await database.start()
    yield database
    await database.stop()


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


async def _user(database: Database) -> int:
    return (await database.run("user", users.register, "/CN=a", "user", START)).id


async def _submit(database: Database, type_: JobType = JobType.MKDIR, **changes: Any) -> JobRecord:
    user = await _user(database)
    return await database.run("submit", jobs.submit, new_job(user, type_, **changes), None, START)


async def _claim(database: Database) -> list[ClaimToken]:
    batches = await database.run("claim", claiming.claim, "w", _LIMITS, START)
    return [batch.token(element) for batch in batches for element in batch.elements]


# -- with a database


@pytest_twisted.ensureDeferred
async def test_memory_is_what_the_database_says_after_every_change(
    database: Database, database_kind: str, reads: list[int]
) -> None:
    job = await _submit(database, JobType.COPY)

    async def check(**expected: Any) -> None:
        """The job, out of memory where there is one, is the job of the database."""
        reads.clear()
        known = await database.job(job.id)
        assert reads == ([] if database_kind == "sqlite" else [job.id])
        assert known == await database.read("fetch", jobs.fetch, job.id, None)
        assert known is not None
        assert {name: getattr(known, name) for name in expected} == expected

    await check(status=JobStatus.SUBMITTED)
    await database.run("register", leases.register_worker, _WORKER, START, LEASE_S)
    (listing,) = await _claim(database)
    await check(status=JobStatus.RUNNING)
    files = [NewElement(JobType.COPY, f"a/{n}", f"b/{n}", size=7) for n in range(4)]
    assert await database.run("extend", results.add_elements, "w", listing, files)
    await check(bytes_total=28)
    await database.run("settle", results.settle, "w", [verdict(listing, skipped=3)], START)
    await check(skipped=3)
    one, two, three, _ = await _claim(database)
    verdicts = [
        verdict(one, transferred=7),
        verdict(two, JobStatus.FAILED, failure=BROKEN),
        verdict(three, JobStatus.HELD, failure=EXPIRED, counts=False),
    ]
    await database.run("settle", results.settle, "w", verdicts, START)
    await check(bytes_done=7)
    await database.run("resume", held_elements.resume_held, job.user_id, START)
    await check(status=JobStatus.RUNNING)
    # A daemon that comes back under its name gives up what it ran.
    assert await database.run("register", leases.register_worker, _WORKER, START, LEASE_S) == leases.Registration(
        back=1
    )
    await check(status=JobStatus.RUNNING)
    await database.run("cancel", job_changes.cancel, job.id, START + timedelta(seconds=9))
    await check(status=JobStatus.CANCELLED, cancel_requested=True, finished_at=START + timedelta(seconds=9))
    await database.run("retry", job_changes.retry, job.id, START)
    await check(status=JobStatus.RUNNING, cancel_requested=False, finished_at=None)


@pytest_twisted.ensureDeferred
async def test_a_job_is_not_read_again(database: Database, database_kind: str, reads: list[int]) -> None:
    job = await _submit(database, src_filepath="x" * (LONGEST_TEXT + 1))
    short = await _submit(database)
    for _ in range(3):
        assert await database.job(short.id) == short
        assert await database.job(job.id) == job
        assert await database.job(999) is None
    # In memory since it was registered; too long to be kept; not there to be kept.
    expected = [0 if database_kind == "sqlite" else 3, 3, 3]
    assert [reads.count(number) for number in (short.id, job.id, 999)] == expected


@pytest_twisted.ensureDeferred
async def test_a_job_of_an_earlier_life_is_read_once(url: str, reads: list[int]) -> None:
    first = Database.open(url, reactor)
    await first.start()
    job = await _submit(first)
    await first.stop()
    again = Database.open(url, reactor)
    await again.start()
    assert [await again.job(job.id) for _ in range(3)] == [job] * 3
    assert len(reads) == (1 if url.startswith("sqlite") else 3)
    await again.stop()


@pytest.mark.parametrize("database_kind", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True)
@pytest_twisted.ensureDeferred
async def test_what_another_daemon_writes_is_seen(database: Database, url: str) -> None:
    """Several daemons share a PostgreSQL database, so there nothing is remembered."""
    job = await _submit(database)
    assert await database.job(job.id) == job
    other = Database.open(url, reactor, threads=1)
    await other.start()
    cancelled = await other.run("cancel", job_changes.cancel, job.id, START)
    assert await database.job(job.id) == cancelled
    await other.stop()


@pytest_twisted.ensureDeferred
async def test_what_is_rolled_back_was_never_there(database: Database) -> None:
    job = await _submit(database)

    def fail(session: Any) -> None:
        job_changes.cancel(session, job.id, START)
        raise LookupError("no")

    # Together with one that succeeds: on SQLite they would have shared a commit.
    gate = threading.Event()
    waits = Deferred.fromCoroutine(database.run("wait", lambda session: gate.wait(10)))
    fails = Deferred.fromCoroutine(database.run("fail", fail))
    other = Deferred.fromCoroutine(_submit(database))
    gate.set()
    await waits
    with pytest.raises(LookupError, match="no"):
        await fails
    assert await database.job(job.id) == job
    made = await other
    assert await database.job(made.id) == made


@pytest_twisted.ensureDeferred
async def test_a_commit_that_fails_leaves_no_doubt(database: Database, reads: list[int]) -> None:
    job = await _submit(database)
    engine = database._engines.writer

    def refuse(connection: sa.Connection) -> None:
        raise OSError("disk full")

    event.listen(engine, "commit", refuse)
    with pytest.raises(OSError, match="disk full"):
        await database.run("cancel", job_changes.cancel, job.id, START)
    event.remove(engine, "commit", refuse)
    assert [await database.job(job.id) for _ in range(3)] == [job] * 3
    if engine.dialect.name == "sqlite":
        assert len(reads) == 1


@pytest_twisted.ensureDeferred
async def test_during_a_commit_the_database_is_read(database: Database, database_kind: str, reads: list[int]) -> None:
    """During a commit only the database knows the current state."""
    job = await _submit(database)
    engine = database._engines.writer
    begun: Deferred[None] = Deferred()
    go_on = threading.Event()

    def dawdle(connection: sa.Connection) -> None:
        reactor.callFromThread(begun.callback, None)
        assert go_on.wait(30)

    event.listen(engine, "commit", dawdle, once=True)
    reads.clear()
    cancelling = Deferred.fromCoroutine(database.run("cancel", job_changes.cancel, job.id, START))
    await begun
    if database_kind == "sqlite":
        for _ in range(2):
            assert await database.job(job.id) == job
        assert len(reads) == 2
    go_on.set()
    cancelled = await cancelling
    assert cancelled != job
    assert await database.job(job.id) == cancelled


@pytest_twisted.ensureDeferred
async def test_a_slow_read_does_not_bring_back_what_was_before(
    url: str, database_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Database.open(url, reactor)
    await first.start()
    job = await _submit(first)
    await first.stop()
    database = Database.open(url, reactor, threads=4)
    await database.start()
    read: Deferred[None] = Deferred()
    go_on = threading.Event()
    fetch = jobs.fetch

    def fetch_slowly(session: Any, job_id: int, owner_id: int | None) -> JobRecord | None:
        found = fetch(session, job_id, owner_id)
        if not read.called:
            reactor.callFromThread(read.callback, None)
            assert go_on.wait(30)
        return found

    monkeypatch.setattr(jobs, "fetch", fetch_slowly)
    slow = Deferred.fromCoroutine(database.job(job.id))
    await read
    cancelled = await database.run("cancel", job_changes.cancel, job.id, START)
    go_on.set()
    # Asked before the change, so the answer may be the older one; it must not stay.
    assert await slow == job
    assert await database.job(job.id) == cancelled
    await database.stop()


# -- the memory alone


@pytest.fixture
def record() -> JobRecord:
    return job_record(status=JobStatus.SUBMITTED, counters=Counters(elements=1, submitted=1))


def test_of_two_commits_the_later_one_counts(record: JobRecord) -> None:
    """The thread may have begun the next commit before the reactor hears of the one before."""
    cache = JobCache()
    older, newer = {1: record}, {1: evolve(record, bytes_done=1)}
    first = cache.begin_write(older)
    second = cache.begin_write(newer)
    cache.end_write(first, older, committed=True)
    assert cache.get(1) is None
    cache.end_write(second, newer, committed=True)
    assert cache.get(1) == newer[1]


def test_a_read_in_the_middle_of_a_commit_is_not_kept(record: JobRecord) -> None:
    cache = JobCache()
    newer = {1: evolve(record, bytes_done=1)}
    with cache.loading(1) as begun_before:
        commit = cache.begin_write(newer)
        with cache.loading(1) as begun_meanwhile:
            cache.end_write(commit, newer, committed=True)
            begun_meanwhile.record = record
        begun_before.record = record
    assert cache.get(1) == newer[1]


def test_the_least_recently_asked_for_leaves(record: JobRecord) -> None:
    cache = JobCache(most=3)
    for number in (1, 2, 3):
        with cache.loading(number) as loading:
            loading.record = evolve(record, id=number)
    assert cache.get(1) is not None
    with cache.loading(4) as loading:
        loading.record = evolve(record, id=4)
    assert [cache.get(number) is not None for number in (1, 2, 3, 4)] == [True, False, True, True]


def test_a_read_that_fails_leaves_nothing(record: JobRecord) -> None:
    cache = JobCache()
    with pytest.raises(LookupError), cache.loading(1):
        raise LookupError
    assert cache.get(1) is None
    assert not cache._loading

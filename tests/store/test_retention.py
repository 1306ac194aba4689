"""Retention: which jobs are purged, what goes with them, and that a job is whole or gone."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import JobRecord, Predecessors
from pdm.workqueue.store import chains, expiry, job_changes, jobs, leases, purged_jobs, retention
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.store.jobs import JobFilter
from pdm.workqueue.store.records import credentials, elements, pending_delegations, predecessors, workers
from pdm.workqueue.store.records import jobs as job_rows
from pdm.workqueue.store.records import purged_jobs as summaries
from pdm.workqueue.WorkqueueDB import Base
from tests.store.stores import MISSING, Store, done, ended, name_of
from tests.support.records import new_job

KEPT = timedelta(days=30)


def old_job(store: Store, user: int, files: int = 3) -> JobRecord:
    """A copy that ended a long time ago, with a failed attempt at its last file."""
    job = store.copy_job(user, [1] * files)
    for batch in store.claim():
        store.settle(done(batch))
    return store.job(job.id)


def purge(store: Store, before: Any = None) -> list[int]:
    """Purge all that has ended, without removing rows."""
    before = before or store.now
    found = store.run(retention.ended_jobs, before, None, 100)
    return store.run(retention.purge, found, before, store.now)


def remove_all(store: Store, most: int = 10_000) -> int:
    steps = 0
    while store.run(retention.remove_rows, most).more:
        steps += 1
        assert steps < 10_000
    return steps


def rows_of(store: Store, job_id: int) -> dict[str, int]:
    """Table → rows that refer to a job."""

    def count(session: Session) -> dict[str, int]:
        found = {}
        for table in Base.metadata.sorted_tables:
            column = table.c.get("job_id")
            if table is job_rows:
                column = table.c.id
            if column is not None:
                found[table.name] = session.scalar(
                    sa.select(sa.func.count()).select_from(table).where(column == job_id)
                )
        return {name: number for name, number in found.items() if number}

    return store.run(count)


def test_a_purged_job_is_gone_at_once_and_all_its_rows_soon(store: Store) -> None:
    store.worker()
    user = store.user()
    key = IdempotencyKey(user, "k", "f")
    job = store.run(jobs.submit, new_job(user), key, store.now)
    (batch,) = store.claim()
    store.settle(ended(JobStatus.FAILED, batch, failure=MISSING))
    kept = store.copy_job(user, [1])
    assert set(rows_of(store, job.id)) >= {"jobs", "job_elements", "attempts", "events", "idempotent_requests"}
    store.pass_time(3600)
    assert purge(store) == [job.id]
    # Not a row is removed yet, but nothing finds the job any more.
    assert store.run(jobs.fetch, job.id, None) is None
    assert [each.id for each in store.run(jobs.page, JobFilter())] == [kept.id]
    with pytest.raises(LookupError):
        store.run(job_changes.retry, job.id, store.now)
    with pytest.raises(LookupError):
        store.run(job_changes.cancel, job.id, store.now)
    purged = store.run(purged_jobs.purged_job, job.id, user)
    assert purged is not None
    assert purged.status is JobStatus.FAILED
    assert purged.failed == 1
    assert store.run(purged_jobs.purged_job, job.id, user + 1) is None
    remove_all(store)
    assert rows_of(store, job.id) == {}
    assert rows_of(store, kept.id)["job_elements"] == 2


def test_rows_are_removed_in_steps_of_about_the_size_that_was_asked(store: Store) -> None:
    store.worker()
    user = store.user()
    large, *small = [old_job(store, user, files) for files in (50, 1, 1, 1)]
    store.pass_time(3600)
    assert purge(store) == [large.id, *(job.id for job in small)]
    count = 51 + sum(2 for _ in small)
    step = store.run(retention.remove_rows, 10)
    assert 0 < step.rows <= 10
    assert not step.jobs
    assert remove_all(store, 10) >= count / 10

    def left(session: Session) -> int:
        return session.scalar(sa.select(sa.func.count()).select_from(elements)) or 0

    assert store.run(left) == 0


def test_jobs_that_may_still_change_are_kept(store: Store) -> None:
    store.worker()
    user = store.user()
    leftover = old_job(store, user)
    awaited = old_job(store, user)
    old = old_job(store, user)

    unfinished = store.submit(user)

    def prepare(session: Session) -> None:
        session.execute(
            sa.update(elements).where(elements.c.job_id == leftover.id, elements.c.id == 1).values(residue=True)
        )
        session.execute(sa.insert(predecessors).values(job_id=unfinished.id, predecessor_id=awaited.id))

    store.run(prepare)
    store.pass_time(10)
    old_job(store, user)
    found = store.run(retention.ended_jobs, store.now, None, 100)
    assert [job.id for job in found] == [leftover.id, awaited.id, old.id]
    assert store.run(retention.purge, found, store.now, store.now) == [old.id]


def test_a_job_that_has_ended_again_since_it_was_read_is_kept(store: Store) -> None:
    store.worker()
    user = store.user()
    job = store.submit(user)
    (batch,) = store.claim()
    store.settle(ended(JobStatus.FAILED, batch, failure=MISSING))
    store.pass_time(10)
    found = store.run(retention.ended_jobs, store.now, None, 10)
    store.run(job_changes.retry, job.id, store.now)
    assert store.run(retention.purge, found, store.now, store.now) == []
    (batch,) = store.claim()
    store.settle(ended(JobStatus.FAILED, batch, failure=MISSING))
    store.pass_time(10)
    assert store.run(retention.purge, found, store.now, store.now) == []
    assert store.job(job.id).status is JobStatus.FAILED


def test_a_retry_at_the_same_moment_wins_or_finds_the_job_gone(store: Store) -> None:
    """Each job is purged or retried, never both; what is retried keeps all its rows."""
    store.worker()
    user = store.user()
    numbers = [store.submit(user).id for _ in range(40)]
    for batch in store.claim(batches=100):
        store.settle(ended(JobStatus.FAILED, batch, failure=MISSING))
    store.pass_time(10)
    found = {job.id: job for job in store.run(retention.ended_jobs, store.now, None, 100)}
    retried: set[int] = set()
    barrier = threading.Barrier(2)

    def retry_all() -> None:
        barrier.wait()
        for number in numbers:
            try:
                if store.run(job_changes.retry, number, store.now)[1]:
                    retried.add(number)
            except LookupError:
                pass
            except sa.exc.OperationalError:
                # SQLite: the other one writes.
                pass

    thread = threading.Thread(target=retry_all)
    thread.start()
    purged: set[int] = set()
    barrier.wait()
    for number in reversed(numbers):
        try:
            purged.update(store.run(retention.purge, [found[number]], store.now, store.now))
            store.run(retention.remove_rows, 10)
        except sa.exc.OperationalError:
            pass
    thread.join()
    remove_all(store)
    assert not purged & retried
    assert purged
    for number in retried:
        assert not store.job(number).status.is_final
        assert store.recount(number) == store.job(number).counters
    for number in purged:
        assert rows_of(store, number) == {}


def test_a_chain_knows_how_a_purged_job_has_ended(store: Store) -> None:
    store.worker()
    user = store.user()
    first = old_job(store, user)
    store.pass_time(10)
    purge(store)
    remove_all(store)

    def submit(session: Session, who: int) -> JobRecord:
        made = jobs.submit(
            session, new_job(who, JobType.MKDIR, after=Predecessors((first.id,), any_end=False)), None, store.now
        )
        return chains.begin_waiting(session, made, store.now)

    assert store.run(submit, user).status is JobStatus.SUBMITTED
    with pytest.raises(chains.NoPredecessorError):
        store.run(submit, store.user("mallory"))


def test_receipts_and_summaries_go_when_their_time_has_come(store: Store) -> None:
    store.worker()
    job = old_job(store, store.user())
    store.pass_time(10)
    found = store.run(retention.ended_jobs, store.now, None, 10)
    store.run(retention.begin_receipt, job.id)
    store.run(retention.store_pieces, [{"job_id": job.id, "number": 0, "content": b"0"}])
    last = [{"job_id": job.id, "number": 1, "content": b"1"}]
    assert store.run(retention.purge, found, store.now, store.now, {job.id: 2}, last) == [job.id]
    assert [store.run(purged_jobs.receipt_piece, job.id, number) for number in range(3)] == [b"0", b"1", None]
    assert store.run(purged_jobs.remove_summaries, store.now + KEPT, 10).rows == 0
    while store.run(purged_jobs.remove_receipts, store.now, 1).more:
        assert store.run(purged_jobs.purged_job, job.id, None).receipt_pieces == 0  # type: ignore[union-attr]
    assert store.run(purged_jobs.remove_summaries, store.now + KEPT, 10).rows == 1
    assert store.run(purged_jobs.purged_job, job.id, None) is None


def test_a_receipt_whose_job_is_not_purged_after_all_is_dropped(store: Store) -> None:
    store.run(retention.take_turn, "w", 60, store.now)
    store.run(retention.begin_receipt, 7)
    store.run(retention.store_pieces, [{"job_id": 7, "number": 0, "content": b"0"}])
    store.run(retention.drop_unfinished_receipt)
    assert store.run(purged_jobs.receipt_piece, 7, 0) is None


def test_one_daemon_at_a_time(store: Store) -> None:
    for incarnation in ("a", "b"):
        store.register(incarnation)
    assert store.run(retention.take_turn, "a", 60, store.now)
    assert store.run(retention.take_turn, "a", 60, store.now)
    assert not store.run(retention.take_turn, "b", 60, store.now)
    store.run(retention.end_turn, "b")
    assert not store.run(retention.take_turn, "b", 60, store.now)
    store.run(retention.end_turn, "a")
    assert store.run(retention.take_turn, "b", 60, store.now)


def test_what_is_old_is_found_by_indexes(store: Store) -> None:
    """Neither what runs every ten minutes nor a list of failed or running jobs reads the whole history."""
    store.worker()
    user = store.user()
    for _ in range(3):
        old_job(store, user)

    def plans(session: Session) -> list[str]:
        seen: list[str] = []
        connection = session.connection()

        def note(_conn: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            if statement.startswith(("SELECT", "DELETE")):
                plain = connection.connection.cursor()
                plain.execute("EXPLAIN QUERY PLAN " + statement, parameters)
                seen.extend(f"{row[-1]} | {statement}" for row in plain.fetchall())
                plain.close()

        sa.event.listen(connection, "before_cursor_execute", note)
        for statuses in ({JobStatus.RUNNING}, {JobStatus.SUBMITTED, JobStatus.HELD}):
            for owner in (None, user):
                jobs.page(session, JobFilter(owner_id=owner, statuses=statuses, limit=50, newest_first=True))
        job_changes.unfinished_changes(session)
        job_changes.next_deadline(session)
        retention.ended_jobs(session, store.now, (store.now, 1), 10)
        retention.remove_rows(session, 10)
        expiry.remove_events(session, store.now, 10)
        purged_jobs.remove_receipts(session, store.now, 10)
        purged_jobs.remove_summaries(session, store.now, 10)
        purged_jobs.purged_logs(session, (store.now, 1), 10)
        sa.event.remove(connection, "before_cursor_execute", note)
        return seen

    if store.engine.dialect.name != "sqlite":
        pytest.skip("the plans of SQLite do not depend on statistics")
    tables = tuple(f"SCAN {table} |" for table in Base.metadata.tables)
    scans = {plan for plan in store.run(plans) if plan.startswith(tables)}
    # The oldest events are read in the order of the primary key.
    assert {plan for plan in scans if not plan.startswith("SCAN events |")} == set()


def test_summaries_say_what_a_job_was(store: Store) -> None:
    store.worker()
    job = old_job(store, store.user())
    store.pass_time(10)
    purge(store)
    purged = store.run(purged_jobs.purged_job, job.id, None)
    assert purged is not None
    line = purged.summary()
    assert line.startswith(f"job {job.id} ended DONE on ")
    assert "elements: 4 done, 0 failed, 0 cancelled" in line
    assert "\n" not in line
    count = store.run(lambda session: session.scalar(sa.select(sa.func.count()).select_from(summaries)))
    assert count == 1


def test_a_dead_worker_is_forgotten_once_nothing_refers_to_it(store: Store) -> None:
    store.worker("old")
    job = store.submit(store.user())
    (batch,) = store.claim("old")
    store.settle(done(batch), "old")
    store.run(leases.give_up_lease, "old")
    store.worker("idle")
    store.run(leases.give_up_lease, "idle")
    store.worker("alive")

    def seen(session: Session) -> None:
        session.execute(sa.update(workers).where(workers.c.name != name_of("alive")).values(seen_at=store.now))

    store.run(seen)
    before = store.now + timedelta(seconds=5)

    def dead() -> list[str]:
        numbers = store.run(expiry.dead_workers, before)
        names = sa.select(workers.c.name).where(workers.c.id.in_(numbers)).order_by(workers.c.name)
        return store.run(lambda session: list(session.scalars(names)))

    assert dead() == [name_of("idle")]
    store.pass_time(10)
    assert purge(store) == [job.id]
    remove_all(store)
    assert dead() == [name_of("idle"), name_of("old")]
    numbers = store.run(expiry.dead_workers, before)
    # One of them comes back.
    store.register("idle")
    assert store.run(expiry.remove_workers, numbers, before) == 1


def test_expired_credentials_and_delegations_are_removed(store: Store) -> None:
    user = store.user()
    pending = {"id": "d", "user_id": user, "key": b"", "csr_pem": "", "created_at": store.now}
    rows = [
        {"site_id": number, "valid_until": end, "user_id": user, "kind": "proxy", "subject": "s", "details": {}}
        | {"stored_at": store.now, "secret": b""}
        for number, end in enumerate((None, store.now, store.now + KEPT))
    ]

    def put(session: Session) -> None:
        session.execute(sa.insert(pending_delegations), pending)
        session.execute(sa.insert(credentials), rows)

    store.run(put)
    assert store.run(expiry.remove_credentials, store.now) == 0
    assert store.run(expiry.remove_credentials, store.now + timedelta(seconds=1)) == 2

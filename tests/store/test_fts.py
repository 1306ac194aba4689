"""Jobs of FTS3's clients in the database: one of an id for each user, their files, and their end by age."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import JobRecord, NewElement, NewJob
from pdm.workqueue.store import chains, fts, jobs, retention
from pdm.workqueue.store.fts import DuplicateFtsJobError, FtsFilter, NewFtsFile, NewFtsJob, NewFtsPart
from pdm.workqueue.store.records import fts_files, fts_jobs, fts_parts
from tests.store.stores import Store, done, ended
from tests.store.test_retention import purge, remove_all
from tests.support.records import new_job


def _new(user: int, fts_id: str, *files: int, alternatives: bool = False) -> NewFtsJob:
    """A job of FTS with parts that have so many files each."""
    parts = []
    for number, count in enumerate(files):
        elements = [NewElement(JobType.COPY, f"/s{each}", f"/d{each}", 5) for each in range(count)]
        job = new_job(user, JobType.COPY, first=elements[0], more=elements[1:])
        details = {"metadata": {"part": number}}
        rows = [NewFtsFile(each, f"https://a/{each}", f"https://b/{each}", details) for each in range(count)]
        parts.append(NewFtsPart(job, rows, is_alternative=alternatives and number > 0))
    return NewFtsJob(fts_id, user, "vo", {"retry": 1}, parts)


def _submit(store: Store, new: NewFtsJob) -> list[JobRecord]:
    def register(session: Session, job: NewJob) -> JobRecord:
        return chains.begin_waiting(session, jobs.submit(session, job, None, store.now), store.now)

    return store.run(fts.submit, new, register, store.now)


def test_an_id_is_taken_once_by_a_user(store: Store) -> None:
    alice, bob = store.user(), store.user("bob")
    _submit(store, _new(alice, "one", 1))
    with pytest.raises(DuplicateFtsJobError):
        _submit(store, _new(alice, "one", 2))
    _submit(store, _new(bob, "one", 1))
    assert [each.user_id for each in store.run(fts.find, ["one", "other"])] == [alice, bob]
    results: list[object] = []

    def try_once() -> None:
        try:
            results.append(_submit(store, _new(alice, "two", 3)))
        except (DuplicateFtsJobError, sa.exc.IntegrityError, sa.exc.OperationalError) as error:
            results.append(error)

    threads = [threading.Thread(target=try_once) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(each, list) for each in results) == 1
    (found,) = store.run(fts.find, ["two"])
    assert [part.counters.elements for part in found.parts] == [3]


def test_files_lists_and_the_cancellation_of_some(store: Store) -> None:
    store.worker()
    user = store.user()
    first, second = _submit(store, _new(user, "x", 2, 3))
    _submit(store, _new(user, "y", 1))
    page = store.run(fts.page, FtsFilter(user, is_open=True), 10)
    assert [each.fts_id for each in page] == ["y", "x"]
    assert [each.fts_id for each in store.run(fts.page, FtsFilter(None, before=page[0].number), 10)] == ["x"]
    rows = store.run(fts.files, second, 0, 10)
    assert [(each.element.id, each.file.source_surl, each.file.details["metadata"]) for each in rows] == [
        (number, f"https://a/{number}", {"part": 1}) for number in (1, 2)
    ]
    batches = {batch.job.id: batch for batch in store.claim(batch_elements=2)}
    chosen = {first.id: [0, 1], second.id: [0, 2, 9]}
    changed, statuses = store.run(fts.cancel_elements, chosen, store.now)
    running = {(number, element.id) for number, batch in batches.items() for element in batch.elements}
    assert statuses == {
        place: JobStatus.RUNNING if place in running else JobStatus.CANCELLED
        for place in ((first.id, 0), (first.id, 1), (second.id, 0), (second.id, 2))
    }
    assert [job.counters for job in changed] == [store.job(first.id).counters, store.job(second.id).counters]
    store.run(fts.set_priority, [first.id, second.id], 1)
    assert {store.job(first.id).priority, store.job(second.id).priority} == {1}


def test_another_source_is_tried_only_after_a_failure(store: Store) -> None:
    store.worker()
    user = store.user()
    parts = _submit(store, _new(user, "x", 1, 1, 1, alternatives=True))
    (batch,) = store.claim()
    assert batch.job.id == parts[0].id
    store.settle(ended(JobStatus.FAILED, batch))
    store.run(chains.release, parts[0].id, store.now)
    (batch,) = store.claim()
    assert batch.job.id == parts[1].id
    store.settle(done(batch))
    released = store.run(chains.release, parts[1].id, store.now)
    assert [job.id for job in released.ended] == [parts[2].id]
    assert store.job(parts[2].id).status is JobStatus.CANCELLED


def test_a_job_is_removed_with_the_last_of_its_parts(store: Store) -> None:
    user = store.user()
    first, second = _submit(store, _new(user, "x", 2, 1))
    store.run(fts.cancel, [first.id], store.now)
    store.pass_time(3600)

    def counts(session: Session) -> list[int]:
        return [
            session.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for table in (fts_jobs, fts_parts, fts_files)
        ]

    assert purge(store) == [first.id]
    remove_all(store)
    assert store.run(counts) == [1, 1, 1]
    store.run(fts.cancel, [second.id], store.now)
    store.pass_time(3600)
    purge(store)
    assert store.run(partial(fts.find, ids=["x"])) == []
    remove_all(store)
    assert store.run(counts) == [0, 0, 0]
    assert store.run(retention.remove_rows, 10).rows == 0

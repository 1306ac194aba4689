"""Jobs of FTS3's clients in the database: one of an id for each user, their files, their sites, and the end by age."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from attrs import evolve
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.jobs import JobRecord, NewElement, NewJob
from pdm.workqueue.domain.sites import Actor, NewSite, RestrictionKind
from pdm.workqueue.store import chains, fts, jobs, retention, sites, unlisted_sites
from pdm.workqueue.store.fts import DuplicateFtsJobError, FtsFilter, NewFtsFile, NewFtsJob, NewFtsPart
from pdm.workqueue.store.records import credentials, fts_files, fts_jobs, fts_parts
from pdm.workqueue.store.records import jobs as job_rows
from tests.store.stores import Store, done, ended
from tests.store.test_retention import old_job, purge, remove_all
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


_LATER = timedelta(seconds=1)


@pytest.fixture
def owner(store: Store) -> Actor:
    store.worker()
    return Actor(store.user(), "/DC=test/CN=alice")


def _made(store: Store, owner: Actor, name: str, **changes: Any) -> int:
    endpoints = {JobProtocol.GRIDFTP: (f"gsiftp://{name}:1",)}
    new = NewSite(owner.user_id, False, name, "", "/", endpoints, None, None, "")
    return store.run(sites.create, evolve(new, **{"unlisted": True, **changes}), owner, store.now).id


def _unused(store: Store) -> list[int]:
    found = []
    after = 0
    while step := store.run(unlisted_sites.unused, store.now + _LATER, after):
        after, numbers = step
        found += numbers
    return found


def _removed(store: Store, owner: Actor, numbers: list[int], newest: int = 10**6) -> int:
    return store.run(unlisted_sites.remove, owner.user_id, numbers, store.now + _LATER, newest).rows


def test_only_sites_to_which_nothing_refers_are_removed(store: Store, owner: Actor) -> None:
    idle = _made(store, owner, "idle")
    for name, changes in (
        ("named", {"unlisted": False}),
        ("limited", {"limit_in": 3}),
        ("fts", {"fts": "https://f:1"}),
    ):
        _made(store, owner, name, **changes)
    drained, keyed, used = (_made(store, owner, name) for name in ("drained", "keyed", "used"))
    store.run(sites.restrict, RestrictionKind.SITE, drained, "", owner, store.now)
    row = {"user_id": owner.user_id, "kind": "proxy", "site_id": keyed, "subject": "s", "details": {}, "secret": b""}
    store.run(lambda session: session.execute(sa.insert(credentials), {**row, "stored_at": store.now}))
    job = old_job(store, owner.user_id)
    store.run(lambda session: session.execute(sa.update(job_rows).values(dst_siteid=used)))
    other = Actor(store.user("bob"), "/DC=test/CN=bob")
    of_other = _made(store, other, "others")
    assert _unused(store) == [idle, of_other]
    assert store.run(unlisted_sites.unused, store.now - _LATER, 0) is None
    assert _removed(store, owner, [idle, drained, keyed]) == 1
    assert _unused(store) == [of_other]
    # Once the job is removed by its age, its site follows.
    store.pass_time(3600)
    assert purge(store) == [job.id]
    remove_all(store)
    assert _unused(store) == [used, of_other]


def test_a_site_that_is_used_again_meanwhile_stays(store: Store, owner: Actor) -> None:
    site = _made(store, owner, "again")
    newest = store.run(unlisted_sites.newest_job)
    assert _unused(store) == [site]
    old_job(store, owner.user_id)
    store.run(lambda session: session.execute(sa.update(job_rows).values(src_siteid=site)))
    assert _removed(store, owner, [site], newest) == 0
    assert {each.id for each in store.run(lambda session: list(sites.all_sites(session)))} == {site}

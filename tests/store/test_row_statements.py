"""Statements about lists of rows: of any length, with every kind of value."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import NewElement
from pdm.workqueue.store import results
from tests.store.stores import EXPIRED, Store, done, token_of
from tests.support.records import verdict


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 200])
def test_listings_of_any_length_are_stored_and_settled(store: Store, count: int) -> None:
    store.worker()
    new = [
        NewElement(JobType.MKDIR, f"/src/{n}", f"/dst/{n} 100 % ?", is_directory=True)
        if n % 7 == 3
        else NewElement(JobType.COPY, f"/src/{n}", f"/dst/{n}", size=2 ** (n % 35))
        for n in range(count)
    ]
    job = store.copy_job(store.user(), new, max_tries=3)
    found = store.elements(job.id, after=0)
    assert [(e.type, e.src_filepath, e.dst_filepath, e.size, e.is_directory) for e in found] == [
        (e.type, e.src_filepath, e.dst_filepath, e.size, e.is_directory) for e in new
    ]
    assert {(e.status, e.attempts, e.lost, e.max_tries, e.not_before) for e in found} == {
        (JobStatus.SUBMITTED, 0, 0, 3, None)
    }
    verdicts = [
        verdict(batch.token(e), transferred=e.size, checksum=f"adler32:{e.id:08x}" if e.id % 2 else None)
        for batch in store.claim(batches=20)
        for e in batch.elements
    ]
    assert store.settle(verdicts).lost == ()
    assert [(e.status, e.transferred, e.checksum, e.elapsed_s) for e in store.elements(job.id, after=0)] == [
        (JobStatus.DONE, e.size, f"adler32:{e.id:08x}" if e.id % 2 else None, 2.0) for e in found
    ]
    assert store.job(job.id).counters == store.recount(job.id)


def test_destinations_and_checksums_may_all_be_missing(store: Store) -> None:
    store.worker()
    job = store.remove_job(store.user(), [0] * 3)
    assert {element.dst_filepath for element in store.elements(job.id, after=0)} == {None}
    store.settle(done(*store.claim()))
    assert {element.checksum for element in store.elements(job.id)} == {None}


def test_a_claim_takes_what_waits_and_nothing_between(store: Store) -> None:
    store.worker()
    user = store.user()
    first, second = (store.copy_job(user, [1] * 9) for _ in range(2))
    between = {2, 5, 6, 9}
    store.settle(
        [
            verdict(batch.token(e), JobStatus.HELD, failure=EXPIRED, counts=False)
            if e.id in between
            else verdict(batch.token(e), JobStatus.SUBMITTED, counts=False)
            for batch in store.claim()
            for e in batch.elements
        ]
    )
    claimed = {(e.job_id, e.id, e.attempts) for batch in store.claim() for e in batch.elements}
    assert claimed == {(job.id, n, 2) for job in (first, second) for n in (1, 3, 4, 7, 8)}
    for job in (first, second):
        found = {e.id: (e.status, e.attempts) for e in store.elements(job.id, after=0)}
        assert found == {n: (JobStatus.HELD, 1) if n in between else (JobStatus.RUNNING, 2) for n in range(1, 10)}
        assert store.job(job.id).counters == store.recount(job.id)


def test_elements_are_added_behind_those_of_earlier_lists(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.COPY)
    (batch,) = store.claim()
    for first in (0, 70, 140):
        new = [NewElement(JobType.COPY, f"/{first + n}", "/b") for n in range(70)]
        assert store.run(results.add_elements, "w", token_of(batch), new)
    assert [(e.id, e.src_filepath) for e in store.elements(job.id, after=0)] == [(n + 1, f"/{n}") for n in range(210)]


@pytest.mark.postgresql
@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_postgresql_plans_joins_for_the_number_of_rows(store: Store) -> None:
    """A plan for any number of rows compares each of them with each element that runs."""
    store.worker()
    store.copy_job(store.user(), [1] * 120)
    # The driver prepares what it has executed five times, and the server keeps a plan after five more.
    for _ in range(15):
        store.settle(done(*store.claim(batches=1, batch_elements=5)))

    def kept(session: Session) -> list[str]:
        texts = session.scalars(sa.text("SELECT statement FROM pg_prepared_statements WHERE generic_plans > 0"))
        return [text for text in texts if "unnest(" in text and "INSERT INTO" not in text]

    def prepared(session: Session) -> int:
        return session.scalar(sa.text("SELECT count(*) FROM pg_prepared_statements")) or 0

    assert store.run(prepared) > 0
    assert store.run(kept) == []

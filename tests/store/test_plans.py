"""Queries on the way of every element are answered from indexes: shown by EXPLAIN on a queue of some size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from attrs import evolve
from sqlalchemy import event
from sqlalchemy.orm import Session

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType, PlannedAction
from pdm.workqueue.domain.jobs import NewElement
from pdm.workqueue.domain.limits import ClaimExclusions, LimitKey, LimitKind, Route, StreamQuota
from pdm.workqueue.domain.sites import Actor, NewSite
from pdm.workqueue.store import (
    activity,
    claim_queries,
    estimates,
    held_elements,
    job_changes,
    jobs,
    leases,
    leftover_files,
    node_work,
    planned_elements,
    queue,
    results,
    sites,
)
from pdm.workqueue.store.jobs import ElementFilter, JobFilter
from tests.store.stores import LEASE_S, MISSING, Store, done, ended, name_of, token_of
from tests.support.records import verdict

_FILES = 1500


@pytest.fixture
def busy(store: Store) -> Store:
    """Jobs that wait, run and have ended, and one large one; statistics are fresh."""
    store.worker()
    users = [store.user(name) for name in ("alice", "bob", "carol", *(f"user{number}" for number in range(9)))]
    for number in range(120):
        store.submit(users[number % len(users)], JobType.LIST if number % 4 else JobType.MKDIR)
    for _ in range(2):
        store.settle(done(*store.claim(batches=100)))
    large = store.submit(users[0], JobType.COPY, priority=0)
    (listing,) = [batch for batch in store.claim(batches=200) if batch.job.id == large.id]
    files = [NewElement(JobType.COPY, f"/src/{n}", f"/dst/{n}", 1) for n in range(_FILES)]
    store.run(results.add_elements, "w", token_of(listing), files)
    store.settle(done(listing))
    for batch in store.claim(batches=2, batch_elements=5):
        store.settle([verdict(token_of(batch, 0), JobStatus.FAILED, failure=MISSING, leftover=True)])
    store.run(lambda session: session.execute(sa.text("ANALYZE")))
    return store


class Explained:
    """Asks for the plan of every statement before it runs."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.plans: list[tuple[str, str]] = []

    def __enter__(self) -> Explained:
        event.listen(self._engine, "before_cursor_execute", self._explain)
        return self

    def __exit__(self, *exc: object) -> None:
        event.remove(self._engine, "before_cursor_execute", self._explain)

    def _explain(self, connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if not re.match(r"SELECT|UPDATE|DELETE|WITH", statement):
            return
        asking = connection.connection.cursor()
        prefix = "EXPLAIN QUERY PLAN "
        if self._engine.dialect.name == "postgresql":
            # Of a table this small it would read all; the question is what it can do when it is large.
            for way in ("seqscan", "hashjoin", "mergejoin"):
                asking.execute(f"SET LOCAL enable_{way} = off")
            prefix = "EXPLAIN "
        asking.execute(prefix + statement, parameters[0] if many else parameters)
        rows = asking.fetchall()
        asking.close()
        self.plans.append((statement, "\n".join(str(row[-1]) for row in rows)))

    def assert_indexed(self) -> None:
        assert self.plans
        for statement, plan in self.plans:
            read_whole = {"".join(names) for names in _READ_WHOLE.findall(plan + "\n")} - _SHORT
            # An index of what waits, runs or failed may be read whole: it is as long as the answer.
            faults = {what for what in read_whole if not what.startswith("ix_") or what in _LONG_INDEXES}
            assert not faults, f"{faults} read whole by {statement}\n{plan}"


#: Indexes that may be read whole: "workers" has a row for each daemon, "predecessors" only rows of jobs that wait.
_SHORT = frozenset({"pk_workers", "uq_workers_name", "pk_predecessors"})
#: Names of tables and indexes that a plan reads from end to end.
_READ_WHOLE = re.compile(
    r"SCAN (jobs|job_elements|attempts)(?! USING)\b(?! USING)"
    r"|SCAN (?:jobs|job_elements|attempts) USING (?:COVERING )?INDEX (\w+)"
    r"|Seq Scan on (jobs|job_elements|attempts)\b"
    r"|Index (?:Only )?Scan using (\w+) on [^\n]*\n(?! *Index Cond)"
)
_LONG_INDEXES = {"ix_jobs_user", "ix_jobs_user_status"}


@pytest.fixture
def explained(busy: Store) -> Iterator[Explained]:
    with Explained(busy.engine) as explained:
        yield explained


def test_claims_and_results(busy: Store, explained: Explained) -> None:
    batches = busy.claim(batches=4, batch_elements=20)
    assert sum(len(batch.elements) for batch in batches) > 20
    verdicts = done(*batches)
    busy.settle([*ended(JobStatus.FAILED, batches[0], failure=MISSING), *verdicts[len(batches[0].elements) :]])
    busy.run(claim_queries.next_due, busy.now)
    explained.assert_indexed()


@pytest.mark.parametrize("options", [{"move": True}, {"sync": "size", "delete_extra": True}])
def test_removals_of_a_copy(busy: Store, explained: Explained, options: dict[str, Any]) -> None:
    job = busy.submit(busy.user("dora"), JobType.COPY, priority=0, options=options)
    (listing,) = [batch for batch in busy.claim(batches=200) if batch.job.id == job.id]
    new = [NewElement(JobType.COPY, f"/src/{n}", f"/dst/{n}", 1, planned=PlannedAction.COPY) for n in range(_FILES)]
    if "move" not in options:
        paths = [f"/dst/{n}" for n in range(_FILES, 2 * _FILES)]
        new += [NewElement(JobType.REMOVE, path, path, phase=1, planned=PlannedAction.DELETE) for path in paths]
    busy.run(results.add_elements, "w", token_of(listing), new)
    busy.run(lambda session: session.execute(sa.text("ANALYZE")))
    explained.plans.clear()
    busy.settle(done(listing))
    types = set()
    while batches := [batch for batch in busy.claim(batches=8, batch_elements=_FILES) if batch.job.id == job.id]:
        types |= {batch.type for batch in batches}
        busy.settle(done(*batches))
    assert types == {JobType.COPY, JobType.REMOVE}
    assert busy.job(job.id).status is JobStatus.DONE
    busy.run(planned_elements.drop_deletions, token_of(listing), busy.now)
    explained.assert_indexed()


def test_claims_while_much_is_closed(busy: Store, explained: Explained) -> None:
    left: dict[LimitKey, int] = {
        (LimitKind.ROUTE, Route(1, None)): 0,
        (LimitKind.ROUTE, Route(3, 4)): 0,
        (LimitKind.INTO, 7): 0,
        (LimitKind.OUT_OF, 8): 0,
        (LimitKind.JOB, 1): 0,
        (LimitKind.USER, busy.user("bob")): 0,
    }
    explained.plans.clear()
    batches = busy.claim(batches=4, batch_elements=20, quota=StreamQuota(left))
    assert {batch.job.type for batch in batches if batch.type is not JobType.LIST} == {JobType.COPY}
    explained.assert_indexed()


def test_claims_while_sites_are_away(busy: Store, explained: Explained) -> None:
    exclusions = ClaimExclusions(
        frozenset({(3, JobProtocol.DUMMY)}), frozenset({(4, JobProtocol.DUMMY)}), frozenset({7, 8}), frozenset({9})
    )
    for quota in (StreamQuota(), StreamQuota({(LimitKind.INTO, 7): 0})):
        explained.plans.clear()
        busy.claim(batches=4, batch_elements=20, quota=quota, exclusions=exclusions)
        explained.assert_indexed()


def test_what_an_estimate_is_taken_from(busy: Store, explained: Explained) -> None:
    (large,) = [job for job in busy.run(jobs.page, JobFilter(limit=500)) if job.counters.elements > _FILES]
    explained.plans.clear()
    busy.run(estimates.estimate_basis, large, busy.now)
    (plan,) = [plan for statement, plan in explained.plans if "jobs" in statement and "listing_notes" not in statement]
    assert "ix_jobs_user" in plan, plan
    explained.assert_indexed()


def test_pictures(busy: Store, explained: Explained) -> None:
    (large,) = [job for job in busy.run(jobs.page, JobFilter(limit=500)) if job.counters.elements > _FILES]
    for _ in range(12):
        busy.settle(ended(JobStatus.FAILED, *busy.claim(batches=1, batch_elements=100), failure=MISSING))
    busy.run(lambda session: session.execute(sa.text("ANALYZE")))
    large = busy.job(large.id)
    # Of few rows all would be read for many blocks: there are few blocks, of the job that has not ended.
    later = activity.TimeBuckets.until(busy.now + timedelta(hours=2), timedelta(hours=1), 4)
    for limit in (200, 64):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(activity, "MOST_ELEMENTS", limit)
            explained.plans.clear()
            busy.run(activity.job_rate, large, busy.now, 60)
            busy.run(activity.route_activity, later)
            explained.assert_indexed()
    explained.plans.clear()
    busy.run(queue.queue_shares)
    busy.run(node_work.node_states, busy.now)
    busy.run(node_work.nodes_named, name_of(), busy.now)
    busy.run(node_work.workers_of_job, large.id)
    busy.run(node_work.workers_of_elements, large.id, [1, 2, 3])
    busy.run(node_work.jobs_of_workers, [name_of()], 100)
    busy.run(node_work.drain_of, "w", busy.now)
    explained.assert_indexed()


def test_leases(busy: Store, explained: Explained) -> None:
    busy.run(leases.renew, "w", busy.now, LEASE_S)
    busy.run(leases.release_expired, busy.now)
    busy.run(leases.release_worker, name_of(), busy.now)
    explained.assert_indexed()


def test_claims_and_results_of_many_small_jobs(busy: Store, explained: Explained) -> None:
    for number in range(40):
        busy.submit(busy.user("user1"), JobType.MKDIR, priority=number % 2)
    batches = busy.claim(batches=2, batch_elements=50)
    assert any(len(batch.jobs) > 10 for batch in batches)
    busy.settle(done(*batches))
    explained.assert_indexed()


def test_daemons_that_die(busy: Store, explained: Explained) -> None:
    for _ in range(3):
        assert busy.claim(batches=2, batch_elements=10)
        busy.run(leases.release_worker, name_of(), busy.now)
        busy.worker()
    explained.assert_indexed()


def test_changes_of_sites_and_what_is_held(busy: Store, explained: Explained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_elements, "CHANGED_AT_ONCE", 100)
    by = Actor(busy.user(), "/CN=owner")
    endpoints = {JobProtocol.DUMMY: ("dummy://a",)}
    site = busy.run(sites.create, NewSite(by.user_id, True, "S", "", "~", endpoints, None, None, ""), by, busy.now)
    explained.plans.clear()
    busy.run(sites.change, site.id, lambda seen: evolve(seen, limit_in=1), by, busy.now)
    assert busy.run(sites.remove, site.id, by, busy.now)
    for kind in CredentialKind:
        busy.run(held_elements.held_despite_credential, kind, list(JobProtocol))
    after: tuple[int, int] | None = (0, -1)
    while after is not None:
        after = busy.run(held_elements.resume_held, busy.user(), busy.now, 1, [JobProtocol.DUMMY], after).after
    explained.assert_indexed()


def test_a_large_job_is_cancelled_in_parts(busy: Store, explained: Explained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_changes, "CHANGED_AT_ONCE", 100)
    (large,) = [job for job in busy.run(jobs.page, JobFilter(limit=500)) if job.counters.elements > _FILES]
    explained.plans.clear()
    busy.run(job_changes.cancel, large.id, busy.now)
    assert busy.run(job_changes.unfinished_changes) == [large.id]
    assert busy.run(job_changes.continue_change, large.id, busy.now)
    explained.assert_indexed()


def test_listings_that_grow(busy: Store, explained: Explained) -> None:
    busy.submit(busy.user(), JobType.COPY, priority=0)
    for batch in busy.claim(batches=3):
        if batch.type is JobType.LIST:
            busy.run(results.add_elements, "w", token_of(batch), [NewElement(JobType.COPY, "/a", "/b")])
    explained.assert_indexed()


def test_pages(busy: Store, explained: Explained) -> None:
    (large,) = [job for job in busy.run(jobs.page, JobFilter(limit=500)) if job.counters.elements > _FILES]
    explained.plans.clear()
    busy.run(jobs.page, JobFilter(owner_id=large.user_id, limit=10))
    busy.run(jobs.page, JobFilter(owner_id=large.user_id, statuses=[JobStatus.RUNNING], limit=10))
    busy.run(jobs.page_elements, large.id, ElementFilter(limit=100, after=700))
    failed = busy.run(jobs.page_elements, large.id, ElementFilter(statuses=[JobStatus.FAILED], limit=100))
    assert len(failed) == 2
    busy.run(jobs.fetch_element, large.id, 7)
    busy.run(jobs.attempts, large.id, 7)
    assert len(busy.run(leftover_files.leftovers, 10)) == 2
    explained.assert_indexed()


def test_users_who_come_back(busy: Store, explained: Explained) -> None:
    busy.run(held_elements.resume_held, busy.user(), busy.now)
    explained.assert_indexed()


def test_the_plan_of_a_scan_would_be_seen(busy: Store, explained: Explained) -> None:
    def scan(session: Session) -> None:
        session.execute(sa.text("SELECT count(*) FROM job_elements WHERE src_filepath = 'x'"))

    busy.run(scan)
    with pytest.raises(AssertionError, match="job_elements"):
        explained.assert_indexed()


def test_why_jobs_wait_and_the_newest_jobs(busy: Store, explained: Explained) -> None:
    newest = busy.run(jobs.page, JobFilter(owner_id=busy.user("alice"), limit=3, newest_first=True))
    for job in newest:
        explained.plans.clear()
        busy.run(claim_queries.wait_reason, job, busy.now)
        explained.assert_indexed()
    explained.plans.clear()
    busy.run(jobs.page, JobFilter(owner_id=busy.user("alice"), limit=3, newest_first=True, before=newest[-1].id))
    explained.assert_indexed()
    assert "TEMP B-TREE" not in explained.plans[0][1]
    assert "Sort" not in explained.plans[0][1]

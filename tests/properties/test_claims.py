"""Claims and results under crashes at any point, against a model that knows who runs what.

Whatever happens in whatever order: no element is lost, none runs twice with a live token, the counters are what a
recount gives, and a job is final exactly when all its elements are.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import cast

import pytest
import sqlalchemy as sa
from attrs import define, field
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import Batch, ClaimToken, Counters, NewElement
from pdm.workqueue.domain.lifecycle import MOST_CRASHES
from pdm.workqueue.store import (
    claim_limits,
    claim_queries,
    claiming,
    counted_apart,
    held_elements,
    job_changes,
    jobs,
    leases,
    results,
)
from pdm.workqueue.store.records import elements, job_counts
from pdm.workqueue.WorkqueueDB import Base
from tests.store.stores import BROKEN, EXPIRED, LEASE_S, LIST_LANE, WORK_LANE, Store, name_of
from tests.support.records import new_job, verdict

_S = JobStatus
_WORKERS = ("ann", "ben", "cid")
_FAILURES = {_S.FAILED: BROKEN, _S.SUBMITTED: BROKEN, _S.HELD: EXPIRED}
#: Status of a verdict → of its attempt.
_OUTCOMES = {_S.DONE: _S.DONE, _S.CANCELLED: _S.CANCELLED, **dict.fromkeys(_FAILURES, _S.FAILED)}


class CrashError(Exception):
    """The daemon dies before its transaction commits."""


@define
class Known:
    """An element as the model knows it.

    ``worker`` runs its newest attempt, the last ``crashes`` ones were lost; ``ended`` are number, status and worker of
    those that have ended.
    """

    type: JobType
    phase: int
    status: JobStatus = _S.SUBMITTED
    attempts: int = 0
    crashes: int = 0
    worker: str | None = None
    ended: list[tuple[int, JobStatus, str]] = field(factory=list)


class Queue(RuleBasedStateMachine):
    """The real store beside its model."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.users = [store.user("alice"), store.user("bob")]
        self.known: dict[tuple[int, int], Known] = {}
        self.cancelling: set[int] = set()
        self.leases: dict[str, timedelta | None] = {}
        #: All tokens there ever were, with who got them: a daemon may come back with any of them.
        self.tokens: list[tuple[ClaimToken, str]] = []
        self.clock = timedelta()
        for worker in _WORKERS:
            self.register(worker)

    # -- users

    @initialize(types=st.lists(st.sampled_from([JobType.COPY, JobType.REMOVE, JobType.MKDIR]), min_size=2, max_size=5))
    def begin(self, types: list[JobType]) -> None:
        """Some jobs are there, and their listings run and have found something."""
        for number, type_ in enumerate(types):
            self.submit(type_, number % 2, 5)
        self.claim("ann", LIST_LANE, len(types), 1, crash=False)
        for token, worker in self.tokens:
            self._extend(token, worker, 3, phases=True)

    @rule(type_=st.sampled_from(JobType), user=st.integers(0, 1), priority=st.integers(0, 9))
    def submit(self, type_: JobType, user: int, priority: int) -> None:
        job = self.store.run(jobs.submit, new_job(self.users[user], type_, priority=priority), None, self.store.now)
        first = self.store.element(job.id, 0)
        self.known[job.id, 0] = Known(first.type, 0)

    @rule(pick=st.integers(0, 99))
    def cancel(self, pick: int) -> None:
        job_id = self._pick_job(pick)
        if job_id is None or self._is_final(job_id):
            return
        self.store.run(job_changes.cancel, job_id, self.store.now)
        self.cancelling.add(job_id)
        for one in self._of(job_id):
            if one.status in (_S.SUBMITTED, _S.HELD):
                one.status = _S.CANCELLED

    @rule(pick=st.integers(0, 99))
    def retry(self, pick: int) -> None:
        job_id = self._pick_job(pick)
        if job_id is None:
            return
        _, count = self.store.run(job_changes.retry, job_id, self.store.now)
        again = []
        if job_id not in self.cancelling or self._is_final(job_id):
            again = [one for one in self._of(job_id) if one.status in (_S.FAILED, _S.CANCELLED)]
        assert count == len(again)
        for one in again:
            one.status = _S.SUBMITTED
        if again:
            self.cancelling.discard(job_id)

    @rule(user=st.integers(0, 1))
    def resume(self, user: int) -> None:
        self.store.run(held_elements.resume_held, self.users[user], self.store.now)
        for (job_id, _), one in self.known.items():
            if one.status is _S.HELD and self.store.job(job_id).user_id == self.users[user]:
                one.status = _S.SUBMITTED

    # -- daemons

    @rule(worker=st.sampled_from(_WORKERS))
    def register(self, worker: str) -> None:
        """A daemon starts, or starts again: what it ran before goes back."""
        self.store.register(worker)
        self._release(worker)
        self.leases[worker] = self.clock + timedelta(seconds=LEASE_S)

    @rule(
        worker=st.sampled_from(_WORKERS),
        lane=st.sampled_from([LIST_LANE, WORK_LANE, LIST_LANE | WORK_LANE]),
        batches=st.integers(1, 3),
        batch_elements=st.integers(1, 3),
        crash=st.integers(0, 5).map(lambda number: number == 0),
    )
    def claim(self, worker: str, lane: frozenset[JobType], batches: int, batch_elements: int, crash: bool) -> None:
        limits = claim_limits.ClaimLimits(
            elements=batches * batch_elements,
            batches=batches,
            batch_elements=batch_elements,
            batch_bytes=2**30,
            types=lane,
        )
        if crash:
            self._crashing(claiming.claim, worker, limits, self.store.now)
            return
        found = self.store.run(claiming.claim, worker, limits, self.store.now)
        lease = self.leases[worker]
        assert lease is not None or not found
        assert len(found) <= batches
        for batch in found:
            assert len(batch.elements) <= batch_elements
            self._begin(batch, worker, lane)

    def _begin(self, batch: Batch, worker: str, lane: frozenset[JobType]) -> None:
        assert batch.type in lane
        assert set(batch.jobs) == {element.job_id for element in batch.elements}
        assert len({(job.user_id, job.type, job.priority) for job in batch.jobs.values()}) == 1
        for element in batch.elements:
            assert element.job_id not in self.cancelling
            one = self.known[element.job_id, element.id]
            assert one.status is _S.SUBMITTED, "an element is claimed that does not wait"
            assert element.attempts == one.attempts + 1
            assert element.type is one.type is batch.type
            if one.phase:
                others = self._of(element.job_id)
                assert others[0].status is _S.DONE, "a directory goes before all is listed"
                assert all(other.status.is_final for other in others if other.phase < one.phase)
            one.status, one.attempts, one.worker = _S.RUNNING, element.attempts, worker
            self.tokens.append((batch.token(element), worker))

    @rule(
        picks=st.lists(
            st.tuples(
                st.integers(0, 99), st.sampled_from([_S.DONE, _S.DONE, _S.FAILED, _S.CANCELLED, _S.SUBMITTED, _S.HELD])
            ),
            min_size=1,
            max_size=6,
        ),
        pause=st.sampled_from([None, 5, 100]),
        crash=st.integers(0, 5).map(lambda number: number == 0),
        live=st.integers(0, 3).map(bool),
    )
    @precondition(lambda self: self.tokens)
    def settle(self, picks: list[tuple[int, JobStatus]], pause: int | None, crash: bool, live: bool) -> None:
        """Results of one daemon: of what it runs, and of what it believes to run."""
        chosen: dict[ClaimToken, JobStatus] = {}
        worker = None
        # Mostly what runs: old tokens are many, and all of them lost.
        tokens = [one for one in self.tokens if not live or self._is_live(*one)] or self.tokens
        for pick, status in picks:
            token, owner = tokens[pick % len(tokens)]
            if worker in (None, owner):
                worker = owner
                chosen[token] = status
        assert worker is not None
        later = self.store.now + timedelta(seconds=pause) if pause else None
        verdicts = [
            verdict(token, status, not_before=later if status is _S.SUBMITTED else None, failure=_FAILURES.get(status))
            for token, status in chosen.items()
        ]
        if crash:
            self._crashing(results.settle, worker, verdicts, self.store.now, may_count_apart=True)
            return
        settled = self.store.run(results.settle, worker, verdicts, self.store.now, may_count_apart=True)
        lost, repeated = set(), set()
        before = {token.job_id: self._is_final(token.job_id) for token in chosen}
        for token, status in chosen.items():
            if not self._is_live(token, worker):
                lost.add(token)
                if (token.attempt, _OUTCOMES[status], worker) in self.known[token.job_id, token.element_id].ended:
                    repeated.add(token)
                continue
            one = self.known[token.job_id, token.element_id]
            one.worker = None
            one.ended.append((token.attempt, _OUTCOMES[status], worker))
            one.status = status
            one.crashes = 0
            if token.job_id in self.cancelling and status in (_S.SUBMITTED, _S.HELD):
                one.status = _S.CANCELLED
            if one.type is JobType.LIST and one.status in (_S.FAILED, _S.CANCELLED):
                for other in self._of(token.job_id):
                    if other.phase and other.status is _S.SUBMITTED:
                        other.status = _S.CANCELLED
        assert set(settled.lost) == lost
        # The model has no times: those of a lost daemon's attempt may differ.
        assert settled.repeated <= repeated
        assert {token for token in repeated if chosen[token] is _S.DONE} <= settled.repeated
        apart = self._counted_apart()
        ended = {job_id for job_id, was_final in before.items() if self._is_final(job_id) and not was_final}
        assert {job.id for job in settled.finished} == ended - apart.keys()

    @rule()
    def add_up(self) -> None:
        """Results that were stored without the lock of their job are counted in its row."""
        pending = self._counted_apart()
        added = self.store.run(counted_apart.add_up, self.store.now)
        assert {job.id for job in added.finished} == {job_id for job_id in pending if self._is_final(job_id)}
        assert not self._counted_apart()

    @rule(pick=st.integers(0, 99), count=st.integers(0, 4), phases=st.booleans(), crash=st.booleans())
    def extend(self, pick: int, count: int, phases: bool, crash: bool) -> None:
        listings = [(token, owner) for token, owner in self.tokens if token.element_id == 0]
        if not listings:
            return
        token, worker = listings[-1 - pick % len(listings)]
        if self.store.job(token.job_id).type in (JobType.COPY, JobType.REMOVE):
            self._extend(token, worker, count, phases=phases, crash=crash)

    def _extend(self, token: ClaimToken, worker: str, count: int, *, phases: bool, crash: bool = False) -> None:
        type_ = self.store.job(token.job_id).type
        number = len(self._of(token.job_id))
        new = [
            NewElement(type_, f"/src/{number + n}", phase=n if phases and type_ is JobType.REMOVE else 0)
            for n in range(count)
        ]
        if crash:
            self._crashing(results.add_elements, worker, token, new)
            return
        grown = self.store.run(results.add_elements, worker, token, new)
        assert grown == (self._is_live(token, worker) and token.job_id not in self.cancelling)
        if grown:
            for offset, element in enumerate(new):
                self.known[token.job_id, number + offset] = Known(type_, element.phase)

    # -- time

    @rule(seconds=st.sampled_from([1, 20, 50]))
    def wait(self, seconds: int) -> None:
        self.store.pass_time(seconds)
        self.clock += timedelta(seconds=seconds)

    @rule(worker=st.sampled_from(_WORKERS))
    def renew(self, worker: str) -> None:
        renewal = self.store.run(leases.renew, worker, self.store.now, LEASE_S)
        assert renewal.lost == (self.leases[worker] is None)
        if renewal.lost:
            return
        self.leases[worker] = self.clock + timedelta(seconds=LEASE_S)
        assert renewal.cancelled_jobs == {
            job_id for (job_id, _), one in self.known.items() if one.worker == worker and job_id in self.cancelling
        }

    @rule()
    def release_expired(self) -> None:
        expired = {worker for worker, until in self.leases.items() if until is not None and until <= self.clock}
        count = self.store.run(leases.release_expired, self.store.now)
        assert count == sum(self._release(worker) for worker in expired)
        for worker in expired:
            self.leases[worker] = None

    # -- what always holds

    @invariant()
    def store_and_model_agree(self) -> None:
        rows = self.store.run(
            lambda session: session.execute(
                sa.select(elements.c.job_id, elements.c.id, elements.c.status, elements.c.attempts)
            ).all()
        )
        assert {(row.job_id, row.id): (row.status, row.attempts) for row in rows} == {
            key: (one.status, one.attempts) for key, one in self.known.items()
        }

    @invariant()
    def counters_and_status_follow_from_the_elements(self) -> None:
        apart = self._counted_apart()
        for job_id in {job_id for job_id, _ in self.known}:
            record, statuses = self.store.job(job_id), [one.status for one in self._of(job_id)]
            later = apart.get(job_id, 0)
            assert record.counters == Counters(
                len(statuses),
                statuses.count(_S.SUBMITTED),
                statuses.count(_S.RUNNING) + later,
                statuses.count(_S.DONE) - later,
                *(statuses.count(status) for status in (_S.FAILED, _S.CANCELLED, _S.HELD)),
            )
            assert record.status.is_final == (not later and all(status.is_final for status in statuses))
            assert (record.finished_at is not None) == record.status.is_final
            assert (record.status is _S.DONE) == (not later and set(statuses) == {_S.DONE})

    @rule(pick=st.integers(0, 99))
    def ended_attempts_are_kept(self, pick: int) -> None:
        job_id = self._pick_job(pick)
        if job_id is not None:
            self._check_attempts(job_id)

    def _check_attempts(self, job_id: int) -> None:
        for number, one in enumerate(self._of(job_id)):
            found = self.store.run(jobs.attempts, job_id, number)
            assert [(each.attempt, each.status, each.worker) for each in found] == [
                (attempt, status, name_of(worker)) for attempt, status, worker in one.ended
            ]

    def teardown(self) -> None:
        """Left alone, everything comes to its end: nothing was lost."""
        for job_id in {job_id for job_id, _ in self.known}:
            self._check_attempts(job_id)
        self.add_up()
        self.store.pass_time(1000)
        self.store.run(leases.release_expired, self.store.now)
        # What a daemon's end has cost for the third time waits a little.
        self.store.pass_time(1000)
        self.store.worker("last")
        for user in self.users:
            self.store.run(held_elements.resume_held, user, self.store.now)
        while found := self.store.claim("last", batches=50):
            self.store.settle([verdict(batch.token(element)) for batch in found for element in batch.elements], "last")
        assert self.store.run(claim_queries.next_due, self.store.now) is None
        for job_id in {job_id for job_id, _ in self.known}:
            record = self.store.job(job_id)
            assert record.status.is_final, f"job {job_id} never ends: {record}"
            assert record.counters == self.store.recount(job_id)

    # -- helpers

    def _counted_apart(self) -> dict[int, int]:
        """Elements of each job that are DONE, and that its row counts as RUNNING."""
        statement = sa.select(job_counts.c.job_id, sa.func.sum(job_counts.c.done)).group_by(job_counts.c.job_id)
        return self.store.run(lambda session: {number: int(done) for number, done in session.execute(statement)})

    def _crashing(self, function: Callable[..., object], *args: object, **more: object) -> None:
        """The daemon dies when all is written and nothing committed."""

        def die(session: object) -> None:
            function(session, *args, **more)
            raise CrashError

        with pytest.raises(CrashError):
            self.store.run(die)

    def _release(self, worker: str) -> int:
        count = 0
        for (job_id, _), one in self.known.items():
            if one.worker == worker:
                count += 1
                one.ended.append((one.attempts, _S.FAILED, worker))
                one.worker = None
                one.crashes += 1
                one.status = _S.CANCELLED if job_id in self.cancelling else _S.SUBMITTED
                if one.crashes == MOST_CRASHES:
                    one.status = _S.FAILED
        return count

    def _is_live(self, token: ClaimToken, worker: str) -> bool:
        one = self.known[token.job_id, token.element_id]
        return one.status is _S.RUNNING and one.worker == worker and one.attempts == token.attempt

    def _of(self, job_id: int) -> list[Known]:
        return [self.known[key] for key in sorted(self.known) if key[0] == job_id]

    def _is_final(self, job_id: int) -> bool:
        return all(one.status.is_final for one in self._of(job_id))

    def _pick_job(self, pick: int) -> int | None:
        numbers = sorted({job_id for job_id, _ in self.known})
        return numbers[pick % len(numbers)] if numbers else None


_EXAMPLES = {"sqlite": 25, "postgresql": 6}


@pytest.mark.timeout(180)
def test_nothing_is_lost_and_nothing_runs_twice(engine: sa.Engine, database_kind: str) -> None:
    def fresh() -> Queue:
        store = Store(engine)
        store.run(lambda session: [session.execute(sa.delete(table)) for table in reversed(_TABLES)])
        return Queue(store)

    run_state_machine_as_test(
        cast(type[RuleBasedStateMachine], fresh),
        settings=settings(
            max_examples=_EXAMPLES[database_kind],
            stateful_step_count=40,
            deadline=None,
            database=None,
            # The phase that explains a failure takes minutes.
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )


_TABLES = Base.metadata.sorted_tables

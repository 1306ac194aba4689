"""A migrated database of either kind, and short words for what tests do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from attrs import define
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch, ClaimToken, Counters, ElementRecord, JobRecord, NewElement, Verdict
from pdm.workqueue.store import claiming, events, jobs, leases, results, users
from pdm.workqueue.store.claim_limits import ClaimLimits
from pdm.workqueue.store.jobs import ElementFilter
from pdm.workqueue.store.records import elements, workers
from tests.support.records import NOW, new_job, verdict

P = ParamSpec("P")
R = TypeVar("R")

START = NOW
LIST_LANE = frozenset({JobType.LIST})
WORK_LANE = frozenset(JobType) - LIST_LANE
LEASE_S = 60.0

BROKEN = AttemptFailure(FailureScope.SOURCE, FailureCode.CONNECTION, "connection reset")
MISSING = AttemptFailure(FailureScope.SOURCE, FailureCode.NOT_FOUND, "no such file")
EXPIRED = AttemptFailure(FailureScope.SERVICE, FailureCode.CREDENTIAL_EXPIRED, "proxy expired")


@define
class Store:
    """Functions of the store, each in a transaction of its own; and a clock that tests move."""

    engine: sa.Engine
    now: datetime = START

    def run(self, function: Callable[Concatenate[Session, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        with Session(self.engine, autoflush=False) as session, session.begin():
            result = function(session, *args, **kwargs)
            events.write_noted(session)
            return result

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        if self.engine.dialect.name == "postgresql":
            # Leases are measured by the clock of the database, which no test can move.
            earlier = workers.c.lease_until - sa.literal(timedelta(seconds=seconds), sa.Interval())
            with self.engine.begin() as connection:
                connection.execute(sa.update(workers).values(lease_until=earlier))

    def user(self, name: str = "alice") -> int:
        return self.run(users.register, f"/DC=test/CN={name}", "user", self.now).id

    def worker(self, incarnation: str = "w") -> str:
        self.register(incarnation)
        return incarnation

    def register(self, incarnation: str = "w") -> leases.Registration:
        return self.run(leases.register_worker, identity(incarnation), self.now, LEASE_S)

    def submit(self, user: int, type_: JobType = JobType.MKDIR, **changes: Any) -> JobRecord:
        return self.run(jobs.submit, new_job(user, type_, **changes), None, self.now)

    def job(self, job_id: int) -> JobRecord:
        found = self.run(jobs.fetch, job_id, None)
        assert found is not None
        return found

    def element(self, job_id: int, number: int) -> ElementRecord:
        found = self.run(jobs.fetch_element, job_id, number)
        assert found is not None
        return found

    def elements(self, job_id: int, **wanted: Any) -> list[ElementRecord]:
        return self.run(jobs.page_elements, job_id, ElementFilter(**wanted))

    def claim(
        self,
        worker: str = "w",
        batches: int = 10,
        batch_elements: int = 100,
        batch_bytes: int = 2**40,
        **limits: Any,
    ) -> list[Batch]:
        whole = ClaimLimits(
            elements=limits.pop("elements", batches * batch_elements),
            batches=batches,
            batch_elements=batch_elements,
            batch_bytes=batch_bytes,
            **limits,
        )
        return self.run(claiming.claim, worker, whole, self.now)

    def settle(self, verdicts: Iterable[Verdict], worker: str = "w") -> results.SettleOutcome:
        return self.run(results.settle, worker, list(verdicts), self.now)

    def copy_job(self, user: int, files: Sequence[NewElement | int], worker: str = "w", **changes: Any) -> JobRecord:
        """A COPY job whose listing is done: one element for each file, given as element or as size."""
        return self._listed(user, JobType.COPY, files, worker, changes)

    def remove_job(self, user: int, files: Sequence[NewElement | int], worker: str = "w", **changes: Any) -> JobRecord:
        return self._listed(user, JobType.REMOVE, files, worker, changes)

    def _listed(
        self, user: int, type_: JobType, files: Sequence[NewElement | int], worker: str, changes: dict[str, Any]
    ) -> JobRecord:
        job = self.submit(user, type_, **changes)
        (batch,) = [one for one in self.claim(worker, types=LIST_LANE) if one.job.id == job.id]
        assert self.run(
            results.add_elements, worker, token_of(batch), [as_element(type_, n, f) for n, f in enumerate(files)]
        )
        self.settle(done(batch), worker)
        return self.job(job.id)

    def recount(self, job_id: int) -> Counters:
        """The counters, from the elements themselves."""

        def count(session: Session) -> dict[JobStatus, int]:
            statement = (
                sa.select(elements.c.status, sa.func.count())
                .where(elements.c.job_id == job_id)
                .group_by(elements.c.status)
            )
            return dict(iter(session.execute(statement)))

        found = self.run(count)
        return Counters(
            sum(found.values()),
            *(found.get(status, 0) for status in (JobStatus.SUBMITTED, JobStatus.RUNNING, JobStatus.DONE)),
            *(found.get(status, 0) for status in (JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.HELD)),
        )


def name_of(incarnation: str = "w") -> str:
    """The worker's name: another text than its incarnation, so that a statement that takes one for the other fails."""
    return f"worker {incarnation}"


def identity(incarnation: str = "w") -> leases.WorkerIdentity:
    return leases.WorkerIdentity(name_of(incarnation), incarnation)


def as_element(type_: JobType, number: int, given: NewElement | int) -> NewElement:
    if isinstance(given, NewElement):
        return given
    destination = f"/dst/{number}" if type_ is JobType.COPY else None
    return NewElement(type_, f"/src/{number}", destination, size=given)


def token_of(batch: Batch, index: int = 0) -> ClaimToken:
    return batch.token(batch.elements[index])


def done(*batches: Batch) -> list[Verdict]:
    return [verdict(batch.token(element), transferred=element.size) for batch in batches for element in batch.elements]


def ended(status: JobStatus, *batches: Batch, **more: Any) -> list[Verdict]:
    return [verdict(batch.token(element), status, **more) for batch in batches for element in batch.elements]

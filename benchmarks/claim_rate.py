"""Claims with many elements queued against claims with few: the store's own functions on two SQLite files.

Each cycle claims some batches in one transaction (that is what is timed), settles them as DONE and adds as many
elements to the same jobs, so that as many are queued as before. Cycles of the two files alternate.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from attrs import define, field
from figures import BenchmarkError, ratios, spread
from meter import memory_mib
from rig import directory_for_all, file_system, options_of, report, run
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.jobs import ClaimToken, NewElement, NewJob, Verdict
from pdm.workqueue.store import claim_limits, claiming, jobs, leases, results, schema_revisions, users
from pdm.workqueue.store.engines import create_sqlite_file, make_engines

_WORKER = "benchmark"
_IDENTITY = leases.WorkerIdentity(_WORKER, _WORKER)
_LEASE_S = 86_400.0
_BATCHES, _BATCH_ELEMENTS = 4, 50
_ADDED_AT_ONCE = 1000


def _extend(token: ClaimToken, new: Sequence[NewElement], session: Session) -> bool:
    return results.add_elements(session, _WORKER, token, new)


def _now() -> datetime:
    return datetime.now(UTC)


@define
class Queue:
    """A database with elements that wait.

    Attributes:
        engine: of the file.
        listings: job → the right to add elements to it.
        seconds: of each claim.
        settle_seconds: of each settlement.
    """

    engine: sa.Engine
    listings: dict[int, ClaimToken] = field(factory=dict)
    seconds: list[float] = field(factory=list)
    settle_seconds: list[float] = field(factory=list)

    @classmethod
    def make(cls, path: Path, elements: int, job_count: int) -> Queue:
        """A file with so many elements queued, in as many jobs of one user."""
        queue = cls(make_engines(f"sqlite:///{path}", 4).writer)
        create_sqlite_file(queue.engine)
        queue.transact(lambda session: schema_revisions.migrate(session.connection()))
        user = queue.transact(lambda session: users.register(session, "/DC=bench/CN=user", "user", _now())).id
        queue.transact(lambda session: leases.register_worker(session, _IDENTITY, _now(), _LEASE_S))
        for _ in range(job_count):
            queue.transact(lambda session: jobs.submit(session, _new_job(user), None, _now()))
        lanes = claim_limits.ClaimLimits(
            elements=job_count, batches=job_count, batch_elements=1, batch_bytes=1, types=frozenset({JobType.LIST})
        )
        for batch in queue.transact(lambda session: claiming.claim(session, _WORKER, lanes, _now())):
            queue.listings[batch.job.id] = batch.token(batch.elements[0])
        for job_id in queue.listings:
            queue.add(job_id, elements // job_count)
        return queue

    def transact(self, function: Callable[[Session], Any]) -> Any:
        with Session(self.engine, autoflush=False, expire_on_commit=False) as session, session.begin():
            return function(session)

    def add(self, job_id: int, count: int) -> None:
        """Add elements to a job."""
        for first in range(0, count, _ADDED_AT_ONCE):
            new = list(_new_elements(min(_ADDED_AT_ONCE, count - first)))
            self.transact(partial(_extend, self.listings[job_id], new))

    def cycle(self) -> None:
        """Claim, settle, add."""
        most = _BATCHES * _BATCH_ELEMENTS
        limits = claim_limits.ClaimLimits(
            elements=most,
            batches=_BATCHES,
            batch_elements=_BATCH_ELEMENTS,
            batch_bytes=2**40,
            types=frozenset(JobType) - {JobType.LIST},
        )
        began = time.perf_counter()
        batches = self.transact(lambda session: claiming.claim(session, _WORKER, limits, _now()))
        self.seconds.append(time.perf_counter() - began)
        taken = sum(len(batch.elements) for batch in batches)
        if taken != most:
            raise BenchmarkError(f"{taken} elements were claimed instead of {most}")
        now = _now()
        verdicts = [
            Verdict(batch.token(element), JobStatus.DONE, now, now) for batch in batches for element in batch.elements
        ]
        began = time.perf_counter()
        settled = self.transact(lambda session: results.settle(session, _WORKER, verdicts, now))
        self.settle_seconds.append(time.perf_counter() - began)
        if settled.lost:
            raise BenchmarkError(f"{len(settled.lost)} claims were lost")
        for batch in batches:
            self.add(batch.job.id, len(batch.elements))


def _new_job(user: int) -> NewJob:
    return NewJob(
        user_id=user, type=JobType.COPY, protocol=JobProtocol.DUMMY, src_siteid=1, src_filepath="/src", dst_siteid=2,
        dst_filepath="/dst", options={}, priority=5, max_tries=2, label=None, log_uid="0" * 32,
        first=NewElement(JobType.LIST, "/src"),
    )  # fmt: skip


def _new_elements(count: int) -> Iterator[NewElement]:
    for number in range(count):
        yield NewElement(JobType.COPY, f"/src/directory/f{number:07d}", f"/dst/directory/f{number:07d}", size=1024)


def main() -> None:
    options = options_of(
        __doc__ or "", many=(1_000_000, 100_000), few=(1_000, 1_000), jobs=(10, 10), cycles=(20, 8), rounds=(9, 3)
    )
    with directory_for_all("pdm-bench-") as directory:
        began = time.perf_counter()
        many = Queue.make(directory / "many.sqlite", options.many, options.jobs)
        filled_s = time.perf_counter() - began
        print(f"  . {options.many} elements in {filled_s:.1f} s", file=sys.stderr)
        few = Queue.make(directory / "few.sqlite", options.few, options.jobs)
        for queue in (many, few):
            queue.cycle()
            queue.seconds.clear()
            queue.settle_seconds.clear()
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.rounds):
            for _ in range(options.cycles):
                many.cycle()
                few.cycle()
            for queue, into in zip((many, few), rates, strict=True):
                into.append(1 / statistics.median(queue.seconds[-options.cycles :]))
        elements = _BATCHES * _BATCH_ELEMENTS
        figures = {
            "unit": f"claims/s of {elements} elements",
            "ratio": ratios(*rates),
            "ours": spread(rates[0]),
            "bare": spread(rates[1]),
            "bare is": f"the same with {options.few} elements queued",
            "elements claimed/s": spread([rate * elements for rate in rates[0]]),
            "settlements/s, many": 1 / statistics.median(many.settle_seconds),
            "settlements/s, few": 1 / statistics.median(few.settle_seconds),
            "elements added/s": options.many / filled_s,
            "database on": file_system(directory),
            "database (MiB)": sum(file.stat().st_size for file in directory.glob("many*")) / 1024**2,
            "peak MiB": {"client": memory_mib(os.getpid(), "VmHWM")},
        }
        for queue in (many, few):
            queue.engine.dispose()
    report(options, figures)


if __name__ == "__main__":
    run(main)
